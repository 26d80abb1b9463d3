//! Floods of HTTP/2 frames that cost their sender nothing: other clients don't notice.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::{Cost, MIB, alone, metric, under_attack};
use crate::connections::{frame, hello, request};
use crate::process::Server;

/// How long each flood lasts.
const FLOOD: Duration = Duration::from_millis(500);

/// Longest that another client may wait meanwhile.
const BOUND: Duration = Duration::from_millis(50);

/// Sends the same bytes until the time is over, with a new connection whenever the server ends one; returns how often.
fn flood(address: SocketAddr, bytes: &[u8]) -> u64 {
    let started = Instant::now();
    let mut sent = 0;
    while started.elapsed() < FLOOD {
        sent += connection(address, bytes, started);
    }
    sent
}

fn connection(address: SocketAddr, bytes: &[u8], started: Instant) -> u64 {
    let mut stream = TcpStream::connect(address).unwrap();
    let mut reader = stream.try_clone().unwrap();
    let drain = std::thread::spawn(move || {
        let mut buffer = [0; 65536];
        while reader.read(&mut buffer).is_ok_and(|read| read > 0) {}
    });
    let mut sent = 0;
    if stream.write_all(&hello(1 << 20)).is_ok() {
        while started.elapsed() < FLOOD && stream.write_all(bytes).is_ok() {
            sent += bytes.len() as u64;
        }
    }
    let _ = stream.shutdown(std::net::Shutdown::Both);
    drain.join().unwrap();
    sent
}

/// Requests on streams of their own, each followed by the frames of `and`.
fn streams(count: u32, and: impl Fn(u32) -> Vec<u8>) -> Vec<u8> {
    let whole = request("GET", "/v2/health/live", "text/plain", b"");
    let head = &whole[9..whole.len() - 9];
    (0..count).flat_map(|i| [frame(1, 4, 2 * i + 1, head), and(2 * i + 1)].concat()).collect()
}

/// Floods until other clients did not notice; the best of a few attempts counts.
fn unnoticed<T>(server: &Server, what: &str, attack: impl Fn() -> T) -> (T, Cost) {
    let _alone = alone();
    let mut slowest = Vec::new();
    for _ in 0..5 {
        let (outcome, cost) = under_attack(server, &attack);
        assert!(cost.failed == 0 && cost.growth < 64 * MIB, "{what}: {cost:?}");
        slowest.push(cost.health);
        if cost.health < BOUND {
            return (outcome, cost);
        }
    }
    panic!("{what}: others waited {slowest:?}")
}

#[test]
fn floods_of_frames_cost_others_nothing() {
    let server = Server::start(&[]);
    let zero = 0_u32.to_be_bytes();
    let floods: [(&str, Vec<u8>); 10] = [
        ("PING", frame(6, 0, 0, &[0; 8]).repeat(4000)),
        ("PING ACK", frame(6, 1, 0, &[0; 8]).repeat(4000)),
        ("PRIORITY", frame(2, 0, 1, &[0, 0, 0, 0, 1]).repeat(4000)),
        ("SETTINGS", frame(4, 0, 0, &[0, 4, 0, 1, 0, 0]).repeat(4000)),
        ("empty SETTINGS", frame(4, 0, 0, &[]).repeat(4000)),
        ("WINDOW_UPDATE", frame(8, 0, 0, &1_u32.to_be_bytes()).repeat(4000)),
        ("unknown", frame(0x77, 0, 0, &zero).repeat(4000)),
        ("unknown and empty", frame(0x77, 0, 0, &[]).repeat(4000)),
        ("CONTINUATION", [frame(1, 0, 1, b"\x82"), frame(9, 0, 1, b"").repeat(4000)].concat()),
        ("empty DATA", [streams(1, |_| Vec::new()), frame(0, 0, 1, b"").repeat(4000)].concat()),
    ];
    let mut costs = Vec::new();
    for (name, bytes) in &floods {
        for address in [server.http, server.grpc, server.admin] {
            let (sent, cost) = unnoticed(&server, name, || flood(address, bytes));
            costs.push(format!("{name}: {} KiB sent, {cost:?}", sent >> 10));
        }
    }
    println!("{}", costs.join("\n"));
    for port in ["http", "grpc", "admin"] {
        let cut =
            metric(server.admin, &format!("nfold_ended_connections_total{{port=\"{port}\",reason=\"protocol\"}}"));
        assert!(cut >= 8, "{port}: {cut}");
    }
    // nor does it fill the log
    assert_eq!(metric(server.admin, "nfold_dropped_log_lines_total"), 0);
    server.signal("-TERM");
    assert!(server.wait().success());
}

/// CVE-2023-44487: requests that are reset at once.
#[test]
fn a_rapid_reset_costs_others_nothing() {
    let server = Server::start(&[]);
    let reset = |stream| frame(3, 0, stream, &8_u32.to_be_bytes());
    let requests = streams(20_000, reset);
    let (_, cost) = unnoticed(&server, "rapid reset", || flood(server.http, &requests));
    println!("rapid reset: {cost:?}");
    server.signal("-TERM");
    assert!(server.wait().success());
}
