//! gRPC streams: a message's memory is released when it is answered, every message that was read is answered or refused
//! with a status, and a server that stops ends its streams after their last response.

use std::time::{Duration, Instant};

use nfold::metrics::{Outcome, Protocol};
use nfold::server::{Control, Options};

use super::calls::{Call, Ended, INFER, STREAM, call, flagged, frame, gzip, gzipped, ld, open};
use crate::fakes::{SIDE, eventually, images, options};
use crate::serve::{TestServer, ask, local, receive, start};

const LEN: usize = 3 * SIDE * SIDE;

/// A tensor of one image, with `extra` bytes of an unknown field.
pub fn message(extra: usize) -> Vec<u8> {
    let values: Vec<u8> = (0..LEN).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let shape = [1, 3, SIDE as u8, SIDE as u8];
    let tensor = [ld(1, b"input"), ld(2, b"FP32"), ld(3, &shape)].concat();
    [ld(1, b"m"), ld(5, &tensor), ld(7, &values), ld(15, &vec![b'x'; extra])].concat()
}

pub fn run<T>(talk: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(talk)
}

pub async fn stream(server: &TestServer, headers: &[(&str, &str)]) -> Call {
    open(server.grpc, STREAM, headers).await
}

/// The errors of a response; empty if it has none.
pub fn error_of(answer: &[u8]) -> String {
    use prost::Message as _;
    nfold::pb::open_inference::ModelStreamInferResponse::decode(answer).unwrap().error_message
}

pub fn ended(ended: &Ended) -> (i32, &str) {
    (ended.status.unwrap_or(-1), &ended.code)
}

#[test]
fn what_a_message_took_is_given_back_when_it_is_answered() {
    let server = Options { body_limit: 200_000, body_memory: 300_000, ..local() };
    let server = start(server, options(1, 4, 16));
    run(async {
        let mut call = stream(&server, &[("grpc-encoding", "gzip")]).await;
        for i in 0..40 {
            // ten times the memory, plain and compressed by turns
            let sent = if i % 2 == 0 { frame(&message(150_000)) } else { gzipped(&message(150_000)) };
            assert!(call.send(sent).await);
            let answer = call.next().await.expect("answered");
            assert_eq!(error_of(&answer), "", "{i}");
        }
        eventually("all of it is back while the stream is open", || server.metrics.body_bytes.get() == 0);
        // half a message is charged as far as it has come
        let half = frame(&message(150_000));
        assert!(call.send(half[..100_000].to_vec()).await);
        eventually("half of it is charged", || server.metrics.body_bytes.get() > 90_000);
        assert!(call.send(half[100_000..].to_vec()).await);
        assert_eq!(error_of(&call.next().await.expect("answered")), "");
        call.sender = None;
        assert_eq!(ended(&call.end().await), (0, ""));
    });
    assert_eq!(server.requests(Protocol::GrpcStream, Outcome::Ok), 41, "every message is counted");
    assert_eq!(server.requests(Protocol::Grpc, Outcome::Ok), 1, "and so is the stream");
    server.end().unwrap();
}

#[test]
fn a_refused_message_ends_the_stream_with_its_status() {
    let server = Options { body_limit: 100_000, body_memory: 100_000, ..local() };
    let server = start(server, options(1, 4, 16));
    run(async {
        let packed = gzip(&message(10));
        let junk = flagged(1, b"junk");
        let cases: [(&str, Vec<u8>, (i32, &str)); 8] = [
            ("too large", frame(&message(200_000)), (11, "body_too_large")),
            ("too large once inflated", gzipped(&message(200_000)), (11, "body_too_large")),
            ("malformed", frame(&[0xff; 100]), (3, "invalid_request")),
            ("no gzip", junk, (3, "invalid_request")),
            ("gzip that is cut short", flagged(1, &packed[..packed.len() - 3]), (3, "invalid_request")),
            ("a flag that does not exist", flagged(2, &message(0)), (3, "invalid_request")),
            ("cut short", frame(&message(0))[..20].to_vec(), (3, "invalid_request")),
            ("too many fields", frame(&[0x78, 0].repeat(5000)), (3, "invalid_request")),
        ];
        for (what, bytes, due) in cases {
            let mut call = stream(&server, &[("grpc-encoding", "gzip")]).await;
            assert!(call.send(frame(&message(0))).await);
            assert_eq!(error_of(&call.next().await.expect("answered")), "", "{what}");
            assert!(call.send(bytes).await);
            call.sender = None;
            let end = call.end().await;
            assert_eq!(ended(&end), due, "{what}: {end:?}");
            assert!(!end.message.is_empty());
        }
        // no memory: another request holds it
        let holder = stream(&server, &[]).await;
        assert!(holder.send(frame(&message(80_000))[..70_000].to_vec()).await);
        eventually("it holds", || server.metrics.body_bytes.get() > 60_000);
        let refused = stream(&server, &[]).await;
        assert!(refused.send(frame(&message(60_000))).await);
        assert_eq!(ended(&refused.end().await), (8, "overloaded"));
        drop(holder);
        eventually("it is back", || server.metrics.body_bytes.get() == 0);
        // an error of one message is reported in its place
        let mut call = stream(&server, &[]).await;
        for _ in 0..2 {
            assert!(call.send(frame(&[ld(1, b"m"), [0x2a, 0].repeat(9)].concat())).await);
            assert!(error_of(&call.next().await.expect("answered")).contains("more than 8 inputs"));
        }
        call.sender = None;
        assert_eq!(ended(&call.end().await), (0, ""));
    });
    // unsupported codings
    let unknown = call(server.grpc, STREAM, &[("grpc-encoding", "zstd")], frame(&message(0)));
    assert_eq!(ended(&unknown), (12, "unsupported_media_type"), "{unknown:?}");
    let unsaid = call(server.grpc, STREAM, &[], gzipped(&message(0)));
    assert_eq!(ended(&unsaid), (3, "invalid_request"), "{unsaid:?}");
    server.end().unwrap();
}

