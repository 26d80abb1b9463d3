//! Requests that are refused before their body was read: the client continues to send, and still reads the reason.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use nfold::server::Options;

use super::{MIB, under_attack};
use crate::fakes::{eventually, options};
use crate::process::Server;
use crate::serve::{ask, local, parse, png, start};

const KEY: &str = "a-key-that-is-long-enough";

/// More than all buffers between client and server hold.
const BODY: usize = 10 << 20;

/// Requests with a large body: target, content type, whether with the key, and the status of the refusal.
const REFUSED: [(&str, &str, bool, u16); 8] = [
    ("/v1/classify", "image/png", false, 401),
    ("/v1/classify?model=other", "image/png", true, 404),
    ("/nothing", "image/png", true, 404),
    ("/v1/classify?top_k=x", "image/png", true, 400),
    ("/v1/classify", "text/css", true, 415),
    ("/v1/classify", "image/png", true, 413),
    ("/v2/health/live", "image/png", true, 405),
    ("/v2/models/other/infer", "application/json", true, 404),
];

fn locked() -> (Server, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    std::fs::write(&keys, KEY).unwrap();
    let flags = ["--api-key-file", keys.to_str().unwrap(), "--body-limit", "1048576"];
    (Server::start(&flags), folder)
}

/// Over HTTP/1.1: writes everything, then reads; returns the status.
fn write_then_read(address: SocketAddr, (target, kind, key, _): (&str, &str, bool, u16)) -> u16 {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let key = if key { format!("authorization: Bearer {KEY}\r\n") } else { String::new() };
    let head = format!(
        "POST {target} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: {kind}\r\ncontent-length: {BODY}\r\n{key}\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&vec![b'x'; BODY]).expect("the server reads on");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    parse(answer).error().0
}

/// Over HTTP/2: sends everything as flow control allows; returns the status. Fails if it can't send everything.
async fn send_all(address: SocketAddr, (target, kind, key, _): (&str, &str, bool, u16)) -> u16 {
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut request = axum::http::Request::post(format!("http://{address}{target}")).header("content-type", kind);
    if key {
        request = request.header("authorization", format!("Bearer {KEY}"));
    }
    let mut client = client.ready().await.unwrap();
    let (response, mut body) = client.send_request(request.body(()).unwrap(), false).unwrap();
    let mut left = BODY;
    while left > 0 {
        body.reserve_capacity(left);
        let room = std::future::poll_fn(|cx| body.poll_capacity(cx)).await.expect("not reset").unwrap();
        body.send_data(Bytes::from(vec![b'x'; room]), room == left).unwrap();
        left -= room;
    }
    let mut response = response.await.unwrap();
    let mut text = Vec::new();
    while let Some(part) = response.body_mut().data().await {
        text.extend(part.unwrap());
    }
    let error: serde_json::Value = serde_json::from_slice(&text).unwrap();
    assert!(error["error"].as_str().is_some_and(|error| !error.is_empty()), "{error}");
    connection.abort();
    response.status().as_u16()
}

#[test]
fn who_writes_first_still_reads_why_it_was_refused() {
    let (server, _folder) = locked();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let ((), cost) = under_attack(&server, || {
        for refused in REFUSED {
            assert_eq!(write_then_read(server.http, refused), refused.3, "{refused:?}");
            assert_eq!(runtime.block_on(send_all(server.http, refused)), refused.3, "HTTP/2 {refused:?}");
        }
    });
    assert!(cost.failed == 0 && cost.growth < 32 * MIB && cost.health < Duration::from_secs(1), "{cost:?}");
    drop(runtime);
    server.signal("-TERM");
    assert!(server.wait().success());
}

/// Common clients, if installed; `tests/clients` has more.
#[test]
fn curl_and_node_read_why_they_were_refused() {
    let (server, folder) = locked();
    let body = folder.path().join("body");
    std::fs::write(&body, vec![b'x'; BODY]).unwrap();
    for refused in REFUSED {
        for protocol in ["1.1", "2"] {
            for client in [curl, node] {
                let Some(command) = client(protocol, server.http, &body, refused) else { continue };
                let output = run(command);
                let said = String::from_utf8_lossy(&output.stdout);
                assert!(output.status.success(), "HTTP/{protocol} {refused:?}: {output:?}");
                assert!(
                    said.contains("\"error\"") && said.ends_with(&refused.3.to_string()),
                    "{refused:?}: {output:?}"
                );
            }
        }
    }
    server.signal("-TERM");
    assert!(server.wait().success());
}

fn run(mut command: Command) -> std::process::Output {
    command.output().unwrap()
}

fn installed(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// Prints the response's body and its status.
fn curl(
    protocol: &str,
    to: SocketAddr,
    body: &Path,
    (target, kind, key, _): (&str, &str, bool, u16),
) -> Option<Command> {
    let mut command = Command::new("curl");
    command.args([
        "--silent",
        "--show-error",
        "--max-time",
        "20",
        "--write-out",
        "%{http_code}",
        "--header",
        "expect:",
    ]);
    command.arg(if protocol == "2" { "--http2-prior-knowledge" } else { "--http1.1" });
    command.args(["--header", &format!("content-type: {kind}")]);
    if key {
        command.args(["--header", &format!("authorization: Bearer {KEY}")]);
    }
    command.args(["--data-binary", &format!("@{}", body.display()), &format!("http://{to}{target}")]);
    installed("curl").then_some(command)
}

/// The same with Node.
fn node(
    protocol: &str,
    to: SocketAddr,
    body: &Path,
    (target, kind, key, _): (&str, &str, bool, u16),
) -> Option<Command> {
    const HTTP1: &str = "
        const request = require('http').request(`http://${to}${target}`, { method: 'POST', headers });
        request.on('response', response => {
            response.on('data', part => text += part);
            response.on('end', () => done(response.statusCode));
        });";
    const HTTP2: &str = "
        const session = require('http2').connect(`http://${to}`);
        session.on('error', failed);
        const request = session.request({ ':method': 'POST', ':path': target, ...headers });
        let status;
        request.on('response', head => status = head[':status']);
        request.on('data', part => text += part);
        request.on('end', () => done(status));";
    let headers = if key {
        format!("{{ 'content-type': '{kind}', authorization: 'Bearer {KEY}' }}")
    } else {
        format!("{{ 'content-type': '{kind}' }}")
    };
    let script = format!(
        "const [to, target, headers] = ['{to}', '{target}', {headers}];
        let text = '';
        const failed = error => {{ console.error(error); process.exit(1); }};
        const done = status => {{ process.stdout.write(text + status, () => process.exit(0)); }};
        setTimeout(() => failed('no answer'), 20000);
        {}
        request.on('error', failed);
        request.end(require('fs').readFileSync('{}'));",
        if protocol == "2" { HTTP2 } else { HTTP1 },
        body.display()
    );
    let mut command = Command::new("node");
    command.args(["-e", &script]);
    installed("node").then_some(command)
}

/// A body that exceeds the memory budget is refused before it is read, and a client that writes first reads the
/// refusal.
#[test]
fn a_body_that_does_not_fit_in_memory_is_refused_and_told() {
    let limits = Options { body_limit: BODY, body_memory: BODY, ..local() };
    let server = start(limits, options(1, 4, 8));
    let mut first = TcpStream::connect(server.http).unwrap();
    first
        .write_all(format!("POST /v1/classify HTTP/1.1\r\nhost: a\r\ncontent-length: {BODY}\r\n\r\n").as_bytes())
        .unwrap();
    first.write_all(&vec![0; BODY / 2]).unwrap();
    eventually("it is in memory", || server.metrics.body_bytes.get() as usize == BODY / 2);
    let refused = ("/v1/classify", "image/png", false, 429);
    assert_eq!(write_then_read(server.http, refused), 429);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    assert_eq!(runtime.block_on(send_all(server.http, refused)), 429);
    drop((first, runtime));
    server.end().unwrap();
}

/// A client that sends `expect: 100-continue` is refused before it sends the body.
#[test]
fn a_client_that_asks_first_sends_nothing() {
    let server = start(local(), options(1, 4, 8));
    let asked = Instant::now();
    let head = format!("POST /nothing HTTP/1.1\r\nhost: a\r\ncontent-length: {BODY}\r\nexpect: 100-continue\r\n\r\n");
    let mut stream = TcpStream::connect(server.http).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 404");
    assert!(asked.elapsed() < Duration::from_millis(900), "{:?}", asked.elapsed());
    server.end().unwrap();
}

/// The server does not wait for a client that has stopped sending, or never stops.
#[test]
fn what_is_thrown_away_is_bounded() {
    let server = start(local(), options(1, 4, 8));
    let begin = |length: &str| {
        let mut stream = TcpStream::connect(server.http).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(format!("POST /nothing HTTP/1.1\r\nhost: a\r\n{length}\r\n\r\n").as_bytes()).unwrap();
        stream
    };
    let status = |mut stream: TcpStream| {
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).map(|()| String::from_utf8_lossy(&answer).into_owned())
    };
    let asked = Instant::now();
    // silent, and longer than the server would read
    for length in ["content-length: 1000", "content-length: 99999999999"] {
        assert_eq!(status(begin(length)).unwrap(), "HTTP/1.1 404");
    }
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    // without an end
    let mut endless = begin("transfer-encoding: chunked");
    let chunk = [b"10000\r\n".to_vec(), vec![b'x'; 65536], b"\r\n".to_vec()].concat();
    let mut sent = 0;
    while endless.write_all(&chunk).is_ok() {
        sent += 65536;
        assert!(sent < 1 << 30, "read for ever");
    }
    assert!(sent >= 64 << 20, "{sent}");
    assert_eq!(ask(server.http, "POST /v1/classify", &[], &png(1)).status, 200);
    server.end().unwrap();
}
