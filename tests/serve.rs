//! The server as clients, operators and orchestrators see it: real sockets, the real router, controllable engines; and
//! once the real program with a folded model.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base64::Engine as _;
use nfold::infer::job::SchedulerOptions;
use nfold::infer::registry::{LiveModel, Registry};
use nfold::infer::system::{Os, System};
use nfold::metrics::{Metrics, Outcome, Protocol};
use nfold::server::{Control, Options, ServeError, Server};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::fakes::{Fault, MARK, Strings, engines, eventually, images, model_dir, options};

/// A response; `None` if the connection ended first.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: String,
    pub bytes: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The error body that every failure has.
    pub fn error(&self) -> (u16, String) {
        let body = self.json();
        assert!(body["error"].as_str().is_some_and(|e| !e.is_empty()), "{self:?}");
        assert_eq!(self.headers["content-type"], "application/json", "{self:?}");
        assert!(self.headers.contains_key("x-request-id"), "{self:?}");
        (self.status, body["code"].as_str().unwrap().to_string())
    }
}

pub fn send(address: SocketAddr, head: &str, headers: &[(&str, &str)], body: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut text = format!("{head} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n");
    if !body.is_empty() {
        text += &format!("content-length: {}\r\n", body.len());
    }
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{text}\r\n").as_bytes()).unwrap();
    // a server may refuse before it has read everything
    let _ = stream.write_all(body);
    stream
}

pub fn receive(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    parse(bytes)
}

/// Parses one complete response.
pub fn parse(mut bytes: Vec<u8>) -> Answer {
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let after = bytes.windows(4).position(|w| w == b"\r\n\r\n").map_or(bytes.len(), |at| at + 4);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers = lines.filter_map(|l| l.split_once(": ")).map(|(n, v)| (n.to_lowercase(), v.to_string())).collect();
    Answer { status, headers, body: body.into(), bytes: bytes.split_off(after) }
}

pub fn ask(address: SocketAddr, head: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    receive(send(address, head, headers, body))
}

/// A one-colour PNG; the first logit of the fake engine is its red over 255.
pub fn png(red: u8) -> Vec<u8> {
    let image = image::RgbImage::from_pixel(2, 2, image::Rgb([red, 7, 9]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

pub struct TestServer {
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    pub admin: SocketAddr,
    pub strings: Arc<Strings>,
    pub metrics: Arc<Metrics>,
    pub control: tokio::sync::mpsc::Sender<Control>,
    pub thread: JoinHandle<Result<(), ServeError>>,
}

/// Free ports of this machine.
pub fn local() -> Options {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    Options { http: any, grpc: any, admin: any, ..Options::default() }
}

/// Starts a server that loads its model once `go` says so.
fn open(
    server: Options,
    scheduler: SchedulerOptions,
    names: &'static [&'static str],
    go: mpsc::Receiver<()>,
) -> TestServer {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    open_on(runtime, Arc::new(Os), server, scheduler, names, go)
}

/// The same, on these I/O threads and this system.
fn open_on(
    runtime: Runtime,
    system: Arc<dyn System>,
    server: Options,
    scheduler: SchedulerOptions,
    names: &'static [&'static str],
    go: mpsc::Receiver<()>,
) -> TestServer {
    let strings = Arc::new(Strings::default());
    let server = {
        let _inside = runtime.enter();
        Server::bind(server).unwrap()
    };
    let (http, grpc, admin) = (server.http_address(), server.grpc_address(), server.admin_address());
    let metrics = server.metrics();
    let (control, controlled) = tokio::sync::mpsc::channel(2);
    let pulled = strings.clone();
    let load = move |metrics: &Metrics| {
        go.recv().unwrap();
        let registry = Registry::default();
        for name in names {
            let (dir, engines) = (model_dir(name, 1), engines(&pulled));
            registry.add(LiveModel::start_on(system.clone(), &dir, engines, &scheduler, metrics)?);
        }
        pulled.forget_warm_up();
        Ok(registry)
    };
    let thread = std::thread::spawn(move || {
        let ended = runtime.block_on(server.run(load, controlled));
        runtime.shutdown_background();
        ended
    });
    TestServer { http, grpc, admin, strings, metrics, control, thread }
}

pub fn start(server: Options, scheduler: SchedulerOptions) -> TestServer {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    start_on(runtime, Arc::new(Os), server, scheduler)
}

/// The same with models of these names.
pub fn start_with(server: Options, names: &'static [&'static str]) -> TestServer {
    let (go, gone) = mpsc::channel();
    go.send(()).unwrap();
    let server = open(server, options(1, 4, 16), names, gone);
    server.until_ready();
    server
}

