//! Clients that open as many requests as they can and then neither send nor read: the server keeps little for each, and
//! a bounded amount for all.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::calls::{INFER, STREAM, frame as message, ld, open};
use super::{Cost, MIB, alone, metric, under_attack};
use crate::connections::{frame, hello};
use crate::fakes::eventually;
use crate::process::{Server, ask, data};

const CONNECTIONS: usize = 64;
/// Connections to the admin port, which accepts 64: the rest is for health requests meanwhile.
const ADMIN: usize = 48;
const STREAMS: u32 = 100;
/// Most bytes that all of them together may cost.
const ROOM: u64 = 64_000_000;
const HEALTH: Duration = Duration::from_millis(100);

const META: &str = "/inference.GRPCInferenceService/ServerMetadata";
const CONFIG: &str = "/inference.GRPCInferenceService/ModelConfig";
const WATCH: &str = "/grpc.health.v1.Health/Watch";
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
const DEMO: &str = "nf_regnet_cifar10";

/// An HPACK integer with a prefix of seven bits (RFC 7541, section 5.1).
fn length(bytes: usize) -> Vec<u8> {
    let Some(mut more) = bytes.checked_sub(127) else { return vec![bytes as u8] };
    let mut encoded = vec![127];
    while more > 127 {
        encoded.push(more as u8 | 128);
        more >>= 7;
    }
    encoded.push(more as u8);
    encoded
}

/// The frames of a head, HPACK with literals only.
fn head(stream: u32, ends: bool, method: &str, path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in [(":method", method), (":path", path), (":scheme", "http")].iter().chain(more) {
        block.push(0);
        for text in [name, value] {
            block.extend(length(text.len()));
            block.extend(text.bytes());
        }
    }
    let parts: Vec<_> = block.chunks(16_384).collect();
    let mut frames = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        let last = if i + 1 == parts.len() { 4 } else { 0 };
        let (kind, flags) = if i == 0 { (1, last | u8::from(ends)) } else { (9, last) };
        frames.extend(frame(kind, flags, stream, part));
    }
    frames
}

/// As many requests of one kind as a connection may have open.
fn many(method: &str, path: &str, more: &[(&str, &str)], body: &[u8], ends: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    for stream in (0..STREAMS).map(|i| 2 * i + 1) {
        bytes.extend(head(stream, ends && body.is_empty(), method, path, more));
        for part in body.chunks(16_384) {
            bytes.extend(frame(0, u8::from(ends), stream, part));
        }
    }
    bytes
}

