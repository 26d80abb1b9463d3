//! The server as clients and operators see it: the real program, the real demo model, real sockets and signals.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cli::{nfold, with_demo};
use crate::fakes::eventually;

/// A running `nfold serve` on free ports. Killed when dropped.
pub struct Server {
    child: Child,
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    pub admin: SocketAddr,
    folder: tempfile::TempDir,
    before: Vec<String>,
    log: Arc<Mutex<Vec<String>>>,
}

/// `nfold serve` in a folder, on free ports, with its log as JSON on a pipe.
pub fn serve(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nfold"));
    command.arg("serve").args(["--http", "--grpc", "--admin"].iter().flat_map(|port| [port, "127.0.0.1:0"]));
    command.args(["--log-format", "json"]).env_remove("NFOLD_LOG").current_dir(folder).stderr(Stdio::piped());
    command
}

impl Server {
    pub fn start(flags: &[&str]) -> Self {
        Self::start_in(with_demo(), flags)
    }

    /// Starts a server in `folder`, whose repository is the subfolder `repository`.
    pub fn start_in(folder: tempfile::TempDir, flags: &[&str]) -> Self {
        Self::start_with(folder, flags, &[])
    }

    /// The same, with environment variables.
    pub fn start_with(folder: tempfile::TempDir, flags: &[&str], variables: &[(&str, String)]) -> Self {
        let variables = variables.iter().map(|(name, value)| (*name, value.as_str()));
        let mut child = serve(folder.path()).args(flags).envs(variables).spawn().unwrap();
        let mut before = Vec::new();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut address_of = |what: &str| -> SocketAddr {
            let mut kept = lines.by_ref().map_while(Result::ok).inspect(|line| before.push(line.clone()));
            let line = kept.find(|line| line.contains(what));
            let line = line.unwrap_or_else(|| panic!("no `{what}`: {before:#?}"));
            let line: Value = serde_json::from_str(&line).unwrap();
            line["address"].as_str().unwrap().parse().unwrap()
        };
        let (admin, http) = (address_of("admin port listens"), address_of("HTTP port listens"));
        let grpc = address_of("gRPC port listens");
        // read the log: a full pipe would stop the server
        let log = Arc::<Mutex<Vec<String>>>::default();
        let heard = log.clone();
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| heard.lock().unwrap().push(line)));
        Self { child, http, grpc, admin, folder, before, log }
    }

    pub fn post(&self, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        ask(self.http, "POST", target, headers, body).unwrap()
    }

    pub fn get(&self, target: &str) -> Answer {
        ask(self.http, "GET", target, &[], &[]).unwrap()
    }

    /// Log lines since the server was ready that contain `text`.
    pub fn logged(&self, text: &str) -> Vec<String> {
        self.log.lock().unwrap().iter().filter(|line| line.contains(text)).cloned().collect()
    }

    /// Log lines before the server was ready that contain `text`.
    #[cfg_attr(not(feature = "hub"), allow(dead_code))]
    pub fn before_ready(&self, text: &str) -> Vec<&String> {
        self.before.iter().filter(|line| line.contains(text)).collect()
    }

    /// The server's working folder; the repository is its subfolder `repository`.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, name: &str) {
        let pid = self.pid().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }

    pub fn wait(mut self) -> ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the server does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let line = self.head.lines().find_map(|l| l.split_once(':').filter(|(n, _)| n.eq_ignore_ascii_case(name)))?;
        Some(line.1.trim())
    }
}