/// The same on these I/O threads and this system.
pub fn start_on(runtime: Runtime, system: Arc<dyn System>, server: Options, scheduler: SchedulerOptions) -> TestServer {
    let (go, gone) = mpsc::channel();
    go.send(()).unwrap();
    let server = open_on(runtime, system, server, scheduler, &["m"], gone);
    server.until_ready();
    server
}

impl TestServer {
    fn until_ready(&self) {
        eventually("ready", || ask(self.admin, "GET /readyz", &[], b"").status == 200);
    }

    pub fn classify(&self, query: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        ask(self.http, &format!("POST /v1/classify{query}"), headers, body)
    }

    /// Sends an image and leaves it inside the held engine.
    pub fn occupy(&self) -> TcpStream {
        self.strings.hold();
        let stream = send(self.http, "POST /v1/classify", &[], &png(0));
        eventually("the engine is busy", || self.strings.runs() == 1);
        stream
    }

    pub fn stop(&self) {
        self.control.blocking_send(Control::Stop).unwrap();
    }

    pub fn end(self) -> Result<(), ServeError> {
        drop(self.control);
        self.thread.join().unwrap()
    }

    pub fn requests(&self, protocol: Protocol, outcome: Outcome) -> u64 {
        self.metrics.requests_total.with_label_values(&[protocol.name(), outcome.name()]).get()
    }

    pub fn depth(&self) -> i64 {
        self.metrics.queue_depth.with_label_values(&["m", "1"]).get()
    }
}

#[test]
fn raw_bytes_in_predictions_out() {
    let server = start(local(), options(2, 4, 16));
    for kind in [&[][..], &[("content-type", "image/png")], &[("content-type", "application/octet-stream")]] {
        let answer = server.classify("?top_k=2", kind, &png(255));
        assert_eq!(answer.status, 200, "{answer:?}");
        let body = answer.json();
        assert_eq!((&body["model"], &body["version"]), (&json!("m"), &json!(1)));
        let predictions = body["results"][0]["predictions"].as_array().unwrap();
        assert_eq!(predictions.len(), 2);
        assert_eq!((&predictions[0]["index"], &predictions[0]["label"]), (&json!(0), &json!("first")));
        assert!(predictions[0]["score"].as_f64().unwrap() < 1.0);
        let timing = &answer.headers["server-timing"];
        assert!(["decode;dur=", "queue;dur=", "inference;dur="].iter().all(|p| timing.contains(p)), "{timing}");
    }
    assert_eq!(
        server.classify("?top_k=99&model=m&version=1", &[], &png(1)).json()["results"][0]["predictions"]
            .as_array()
            .unwrap()
            .len(),
        3
    );
    server.end().unwrap();
}

#[test]
fn forms_and_json_keep_the_order_and_isolate_bad_images() {
    let server = start(local(), options(1, 4, 16));
    let (good, other) = (png(200), png(50));
    let scores = |answer: &Answer| {
        let results = answer.json()["results"].as_array().unwrap().clone();
        assert_eq!(results.len(), 3, "{answer:?}");
        assert_eq!(results[1]["error"]["code"], "unsupported_media_type");
        assert!(results[1].get("predictions").is_none());
        let score = |i: usize| results[i]["predictions"][0]["score"].as_f64().unwrap();
        assert!(score(0) > score(2), "{answer:?}");
        assert_eq!(results[0]["predictions"].as_array().unwrap().len(), 1);
    };
    let mut form = Vec::new();
    for part in [&good[..], b"no image", &other] {
        form.extend(b"--X\r\ncontent-disposition: form-data; name=\"f\"; filename=\"f\"\r\n\r\n");
        form.extend(part);
        form.extend(b"\r\n");
    }
    form.extend(b"--X\r\ncontent-disposition: form-data; name=\"top_k\"\r\n\r\n1\r\n--X--\r\n");
    scores(&server.classify("", &[("content-type", "multipart/form-data; boundary=X")], &form));
    let b64 = |bytes: &[u8]| json!({ "b64": base64::engine::general_purpose::STANDARD.encode(bytes) });
    let body = json!({ "images": [b64(&good), b64(b"no image"), b64(&other)], "top_k": 1 }).to_string();
    scores(&server.classify("", &[("content-type", "application/json; charset=utf-8")], body.as_bytes()));
    server.end().unwrap();
}