/// Each of many connections sends its first bytes, and the others a moment later, when it knows the server's windows.
/// No response is read. Returns those that stay open.
fn hoard(address: SocketAddr, connections: usize, first: &[u8], then: &[u8]) -> Vec<TcpStream> {
    let one = || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
        // fails if the server has ended it or reads no more
        let _ = stream.write_all(first);
        std::thread::sleep(Duration::from_millis(80));
        let _ = stream.write_all(then);
        stream
    };
    std::thread::scope(|scope| {
        let some = || (0..connections / 4).map(|_| one()).collect::<Vec<_>>();
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(some)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

fn cut(server: &Server) -> u64 {
    ["http", "grpc", "admin"]
        .map(|port| {
            metric(server.admin, &format!("nfold_ended_connections_total{{port=\"{port}\",reason=\"memory\"}}"))
        })
        .iter()
        .sum()
}

fn attempt(name: &str, port: fn(&Server) -> SocketAddr, first: &[u8], then: &[u8]) -> Cost {
    let server = Server::start(&[]);
    let address = port(&server);
    let connections = if address == server.admin { ADMIN } else { CONNECTIONS };
    let ((), cost) = under_attack(&server, || {
        let kept = hoard(address, connections, first, then);
        std::thread::sleep(Duration::from_millis(700));
        drop(kept);
    });
    println!("{name}: {} MB, {} cut, {cost:?}", cost.growth / 1_000_000, cut(&server));
    assert!(cost.failed == 0 && cost.growth < ROOM, "{name}: {cost:?}");
    assert_eq!(ask(server.http, "POST", "/v1/classify", &[], &data("cat.jpg")).unwrap().status, 200, "{name}");
    eventually("what was kept is given back", || metric(server.admin, "nfold_body_bytes") == 0);
    server.signal("-TERM");
    assert!(server.wait().success());
    cost
}

/// Other load on the machine can only slow it down: the best of three counts.
fn bounded(name: &str, port: fn(&Server) -> SocketAddr, first: &[u8], then: &[u8]) {
    let _alone = alone();
    let slowest: Vec<_> =
        (0..3).map(|_| attempt(name, port, first, then).health).take_while(|&slow| slow >= HEALTH).collect();
    assert!(slowest.len() < 3, "{name}: health took {slowest:?}");
}

const GRPC: (&str, &str) = ("content-type", "application/grpc");
const GZIP: (&str, &str) = ("accept-encoding", "gzip");

fn http(server: &Server) -> SocketAddr {
    server.http
}

fn grpc(server: &Server) -> SocketAddr {
    server.grpc
}

fn admin(server: &Server) -> SocketAddr {
    server.admin
}

#[test]
fn heads_without_their_bodies() {
    let long = "~".repeat(4200);
    let names: Vec<_> = (0..14).map(|i| format!("x-{i}")).collect();
    let large: Vec<_> = names.iter().map(|name| (name.as_str(), long.as_str())).collect();
    let large_call: Vec<_> = [&[GRPC, ("x-request-id", "mine")], &large[..]].concat();
    for (name, port, path, more) in [
        ("large heads of small calls", grpc as fn(&Server) -> SocketAddr, META, &large_call[..]),
        ("large heads of calls", grpc, INFER, &large_call[..]),
        ("large heads of streams", grpc, STREAM, &large_call[..]),
        ("large heads of requests", http, "/v1/classify", &large[..]),
        ("large heads of unknown requests", http, "/nothing", &large[..]),
        ("small calls", grpc, META, &[GRPC][..]),
        ("calls", grpc, INFER, &[GRPC][..]),
        ("streams", grpc, STREAM, &[GRPC][..]),
        ("streams of reflection", grpc, REFLECTION, &[GRPC][..]),
        ("requests", http, "/v1/classify", &[][..]),
        ("requests of the admin port", admin, "/livez", &[][..]),
    ] {
        bounded(name, port, &hello(1 << 16), &many("POST", path, more, &[], false));
    }
}

#[test]
fn parts_of_bodies() {
    // what has come of a body is charged to --body-memory
    let part = [b'x'; 2000];
    bounded("parts of bodies", http, &hello(1 << 16), &many("POST", "/v1/classify", &[], &part, false));
    let part = &message(&[b'x'; 6000])[..2000];
    bounded("parts of messages", grpc, &hello(1 << 16), &many("POST", INFER, &[GRPC], part, false));
    // a window of HTTP/2, full of messages that wait until the answer before them is taken
    let unknown = message(&ld(1, b"x")).repeat(70_000);
    let window = &unknown[..500 * 1024];
    let mut bytes = head(1, false, "POST", STREAM, &[GRPC]);
    window.chunks(16_384).for_each(|part| bytes.extend(frame(0, 0, 1, part)));
    bounded("messages behind an answer", grpc, &hello(0), &bytes);
}

#[test]
fn answers_that_nobody_takes() {
    let named = message(&ld(1, DEMO.as_bytes()));
    let config = format!("/v2/models/{DEMO}/config");
    for window in [0, 1] {
        for (name, port, path, more, body) in [
            ("configurations over gRPC", grpc as fn(&Server) -> SocketAddr, CONFIG, &[GRPC][..], &named[..]),
            ("watches of health", grpc, WATCH, &[GRPC], &[0; 5]),
            ("configurations", http, &config, &[], &[]),
            ("configurations in gzip", http, &config, &[GZIP], &[]),
            ("/openapi.json", http, "/openapi.json", &[], &[]),
            ("/openapi.json in gzip", http, "/openapi.json", &[GZIP], &[]),
            ("/docs in gzip", http, "/docs/swagger-ui-bundle.js", &[GZIP], &[]),
            ("the page in gzip", http, "/page/page.js", &[GZIP], &[]),
            ("refusals", http, "/nothing", &[], &[]),
            ("metrics", admin, "/metrics", &[], &[]),
        ] {
            let method = if body.is_empty() { "GET" } else { "POST" };
            bounded(&format!("{name}, {window}"), port, &hello(window), &many(method, path, more, body, true));
        }
    }
}

#[test]
fn pipelined_requests_whose_answers_nobody_takes() {
    for path in [format!("/v2/models/{DEMO}/config"), "/openapi.json".into()] {
        let bytes = format!("GET {path} HTTP/1.1\r\nhost: t\r\n\r\n").repeat(3000);
        bounded(&path, http, &[], bytes.as_bytes());
    }
}

/// A connection that keeps little is not cut, however much others keep.
#[test]
fn who_keeps_little_stays() {
    let _alone = alone();
    let server = Server::start(&[]);
    let cat = data("cat.jpg");
    let connect = |address| {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    };
    let mut slow = connect(server.http);
    slow.write_all(&[hello(1 << 20), head(1, false, "POST", "/v1/classify", &[])].concat()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let mut stream = runtime.block_on(open(server.grpc, STREAM, &[]));
    let flood = many("POST", META, &[GRPC], &[], false);
    let requests = many("POST", "/v1/classify", &[], &[], false);
    for part in cat.chunks(cat.len().div_ceil(3)) {
        let kept =
            [hoard(server.grpc, CONNECTIONS, &hello(0), &flood), hoard(server.http, CONNECTIONS, &hello(0), &requests)];
        slow.write_all(&part.chunks(16_384).flat_map(|part| frame(0, 0, 1, part)).collect::<Vec<_>>()).unwrap();
        assert!(runtime.block_on(stream.send(message(&ld(1, b"unknown")))));
        let answer = runtime.block_on(stream.next()).expect("answered");
        assert!(answer.windows(9).any(|w| w == b"not found" || w == b"available" || w == b"`unknown`"), "{answer:?}");
        drop(kept);
    }
    assert!(cut(&server) > 30, "{} were cut", cut(&server));
    slow.write_all(&frame(0, 1, 1, &[])).unwrap();
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while !answer.windows(11).any(|w| w == b"predictions") {
        let read = slow.read(&mut buffer).expect("an answer");
        assert!(read > 0, "it was cut: {:?}", String::from_utf8_lossy(&answer));
        answer.extend(&buffer[..read]);
    }
}

/// Frames of HTTP/2 from the server: kind, flags, stream and payload.
fn frames(stream: &mut TcpStream, until: impl Fn(&[(u8, u8, u32, Vec<u8>)]) -> bool) -> Vec<(u8, u8, u32, Vec<u8>)> {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut frames = Vec::new();
    while !until(&frames) {
        let mut head = [0; 9];
        stream.read_exact(&mut head).expect("a frame");
        let mut payload = vec![0; usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])];
        stream.read_exact(&mut payload).expect("its payload");
        let number = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        frames.push((head[3], head[4], number, payload));
    }
    frames
}

#[test]
fn http2_has_100_streams_and_windows_of_512_kib() {
    const WINDOW: u32 = 512 * 1024;
    let server = Server::start(&[]);
    for (address, path) in [(server.http, "/v1/classify"), (server.grpc, STREAM), (server.admin, "/livez")] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&hello(1 << 16)).unwrap();
        let begun = frames(&mut stream, |frames| frames.iter().any(|frame| frame.0 == 8));
        let settings = &begun.iter().find(|frame| frame.0 == 4 && frame.1 == 0).expect("settings").3;
        let setting = |id: u16| {
            let mut all = settings
                .chunks(6)
                .map(|s| (u16::from_be_bytes([s[0], s[1]]), u32::from_be_bytes([s[2], s[3], s[4], s[5]])));
            all.find(|&(found, _)| found == id).map(|(_, value)| value)
        };
        assert_eq!((setting(3), setting(4)), (Some(STREAMS), Some(WINDOW)), "{path}");
        let update = begun.iter().find(|frame| frame.0 == 8).expect("there");
        assert_eq!((update.2, &update.3[..]), (0, &(WINDOW - 65_535).to_be_bytes()[..]), "{path}");
        if path == "/livez" {
            // nothing there waits for a body
            continue;
        }
        // a client that exceeds the limit
        for number in (0..=STREAMS).map(|i| 2 * i + 1) {
            stream.write_all(&head(number, false, "POST", path, &[GRPC])).unwrap();
        }
        let ended = frames(&mut stream, |frames| frames.iter().any(|frame| frame.0 == 3));
        let reset = ended.iter().find(|frame| frame.0 == 3).expect("there");
        // REFUSED_STREAM: nothing of it was done
        assert_eq!((reset.2, &reset.3[..]), (2 * STREAMS + 1, &7_u32.to_be_bytes()[..]), "{path}");
    }
}

