//! Connections: unreadable heads, clients that don't read their responses, and how a stop ends connections.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use nfold::metrics::{Ending, Port};
use nfold::server::Options;

use crate::fakes::{eventually, options};
use crate::serve::{Answer, TestServer, ask, local, parse, png, receive, send, start};

const LIVE: &str = "GET /v2/health/live HTTP/1.1\r\nhost: t\r\n\r\n";

pub fn open(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

fn raw(address: SocketAddr, bytes: &[u8]) -> Answer {
    let mut stream = open(address);
    let _ = stream.write_all(bytes);
    receive(stream)
}

/// Heads that can't be parsed as HTTP, each with its status. They reach no handler: hyper answers, without a body.
fn unreadable() -> Vec<(String, u16)> {
    let long = format!("GET /v2 HTTP/1.1\r\nx-long: {}\r\n\r\n", "x".repeat(300_000));
    let many: String = (0..200).map(|i| format!("x-{i}: 1\r\n")).collect();
    let line = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(300_000));
    vec![
        ("GARBAGE\r\n\r\n".into(), 400),
        ("\u{1}\u{2}\u{3}\r\n\r\n".into(), 400),
        ("GET /v2 HTTP/9.9\r\nhost: t\r\n\r\n".into(), 400),
        ("GET /v2 HTTP/1.1\r\nno colon\r\n\r\n".into(), 400),
        ("GET /v2 HTTP/1.1\r\ncontent-length: x\r\n\r\n".into(), 400),
        ("GET http://[/ HTTP/1.1\r\nhost: t\r\n\r\n".into(), 400),
        (long, 431),
        (format!("GET /v2 HTTP/1.1\r\n{many}\r\n"), 431),
        (line, 431),
    ]
}

#[test]
fn heads_that_nobody_can_read_are_told_so_and_counted() {
    let server = start(local(), options(1, 4, 8));
    let cases = unreadable();
    for (address, port) in [(server.http, Port::Http), (server.grpc, Port::Grpc), (server.admin, Port::Admin)] {
        let count = || {
            let labels = [port.name(), Ending::Unreadable.name()];
            server.metrics.ended_connections_total.with_label_values(&labels).get()
        };
        for (i, (bytes, status)) in cases.iter().enumerate() {
            let answer = raw(address, bytes.as_bytes());
            let begin = &bytes[..bytes.len().min(60)];
            assert_eq!((answer.status, answer.body.as_str()), (*status, ""), "{begin:?}");
            // after a valid request
            let answers = raw(address, format!("{LIVE}{bytes}").as_bytes());
            let second = answers.body.split("HTTP/1.1 ").nth(1).unwrap_or_else(|| panic!("{begin:?}: {answers:?}"));
            assert!(second.starts_with(&status.to_string()), "{begin:?}: {second}");
            eventually("both are counted", || count() == 2 * (i as u64 + 1));
        }
    }
    // a request line that can be parsed but is too long
    let answer = ask(server.http, &format!("GET /{}", "x".repeat(9000)), &[], b"");
    assert_eq!(answer.error(), (414, "uri_too_long".into()));
    // headers that hyper accepts although they are above its limit
    assert_eq!(ask(server.http, "GET /v2", &[("x-long", &"x".repeat(66_000))], b"").status, 431);
    assert_eq!(server.classify("", &[], &png(1)).status, 200);
    server.end().unwrap();
}