#[test]
fn every_error_is_json_with_its_code() {
    let server = start(Options { body_limit: 2000, ..local() }, options(1, 4, 3));
    let json_kind = ("content-type", "application/json");
    let form_kind = ("content-type", "multipart/form-data; boundary=X");
    type Case = (&'static str, Vec<(&'static str, &'static str)>, Vec<u8>, u16, &'static str);
    let cases: Vec<Case> = vec![
        ("POST /v1/classify", vec![], b"no image".to_vec(), 415, "unsupported_media_type"),
        ("POST /v1/classify", vec![], vec![], 400, "invalid_image"),
        ("POST /v1/classify", vec![], png(1)[..40].to_vec(), 400, "invalid_image"),
        ("POST /v1/classify", vec![("content-type", "text/plain")], png(1), 415, "unsupported_media_type"),
        ("POST /v1/classify", vec![], vec![0; 3000], 413, "body_too_large"),
        ("POST /v1/classify", vec![form_kind], vec![b'x'; 3000], 413, "body_too_large"),
        ("POST /v1/classify", vec![form_kind], b"junk".to_vec(), 400, "invalid_request"),
        ("POST /v1/classify", vec![("content-type", "multipart/form-data")], b"x".to_vec(), 400, "invalid_request"),
        ("POST /v1/classify", vec![json_kind], b"{".to_vec(), 400, "invalid_request"),
        ("POST /v1/classify", vec![json_kind], b"{\"images\":[]}".to_vec(), 400, "invalid_request"),
        ("POST /v1/classify", vec![json_kind], b"{\"images\":[{\"b64\":\"!\"}]}".to_vec(), 400, "invalid_image"),
        ("POST /v1/classify", vec![json_kind], b"{\"image\":1}".to_vec(), 400, "invalid_request"),
        ("POST /v1/classify?top_k=0", vec![], png(1), 400, "invalid_request"),
        ("POST /v1/classify?top_k=-1", vec![], png(1), 400, "invalid_request"),
        ("POST /v1/classify?model=x", vec![], png(1), 404, "model_not_found"),
        ("POST /v1/classify?version=7", vec![], png(1), 404, "model_not_found"),
        ("POST /v1/classify", vec![("x-request-timeout-ms", "soon")], png(1), 400, "invalid_request"),
        ("POST /v1/classify", vec![("x-request-timeout-ms", "0")], png(1), 400, "invalid_request"),
        ("GET /v1/classify", vec![], vec![], 405, "method_not_allowed"),
        ("DELETE /v2/health/live", vec![], vec![], 405, "method_not_allowed"),
        ("GET /v1/nothing", vec![], vec![], 404, "not_found"),
        ("GET /page", vec![], vec![], 404, "not_found"),
    ];
    let count = cases.len() as u64;
    for (head, headers, body, status, code) in cases {
        let answer = ask(server.http, head, &headers, &body);
        assert_eq!(answer.error(), (status, code.to_string()), "{head}: {answer:?}");
    }
    let four = json!({ "images": vec![json!({ "b64": "" }); 4] }).to_string();
    assert_eq!(server.classify("", &[json_kind], four.as_bytes()).error(), (400, "invalid_request".into()));
    let sum = |p: Protocol| Outcome::ALL.iter().map(|&o| server.requests(p, o)).sum::<u64>();
    eventually("every request is counted", || Protocol::ALL.iter().map(|&p| sum(p)).sum::<u64>() == count + 1);
    assert_eq!(server.requests(Protocol::Rest, Outcome::Ok), 0);
    server.end().unwrap();
}

#[test]
fn faults_are_told_to_the_log_only() {
    let server = start(local(), options(1, 4, 16));
    let mark = u8::MAX;
    assert!((f32::from(mark) / 255.0 - MARK).abs() > 1.0, "images can't carry the mark");
    *server.strings.fault.lock().unwrap() = Some(Fault::Short);
    let answer = server.classify("", &[], &png(1));
    assert_eq!(answer.error(), (500, "internal".into()));
    assert!(!answer.body.contains("classes"), "{answer:?}");
    eventually("counted", || server.requests(Protocol::Rest, Outcome::Internal) == 1);
    *server.strings.fault.lock().unwrap() = None;
    assert_eq!(server.classify("", &[], &png(1)).status, 200);
    server.end().unwrap();
}

