//! Connections that send nothing, little or nonsense: on every port each is ended by a limit, and none keeps others
//! out.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nfold::server::{Options, TlsOptions};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};

use super::logs::{Logging, stops};
use super::{MIB, metric, under_attack};
use crate::cli::with_demo;
use crate::connections::{frame, hello, request};
use crate::fakes::{eventually, options};
use crate::process::{Server, ask};
use crate::secure::{Authority, client};
use crate::serve::{TestServer, local, png, start};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A client that starts with some bytes and then sends more repeatedly, until it is cut off.
struct Nuisance {
    name: &'static str,
    first: Vec<u8>,
    drip: Vec<u8>,
    /// Whether it answers the server's PING, as a live client does.
    lives: bool,
}

impl Nuisance {
    fn new(name: &'static str, first: impl Into<Vec<u8>>, drip: impl Into<Vec<u8>>) -> Self {
        Self { name, first: first.into(), drip: drip.into(), lives: false }
    }

    fn http2(name: &'static str, first: &[u8], drip: impl Into<Vec<u8>>) -> Self {
        Self { lives: true, ..Self::new(name, [PREFACE, &frame(4, 0, 0, &[]), first].concat(), drip) }
    }

    /// Returns how long it stayed connected.
    fn live(&self, address: SocketAddr, longest: Duration) -> Duration {
        let started = Instant::now();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let mut buffer = [0; 4096];
        let mut next = self.first.clone();
        while started.elapsed() < longest {
            if stream.write_all(&next).is_err() {
                break;
            }
            next.clone_from(&self.drip);
            if !self.drip.is_empty() {
                std::thread::sleep(Duration::from_millis(100));
            }
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) if self.lives => next.extend(replies(&buffer[..read])),
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => break,
            }
        }
        started.elapsed()
    }
}

/// What an HTTP/2 client has to answer: PING and SETTINGS.
fn replies(mut bytes: &[u8]) -> Vec<u8> {
    let mut answers = Vec::new();
    while bytes.len() >= 9 {
        let length = usize::from(bytes[1]) << 8 | usize::from(bytes[2]);
        let (kind, flags) = (bytes[3], bytes[4]);
        let payload = bytes.get(9..9 + length).unwrap_or_default();
        match (kind, flags & 1) {
            (6, 0) => answers.extend(frame(6, 1, 0, payload)),
            (4, 0) => answers.extend(frame(4, 1, 0, &[])),
            _ => {}
        }
        bytes = bytes.get(9 + length..).unwrap_or_default();
    }
    answers
}

#[test]
fn whoever_brings_no_head_is_cut_off_on_every_port() {
    let server = Server::start(&["--head-timeout", "1s"]);
    let half_head = frame(1, 0, 1, b"\x82\x84\x86");
    let answered = request("GET", "/v2/health/live", "text/plain", b"");
    let nuisances = [
        Nuisance::new("silence", "", ""),
        Nuisance::new("one byte", "P", ""),
        Nuisance::new("a part of the preface", "PRI * HT", ""),
        Nuisance::new("empty lines", "", "\r\n"),
        Nuisance::new("a head, line by line", "GET / HTTP/1.1\r\nhost: a\r\n", "x: y\r\n"),
        Nuisance::new("a head, byte by byte", "GET / HTTP/1.1\r\nhost: a\r\n", "x"),
        Nuisance::new("silence after an answer", "GET /livez HTTP/1.1\r\nhost: a\r\n\r\n", ""),
        Nuisance::new("a drip after an answer", "GET /livez HTTP/1.1\r\nhost: a\r\n\r\nGET / HT", "x"),
        Nuisance { lives: false, ..Nuisance::http2("a preface, then nothing", &[], "") },
        Nuisance::http2("HTTP/2 that answers pings", &[], ""),
        Nuisance::http2("HTTP/2 that pings", &[], frame(6, 0, 0, &[0; 8])),
        Nuisance::http2("HTTP/2 that changes its settings", &[], frame(4, 0, 0, &[0, 4, 0, 0, 1, 0])),
        Nuisance { lives: false, ..Nuisance::http2("HTTP/2 without the end of a head", &half_head, "") },
        Nuisance::http2("HTTP/2 after an answer", &answered, ""),
    ];
    let doors = [("http", server.http), ("grpc", server.grpc), ("admin", server.admin)];
    let ((), cost) = under_attack(&server, || {
        std::thread::scope(|scope| {
            for nuisance in &nuisances {
                for (port, address) in doors {
                    scope.spawn(move || {
                        let lived = nuisance.live(address, Duration::from_secs(12));
                        let in_time = Duration::from_millis(900)..Duration::from_secs(6);
                        assert!(in_time.contains(&lived), "{} on {port}: {lived:?}", nuisance.name);
                    });
                }
            }
        });
    });
    assert!(cost.failed == 0 && cost.growth < 64 * MIB && cost.health < Duration::from_secs(1), "{cost:?}");
    for port in ["http", "grpc", "admin"] {
        let ended = |reason| {
            metric(server.admin, &format!("nfold_ended_connections_total{{port=\"{port}\",reason=\"{reason}\"}}"))
        };
        assert!(ended("head_timeout") >= 8, "{port}: {}", ended("head_timeout"));
        assert!(ended("idle") >= 1, "{port}");
    }
    server.signal("-TERM");
    assert!(server.wait().success());
}

