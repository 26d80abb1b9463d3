//! Images that share engines with others: those whose clients have left, and those with a higher priority.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::{MIB, under_attack};
use crate::process::{Server, connect, data, exchange};

const INFER: &str = "/v2/models/nf_regnet_cifar10/infer";

/// A photograph that takes long to decode if `side` is large.
fn png(side: u32) -> Vec<u8> {
    let image = image::RgbImage::from_fn(side, side, |x, _| image::Rgb([(x % 251) as u8, 7, 9]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn send(server: &Server, body: &[u8]) -> TcpStream {
    let mut stream = connect(server.http).unwrap();
    write!(
        stream,
        "POST /v1/classify HTTP/1.1\r\nhost: t\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    )
    .unwrap();
    stream.write_all(body).unwrap();
    stream
}

fn status(mut stream: TcpStream) -> String {
    let mut head = [0; 12];
    stream.read_exact(&mut head).map(|()| String::from_utf8_lossy(&head[9..]).into_owned()).unwrap_or_default()
}

/// Version 0.1 answered 504 after ten seconds: the thread that had decoded the first found the second gone and slept.
#[test]
fn an_image_does_not_wait_for_one_whose_client_left() {
    let (large, small) = (png(1500), png(8));
    for flags in [
        &["--workers", "1", "--elastic-threads", "0"][..],
        &["--workers", "2"],
        &["--workers", "1", "--max-queue-delay", "20ms"],
        &["--workers", "2", "--max-queue-delay", "20ms"],
        &["--workers", "1", "--decoders", "1"],
    ] {
        let server = Server::start(&[flags, &["--max-queue-wait", "60s", "--request-timeout", "60s"]].concat());
        let alone = Instant::now();
        assert_eq!(status(send(&server, &large)), "200");
        let alone = alone.elapsed();
        for pause in [alone / 4, alone / 2, alone * 3 / 4] {
            let (answers, cost) = under_attack(&server, || {
                let started = Instant::now();
                let waits = [send(&server, &large), send(&server, &large)];
                let leaves = [send(&server, &small), send(&server, &small), send(&server, &large)];
                std::thread::sleep(pause);
                drop(leaves);
                (waits.map(status), started.elapsed())
            });
            assert_eq!(answers.0, ["200", "200"], "{flags:?}");
            assert!(answers.1 < alone * 8 + Duration::from_secs(8), "{flags:?}: {answers:?}, alone {alone:?}");
            assert_eq!(cost.failed, 0, "{cost:?}");
        }
    }
}

/// An image in the Open Inference Protocol, with a priority.
fn ranked(priority: u32, cat: &str) -> Vec<u8> {
    let input = serde_json::json!({ "name": "input", "datatype": "BYTES", "shape": [1], "data": [cat] });
    serde_json::json!({ "inputs": [input], "parameters": { "priority": priority } }).to_string().into_bytes()
}

/// A constant flood with priority 1: requests with priority 50 and without one still get their share.
#[test]
fn a_crowd_that_pushes_ahead_leaves_the_others_their_share() {
    use base64::Engine as _;
    const CROWD: usize = 24;
    let server = Server::start(&[
        "--workers",
        "1",
        "--elastic-threads",
        "0",
        "--max-queue-wait",
        "60s",
        "--standing-wait",
        "60s",
    ]);
    let cat = base64::engine::general_purpose::STANDARD.encode(data("cat.jpg"));
    let (over, answers) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (served, cost) = under_attack(&server, || {
        std::thread::scope(|scope| {
            let client = |priority: u32, counted: bool| {
                let (server, body, over, answers) = (&server, ranked(priority, &cat), &over, &answers);
                move || {
                    let (mut kept, mut served, mut slowest) = (connect(server.http).unwrap(), 0, Duration::ZERO);
                    while !over.load(Ordering::Relaxed) {
                        let asked = Instant::now();
                        let headers = [("content-type", "application/json")];
                        let answer = exchange(&mut kept, "POST", INFER, &headers, &body).unwrap();
                        assert!(matches!(answer.status, 200 | 429), "{}: {}", answer.status, answer.body);
                        served += usize::from(answer.status == 200);
                        slowest = slowest.max(asked.elapsed());
                    }
                    if counted {
                        answers.fetch_add(served, Ordering::Relaxed);
                    }
                    (priority, served, slowest)
                }
            };
            let crowd: Vec<_> = (0..CROWD).map(|_| scope.spawn(client(1, true))).collect();
            let others: Vec<_> = [50, 99, 0, 1000].map(|priority| scope.spawn(client(priority, false))).into();
            std::thread::sleep(Duration::from_secs(6));
            over.store(true, Ordering::Relaxed);
            for thread in crowd {
                thread.join().unwrap();
            }
            others.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        })
    });
    let crowd = answers.into_inner();
    println!("{crowd} of the crowd, of others (priority, answers, slowest): {served:?}, {cost:?}");
    assert!(crowd > 50, "{crowd}: it was no crowd");
    for (priority, served, slowest) in served {
        // alone among 24, each would have one in 25
        let least = if priority == 1000 { crowd / 200 } else { crowd / 50 };
        assert!(
            served >= least.max(1),
            "priority {priority}: {served} answers beside {crowd}, the slowest after {slowest:?}"
        );
    }
    assert!(cost.failed == 0 && cost.growth < 64 * MIB, "{cost:?}");
}