#[test]
fn codings_and_content_types_of_calls() {
    let server = start(local(), options(1, 4, 16));
    let two = [gzip(&message(0)[..10]), gzip(&message(0)[10..])].concat();
    for (headers, bytes) in [
        (&[("grpc-encoding", "GZIP")][..], gzipped(&message(0))),
        (&[("grpc-encoding", "x-gzip")], flagged(1, &two)),
        (&[("grpc-encoding", "identity")], frame(&message(0))),
        (&[("grpc-encoding", "deflate")], flagged(1, &super::calls::zlib(&message(0)))),
        (&[("content-type", "application/grpc+proto")], frame(&message(0))),
    ] {
        assert_eq!(ended(&call(server.grpc, INFER, headers, bytes)), (0, ""), "{headers:?}");
    }
    for kind in ["text/plain", "application/json", "application/grpc-web", "application/grpc+json", "application/grpcx"]
    {
        let refused = call(server.grpc, INFER, &[("content-type", kind)], frame(&message(0)));
        assert_eq!((refused.http, refused.status), (415, None), "{kind}");
    }
    // small messages come compressed as well
    let health = "/grpc.health.v1.Health/Check";
    assert_eq!(ended(&call(server.grpc, health, &[("grpc-encoding", "gzip")], gzipped(&ld(1, b"m")))), (0, ""));
    // one message is due
    assert_eq!(ended(&call(server.grpc, INFER, &[], Vec::new())), (3, "invalid_request"));
    let two = [frame(&message(0)), frame(&message(0))].concat();
    assert_eq!(ended(&call(server.grpc, INFER, &[], two)), (3, "invalid_request"));
    server.end().unwrap();
}

#[test]
fn a_streams_own_deadline_and_that_of_each_message() {
    let server = start(Options { request_timeout: Duration::from_millis(400), ..local() }, options(1, 4, 16));
    run(async {
        // idle: as long as it likes, without a deadline of its own
        let mut idle = stream(&server, &[]).await;
        let started = Instant::now();
        let bound = stream(&server, &[("grpc-timeout", "700m")]).await;
        assert_eq!(ended(&bound.end().await), (4, "deadline_exceeded"));
        let took = started.elapsed();
        assert!(took >= Duration::from_millis(690) && took < Duration::from_secs(5), "{took:?}");
        assert!(idle.send(frame(&message(0))).await);
        assert_eq!(error_of(&idle.next().await.expect("answered")), "");
        // half a message is waited for as long as a request
        assert!(idle.send(frame(&message(0))[..9].to_vec()).await);
        assert_eq!(ended(&idle.end().await), (4, "deadline_exceeded"));
        // a message that no engine runs in time gets an error, and the next one is tried
        let busy = server.occupy();
        let mut late = stream(&server, &[]).await;
        assert!(late.send(frame(&message(0))).await);
        assert!(error_of(&late.next().await.expect("answered")).contains("deadline"));
        server.strings.release();
        drop(busy);
        assert!(late.send(frame(&message(0))).await);
        assert_eq!(error_of(&late.next().await.expect("answered")), "");
    });
    server.end().unwrap();
}