/// Whether a response with a `content-length` is complete.
fn is_whole(answer: &[u8]) -> bool {
    let Some(head) = answer.windows(4).position(|w| w == b"\r\n\r\n") else { return false };
    let text = String::from_utf8_lossy(&answer[..head]).to_ascii_lowercase();
    let length = text.lines().find_map(|l| l.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    length.is_some_and(|length| answer.len() >= head + 4 + length)
}

/// Sends one request on a new connection.
pub fn ask(
    to: SocketAddr,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> std::io::Result<Answer> {
    let headers = [headers, &[("connection", "close")]].concat();
    exchange(&mut connect(to)?, method, target, &headers, body)
}

pub fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    Ok(stream)
}

/// Sends one request on an open connection.
pub fn exchange(
    stream: &mut TcpStream,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> std::io::Result<Answer> {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = body.len();
    write!(stream, "{method} {target} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n{headers}\r\n")?;
    stream.write_all(body)?;
    let (mut answer, mut part) = (Vec::new(), [0; 65536]);
    // some servers keep the connection although asked to close it
    while !is_whole(&answer) {
        match stream.read(&mut part)? {
            0 => break,
            read => answer.extend_from_slice(&part[..read]),
        }
    }
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let broken = || std::io::Error::other(format!("no answer: {answer:?}"));
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(broken)?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(broken)?;
    Ok(Answer { status, head: head.into(), body: body.into() })
}

pub fn data(path: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)).unwrap()
}

fn multipart(images: &[&[u8]]) -> (String, Vec<u8>) {
    let mut body = Vec::new();
    for (i, image) in images.iter().enumerate() {
        write!(body, "--edge\r\ncontent-disposition: form-data; name=\"f{i}\"; filename=\"{i}\"\r\n\r\n").unwrap();
        body.extend_from_slice(image);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--edge--\r\n");
    ("multipart/form-data; boundary=edge".into(), body)
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::prelude::BASE64_STANDARD.encode(bytes)
}

#[test]
fn one_photograph_one_answer_by_every_way() {
    let server = Server::start(&[]);
    let cat = data("cat.jpg");
    let answer =
        server.post("/v1/classify?top_k=3", &[("content-type", "image/jpeg"), ("x-request-id", "abc-1")], &cat);
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.header("x-request-id"), Some("abc-1"));
    assert!(answer.header("server-timing").is_some_and(|t| t.contains("decode;dur=") && t.contains("inference;dur=")));
    let whole = answer.json();
    assert_eq!((&whole["model"], &whole["version"]), (&json!("nf_regnet_cifar10"), &json!(1)));
    let expected = &whole["results"][0]["predictions"];
    assert_eq!(expected.as_array().unwrap().len(), 3);

    // as the command line answers
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/cat.jpg").display().to_string();
    let output = nfold(&["classify", &path, "--json", "-k", "3"], server.folder.path());
    let by_cli: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(&by_cli["predictions"], expected);

    for headers in [&[][..], &[("content-type", "application/octet-stream")], &[("content-type", "image/x-whatever")]] {
        let answer = server.post("/v1/classify?top_k=3&model=nf_regnet_cifar10&version=1", headers, &cat);
        assert_eq!(&answer.json()["results"][0]["predictions"], expected, "{headers:?}");
        assert!(answer.header("x-request-id").is_some_and(|id| id.len() > 8));
    }

    // several images, one of them broken: the others are answered, in order, as if alone
    let ship = data("cifar10/ship/0000.jpg");
    let (kind, body) = multipart(&[&cat, b"not an image", &ship]);
    let several = server.post("/v1/classify?top_k=3", &[("content-type", &kind)], &body).json();
    assert_eq!(&several["results"][0]["predictions"], expected);
    assert_eq!(several["results"][1]["error"]["code"], "unsupported_media_type");
    let alone = server.post("/v1/classify?top_k=3", &[], &ship).json();
    assert_eq!(several["results"][2], alone["results"][0]);

    let body = json!({ "images": [{ "b64": base64(&ship) }, { "b64": base64(&cat) }], "top_k": 3 }).to_string();
    let by_json = server.post("/v1/classify", &[("content-type", "application/json")], body.as_bytes()).json();
    assert_eq!(by_json["results"], json!([alone["results"][0], whole["results"][0]]));
}

