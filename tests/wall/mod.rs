//! Attacks on the real program over real sockets. Each test measures what an attack costs the server (peak memory) and
//! other clients (latency of health on every port), and how it ends.

pub mod calls;
mod connections;
mod floods;
mod hoards;
mod hosts;
mod images;
mod logs;
mod memory;
mod pace;
mod panics;
mod refusals;
mod repository;
mod shared_engines;
mod streams;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

mod life;

use crate::process::{Server, ask};

pub const MIB: u64 = 1 << 20;

/// What an attack cost.
#[derive(Debug)]
pub struct Cost {
    /// Peak growth of the process's resident memory, in bytes.
    pub growth: u64,
    /// The slowest health response on any port; a missing one counts as the time waited for it.
    pub health: Duration,
    /// Health requests without the right response.
    pub failed: usize,
    /// How long the attack took.
    pub took: Duration,
}

/// Runs tests one at a time, as they disturb each other's measurements. Other load on the machine can only slow them
/// down, so the best of a few attempts counts.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `attack` while requesting health on every port every 5 ms.
pub fn under_attack<T>(server: &Server, attack: impl FnOnce() -> T) -> (T, Cost) {
    warm(server);
    let before = resident(server.pid());
    std::fs::write(format!("/proc/{}/clear_refs", server.pid()), "5").unwrap();
    // the gRPC port refuses what is not gRPC: any response counts
    let doors = [(server.http, "/v2/health/live", 200), (server.admin, "/livez", 200), (server.grpc, "/", 415)];
    let watch = Watch::start(&doors);
    let started = Instant::now();
    let outcome = attack();
    let took = started.elapsed();
    let (health, failed) = watch.end();
    let growth = peak(server.pid()).saturating_sub(before);
    (outcome, Cost { growth, health, failed, took })
}

/// Resident memory of a process, in bytes.
pub fn resident(pid: u32) -> u64 {
    memory(pid, "VmRSS:")
}

/// Peak resident memory in bytes since [`under_attack`] began.
pub fn peak(pid: u32) -> u64 {
    memory(pid, "VmHWM:")
}

fn memory(pid: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the server is alive");
    let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("Linux reports it");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// A metric of a server, by its name and labels as Prometheus writes them.
pub fn metric(admin: SocketAddr, name: &str) -> u64 {
    let metrics = ask(admin, "GET", "/metrics", &[], b"").unwrap().body;
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name}")).parse().unwrap()
}

/// Waits until the server has warmed up all sizes of batches, which takes time and memory of its own; without a test of those, not.
fn warm(server: &Server) {
    let unknown = |line: &str| line.starts_with("nfold_invariance_max_abs_diff{") && line.ends_with(" NaN");
    for _ in 0..100 {
        let metrics = ask(server.admin, "GET", "/metrics", &[], b"").map(|answer| answer.body).unwrap_or_default();
        if !metrics.lines().any(unknown) {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Requests health repeatedly, each time on a new connection.
struct Watch {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<(Duration, usize)>>,
}

impl Watch {
    fn start(doors: &[(SocketAddr, &'static str, u16)]) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let watch = |&(address, path, status): &(SocketAddr, &'static str, u16)| {
            let over = over.clone();
            std::thread::spawn(move || {
                let (mut slowest, mut failed) = (Duration::ZERO, 0);
                while !over.load(Ordering::Relaxed) {
                    let asked = Instant::now();
                    let answered = ask(address, "GET", path, &[], b"").is_ok_and(|answer| answer.status == status);
                    slowest = slowest.max(asked.elapsed());
                    failed += usize::from(!answered);
                    std::thread::sleep(Duration::from_millis(5));
                }
                (slowest, failed)
            })
        };
        let threads = doors.iter().map(watch).collect();
        Self { over, threads }
    }

    fn end(self) -> (Duration, usize) {
        self.over.store(true, Ordering::Relaxed);
        let watched = self.threads.into_iter().map(|thread| thread.join().unwrap());
        watched.fold((Duration::ZERO, 0), |(slowest, failed), (s, f)| (slowest.max(s), failed + f))
    }
}

/// The measurement shows a cost where there is one.
#[test]
fn a_cost_is_seen() {
    let server = Server::start(&[]);
    let body = vec![b' '; 40 << 20];
    let (answer, cost) = under_attack(&server, || ask(server.http, "POST", "/v1/classify", &[], &body));
    assert!(answer.is_ok_and(|answer| answer.status >= 400));
    assert!(cost.growth > 30 * MIB, "{cost:?}");
    assert!(cost.health > Duration::ZERO && cost.failed == 0 && cost.took > Duration::ZERO, "{cost:?}");
}
