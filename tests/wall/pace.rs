//! Hundreds of clients that retry at once after a refusal: clients that are answered don't pay for them.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::calls::{INFER, STREAM, frame as message, ld, open};
use super::{MIB, metric, under_attack};
use crate::process::{Server, connect, data, exchange};

/// Many more clients than an engine can answer, each of which retries at once, whatever `retry-after` says.
fn crowd(server: &Server, clients: usize, time: Duration) -> (usize, usize, Duration) {
    let (over, answered, refused) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let (cat, http) = (&data("cat.jpg"), server.http);
    let mut slowest = Duration::ZERO;
    std::thread::scope(|scope| {
        let client = || {
            let mut kept = connect(http).unwrap();
            let mut slowest = Duration::ZERO;
            while !over.load(Ordering::Relaxed) {
                let asked = Instant::now();
                let answer = exchange(&mut kept, "POST", "/v1/classify", &[], cat).unwrap();
                match answer.status {
                    200 => answered.fetch_add(1, Ordering::Relaxed),
                    429 => {
                        assert!(answer.header("retry-after").is_some());
                        slowest = slowest.max(asked.elapsed());
                        refused.fetch_add(1, Ordering::Relaxed)
                    }
                    other => panic!("{other}: {}", answer.body),
                };
            }
            slowest
        };
        let clients: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        std::thread::sleep(time);
        over.store(true, Ordering::Relaxed);
        for client in clients {
            slowest = slowest.max(client.join().unwrap());
        }
    });
    (answered.into_inner(), refused.into_inner(), slowest)
}

#[test]
fn who_comes_straight_back_waits_a_moment() {
    const CLIENTS: usize = 200;
    const TIME: Duration = Duration::from_secs(4);
    // a queue of four: nearly everybody is refused
    let server = Server::start(&["--workers", "1", "--elastic-threads", "0", "--queue-limit", "4"]);
    let ((answered, refused, slowest), cost) = under_attack(&server, || crowd(&server, CLIENTS, TIME));
    println!("{answered} answered, {refused} refused, the slowest after {slowest:?}; {cost:?}");
    assert!(answered > 20, "{answered}");
    // the first refusal of each is sent at once, then 200 per second
    let most = CLIENTS + 200 * (TIME.as_secs() as usize + 2);
    assert!((CLIENTS..most).contains(&refused), "{refused} refused, of {most}");
    assert!(slowest < Duration::from_secs(5), "{slowest:?}: held for a second at most, on a busy machine");
    assert!(cost.growth < 64 * MIB, "{cost:?}");
    assert_eq!(cost.failed, 0, "{cost:?}");
    crate::fakes::eventually("nothing is held", || metric(server.admin, "nfold_held_refusals") == 0);
}

/// More clients than can wait in line, 48 of 64 connections: the rest are held for a tenth of a second, not refused at once.
#[test]
fn who_finds_the_line_full_waits_a_moment_too() {
    const CLIENTS: usize = 60;
    const TIME: Duration = Duration::from_secs(4);
    let flags = ["--workers", "1", "--elastic-threads", "0", "--queue-limit", "1", "--connections", "64"];
    let server = Server::start(&flags);
    let (answered, refused, slowest) = crowd(&server, CLIENTS, TIME);
    println!("{answered} answered, {refused} refused, the slowest after {slowest:?}");
    // 200 a second in line, and 10 a second of each of the others
    let most = CLIENTS + (200 + 10 * (CLIENTS - 48)) * (TIME.as_secs() as usize + 2);
    assert!(refused < most && answered > 20, "{answered} answered, {refused} refused, of {most}");
}

/// Cheap requests in between do not reset a client's refusals.
#[test]
fn other_requests_between_do_not_help() {
    let server = Server::start(&["--workers", "1", "--elastic-threads", "0", "--queue-limit", "4"]);
    let (over, cat) = (AtomicBool::new(false), &data("cat.jpg"));
    let (refused, http) = (AtomicUsize::new(0), server.http);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                let mut kept = connect(http).unwrap();
                while !over.load(Ordering::Relaxed) {
                    let status = exchange(&mut kept, "POST", "/v1/classify", &[], cat).unwrap().status;
                    refused.fetch_add(usize::from(status == 429), Ordering::Relaxed);
                    assert_eq!(exchange(&mut kept, "GET", "/nothing", &[], &[]).unwrap().status, 404);
                }
            });
        }
        std::thread::sleep(Duration::from_secs(3));
        over.store(true, Ordering::Relaxed);
    });
    // answered now and then, some clients have several first refusals
    let refused = refused.into_inner();
    assert!((16..=200 * 5).contains(&refused), "{refused}");
}

