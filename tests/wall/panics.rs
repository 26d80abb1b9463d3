//! Panics where none should occur: in the task of a call, in what it logs, in a compute thread. Each is reported to
//! whoever waits, logged and counted, and leaves nothing charged; other requests go on.

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nfold::infer::system::{Os, System};
use nfold::metrics::{Outcome, Protocol};
use nfold::server::{Options, ServeError};
use tokio::runtime::Runtime;
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::{Layer, Registry};

use super::calls::{INFER, call, frame};
use super::streams::{ended, error_of, message, run, stream};
use crate::fakes::{eventually, options};
use crate::serve::{TestServer, ask, local, png, start_on};

/// Name of the I/O threads; compute threads are named after their model.
const IO: &str = "told-io";

fn here() -> String {
    std::thread::current().name().unwrap_or_default().to_string()
}

/// The operating system, with a panic once where a test asks for it.
#[derive(Debug, Default)]
struct Faulty {
    /// Panic when an I/O thread reads the clock: during the admission of a call.
    call: AtomicBool,
    /// Panic when a compute thread wakes up.
    compute: AtomicBool,
}

impl System for Faulty {
    fn now(&self) -> Instant {
        assert!(here() != IO || !self.call.swap(false, Ordering::SeqCst), "told to panic, secret detail");
        Os.now()
    }

    fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> std::io::Result<Option<JoinHandle<()>>> {
        Os.spawn(name, body)
    }

    fn current(&self) -> Waker {
        Os.current()
    }

    fn park(&self, until: Option<Instant>) {
        Os.park(until);
        assert!(!here().starts_with("m/1-") || !self.compute.swap(false, Ordering::SeqCst), "told to panic");
    }

    fn sleep(&self, duration: Duration) {
        Os.sleep(duration);
    }
}

/// The log of the I/O threads. Panics on a line that contains this text.
struct Log {
    lines: Arc<Mutex<Vec<String>>>,
    breaks_at: &'static str,
}

struct Line(Vec<u8>);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        write!(self.0, "{field}={value:?} ").unwrap();
    }
}

impl Layer<Registry> for Log {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, Registry>) {
        let mut line = Line(Vec::new());
        event.record(&mut line);
        let line = format!("{} {}", event.metadata().level(), String::from_utf8_lossy(&line.0));
        self.lines.lock().unwrap().push(line.clone());
        assert!(self.breaks_at.is_empty() || !line.contains(self.breaks_at), "told to panic while it logs");
    }
}

struct Stage {
    server: TestServer,
    system: Arc<Faulty>,
    lines: Arc<Mutex<Vec<String>>>,
}

fn stage(server: Options, workers: usize, breaks_at: &'static str) -> Stage {
    let (system, lines) = (Arc::new(Faulty::default()), Arc::<Mutex<Vec<String>>>::default());
    let log = Log { lines: lines.clone(), breaks_at };
    let dispatch = tracing::Dispatch::new(tracing_subscriber::registry().with(log));
    let begin = move || std::mem::forget(tracing::dispatcher::set_default(&dispatch));
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime: Runtime =
        runtime.worker_threads(2).thread_name(IO).on_thread_start(begin).enable_all().build().unwrap();
    let server = start_on(runtime, system.clone(), server, options(workers, 4, 16));
    Stage { server, system, lines }
}

impl Stage {
    fn logged(&self, text: &str) -> bool {
        self.lines.lock().unwrap().iter().any(|line| line.contains(text))
    }

    fn nothing_is_held(&self) {
        eventually("no bytes are held", || self.server.metrics.body_bytes.get() == 0);
        eventually("no slots are held", || self.server.depth() == 0);
        eventually("nothing is in flight", || self.server.metrics.inflight_requests.get() == 0);
    }
}