#[test]
fn silence_after_a_handshake_ends_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let (cert, key) = authority.write(folder.path(), "t.test");
    let tls = Some(TlsOptions { cert, key, client_ca: None });
    let server = start(Options { tls, head_timeout: Duration::from_millis(600), ..local() }, options(1, 4, 8));
    for address in [server.http, server.grpc] {
        for protocol in [&b"http/1.1"[..], b"h2"] {
            let started = Instant::now();
            let config: Arc<_> = client(&authority.pem, None, protocol);
            let connection = ClientConnection::new(config, ServerName::try_from("t.test").unwrap()).unwrap();
            let mut stream = StreamOwned::new(connection, TcpStream::connect(address).unwrap());
            if protocol == b"h2" {
                stream.write_all(&hello(1 << 16)).unwrap();
            } else {
                stream.write_all(b"G").unwrap();
            }
            stream.sock.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let ended = stream.read_to_end(&mut Vec::new());
            assert!(!ended.is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock), "still open");
            assert!(started.elapsed() > Duration::from_millis(500), "{:?}", started.elapsed());
        }
    }
    server.end().unwrap();
}

/// An HTTP/2 client is idle only when it has no request open.
#[test]
fn requests_in_work_and_streams_are_not_idle() {
    let server = start(Options { head_timeout: Duration::from_millis(300), ..local() }, options(1, 1, 8));
    server.strings.hold();
    let mut stream = crate::connections::open(server.http);
    stream
        .write_all(&[PREFACE, &frame(4, 0, 0, &[]), &request("POST", "/v1/classify", "image/png", &png(9))].concat())
        .unwrap();
    eventually("the engine is busy", || server.strings.runs() == 1);
    let pinging = std::thread::spawn(move || {
        let mut bytes: Vec<u8> = Vec::new();
        let mut buffer = [0; 4096];
        while !bytes.windows(13).any(|w| w == b"\"predictions\"") {
            let read = stream.read(&mut buffer).unwrap();
            assert!(read > 0, "cut off");
            stream.write_all(&replies(&buffer[..read])).unwrap();
            bytes.extend(&buffer[..read]);
        }
    });
    std::thread::sleep(Duration::from_millis(1500));
    server.strings.release();
    pinging.join().unwrap();
    server.end().unwrap();
}

/// Fills a port with clients that send nothing and never leave, then sends a request.
fn crowded(doors: &[(SocketAddr, &str)], clients: usize) {
    for &(address, path) in doors {
        let silent: Vec<_> = (0..clients).map(|_| TcpStream::connect(address).unwrap()).collect();
        let half: Vec<_> = (0..clients)
            .map(|_| {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.write_all(b"GET / HTTP/1.1\r\nx:").unwrap();
                stream
            })
            .collect();
        let asked = Instant::now();
        // gRPC's port answers HTTP/1 as well: not found
        let answer = ask(address, "GET", path, &[], b"").unwrap();
        assert!(matches!(answer.status, 200 | 404 | 415), "{answer:?}");
        assert!(asked.elapsed() < Duration::from_secs(4), "{path}: {:?}", asked.elapsed());
        drop((silent, half));
    }
}