#[test]
fn request_ids_are_echoed_or_made() {
    let server = start(local(), options(1, 4, 16));
    let id = |headers: &[(&str, &str)]| server.classify("", headers, &png(1)).headers["x-request-id"].clone();
    assert_eq!(id(&[("x-request-id", "abc-123")]), "abc-123");
    assert_ne!(id(&[]), id(&[]));
    assert_ne!(id(&[("x-request-id", "two words")]), "two words");
    assert_ne!(id(&[("x-request-id", &"x".repeat(200))]).len(), 200);
    server.end().unwrap();
}

#[test]
fn a_full_queue_answers_429_with_retry_after_while_admin_answers() {
    let server = start(local(), options(1, 1, 2));
    let busy = server.occupy();
    let waiting = send(server.http, "POST /v1/classify", &[], &png(1));
    eventually("both are admitted", || server.depth() == 2);
    let refused = server.classify("", &[], &png(2));
    assert_eq!(refused.error(), (429, "overloaded".into()));
    assert!(refused.headers["retry-after"].parse::<u64>().unwrap() >= 1);
    let metrics = ask(server.admin, "GET /metrics", &[], b"");
    assert!(metrics.body.contains("nfold_queue_depth{model=\"m\",version=\"1\"} 2"), "{}", metrics.body);
    assert!(metrics.body.contains("nfold_inflight_requests 2"));
    assert_eq!(ask(server.admin, "GET /livez", &[], b"").status, 200);
    server.strings.release();
    assert_eq!((receive(busy).status, receive(waiting).status), (200, 200));
    assert_eq!((server.depth(), server.requests(Protocol::Rest, Outcome::Overloaded)), (0, 1));
    server.end().unwrap();
}

#[test]
fn a_deadline_answers_504_and_nothing_is_computed() {
    let server = start(local(), options(1, 1, 8));
    let busy = server.occupy();
    let late = server.classify("", &[("x-request-timeout-ms", "40")], &png(1));
    assert_eq!(late.error(), (504, "deadline_exceeded".into()));
    server.strings.release();
    assert_eq!(receive(busy).status, 200);
    eventually("the slot is back", || server.depth() == 0);
    assert_eq!(server.strings.runs(), 1);
    server.end().unwrap();
}

#[test]
fn a_body_that_never_comes_answers_504() {
    let server = start(local(), options(1, 1, 8));
    let mut stream = TcpStream::connect(server.http).unwrap();
    let head = "POST /v1/classify HTTP/1.1\r\nhost: t\r\ncontent-length: 10\r\nx-request-timeout-ms: 50\r\nconnection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    assert_eq!(receive(stream).error(), (504, "deadline_exceeded".into()));
    server.end().unwrap();
}

#[test]
fn a_client_that_goes_away_cancels_its_queued_image() {
    let server = start(local(), options(1, 1, 8));
    let busy = server.occupy();
    let gone = send(server.http, "POST /v1/classify", &[], &png(1));
    eventually("it is admitted", || server.depth() == 2);
    drop(gone);
    eventually("it is counted", || server.requests(Protocol::Rest, Outcome::Cancelled) == 1);
    server.strings.release();
    assert_eq!(receive(busy).status, 200);
    eventually("its image too", || images(&server.metrics, "m", Outcome::Cancelled) == 1);
    assert_eq!((server.depth(), server.strings.runs()), (0, 1));
    server.end().unwrap();
}

