//! Images that share engines with others: those whose clients left, and those whose clients push ahead.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::under_attack;
use crate::process::{Server, connect};

/// A photograph that takes a while to decode, and one that takes none.
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