#[test]
fn every_refusal_is_json_with_its_code() {
    let server = Server::start(&["--body-limit", "300000"]);
    let cat = data("cat.jpg");
    let json_kind = ("content-type", "application/json");
    type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a [u8], u16, &'a str);
    let cases: [Case<'_>; 14] = [
        ("/v1/classify", &[], b"", 400, "invalid_image"),
        ("/v1/classify", &[], b"a text", 415, "unsupported_media_type"),
        ("/v1/classify", &[], &cat[..cat.len() / 2], 400, "invalid_image"),
        ("/v1/classify", &[("content-type", "text/html")], &cat, 415, "unsupported_media_type"),
        ("/v1/classify?model=other", &[], &cat, 404, "model_not_found"),
        ("/v1/classify?version=9", &[], &cat, 404, "model_not_found"),
        ("/v1/classify?version=x", &[], &cat, 400, "invalid_request"),
        ("/v1/classify?top_k=0", &[], &cat, 400, "invalid_request"),
        ("/v1/classify", &[("x-request-timeout-ms", "soon")], &cat, 400, "invalid_request"),
        ("/v1/classify", &[json_kind], b"{", 400, "invalid_request"),
        ("/v1/classify", &[json_kind], b"{\"images\": []}", 400, "invalid_request"),
        ("/v1/classify", &[json_kind], b"{\"images\": [{\"b64\": \"?\"}]}", 400, "invalid_image"),
        ("/v1/classify", &[("content-type", "multipart/form-data")], b"x", 400, "invalid_request"),
        ("/v1/nothing", &[], b"", 404, "not_found"),
    ];
    for (target, headers, body, status, code) in cases {
        let answer = server.post(target, headers, body);
        let body = answer.json();
        assert_eq!((answer.status, body["code"].as_str()), (status, Some(code)), "{target} {headers:?}: {answer:?}");
        assert!(body["error"].as_str().is_some_and(|e| !e.is_empty()), "{answer:?}");
        assert_eq!(answer.header("content-type"), Some("application/json"));
    }
    let large = server.post("/v1/classify", &[], &vec![0; 300_001]);
    assert_eq!((large.status, large.json()["code"].as_str()), (413, Some("body_too_large")));
    let wrong_method = server.get("/v1/classify");
    assert_eq!((wrong_method.status, wrong_method.json()["code"].as_str()), (405, Some("method_not_allowed")));
    let late = server.post("/v1/classify", &[("x-request-timeout-ms", "1")], &cat);
    assert!(late.status == 504 || late.status == 200, "{late:?}");

    // a header that promises 65535 x 65535 pixels is refused before any is decoded
    let mut bomb = cat.clone();
    let frame = bomb.windows(2).position(|w| w == [0xff, 0xc0] || w == [0xff, 0xc2]).unwrap();
    bomb[frame + 5..frame + 9].fill(0xff);
    let answer = server.post("/v1/classify", &[], &bomb);
    assert_eq!((answer.status, answer.json()["code"].as_str()), (413, Some("image_too_large")), "{answer:?}");

    // every request has exactly one outcome
    let metrics = ask(server.admin, "GET", "/metrics", &[], &[]).unwrap().body;
    let total: f64 = metrics
        .lines()
        .filter(|l| l.starts_with("nfold_requests_total{"))
        .map(|l| l.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .sum();
    assert_eq!(total, (cases.len() + 4) as f64, "{metrics}");
    assert!(metrics.contains("nfold_inflight_requests 0"));
}

#[test]
fn health_says_what_is() {
    let server = Server::start(&[]);
    for target in ["/livez", "/readyz"] {
        assert_eq!(ask(server.admin, "GET", target, &[], &[]).unwrap().status, 200, "{target}");
    }
    for target in ["/v2/health/live", "/v2/health/ready"] {
        let answer = server.get(target);
        assert_eq!((answer.status, answer.json()), (200, json!({"live": true, "ready": true})), "{target}");
    }
    for expected in
        ["nfold_ready 1", "nfold_invariance_max_abs_diff{model=\"nf_regnet_cifar10\",version=\"1\"} 0", "process_"]
    {
        // the second is NaN until every batch size is warm
        eventually(expected, || ask(server.admin, "GET", "/metrics", &[], &[]).unwrap().body.contains(expected));
    }
    let admin = server.admin.to_string();
    let folder = tempfile::tempdir().unwrap();
    assert!(nfold(&["healthcheck", "--admin", &admin], folder.path()).status.success());
    for other in [server.http, server.grpc] {
        let wrong = nfold(&["healthcheck", "--admin", &other.to_string()], folder.path());
        let said = String::from_utf8_lossy(&wrong.stderr);
        assert!(wrong.status.code() == Some(1) && said.contains("admin port"), "{wrong:?}");
    }
    let probed = ask(server.grpc, "GET", "/v2/health/ready", &[], b"").unwrap();
    assert!(probed.status == 415 && probed.body.contains("HTTP port"), "{probed:?}");

    // still answering, but not ready, while the hold lasts
    drop(server);
    let gone = nfold(&["healthcheck", "--admin", &admin], folder.path());
    assert_eq!(gone.status.code(), Some(1));
    let server = Server::start(&["--drain-hold", "1500ms"]);
    server.signal("-TERM");
    std::thread::sleep(Duration::from_millis(300));
    let ready = ask(server.admin, "GET", "/readyz", &[], &[]).unwrap();
    assert!(ready.status == 503 && ready.body.contains("shutting down"), "{ready:?}");
    let ready = server.get("/v2/health/ready");
    assert_eq!((ready.status, ready.json()["code"].as_str()), (503, Some("shutting_down")), "{ready:?}");
    let during = server.post("/v1/classify", &[], &data("cat.jpg"));
    assert_eq!(during.status, 200);
    assert!(server.wait().success());
}

#[test]
fn overload_is_refused_at_once_and_the_rest_is_answered() {
    let server = Server::start(&["--workers", "1", "--queue-limit", "3"]);
    let cat = data("cat.jpg");
    // each caller goes on until it has been answered three times
    let persist = || {
        let (mut answers, mut answered) = (Vec::new(), 0);
        while answered < 3 {
            let answer = server.post("/v1/classify", &[], &cat);
            answered += usize::from(answer.status == 200);
            answers.push((answer.status, answer.header("retry-after").map(String::from)));
            assert!(answers.len() < 5000, "never answered");
            std::thread::sleep(Duration::from_millis(1));
        }
        answers
    };
    let counts: Vec<(u16, Option<String>)> = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..12).map(|_| scope.spawn(persist)).collect();
        callers.into_iter().flat_map(|c| c.join().unwrap()).collect()
    });
    let (ok, refused): (Vec<_>, Vec<_>) = counts.iter().partition(|(status, _)| *status == 200);
    assert!(ok.len() == 36 && !refused.is_empty(), "{} answered, {} refused", ok.len(), refused.len());
    for (status, retry_after) in refused {
        assert_eq!(*status, 429);
        assert!(retry_after.as_deref().is_some_and(|s| s.parse::<u64>().is_ok_and(|s| s >= 1)), "{retry_after:?}");
    }
}