/// The response arrives although most of what the client sends is never read.
#[test]
fn a_client_that_goes_on_sending_still_reads_why_it_was_refused() {
    let server = start(local(), options(1, 4, 8));
    for first in ["", LIVE] {
        let mut stream = open(server.http);
        stream.write_all(format!("{first}GARBAGE\r\n\r\n").as_bytes()).unwrap();
        for _ in 0..20 {
            stream.write_all(&[b'x'; 500_000]).expect("the server still reads");
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut answers = String::new();
        stream.read_to_string(&mut answers).unwrap();
        assert!(answers.contains("HTTP/1.1 400"), "{answers}");
    }
    server.end().unwrap();
}

#[test]
fn answers_to_readable_requests_stay_as_they_are() {
    let server = start(Options { cors_origins: vec!["*".into()], ..local() }, options(1, 4, 8));
    // responses without a body, and an error of nfold's
    let preflight = [("origin", "https://a.test"), ("access-control-request-method", "POST")];
    let allowed = ask(server.http, "OPTIONS /v1/classify", &preflight, b"");
    assert_eq!((allowed.status, allowed.body.as_str()), (200, ""));
    let head = ask(server.http, "HEAD /nothing", &[], b"");
    assert_eq!((head.status, head.body.as_str()), (404, ""));
    let missing = ask(server.http, "GET /nothing", &[], b"");
    assert_eq!(missing.error(), (404, "not_found".into()));
    assert!(missing.body.contains("there is no path"), "{missing:?}");
    // a good request and a bad one in one packet: each has its own answer
    let mut stream = open(server.http);
    stream.write_all(format!("{LIVE}GARBAGE\r\n\r\n").as_bytes()).unwrap();
    let mut answers = Vec::new();
    stream.read_to_end(&mut answers).unwrap();
    let at = answers.windows(9).skip(1).position(|w| w == b"HTTP/1.1 ").expect("two answers") + 1;
    let second = answers.split_off(at);
    assert_eq!(parse(answers).json()["live"], true);
    assert_eq!(parse(second).status, 400);
    server.end().unwrap();
}

// --- HTTP/2 by hand: a client that sends only what a test says
// ---------------------------------------------------------

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The preface, and SETTINGS with SETTINGS_INITIAL_WINDOW_SIZE: how many bytes of a response the client accepts.
pub fn hello(window: u32) -> Vec<u8> {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let mut setting = vec![0, 4];
    setting.extend(window.to_be_bytes());
    bytes.extend(frame(4, 0, 0, &setting));
    bytes.extend(frame(4, 1, 0, &[]));
    bytes
}

/// A request on stream 1: HPACK with literals only (RFC 7541, section 6.2.2), END_HEADERS, END_STREAM after the body.
pub fn request(method: &str, path: &str, kind: &str, body: &[u8]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in [(":method", method), (":path", path), (":scheme", "http"), ("content-type", kind)] {
        block.push(0);
        block.push(name.len() as u8);
        block.extend(name.bytes());
        block.push(value.len() as u8);
        block.extend(value.bytes());
    }
    let mut bytes = frame(1, 4, 1, &block);
    bytes.extend(frame(0, 1, 1, body));
    bytes
}

/// Reads until the server is silent or has sent `wanted`; returns the bytes, and whether the connection was closed.
pub fn listen(stream: &mut TcpStream, wanted: &[u8]) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (bytes, true),
            Ok(n) => bytes.extend(&buffer[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return (bytes, true),
            Err(e) => panic!("{e}: {bytes:?}"),
        }
        if !wanted.is_empty() && bytes.windows(wanted.len()).any(|w| w == wanted) {
            return (bytes, false);
        }
    }
}

const BUNDLE: &str = "GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: t\r\n\r\n";

#[test]
fn a_client_that_takes_nothing_loses_its_connection() {
    let server = start(Options { write_timeout: Duration::from_millis(400), ..local() }, options(1, 4, 8));
    let size = ask(server.http, "GET /docs/swagger-ui-bundle.js", &[], b"").bytes.len();
    assert!(size > 1_000_000, "{size} bytes would fit into the system's buffers");
    let gone = |server: &TestServer| eventually("cut off", || server.metrics.connections.get() == 0);
    gone(&server);
    let mut stream = open(server.http);
    stream.write_all(BUNDLE.repeat(40).as_bytes()).unwrap();
    eventually("it is in", || server.metrics.connections.get() == 1);
    let started = Instant::now();
    gone(&server);
    assert!(started.elapsed() > Duration::from_millis(350), "{:?}", started.elapsed());
    // what it could have had is less than what it asked for
    let mut taken = Vec::new();
    let _ = stream.read_to_end(&mut taken);
    assert!(taken.len() < 40 * size);
    server.end().unwrap();
}