#[test]
fn reflection_is_16_streams_and_ends_with_the_server() {
    let server = Server::start(&[]);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let list = message(&ld(7, b""));
        let (mut open_ones, mut refused) = (Vec::new(), 0);
        for i in 0..20 {
            let mut call = if i % 2 == 0 {
                open(server.grpc, REFLECTION, &[]).await
            } else {
                open(server.grpc, &REFLECTION.replace(".v1.", ".v1alpha."), &[]).await
            };
            // one that is refused may be gone by now
            call.send(list.clone()).await;
            match call.next().await {
                Some(services) => {
                    assert!(services.windows(20).any(|w| w == b"GRPCInferenceService"), "{services:?}");
                    open_ones.push(call);
                }
                None => {
                    let ended = call.end().await;
                    assert_eq!((ended.status, ended.code.as_str()), (Some(8), "overloaded"), "{ended:?}");
                    refused += 1;
                }
            }
        }
        assert_eq!((open_ones.len(), refused), (16, 4));
        // one that ends makes room for another
        drop(open_ones.pop());
        let started = Instant::now();
        loop {
            let mut call = open(server.grpc, REFLECTION, &[]).await;
            call.send(list.clone()).await;
            if call.next().await.is_some() {
                open_ones.push(call);
                break;
            }
            assert!(started.elapsed() < Duration::from_secs(10), "its room is not given back");
        }
        server.signal("-TERM");
        for call in open_ones {
            let ended = call.end().await;
            assert_eq!((ended.status, ended.code.as_str()), (Some(14), "shutting_down"), "{ended:?}");
        }
    });
    let started = Instant::now();
    assert!(server.wait().success());
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

/// After a flood, the allocator keeps some memory, but no more than the limit.
#[test]
fn memory_after_the_floods() {
    let _alone = alone();
    let server = Server::start(&[]);
    let start = super::resident(server.pid());
    for _ in 0..3 {
        drop(hoard(server.grpc, CONNECTIONS, &hello(0), &many("POST", META, &[GRPC], &[], false)));
        drop(hoard(server.http, CONNECTIONS, &hello(0), &many("GET", "/openapi.json", &[GZIP], &[], true)));
    }
    let after = super::resident(server.pid()).saturating_sub(start);
    println!("{} MB are kept", after / 1_000_000);
    assert!(after < 2 * 64 * MIB, "{after}");
}