/// Refusals that are held at shutdown: nobody sends another request on a connection that is being closed.
#[test]
fn the_end_of_a_hold_loses_no_request() {
    let server = Server::start(&["--workers", "1", "--elastic-threads", "0", "--queue-limit", "4"]);
    let (http, cat) = (server.http, &data("cat.jpg"));
    let lost = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| {
                let mut kept = connect(http).unwrap();
                loop {
                    match exchange(&mut kept, "POST", "/v1/classify", &[], cat) {
                        Ok(answer) if answer.header("connection") == Some("close") => break,
                        Ok(_) => {}
                        Err(_) => {
                            lost.fetch_add(1, Ordering::Relaxed);
                            break;
                        }
                    }
                }
            });
        }
        std::thread::sleep(Duration::from_secs(2));
        server.signal("-TERM");
    });
    assert_eq!(lost.into_inner(), 0, "requests without an answer");
    assert!(server.wait().success());
}

/// A gRPC request body: an encoded image for the demo model.
fn call_of(cat: &[u8]) -> Vec<u8> {
    let input = [ld(1, b"input"), ld(2, b"BYTES"), ld(3, &[1])].concat();
    let raw = [&(cat.len() as u32).to_le_bytes()[..], cat].concat();
    message(&[ld(1, b"nf_regnet_cifar10"), ld(5, &input), ld(7, &raw)].concat())
}

/// As over HTTP: a connection that is refused and retries at once waits in the queue, with calls and with messages of a
/// stream.
#[test]
fn calls_and_messages_of_streams_wait_as_well() {
    const CLIENTS: usize = 48;
    const TIME: Duration = Duration::from_secs(4);
    let server = Server::start(&["--workers", "1", "--elastic-threads", "0", "--queue-limit", "4"]);
    let call = call_of(&data("cat.jpg"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    for streamed in [false, true] {
        let ((answered, refused), cost) = under_attack(&server, || {
            runtime.block_on(async {
                let clients: Vec<_> = (0..CLIENTS)
                    .map(|_| {
                        let (to, call) = (server.grpc, Bytes::from(call.clone()));
                        tokio::spawn(async move {
                            let until = Instant::now() + TIME;
                            if streamed { messages(to, call, until).await } else { calls(to, call, until).await }
                        })
                    })
                    .collect();
                let mut sum = (0, 0);
                for client in clients {
                    let (answered, refused) = client.await.unwrap();
                    sum = (sum.0 + answered, sum.1 + refused);
                }
                sum
            })
        });
        println!("streams {streamed}: {answered} answered, {refused} refused; {cost:?}");
        assert!(answered > 20, "{answered}");
        // besides those in the queue, the first refusal after each answer
        let most = CLIENTS + answered + 200 * (TIME.as_secs() as usize + 2);
        assert!((CLIENTS / 2..most).contains(&refused), "streams {streamed}: {refused} refused, of {most}");
        assert!(cost.failed == 0 && cost.growth < 64 * MIB, "{cost:?}");
    }
    crate::fakes::eventually("nothing is held", || metric(server.admin, "nfold_held_refusals") == 0);
}

/// Sends calls one after the other on a connection; returns how many are answered, and refused.
async fn calls(to: SocketAddr, call: Bytes, until: Instant) -> (usize, usize) {
    let stream = tokio::net::TcpStream::connect(to).await.unwrap();
    let (mut requests, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let (mut answered, mut refused) = (0, 0);
    while Instant::now() < until {
        let request = hyper::Request::post(format!("http://localhost{INFER}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        let response = requests.send_request(request.body(Full::new(call.clone())).unwrap()).await.unwrap();
        match response.headers().get("grpc-status").map(|status| status.to_str().unwrap()) {
            None => answered += 1,
            Some("8") => refused += 1,
            other => panic!("{other:?}: {response:?}"),
        }
        response.into_body().collect().await.unwrap();
    }
    (answered, refused)
}

/// The same in a stream.
async fn messages(to: SocketAddr, message: Bytes, until: Instant) -> (usize, usize) {
    let mut stream = open(to, STREAM, &[]).await;
    let (mut answered, mut refused) = (0, 0);
    while Instant::now() < until {
        assert!(stream.send(message.clone()).await);
        let answer = stream.next().await.expect("an answer for each message");
        // `error_message` is field 1
        if answer.first() == Some(&(1 << 3 | 2)) {
            assert!(String::from_utf8_lossy(&answer).contains("try again"), "{:?}", String::from_utf8_lossy(&answer));
            refused += 1;
        } else {
            answered += 1;
        }
    }
    (answered, refused)
}