#[test]
fn a_full_port_makes_room() {
    let server = Server::start(&["--head-timeout", "1h", "--connections", "40"]);
    let doors = [(server.http, "/v2/health/live"), (server.grpc, "/"), (server.admin, "/readyz")];
    let ((), cost) = under_attack(&server, || crowded(&doors, 100));
    assert!(cost.failed == 0 && cost.growth < 64 * MIB, "{cost:?}");
    for port in ["http", "grpc", "admin"] {
        let name = format!("nfold_ended_connections_total{{port=\"{port}\",reason=\"full\"}}");
        assert!(metric(server.admin, &name) > 0, "{port}");
    }
    server.signal("-TERM");
    assert!(server.wait().success());
}

/// A full port makes room for a new connection, even if its clients send cheap requests so often that none is ever
/// quiet for long.
#[test]
fn a_port_full_of_busy_askers_makes_room() {
    const ASKERS: usize = 32;
    let server = Server::start(&["--connections", "32"]);
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..ASKERS {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    let Ok(mut kept) = crate::process::connect(server.http) else { continue };
                    while crate::process::exchange(&mut kept, "GET", "/v2/health/live", &[], &[]).is_ok()
                        && !over.load(std::sync::atomic::Ordering::Relaxed)
                    {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
            });
        }
        std::thread::sleep(Duration::from_millis(500));
        for _ in 0..5 {
            let asked = Instant::now();
            let answer = ask(server.http, "GET", "/v2/models/nf_regnet_cifar10", &[], &[]).unwrap();
            assert_eq!(answer.status, 200);
            assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn a_full_port_lets_its_requests_finish() {
    let server = start(Options { connections: 2, ..local() }, options(1, 1, 8));
    let occupied = server.occupy();
    let waits = crate::serve::send(server.http, "POST /v1/classify", &[], &png(8));
    eventually("both are admitted", || server.depth() == 2);
    let late = crate::serve::send(server.http, "GET /v2/health/live", &[], b"");
    std::thread::sleep(Duration::from_millis(1500));
    server.strings.release();
    for stream in [occupied, waits, late] {
        assert_eq!(crate::serve::receive(stream).status, 200);
    }
    server.end().unwrap();
}

#[test]
fn few_descriptors_are_shared_out() {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 64; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_nfold")]);
    let server = Logging::spawn(&mut command, Stdio::null(), with_demo());
    let (http, admin) = (server.http, server.admin);
    let silent: Vec<_> = (0..100).map(|_| TcpStream::connect(http).unwrap()).collect();
    assert_eq!(ask(admin, "GET", "/readyz", &[], b"").unwrap().status, 200);
    let before = processor_time(server.child.id());
    std::thread::sleep(Duration::from_secs(1));
    assert!(processor_time(server.child.id()) - before < Duration::from_millis(500), "it spins");
    assert_eq!(server.classify(), 200);
    drop(silent);
    crowded(&[(admin, "/readyz"), (http, "/v2/health/live")], 100);
    assert_eq!(server.classify(), 200);
    stops(server);
}

/// CPU time of a process.
fn processor_time(process: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

#[test]
fn the_soft_limit_of_descriptors_is_raised() {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -Sn 256; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_nfold")]);
    let server = Logging::spawn(&mut command, Stdio::null(), with_demo());
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.child.id())).unwrap();
    let files: Vec<_> = limits.lines().find(|l| l.starts_with("Max open files")).unwrap().split_whitespace().collect();
    assert_eq!(files[3], files[4], "{limits}");
    stops(server);
}

fn few_patience() -> TestServer {
    let patience = Duration::from_millis(500);
    let limits = Options { head_timeout: patience, write_timeout: patience, ..local() };
    start(Options { request_timeout: Duration::from_secs(600), ..limits }, options(1, 4, 8))
}