/// SIGTERM under traffic: every accepted request is answered, and the process exits with 0.
#[test]
fn a_signal_under_load_loses_nothing() {
    let server = Server::start(&["--drain-hold", "200ms"]);
    let (cat, address) = (data("cat.jpg"), server.http);
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let (cat, stop, answered) = (cat.clone(), stop.clone(), answered.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    match ask(address, "POST", "/v1/classify", &[], &cat) {
                        Ok(answer) => {
                            assert_eq!(answer.status, 200, "{answer:?}");
                            answered.fetch_add(1, Ordering::SeqCst);
                        }
                        // the port is closed, or was closed between the kernel's and the server's accept
                        Err(_) if TcpStream::connect(address).is_err() => return,
                        Err(error) => panic!("a request was lost: {error}"),
                    }
                }
            })
        })
        .collect();
    // traffic is under way, however slow the machine is
    eventually("traffic", || answered.load(Ordering::SeqCst) > 10);
    let before = answered.load(Ordering::SeqCst);
    server.signal("-TERM");
    assert!(server.wait().success());
    stop.store(true, Ordering::SeqCst);
    for caller in callers {
        caller.join().unwrap();
    }
    assert!(answered.load(Ordering::SeqCst) > before, "{before}");
}

/// New, broken and removed versions under traffic: no request fails, and a broken version changes nothing.
#[test]
fn models_come_and_go_under_load() {
    let server = Server::start(&[]);
    let (cat, address) = (data("cat.jpg"), server.http);
    let versions = server.folder.path().join("repository/nf_regnet_cifar10");
    let copy = |to: &str| {
        // moved into place, as `nfold fold` does
        let (from, fresh) = (versions.join("1"), versions.join(".fresh"));
        std::fs::create_dir(&fresh).unwrap();
        for file in ["model.onnx", "manifest.json"] {
            std::fs::copy(from.join(file), fresh.join(file)).unwrap();
        }
        if to == "3" {
            let mut manifest: Value =
                serde_json::from_slice(&std::fs::read(fresh.join("manifest.json")).unwrap()).unwrap();
            let first = manifest["golden"]["logits"][0].as_f64().unwrap();
            manifest["golden"]["logits"][0] = json!(first + 0.1);
            std::fs::write(fresh.join("manifest.json"), manifest.to_string()).unwrap();
        }
        std::fs::rename(fresh, versions.join(to)).unwrap();
    };
    let version = || server.post("/v1/classify", &[], &cat).json()["version"].as_u64().unwrap();
    let reloads = |result: &str| -> f64 {
        let metrics = ask(server.admin, "GET", "/metrics", &[], &[]).unwrap().body;
        let wanted = format!("result=\"{result}\"");
        let line = metrics.lines().find(|l| l.starts_with("nfold_model_reloads_total") && l.contains(&wanted));
        line.map_or(0.0, |l| l.rsplit(' ').next().unwrap().parse().unwrap())
    };
    let stop = AtomicBool::new(false);
    let answered = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut answered = 0;
                    while !stop.load(Ordering::SeqCst) {
                        let answer = ask(address, "POST", "/v1/classify", &[], &cat).expect("no request is lost");
                        assert_eq!(answer.status, 200, "{answer:?}");
                        answered += 1;
                    }
                    answered
                })
            })
            .collect();
        assert_eq!(version(), 1);
        copy("2");
        server.signal("-HUP");
        eventually("the new version answers", || version() == 2);
        copy("3");
        server.signal("-HUP");
        eventually("the broken version is found out", || reloads("error") == 1.0);
        assert_eq!((version(), reloads("ok")), (2, 1.0));
        std::fs::remove_dir_all(versions.join("3")).unwrap();
        std::fs::remove_dir_all(versions.join("2")).unwrap();
        server.signal("-HUP");
        eventually("the old version answers again", || version() == 1);
        stop.store(true, Ordering::SeqCst);
        callers.into_iter().map(|caller| caller.join().unwrap()).sum::<u32>()
    });
    assert!(answered > 20, "{answered}");
}