#[test]
fn a_panic_in_a_streams_task_ends_that_stream_alone() {
    let stage = stage(local(), 1, "");
    let server = &stage.server;
    run(async {
        let (mut other, mut sick) = (stream(server, &[]).await, stream(server, &[("x-request-id", "sick")]).await);
        for call in [&mut other, &mut sick] {
            assert!(call.send(frame(&message(0))).await);
            assert_eq!(error_of(&call.next().await.expect("answered")), "");
        }
        // in the middle of a message that is charged
        assert!(sick.send(frame(&message(10_000))[..5000].to_vec()).await);
        eventually("it is charged", || server.metrics.body_bytes.get() > 0);
        stage.system.call.store(true, Ordering::SeqCst);
        assert!(sick.send(frame(&message(10_000))[5000..].to_vec()).await);
        let end = sick.end().await;
        assert_eq!(ended(&end), (13, "internal"), "{end:?}");
        assert!(!end.message.contains("secret"), "{end:?}");
        eventually("the message is counted", || server.requests(Protocol::GrpcStream, Outcome::Internal) == 1);
        assert!(stage.logged("stream sick met an internal error") && stage.logged("told to panic, secret detail"));
        // the other stream, and new ones, go on
        let mut new = stream(server, &[]).await;
        for call in [&mut other, &mut new] {
            assert!(call.send(frame(&message(0))).await);
            assert_eq!(error_of(&call.next().await.expect("answered")), "");
        }
    });
    stage.nothing_is_held();
    stage.server.end().unwrap();
}

/// Outside of the code that guards a message.
#[test]
fn a_panic_between_messages_ends_the_stream_with_a_status_too() {
    let stage = stage(local(), 1, "message 2 of stream sick");
    let server = &stage.server;
    run(async {
        let (mut other, mut sick) = (stream(server, &[]).await, stream(server, &[("x-request-id", "sick")]).await);
        assert!(sick.send([frame(&message(0)), frame(&message(5000))].concat()).await);
        assert_eq!(error_of(&sick.next().await.expect("answered")), "");
        assert_eq!(ended(&sick.end().await), (13, "internal"));
        assert!(stage.logged("stream sick met an internal error") && stage.logged("told to panic while it logs"));
        assert!(other.send(frame(&message(0))).await);
        assert_eq!(error_of(&other.next().await.expect("answered")), "");
    });
    stage.nothing_is_held();
    stage.server.end().unwrap();
}

#[test]
fn a_panic_in_any_other_call_is_its_answer() {
    let stage = stage(local(), 1, "");
    let server = &stage.server;
    let sick = |answer: &dyn Fn()| {
        stage.system.call.store(true, Ordering::SeqCst);
        answer();
        assert!(!stage.system.call.load(Ordering::SeqCst), "nothing panicked");
        stage.nothing_is_held();
    };
    sick(&|| {
        let end = call(server.grpc, INFER, &[], frame(&message(0)));
        assert_eq!(ended(&end), (13, "internal"), "{end:?}");
        assert!(!end.message.contains("secret"), "{end:?}");
    });
    sick(&|| {
        let answer = server.classify("", &[], &png(1));
        assert_eq!(answer.error(), (500, "internal".into()));
        assert!(!answer.body.contains("secret"), "{answer:?}");
    });
    assert_eq!(server.requests(Protocol::Grpc, Outcome::Internal), 1);
    assert_eq!(server.requests(Protocol::Rest, Outcome::Internal), 1);
    assert!(
        stage.logged("a gRPC handler panicked: told to panic") && stage.logged("a handler panicked: told to panic")
    );
    assert_eq!(server.classify("", &[], &png(1)).status, 200);
    assert_eq!(ended(&call(server.grpc, INFER, &[], frame(&message(0)))), (0, ""));
    stage.server.end().unwrap();
}

/// Other threads do the work that a dead compute thread was woken for.
#[test]
fn a_compute_thread_that_dies_leaves_its_work_to_the_others() {
    let stage = stage(local(), 2, "");
    let engines = || stage.server.metrics.engine_workers.with_label_values(&["m", "1"]).get();
    assert_eq!(engines(), 2);
    stage.system.compute.store(true, Ordering::SeqCst);
    for _ in 0..8 {
        assert_eq!(stage.server.classify("", &[], &png(1)).status, 200);
    }
    assert_eq!(engines(), 1);
    stage.nothing_is_held();
    stage.server.end().unwrap();
}

/// Without any compute thread, nobody waits for an answer, readiness fails, and the server ends to be restarted.
#[test]
fn a_model_whose_last_compute_thread_died_is_not_ready() {
    let stage = stage(Options { fault_limit: Duration::from_secs(2), ..local() }, 1, "");
    stage.system.compute.store(true, Ordering::SeqCst);
    let started = Instant::now();
    let answer = stage.server.classify("", &[], &png(1));
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    stage.nothing_is_held();
    assert_eq!(ask(stage.server.admin, "GET /readyz", &[], b"").status, 503);
    let ended = stage.server.thread.join().unwrap();
    assert!(matches!(&ended, Err(ServeError::Fault(fault)) if fault.contains("no working engine")), "{ended:?}");
}