#[test]
fn ready_only_when_warm_and_listening() {
    let (go, gone) = mpsc::channel();
    let server = open(local(), options(1, 2, 8), &["m"], gone);
    eventually("the admin port is up", || TcpStream::connect(server.admin).is_ok());
    let loading = ask(server.admin, "GET /readyz", &[], b"");
    assert_eq!((loading.status, loading.body.as_str()), (503, "not ready: models are loading\n"));
    assert_eq!(ask(server.admin, "GET /livez", &[], b"").status, 200);
    assert!(ask(server.admin, "GET /metrics", &[], b"").body.contains("nfold_ready 0"));
    assert!(TcpStream::connect(server.http).is_err(), "a probe that only connects must fail too");
    go.send(()).unwrap();
    server.until_ready();
    let health = ask(server.http, "GET /v2/health/ready", &[], b"");
    assert_eq!((health.status, health.json()), (200, json!({ "live": true, "ready": true })));
    assert_eq!(ask(server.http, "GET /v2/health/live", &[], b"").json(), json!({ "live": true, "ready": true }));
    let metrics = ask(server.admin, "GET /metrics", &[], b"").body;
    assert!(metrics.contains("nfold_ready 1") && metrics.contains("nfold_model_info{"), "{metrics}");
    server.end().unwrap();
}

#[test]
fn a_stop_while_loading_ends_at_once() {
    let (go, gone) = mpsc::channel();
    let server = open(local(), options(1, 2, 8), &["m"], gone);
    server.stop();
    server.thread.join().unwrap().unwrap();
    let _ = go.send(());
}

#[test]
fn draining_says_not_ready_answers_what_is_in_flight_and_refuses_the_rest() {
    let hold = Duration::from_millis(300);
    let server = start(Options { drain_hold: hold, ..local() }, options(1, 1, 8));
    let busy = server.occupy();
    let queued = send(server.http, "POST /v1/classify", &[], &png(1));
    eventually("both are admitted", || server.depth() == 2);
    server.stop();
    eventually("not ready", || ask(server.admin, "GET /readyz", &[], b"").status == 503);
    let ready = ask(server.http, "GET /v2/health/ready", &[], b"");
    assert_eq!(ready.error(), (503, "shutting_down".into()));
    let held = send(server.http, "POST /v1/classify", &[], &png(2));
    eventually("requests are still taken", || server.depth() == 3);
    eventually("then no longer", || TcpStream::connect(server.http).is_err());
    assert_eq!(ask(server.admin, "GET /livez", &[], b"").status, 200);
    server.strings.release();
    for stream in [busy, queued, held] {
        assert_eq!(receive(stream).status, 200);
    }
    server.thread.join().unwrap().unwrap();
}

/// A connection in the kernel's queue looks connected to its client, which has sent its request.
#[test]
fn a_stop_answers_connections_that_were_not_accepted_yet() {
    let server = start(Options { connections: 1, ..local() }, options(1, 1, 8));
    let busy = server.occupy();
    let queued = send(server.http, "POST /v1/classify", &[], &png(1));
    let silent = TcpStream::connect(server.http).unwrap();
    server.stop();
    eventually("the port is closed", || TcpStream::connect(server.http).is_err());
    server.strings.release();
    assert_eq!((receive(busy).status, receive(queued).status), (200, 200));
    server.thread.join().unwrap().expect("one that says nothing does not hold up the end");
    drop(silent);
}

#[test]
fn a_drain_has_an_end() {
    let server = start(Options { drain_timeout: Duration::from_millis(100), ..local() }, options(1, 1, 8));
    let _hung = server.occupy();
    let started = Instant::now();
    server.stop();
    server.thread.join().unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
    server.strings.release();
}

#[test]
fn a_second_stop_is_now() {
    let server = start(Options { drain_hold: Duration::from_secs(60), ..local() }, options(1, 1, 8));
    let _hung = server.occupy();
    server.stop();
    server.stop();
    server.thread.join().unwrap().unwrap();
    server.strings.release();
}

#[test]
fn hung_engines_end_readiness_and_then_the_server() {
    let limits = Options {
        hang_limit: Duration::from_millis(50),
        fault_limit: Duration::from_millis(300),
        drain_timeout: Duration::from_millis(50),
        ..local()
    };
    let server = start(limits, options(1, 1, 8));
    let _hung = server.occupy();
    eventually("not ready", || ask(server.admin, "GET /readyz", &[], b"").status == 503);
    assert!(matches!(server.thread.join().unwrap(), Err(ServeError::Fault(_))));
    server.strings.release();
}

#[test]
fn several_models_must_be_named() {
    let (go, gone) = mpsc::channel();
    go.send(()).unwrap();
    let server = open(local(), options(1, 2, 8), &["a", "b"], gone);
    server.until_ready();
    let unnamed = server.classify("", &[], &png(1));
    assert_eq!(unnamed.error(), (400, "invalid_request".into()));
    assert!(unnamed.body.contains("a, b"), "{unnamed:?}");
    assert_eq!(server.classify("?model=b", &[], &png(1)).json()["model"], "b");
    server.end().unwrap();
}