#[test]
fn serve_refuses_what_it_cannot_serve() {
    let folder = tempfile::tempdir().unwrap();
    let serve = |flags: &[&str]| {
        let mut args = vec!["serve", "--log", "off"];
        for port in ["--http", "--grpc", "--admin"] {
            if !flags.contains(&port) {
                args.extend([port, "127.0.0.1:0"]);
            }
        }
        let output = nfold(&[&args, flags].concat(), folder.path());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, text) = serve(&["--repository", "nowhere"]);
    assert!(code == Some(1) && text.starts_with("error: ") && text.contains("nfold fold"), "{text}");
    std::fs::create_dir(folder.path().join("empty")).unwrap();
    let (code, text) = serve(&["--repository", "empty"]);
    assert!(code == Some(1) && text.contains("holds no model"), "{text}");
    let demo = with_demo();
    let repository = demo.path().join("repository").display().to_string();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, text) = serve(&["--repository", &repository, "--admin", &address]);
    assert!(code == Some(1) && text.contains("--admin") && text.contains(&address), "{text}");
    let (code, text) = serve(&["--repository", &repository, "--http", &address]);
    assert!(code == Some(1) && text.contains("--http"), "{text}");
    let (code, text) = serve(&["--repository", &repository, "--model", "nf_regnet_cifar10:4"]);
    assert!(code == Some(1) && text.contains("no version 4"), "{text}");
    let (code, text) = serve(&["--repository", &repository, "--provider", "cuda"]);
    assert!(code == Some(1) && text.contains("`cuda` is not available"), "{text}");
}
