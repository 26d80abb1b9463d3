//! Load generator without coordinated omission. Knows the protocols, not the server.
//!
//! Closed loop: N connections, each with one request in flight. Open loop: requests are sent at arrival times drawn
//! before the run, whether or not earlier ones were answered, and latency counts from when a request was *due* (MLPerf
//! Inference rules, "latency"), so that a stall of the server counts for all requests that wait. The generator's own
//! lag is measured, and a step with too much of it is marked as invalid.

pub mod answer;
pub mod client;
pub mod grpc;
pub mod protocol;
pub mod record;
pub mod request;
pub mod schedule;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use super::machine::{Machine, ProcessorTime};
use answer::{Answer, Outcome};
use client::Client;
use protocol::{Protocol, Tensors};
use record::{Recorder, Step, Window};
use request::Request;
use schedule::Arrivals;

/// Version of the report's format, documented in `docs/benchmarks.md`.
pub const SCHEMA: &str = "nfold-bench-load/1";
/// Offered rates of a sweep, as multiples of the measured capacity: below saturation and beyond it.
pub const SWEEP: [f64; 9] = [0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0, 5.0];

/// Settings of a measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// Server, `HOST:PORT`.
    pub server: String,
    /// Protocol.
    pub protocol: Protocol,
    /// Tensors, for protocols that send tensors.
    #[serde(default)]
    pub tensors: Tensors,
    /// Model to request; the server's only one if absent.
    pub model: Option<String>,
    /// Closed-loop steps: number of connections of each.
    pub connections: Vec<usize>,
    /// Open-loop steps: requests per second of each.
    pub rates: Vec<f64>,
    /// Whether to add open-loop steps at the multiples [`SWEEP`] of the best closed-loop throughput.
    pub sweep: bool,
    /// Distribution of open-loop arrivals.
    pub arrivals: Arrivals,
    /// Unmeasured start of each step, in seconds.
    pub warmup_s: f64,
    /// Measured part of each step, in seconds.
    pub window_s: f64,
    /// Client timeout, in seconds; a later response counts as a failure.
    pub timeout_s: f64,
    /// Responses within this latency count as goodput, in milliseconds.
    pub slo_ms: f64,
    /// Largest 99th percentile of the generator's own lag in a valid step, in milliseconds.
    pub max_lag_ms: f64,
    /// Seed of arrivals and of the order of payloads.
    pub seed: u64,
}

/// Results of a measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Always [`SCHEMA`].
    pub schema: String,
    /// Machine that ran the generator.
    pub machine: Machine,
    /// Settings of the measurement.
    pub plan: Plan,
    /// Number of different request bodies.
    pub payloads: usize,
    /// Mean bytes of a request body.
    pub payload_bytes: f64,
    /// Share of processor time that the hypervisor gave to other machines during the measurement (steal time).
    pub stolen_share: Option<f64>,
    /// Best closed-loop throughput, in requests per second; the base of a sweep's multiples.
    pub capacity: Option<f64>,
    /// One step per number of connections and per rate, in order.
    pub steps: Vec<Step>,
}

/// Runs every step of the plan with at least one payload. Calls `tell` with a description before each step.
pub async fn run(plan: &Plan, payloads: Vec<Request>, tell: impl Fn(&str)) -> Report {
    let machine = Machine::look(None);
    let before = ProcessorTime::now();
    let payload_bytes = payloads.iter().map(|p| p.size() as f64).sum::<f64>() / payloads.len().max(1) as f64;
    let count = payloads.len();
    let payloads: Arc<[Request]> = payloads.into();
    let mut steps = Vec::new();
    let mut capacity: Option<f64> = None;
    for &connections in &plan.connections {
        tell(&format!("closed loop, {connections} connections"));
        let step = closed(plan, &payloads, connections).await;
        capacity = Some(capacity.unwrap_or(0.0).max(step.throughput));
        steps.push(step);
    }
    let mut rates: Vec<(f64, Option<f64>)> = plan.rates.iter().map(|&r| (r, None)).collect();
    if let Some(capacity) = capacity.filter(|c| plan.sweep && *c > 0.0) {
        rates.extend(SWEEP.iter().map(|&m| (m * capacity, Some(m))));
    }
    for (i, (rate, multiple)) in rates.into_iter().enumerate() {
        tell(&format!("open loop, {rate:.1} requests/s"));
        let step = open(plan, &payloads, rate, plan.seed.wrapping_add(i as u64)).await;
        steps.push(Step { multiple, ..step });
    }
    let stolen_share = before.zip(ProcessorTime::now()).map(|(before, after)| after.stolen_since(before));
    let schema = SCHEMA.into();
    let plan = plan.clone();
    Report { schema, machine, plan, payloads: count, payload_bytes, stolen_share, capacity, steps }
}