#[test]
fn an_address_in_use_is_told_before_models_load() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = Server::bind(Options { http: taken.local_addr().unwrap(), ..local() });
    assert!(matches!(refused, Err(ServeError::Bind { port: "http", .. })), "{refused:?}");
}

#[test]
fn under_load_every_request_is_answered_and_counted() {
    let server = start(local(), options(2, 4, 8));
    *server.strings.delay.lock().unwrap() = Duration::from_millis(1);
    let answers = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..8)
            .map(|c: u8| {
                let server = &server;
                scope.spawn(move || {
                    let ask = |i: u8| {
                        let red = c * 30 + i;
                        let answer = server.classify("?top_k=3", &[], &png(red));
                        if answer.status == 200 {
                            // softmax of (red/255, 7/255 …): the response is for this very image
                            let of = |i| {
                                let all = answer.json()["results"][0]["predictions"].as_array().unwrap().clone();
                                all.iter().find(|p| p["index"] == i).unwrap()["score"].as_f64().unwrap()
                            };
                            let logit = (of(0) / of(2)).ln();
                            assert!((logit - f64::from(red) / 255.0).abs() < 1e-4, "{red}: {answer:?}");
                        }
                        answer.status
                    };
                    (0..25).map(ask).collect::<Vec<_>>()
                })
            })
            .collect();
        clients.into_iter().flat_map(|c| c.join().unwrap()).collect::<Vec<u16>>()
    });
    assert!(answers.iter().all(|s| matches!(s, 200 | 429)), "{answers:?}");
    let ok = answers.iter().filter(|&&s| s == 200).count() as u64;
    eventually("counted", || server.requests(Protocol::Rest, Outcome::Ok) == ok);
    assert_eq!(server.requests(Protocol::Rest, Outcome::Overloaded), 200 - ok);
    assert_eq!((server.depth(), server.metrics.inflight_requests.get()), (0, 0));
    server.end().unwrap();
}

/// End to end: fold the demo checkpoint, serve it with the program itself, classify, SIGTERM, exit code 0.
#[test]
fn the_program_serves_a_folded_model() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = root.join("models/nf_regnet_cifar10").display().to_string();
    let folded = crate::cli::nfold(&["fold", &checkpoint], folder.path());
    assert!(folded.status.success(), "{}", String::from_utf8_lossy(&folded.stderr));
    let flags = ["--workers", "2", "--max-batch-size", "4"];
    let mut server = crate::process::serve(folder.path()).args(flags).spawn().unwrap();
    let mut addresses = BTreeMap::new();
    let mut log = BufReader::new(server.stderr.take().unwrap()).lines();
    for line in log.by_ref() {
        let line: Value = serde_json::from_str(&line.unwrap()).unwrap();
        if let (Some(protocol), Some(address)) = (line["protocol"].as_str(), line["address"].as_str()) {
            addresses.insert(protocol.to_string(), address.parse::<SocketAddr>().unwrap());
        }
        if line["message"] == "ready" {
            break;
        }
    }
    let (http, admin) = (addresses["http"], addresses["admin"]);
    let cat = std::fs::read(root.join("tests/data/cat.jpg")).unwrap();
    let answer = ask(http, "POST /v1/classify?top_k=3", &[("content-type", "image/jpeg")], &cat);
    assert_eq!(answer.status, 200, "{answer:?}");
    // the same photograph through the command line
    let path = root.join("tests/data/cat.jpg").display().to_string();
    let direct = crate::cli::nfold(&["classify", &path, "--json", "--top-k", "3"], folder.path());
    let direct: Value = serde_json::from_slice(&direct.stdout).unwrap();
    assert_eq!(answer.json()["results"][0]["predictions"], direct["predictions"], "{direct}");
    assert_eq!(
        crate::cli::nfold(&["healthcheck", "--admin", &admin.to_string()], folder.path()).status.code(),
        Some(0)
    );
    let metrics = ask(admin, "GET /metrics", &[], b"").body;
    assert!(metrics.contains("nfold_requests_total{outcome=\"ok\",protocol=\"rest\"} 1"), "{metrics}");
    // what `curl -d @photo.jpg` sends of it
    let by_form = [("content-type", "application/x-www-form-urlencoded")];
    let left: Vec<u8> = cat.iter().copied().filter(|byte| !b"\r\n\0".contains(byte)).collect();
    let answer = ask(http, "POST /v1/classify", &by_form, &left);
    assert!(answer.status >= 400 && answer.body.contains("send them with --data-binary"), "{answer:?}");
    let answer = ask(http, "POST /v1/classify", &by_form, &cat[..cat.len() / 2]);
    assert!(answer.status == 400 && !answer.body.contains("curl"), "{answer:?}");
    let killed = Command::new("kill").arg(server.id().to_string()).status().unwrap();
    assert!(killed.success());
    assert_eq!(server.wait().unwrap().code(), Some(0));
    assert!(log.any(|l| l.unwrap().contains("\"stopped\"")));
    let gone = crate::cli::nfold(&["healthcheck", "--admin", &admin.to_string()], folder.path());
    assert_eq!(gone.status.code(), Some(1));
}