/// Even with a request timeout of ten minutes, no body may take that long.
#[test]
fn bodies_that_trickle_end_their_requests() {
    let server = few_patience();
    let head = |path: &str| format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n");
    let chunked = "POST /v1/classify HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
    let open_request = |path: &str, kind: &str| {
        let whole = request("POST", path, kind, b"");
        // without the frame that ends it
        whole[..whole.len() - 9].to_vec()
    };
    let byte = frame(0, 0, 1, &[0]);
    let cases = [
        (server.http, Nuisance::new("a body", head("/v1/classify"), "x")),
        (server.http, Nuisance::new("a body that nobody reads", head("/nothing"), "x")),
        (server.http, Nuisance::new("a body for another method", head("/v2/health/live"), "x")),
        (server.http, Nuisance::new("an inference", head("/v2/models/m/infer"), "x")),
        (server.http, Nuisance::new("no body at all", head("/v1/classify"), "")),
        (server.http, Nuisance::new("chunks", chunked, "1\r\na\r\n")),
        (server.admin, Nuisance::new("a body for a probe", head("/readyz"), "x")),
    ];
    let longest = Duration::from_secs(25);
    std::thread::scope(|scope| {
        for (address, nuisance) in &cases {
            scope.spawn(move || {
                let lived = nuisance.live(*address, longest);
                assert!(lived < Duration::from_secs(15), "{}: {lived:?}", nuisance.name);
            });
        }
        let calls = [
            (server.http, "/v1/classify", "image/png"),
            (server.grpc, "/inference.GRPCInferenceService/ModelInfer", "application/grpc"),
            (server.grpc, "/inference.GRPCInferenceService/ServerLive", "application/grpc"),
        ];
        for (address, path, kind) in calls {
            for drip in [Vec::new(), byte.clone()] {
                let begin = open_request(path, kind);
                scope.spawn(move || {
                    let nuisance = Nuisance::http2("HTTP/2", &begin, drip);
                    let lived = nuisance.live(address, longest);
                    assert!(lived < Duration::from_secs(15), "{path}: {lived:?}");
                });
            }
        }
        // a message of a stream must come whole as well
        let begin = open_request("/inference.GRPCInferenceService/ModelStreamInfer", "application/grpc");
        let begin = [begin, frame(0, 0, 1, &[0, 0, 0, 200, 0])].concat();
        scope.spawn(move || {
            let lived = Nuisance::http2("a message", &begin, byte).live(server.grpc, longest);
            assert!(lived < Duration::from_secs(15), "{lived:?}");
        });
    });
    let slow = |port: &str| server.metrics.ended_connections_total.with_label_values(&[port, "slow_body"]).get();
    assert!(slow("http") >= 5 && slow("grpc") >= 4, "{} {}", slow("http"), slow("grpc"));
    server.end().unwrap();
}

/// Progress alone is not enough: at a byte now and then, a response would never end.
#[test]
fn answers_taken_in_a_trickle_end() {
    let server = few_patience();
    let ask_for_much = request("GET", "/docs/swagger-ui-bundle.js", "text/plain", b"");
    let begin = [hello(0), ask_for_much].concat();
    let one = 1_u32.to_be_bytes();
    let drip = [frame(8, 0, 0, &one), frame(8, 0, 1, &one)].concat();
    let lived = Nuisance::new("a byte at a time", begin, drip).live(server.http, Duration::from_secs(20));
    assert!(lived < Duration::from_secs(10), "{lived:?}");

    let started = Instant::now();
    let mut stream = crate::connections::open(server.http);
    stream.write_all("GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: t\r\n\r\n".repeat(40).as_bytes()).unwrap();
    eventually("it is in", || server.metrics.connections.get() >= 1);
    while server.metrics.connections.get() > 0 {
        let _ = stream.read(&mut [0; 1]);
        std::thread::sleep(Duration::from_millis(50));
        assert!(started.elapsed() < Duration::from_secs(15), "still open");
    }
    // the kernel does not continue to send either
    let ended = stream.read_to_end(&mut Vec::new());
    assert_eq!(ended.map_err(|e| e.kind()), Err(std::io::ErrorKind::ConnectionReset));
    assert!(server.metrics.ended_connections_total.with_label_values(&["http", "write_timeout"]).get() >= 2);
    server.end().unwrap();
}