#[test]
fn a_slow_client_that_takes_something_keeps_its_connection() {
    let server = start(Options { write_timeout: Duration::from_millis(400), ..local() }, options(1, 4, 8));
    let size = ask(server.http, "GET /docs/swagger-ui-bundle.js", &[], b"").bytes.len();
    let mut stream = open(server.http);
    stream.write_all(BUNDLE.repeat(20).as_bytes()).unwrap();
    let (mut taken, mut buffer, started) = (0, vec![0; 1 << 20], Instant::now());
    while taken < 20 * size {
        taken += stream.read(&mut buffer).expect("not cut off");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(started.elapsed() > Duration::from_millis(500), "{:?} says nothing", started.elapsed());
    stream.write_all(LIVE.as_bytes()).unwrap();
    listen(&mut stream, b"\"live\":true");
    drop(stream);
    server.end().unwrap();
}

/// An HTTP/2 client that answers PING and accepts frames, but never opens its flow-control window for the response.
#[test]
fn a_client_that_gives_no_window_loses_its_connection_on_both_ports() {
    let server = start(Options { write_timeout: Duration::from_millis(400), ..local() }, options(1, 4, 8));
    let live = request("POST", "/inference.GRPCInferenceService/ServerLive", "application/grpc", &[0; 5]);
    for (address, asked) in [(server.http, request("GET", "/", "text/plain", b"")), (server.grpc, live)] {
        let mut stream = open(address);
        stream.write_all(&[hello(0), asked.clone()].concat()).unwrap();
        let started = Instant::now();
        let (_, closed) = listen(&mut stream, b"");
        assert!(closed && started.elapsed() > Duration::from_millis(350), "{:?}", started.elapsed());
        // the same with an open window is answered, and stays for as long as it likes
        let mut stream = open(address);
        stream.write_all(&[hello(1 << 20), asked].concat()).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(1500))).unwrap();
        let mut bytes = Vec::new();
        let ended = stream.read_to_end(&mut bytes);
        assert!(ended.is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock), "cut off");
        let ended_stream = bytes.windows(9).any(|w| w[3] <= 1 && w[4] & 1 == 1 && w[5..9] == [0, 0, 0, 1]);
        assert!(ended_stream, "{bytes:?}");
    }
    server.end().unwrap();
}

#[test]
fn clients_that_leave_connections_open_don_t_hold_up_the_stop() {
    let server = start(local(), options(1, 4, 8));
    let mut idle = open(server.grpc);
    let live = request("POST", "/inference.GRPCInferenceService/ServerLive", "application/grpc", &[0; 5]);
    idle.write_all(&[hello(1 << 20), live].concat()).unwrap();
    listen(&mut idle, b"\x08\x01");
    let mut silent = open(server.http);
    silent.write_all(&hello(1 << 20)).unwrap();
    let mut half = open(server.http);
    half.write_all(format!("{LIVE}GET /v2 HTTP/1.1\r\nx: ").as_bytes()).unwrap();
    listen(&mut half, b"\"live\":true");
    eventually("all are in", || server.metrics.connections.get() == 3);
    let started = Instant::now();
    server.stop();
    server.thread.join().unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
    drop((idle, silent, half));
}

/// A stop waits for requests in work, even if their clients are silent.
#[test]
fn a_stop_waits_for_open_requests_of_silent_clients() {
    let server = start(local(), options(1, 1, 8));
    server.strings.hold();
    let mut multiplexed = open(server.http);
    multiplexed.write_all(&[hello(1 << 20), request("POST", "/v1/classify", "image/png", &png(9))].concat()).unwrap();
    eventually("the engine is busy", || server.strings.runs() == 1);
    let plain = send(server.http, "POST /v1/classify", &[], &png(8));
    eventually("both are admitted", || server.depth() == 2);
    server.stop();
    std::thread::sleep(Duration::from_millis(2500));
    server.strings.release();
    let (bytes, _) = listen(&mut multiplexed, b"\"predictions\"");
    assert!(bytes.windows(13).any(|w| w == b"\"predictions\""));
    assert_eq!(receive(plain).status, 200);
    server.thread.join().unwrap().unwrap();
}