fn window(plan: &Plan, start: Instant) -> Window {
    let from = start + Duration::from_secs_f64(plan.warmup_s);
    Window { from, until: from + Duration::from_secs_f64(plan.window_s) }
}

/// Runs a closed loop: each connection sends its next request when the previous one was answered.
async fn closed(plan: &Plan, payloads: &Arc<[Request]>, connections: usize) -> Step {
    let window = window(plan, Instant::now());
    let recorder = Arc::new(Mutex::new(Recorder::new(window, plan.slo_ms)));
    let timeout = Duration::from_secs_f64(plan.timeout_s);
    let client = Arc::new(Client::new(&plan.server, &payloads[0]));
    let callers: Vec<_> = (0..connections)
        .map(|caller| {
            let (client, payloads, recorder) = (client.clone(), payloads.clone(), recorder.clone());
            let mut rng = ChaCha8Rng::seed_from_u64(plan.seed ^ ((caller as u64 + 1) << 32));
            tokio::spawn(async move {
                loop {
                    let sent = Instant::now();
                    if sent >= window.until {
                        break;
                    }
                    let answer = send(&client, &payloads[rng.random_range(0..payloads.len())], timeout).await;
                    lock(&recorder).record(sent, Duration::ZERO, Instant::now(), &answer);
                    if !answer.outcome.is_answer() {
                        // back off, or a server that is down would get a million requests per second
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                }
            })
        })
        .collect();
    for caller in callers {
        unless_panicked(caller.await);
    }
    lock(&recorder).step("closed", None, Some(connections), plan.max_lag_ms)
}

/// Runs an open loop: requests are sent when they are due, whatever happened to earlier ones.
async fn open(plan: &Plan, payloads: &Arc<[Request]>, rate: f64, seed: u64) -> Step {
    let span = Duration::from_secs_f64(plan.warmup_s + plan.window_s);
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ (1 << 63));
    let due = schedule::draw(plan.arrivals, rate, span, seed).into_iter();
    let due: Vec<(Duration, usize)> = due.map(|offset| (offset, rng.random_range(0..payloads.len()))).collect();
    let timeout = Duration::from_secs_f64(plan.timeout_s);
    // time to start connections and the generator's thread before the first arrival
    let start = Instant::now() + Duration::from_millis(50);
    let recorder = Arc::new(Mutex::new(Recorder::new(window(plan, start), plan.slo_ms)));
    let client = Arc::new(Client::new(&plan.server, &payloads[0]));
    let (handle, payloads, shared) = (Handle::current(), payloads.clone(), recorder.clone());
    // a thread of its own: the runtime's timer has millisecond resolution, and its workers may be busy with responses
    let generator = tokio::task::spawn_blocking(move || {
        let mut calls = Vec::with_capacity(due.len());
        for (offset, pick) in due {
            let at = start + offset;
            if let Some(left) = at.checked_duration_since(Instant::now()) {
                std::thread::sleep(left);
            }
            let (client, payloads, recorder) = (client.clone(), payloads.clone(), shared.clone());
            calls.push(handle.spawn(async move {
                let lag = Instant::now().saturating_duration_since(at);
                let answer = send(&client, &payloads[pick], timeout).await;
                lock(&recorder).record(at, lag, Instant::now(), &answer);
            }));
        }
        calls
    });
    for call in unless_panicked(generator.await).unwrap_or_default() {
        unless_panicked(call.await);
    }
    lock(&recorder).step("open", Some(rate), None, plan.max_lag_ms)
}

/// The result of a task. Resumes its panic, since figures without it would be wrong.
fn unless_panicked<T>(joined: Result<T, tokio::task::JoinError>) -> Option<T> {
    joined.map_err(|error| error.try_into_panic().map(|panic| std::panic::resume_unwind(panic))).ok()
}

/// Sends one request. A server address that no client can be created for counts as unreachable.
async fn send(client: &Result<Client, String>, request: &Request, timeout: Duration) -> Answer {
    match client {
        Ok(client) => client.send(request, timeout).await,
        Err(_) => Answer::without(Outcome::Transport),
    }
}

fn lock(recorder: &Mutex<Recorder>) -> std::sync::MutexGuard<'_, Recorder> {
    recorder.lock().unwrap_or_else(PoisonError::into_inner)
}