#[test]
fn a_client_that_leaves_takes_its_images_with_it() {
    let server = start(local(), options(1, 1, 8));
    run(async {
        let busy = server.occupy();
        let left = stream(&server, &[]).await;
        assert!(left.send(frame(&message(1000))).await);
        eventually("its image waits", || server.depth() == 2);
        let cancelled = || images(&server.metrics, "m", Outcome::Cancelled);
        let before = cancelled();
        drop(left);
        eventually("its message is given up", || server.requests(Protocol::GrpcStream, Outcome::Cancelled) == 1);
        server.strings.release();
        assert_eq!(receive(busy).status, 200);
        eventually("and its image", || cancelled() == before + 1);
        eventually("and its memory", || server.metrics.body_bytes.get() == 0);
        assert_eq!(server.strings.runs(), 1, "nothing was computed for it");
    });
    server.end().unwrap();
}

#[test]
fn streams_live_through_the_hold_and_end_after_their_last_answer() {
    let hold = Duration::from_millis(1500);
    let server = start(Options { drain_hold: hold, ..local() }, options(1, 1, 8));
    run(async {
        let (mut busy, mut idle) = (stream(&server, &[]).await, stream(&server, &[]).await);
        assert!(busy.send(frame(&message(0))).await);
        assert_eq!(error_of(&busy.next().await.expect("answered")), "");
        let stopped = Instant::now();
        server.control.send(Control::Stop).await.unwrap();
        eventually("it is stopping", || ask(server.admin, "GET /readyz", &[], b"").status == 503);
        // during the hold everything works as before, new streams too
        let mut new = stream(&server, &[]).await;
        for call in [&mut busy, &mut new, &mut idle] {
            assert!(call.send(frame(&message(0))).await);
            assert_eq!(error_of(&call.next().await.expect("answered")), "");
        }
        assert!(stopped.elapsed() < hold, "too slow to say anything");
        // in an engine when the hold ends, and one more behind it
        server.strings.hold();
        assert!(busy.send([frame(&message(0)), frame(&message(0))].concat()).await);
        tokio::time::sleep(hold.saturating_sub(stopped.elapsed()) + Duration::from_millis(200)).await;
        assert_eq!(ended(&idle.end().await), (14, "shutting_down"), "an idle one hears of it");
        server.strings.release();
        for i in 0..2 {
            assert_eq!(error_of(&busy.next().await.expect("answered")), "", "{i}");
        }
        assert_eq!(ended(&busy.end().await), (14, "shutting_down"));
        assert_eq!(ended(&new.end().await), (14, "shutting_down"));
    });
    server.thread.join().unwrap().unwrap();
}

#[test]
fn a_stream_that_begins_after_the_hold_is_refused() {
    let server = start(local(), options(1, 1, 8));
    run(async {
        // keeps the server from ending
        let busy = server.occupy();
        let stream_to = tokio::net::TcpStream::connect(server.grpc).await.unwrap();
        let io = hyper_util::rt::TokioIo::new(stream_to);
        let (mut requests, connection) =
            hyper::client::conn::http2::handshake(hyper_util::rt::TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        server.control.send(Control::Stop).await.unwrap();
        eventually("it is stopping", || ask(server.admin, "GET /readyz", &[], b"").status == 503);
        // a hold of zero is over now
        tokio::time::sleep(Duration::from_millis(200)).await;
        let request =
            hyper::Request::post(format!("http://localhost{STREAM}")).header("content-type", "application/grpc");
        let body = http_body_util::Full::new(bytes::Bytes::from(frame(&message(0))));
        match requests.send_request(request.body(body).unwrap()).await {
            Ok(response) => assert_eq!(response.headers()["grpc-status"], "14", "{response:?}"),
            // the connection was closed for new calls: clients try elsewhere
            Err(error) => assert!(error.is_canceled() || error.to_string().contains("connection"), "{error:?}"),
        }
        server.strings.release();
        assert_eq!(receive(busy).status, 200);
    });
    server.thread.join().unwrap().unwrap();
}

/// Nothing is computed for a client that does not read, and its call is ended.
#[test]
fn a_client_that_reads_nothing_is_bounded() {
    let server = start(Options { write_timeout: Duration::from_millis(300), ..local() }, options(1, 4, 16));
    run(async {
        let call = stream(&server, &[]).await;
        let id = ld(3, &[b'i'; 200]);
        let one = frame(&[message(0), id].concat());
        let mut sent = 0;
        let started = Instant::now();
        // its window is 64 KiB: some hundred answers fit
        while started.elapsed() < Duration::from_secs(20) {
            match tokio::time::timeout(Duration::from_millis(500), call.send(one.clone())).await {
                Ok(true) => sent += 1,
                _ => break,
            }
        }
        let answered = server.requests(Protocol::GrpcStream, Outcome::Ok);
        assert!(answered < 3000 && sent < 10_000, "{answered} of {sent} were answered although nobody read");
        eventually("it is let go of", || server.metrics.connections.get() == 0 || server.metrics.body_bytes.get() == 0);
    });
    server.end().unwrap();
}