/// Finished images are answered; those that the deadline cut off have an error.
#[test]
fn a_deadline_in_the_middle_of_a_request_keeps_what_is_done() {
    let server = start(local(), options(1, 1, 64));
    *server.strings.delay.lock().unwrap() = Duration::from_millis(60);
    let b64 = |bytes: &[u8]| json!({ "b64": base64::engine::general_purpose::STANDARD.encode(bytes) });
    let images: Vec<_> = (0..20).map(|i| if i == 1 { b64(b"no image") } else { b64(&png(i)) }).collect();
    let body = json!({ "images": images }).to_string();
    let headers = [("content-type", "application/json"), ("x-request-timeout-ms", "500")];
    let answer = server.classify("", &headers, body.as_bytes());
    assert_eq!(answer.status, 200, "{answer:?}");
    let results = answer.json()["results"].as_array().unwrap().clone();
    assert_eq!(results.len(), 20);
    assert_eq!(results[1]["error"]["code"], "unsupported_media_type");
    let done = results.iter().filter(|result| result.get("predictions").is_some()).count();
    let late = results.iter().filter(|result| result["error"]["code"] == "deadline_exceeded").count();
    assert!(done >= 1 && late >= 5 && done + late == 19, "{done} done, {late} late");
    assert!(results[0].get("predictions").is_some(), "in the order in which they came");
    assert!(results[19]["error"]["code"] == "deadline_exceeded");
    // with no image finished, the request fails
    server.strings.hold();
    let answer = server.classify("", &headers, body.as_bytes());
    server.strings.release();
    assert_eq!((answer.status, answer.json()["code"].clone()), (504, json!("deadline_exceeded")));
    server.end().unwrap();
}

#[test]
fn a_model_is_ready_whatever_the_others_do() {
    let (go, gone) = mpsc::channel();
    go.send(()).unwrap();
    let server = Options { hang_limit: Duration::from_millis(50), ..local() };
    let server = open(server, options(1, 1, 16), &["m", "n"], gone);
    server.until_ready();
    let status = |path: &str| ask(server.http, &format!("GET {path}"), &[], b"").status;
    let models = ["/v2/models/m/ready", "/v2/models/n/versions/1/ready"];
    assert_eq!(models.map(status), [200, 200]);
    server.strings.hold();
    let stream = send(server.http, "POST /v1/classify?model=m", &[], &png(0));
    eventually("it hangs", || status(models[0]) == 503);
    assert_eq!((status(models[1]), status("/v2/health/ready")), (200, 503), "the server as a whole is not");
    let index = ask(server.http, "POST /v2/repository/index", &[], b"").json();
    assert_eq!((&index[0]["state"], &index[1]["state"]), (&json!("UNAVAILABLE"), &json!("READY")), "{index}");
    assert!(index[0]["reason"].as_str().unwrap().contains("hangs"), "{index}");
    let ready = ask(server.http, "POST /v2/repository/index", &[], b"{\"ready\":true}").json();
    assert_eq!(ready.as_array().unwrap().len(), 1, "{ready}");
    server.strings.release();
    assert_eq!(receive(stream).status, 200);
    eventually("it is back", || models.map(status) == [200, 200]);
    server.end().unwrap();
}
