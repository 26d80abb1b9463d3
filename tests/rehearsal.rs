//! A rolling restart as a cluster does it: three servers behind HAProxy, which asks `/readyz` as Kubernetes would and
//! never retries, each stopped by SIGTERM and started again while clients call. No request may fail.
//!
//! Without haproxy the tests say SKIP on stderr and pass; `make tools` installs it on Debian.

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::cli::with_demo;
use crate::process::{Answer, ask, connect, data, exchange};

/// How long a stopped server still answers; the proxy checks ten times in that.
const HOLD: &str = "1s";
const CALLERS: usize = 4;

/// A process that is killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn signal(&self, name: &str) {
        assert!(Command::new("kill").args([name, &self.0.id().to_string()]).status().unwrap().success());
    }
}

/// Three servers and the proxy before them.
struct Cluster {
    servers: Vec<(SocketAddr, SocketAddr, Process)>,
    proxy: SocketAddr,
    folder: tempfile::TempDir,
    _proxy: Process,
}

/// A port that was free a moment ago: a server must restart on the same port.
fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn eventually(what: &str, so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !so() {
        assert!(Instant::now() < deadline, "{what}: never");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is_ok(address: SocketAddr, path: &str) -> bool {
    ask(address, "GET", path, &[], &[]).is_ok_and(|a| a.status == 200)
}

fn serve(folder: &Path, http: SocketAddr, admin: SocketAddr) -> Process {
    let child = Command::new(env!("CARGO_BIN_EXE_nfold"))
        .args(["serve", "--workers", "1", "--drain-hold", HOLD, "--log", "off", "--grpc", "127.0.0.1:0"])
        .args(["--http", &http.to_string(), "--admin", &admin.to_string()])
        .current_dir(folder)
        .spawn();
    Process(child.unwrap())
}

impl Cluster {
    /// `None` without haproxy.
    fn start() -> Option<Self> {
        if Command::new("haproxy").arg("-v").stdout(Stdio::null()).status().is_err() {
            let said = b"SKIP: no haproxy here, so no rolling restart was rehearsed (make tools)\n";
            std::io::stderr().write_all(said).unwrap();
            return None;
        }
        let folder = with_demo();
        let (proxy, addresses) = (free(), [(); 3].map(|()| (free(), free())));
        let lines: String = addresses
            .iter()
            .map(|(http, admin)| {
                format!(
                    "  server s{0} 127.0.0.1:{0} check port {1} inter 100ms fall 1 rise 1\n",
                    http.port(),
                    admin.port()
                )
            })
            .collect();
        // retries would hide what this looks for
        let settings = format!(
            "defaults\n  mode http\n  retries 0\n  timeout connect 2s\n  timeout client 20s\n  timeout server 20s\n\
             listen nfold\n  bind {proxy}\n  balance roundrobin\n  option httpchk GET /readyz\n{lines}"
        );
        let file = folder.path().join("haproxy.cfg");
        std::fs::write(&file, settings).unwrap();
        let servers = addresses.map(|(http, admin)| (http, admin, serve(folder.path(), http, admin))).into();
        let child = Command::new("haproxy").arg("-q").arg("-f").arg(&file).stderr(Stdio::null()).spawn();
        let cluster = Self { servers, proxy, folder, _proxy: Process(child.unwrap()) };
        for (_, admin, _) in &cluster.servers {
            eventually("ready", || is_ok(*admin, "/readyz"));
        }
        eventually("the proxy finds a server", || is_ok(proxy, "/v2/health/ready"));
        Some(cluster)
    }

    /// Stops and restarts each server, one after the other.
    fn roll(&mut self) {
        for (http, admin, process) in &mut self.servers {
            process.signal("-TERM");
            assert!(process.0.wait().unwrap().success(), "a server did not end well");
            *process = serve(self.folder.path(), *http, *admin);
            eventually("ready again", || is_ok(*admin, "/readyz"));
            // until the proxy, which checks every 100 ms, has noticed
            std::thread::sleep(Duration::from_millis(300));
        }
    }
}

/// What clients received.
#[derive(Default)]
struct Met {
    latencies: Vec<Duration>,
    failures: Vec<String>,
}

/// Sends one request, on the kept connection if any. The connection is kept unless the response says close.
fn call(proxy: SocketAddr, kept: &mut Option<TcpStream>, body: &[u8]) -> std::io::Result<Answer> {
    let mut stream = kept.take().map_or_else(|| connect(proxy), Ok)?;
    let answer = exchange(&mut stream, "POST", "/v1/classify", &[], body)?;
    if answer.header("connection") != Some("close") {
        *kept = Some(stream);
    }
    Ok(answer)
}

/// Sends requests through the proxy while `meanwhile` runs: half of the clients keep their connection, half open one
/// per request.
fn under_load(proxy: SocketAddr, meanwhile: impl FnOnce()) -> Met {
    let (met, stop, cat) = (Mutex::new(Met::default()), AtomicBool::new(false), data("cat.jpg"));
    std::thread::scope(|scope| {
        let (met, stop, cat) = (&met, &stop, &cat);
        for caller in 0..CALLERS {
            scope.spawn(move || {
                let mut kept = None;
                while !stop.load(Ordering::SeqCst) {
                    let started = Instant::now();
                    let answer = call(proxy, &mut kept, cat);
                    if caller % 2 == 0 {
                        kept = None;
                    }
                    let mut met = met.lock().unwrap();
                    match answer {
                        Ok(answer) if answer.status == 200 && answer.body.contains("\"cat\"") => {
                            met.latencies.push(started.elapsed());
                        }
                        other => met.failures.push(format!("{other:?}")),
                    }
                }
            });
        }
        // stops the clients even if `meanwhile` panics
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let _stop = Stop(stop);
        std::thread::sleep(Duration::from_millis(300));
        meanwhile();
        std::thread::sleep(Duration::from_millis(300));
    });
    let mut met = met.into_inner().unwrap();
    met.latencies.sort();
    met
}

fn rehearse(rounds: usize) {
    let Some(mut cluster) = Cluster::start() else { return };
    let started = Instant::now();
    let met = under_load(cluster.proxy, || (0..rounds).for_each(|_| cluster.roll()));
    let (count, taken) = (met.latencies.len(), started.elapsed().as_secs_f64());
    let at = |share: f64| met.latencies[((count - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    println!(
        "{} restarts in {taken:.1} s: {count} requests answered, {} failed; p50 {:.1} ms, p99 {:.1} ms, longest {:.1} ms",
        3 * rounds,
        met.failures.len(),
        at(0.5),
        at(0.99),
        at(1.0)
    );
    assert!(met.failures.is_empty(), "{:?}", met.failures);
    assert!(count > 100, "{count} requests are no load");
}

#[test]
fn a_rolling_restart_fails_no_request() {
    rehearse(1);
}

/// `make rehearsal`
#[test]
#[ignore = "a minute of restarts: make rehearsal"]
fn many_rolling_restarts_fail_no_request() {
    rehearse(10);
}

/// The rehearsal can see failures: a server that is killed costs requests.
#[test]
#[ignore = "a minute of restarts: make rehearsal"]
fn a_killed_server_is_noticed() {
    let Some(cluster) = Cluster::start() else { return };
    let proxy = cluster.proxy;
    let met = under_load(proxy, || {
        cluster.servers[0].2.signal("-KILL");
        std::thread::sleep(Duration::from_millis(500));
    });
    println!("{} answered, {} failed", met.latencies.len(), met.failures.len());
    assert!(!met.failures.is_empty());
}
