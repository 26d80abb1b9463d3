//! Far more load than capacity, and bursts, on simulated time: a hundred thousand arrivals per test, the same in every
//! run. The scheduler is the real one; its engine sleeps.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::system::Simulated;
use crate::engine::{Backend, BackendError, Batch, Logits};
use crate::infer::error::InferError;
use crate::infer::job::{Job, SchedulerOptions};
use crate::infer::request::{Input, Terms, Ticket};
use crate::infer::scheduler::Scheduler;
use crate::infer::system::System;
use crate::metrics::Metrics;
use crate::model::Preprocessing;
use crate::pixels::Preprocessor;
use crate::random::Random;

const MS: Duration = Duration::from_millis(1);
const PATIENT: Duration = Duration::from_secs(10);
/// Bound of the 99th percentile of latency.
const OBJECTIVE: Duration = Duration::from_millis(250);
/// Engine run of about `nf_regnet_b0@192` on one core.
const RUN: Duration = Duration::from_millis(15);

/// An engine that sleeps, a fifth more or less.
struct Sleeper {
    system: Arc<Simulated>,
    random: Random,
    run: Duration,
}

impl Backend for Sleeper {
    fn run(&mut self, batch: &Batch) -> Result<Logits, BackendError> {
        let noise = self.random.between(80, 120) as f64 / 100.0;
        self.system.sleep(self.run.mul_f64(batch.images as f64 * noise));
        Ok(Logits { images: batch.images, classes: 1, data: vec![0.0; batch.images] })
    }
}

/// A server with the options of the command line.
#[derive(Debug, Clone, Copy)]
struct Serving {
    workers: usize,
    run: Duration,
    /// Run time of the engine with all cores.
    wide: Option<Duration>,
    standing_wait: Duration,
    queue_limit: usize,
}

const SERVING: Serving =
    Serving { workers: 1, run: RUN, wide: None, standing_wait: Duration::from_millis(100), queue_limit: 256 };

/// When an image arrives, and how long its client waits.
#[derive(Debug, Clone, Copy)]
struct Arrival {
    at: Duration,
    patience: Duration,
}

/// How an image ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Answered(Duration),
    Refused,
    Late,
}

/// Serves the arrivals, timed from when the server is ready, and returns how each ended.
fn serve(seed: u64, serving: Serving, arrivals: Vec<Arrival>) -> Vec<End> {
    let system = Simulated::new(seed);
    let ends = Arc::new(Mutex::new(Vec::new()));
    let (inside, told) = (system.clone(), ends.clone());
    let until = arrivals.last().map_or(Duration::ZERO, |last| last.at) + Duration::from_secs(600);
    system.start("server", move || {
        let Serving { workers, run, wide, standing_wait, queue_limit } = serving;
        let open = |run: Duration, seed: u64| {
            let system = inside.clone();
            Box::new(move || {
                let engine = Sleeper { system: system.clone(), random: Random::new(seed), run };
                Ok(Box::new(engine) as Box<dyn Backend>)
            })
        };
        let preprocessing: Preprocessing = serde_json::from_value(serde_json::json!({
            "height": 1, "width": 1, "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bilinear",
            "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0],
        }))
        .expect("preprocessing");
        let job = Job {
            what: "m/1".into(),
            preprocessor: Preprocessor::new(&preprocessing),
            exif_orientation: false,
            classes: 1,
            open: open(run, seed),
            open_wide: wide.map(|wide| open(wide, seed + 1) as _),
            golden: None,
            metrics: Metrics::new().model("m", 1, "simulated"),
            system: inside.clone(),
        };
        let options = SchedulerOptions { workers, queue_limit, standing_wait, ..SchedulerOptions::default() };
        let scheduler = Scheduler::start(job, options).expect("a scheduler");
        let start = inside.elapsed();
        let mut tickets = Vec::with_capacity(arrivals.len());
        for Arrival { at, patience } in arrivals {
            if let Some(pause) = (start + at).checked_sub(inside.elapsed()).filter(|pause| !pause.is_zero()) {
                inside.sleep(pause);
            }
            let terms = Terms { deadline: inside.now() + patience, priority: 0 };
            tickets.push(scheduler.submit(vec![Input::Tensor(vec![0.0; 3])], terms));
        }
        scheduler.close();
        assert_eq!(scheduler.join(inside.now() + Duration::from_secs(600)), 0);
        let end = |ticket: Result<Vec<Ticket>, InferError>| match ticket {
            Err(InferError::Overloaded { .. }) => End::Refused,
            Err(other) => panic!("{other}"),
            Ok(mut tickets) => match tickets[0].reply.try_recv().expect("an answer") {
                Ok(output) => End::Answered(output.timings.queue + output.timings.inference),
                Err(InferError::DeadlineExceeded) => End::Late,
                Err(other) => panic!("{other}"),
            },
        };
        *told.lock().unwrap_or_else(PoisonError::into_inner) = tickets.into_iter().map(end).collect();
    });
    let left = system.run(until, || Ok(())).expect("no violation");
    assert!(left.is_empty(), "{left:?}");
    std::mem::take(&mut *ends.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Poisson arrivals at `rate` per second on average.
fn poisson(random: &mut Random, rate: f64, count: usize, from: Duration) -> Vec<Arrival> {
    let mut at = from;
    let mut next = || {
        let uniform = (random.below(1 << 32) + 1) as f64 / (1_u64 << 32) as f64;
        at += Duration::from_secs_f64(-uniform.ln() / rate);
        Arrival { at, patience: PATIENT }
    };
    (0..count).map(|_| next()).collect()
}

fn latencies(ends: impl Iterator<Item = End>) -> Vec<Duration> {
    let answered = |end| if let End::Answered(took) = end { Some(took) } else { None };
    let mut latencies: Vec<_> = ends.filter_map(answered).collect();
    latencies.sort_unstable();
    latencies
}

/// Answers per second of a saturated server.
fn most(serving: Serving) -> f64 {
    let rate = 5.0 * serving.workers as f64 / serving.run.as_secs_f64();
    let arrivals = poisson(&mut Random::new(99), rate, 20_000, Duration::ZERO);
    let (warm, over) = (Duration::from_secs(2), arrivals.last().map_or(Duration::ZERO, |last| last.at));
    let early = arrivals.iter().filter(|arrival| arrival.at < warm).count();
    let ends = serve(99, Serving { standing_wait: PATIENT, ..serving }, arrivals);
    // as many images arrive as leave
    latencies(ends.into_iter().skip(early)).len() as f64 / (over - warm).as_secs_f64()
}

#[test]
fn under_steady_overload_the_wait_is_short_and_nothing_is_lost() {
    let small = Serving { workers: 2, run: Duration::from_micros(1500), ..SERVING };
    for (serving, multiples) in [(SERVING, [1.2, 3.0, 10.0]), (small, [1.2, 3.0, 10.0])] {
        let most = most(serving);
        for multiple in multiples {
            let mut random = Random::new(7);
            let arrivals = poisson(&mut random, multiple * most, 100_000, Duration::ZERO);
            let warm = Duration::from_secs(2);
            let (count, over) = (arrivals.len(), arrivals.last().map_or(Duration::ZERO, |last| last.at));
            let steady = arrivals.iter().filter(|arrival| arrival.at < warm).count();
            assert!(steady < count, "all of it was warm-up");
            let ends = serve(7, serving, arrivals);
            let answered = latencies(ends[steady..].iter().copied());
            assert!(!ends.contains(&End::Late));
            let p99 = answered[answered.len() * 99 / 100];
            let good = answered.iter().filter(|&&took| took <= OBJECTIVE).count();
            let goodput = good as f64 / (over - warm).as_secs_f64();
            println!(
                "{multiple} times {most:.0}/s: goodput {:.3} of it, p50 {:?}, p99 {p99:?}",
                goodput / most,
                answered[answered.len() / 2]
            );
            // slight overload arrives as bursts with pauses between them
            let least = if multiple == 3.0 { 0.95 } else { 0.90 };
            assert!(goodput >= least * most, "{multiple}: {goodput} of {most}");
            assert!(p99 <= if multiple < 3.0 { 2 * OBJECTIVE } else { OBJECTIVE }, "{multiple}: {p99:?}");
        }
    }
}

/// The target wait of a standing queue is the normal depth; twice that arrives at once, again and again.
#[test]
fn no_image_of_a_burst_is_lost() {
    let depth = SERVING.standing_wait.as_secs_f64() / RUN.as_secs_f64();
    let burst = (2.0 * depth).ceil() as usize;
    let mut random = Random::new(3);
    let mut arrivals = Vec::new();
    while arrivals.len() < 100_000 {
        let begins = arrivals.last().map_or(Duration::ZERO, |last: &Arrival| last.at) + 1000 * MS;
        let spread = random.one(&[0, 10, 50]);
        let mut offsets: Vec<_> = (0..burst).map(|_| random.between(0, spread) as u32 * MS).collect();
        offsets.sort_unstable();
        arrivals.extend(offsets.into_iter().map(|offset| Arrival { at: begins + offset, patience: PATIENT }));
    }
    let ends = serve(3, SERVING, arrivals);
    let lost = ends.iter().filter(|end| !matches!(end, End::Answered(_))).count();
    assert_eq!(lost, 0, "of {}", ends.len());
}

/// Load below capacity is no overload, whatever its distribution.
#[test]
fn next_to_nothing_is_refused_below_capacity() {
    let most = most(SERVING);
    for (load, refused) in [(0.5, 0.0), (0.8, 0.01), (0.9, 0.05)] {
        let ends = serve(5, SERVING, poisson(&mut Random::new(5), load * most, 100_000, Duration::ZERO));
        let lost = ends.iter().filter(|end| !matches!(end, End::Answered(_))).count();
        println!("{load} of capacity: {lost} of {} lost", ends.len());
        assert!(lost as f64 <= refused * ends.len() as f64, "{load}: {lost} of {}", ends.len());
    }
}

/// Images that can't be answered in time are refused at once, and the others are answered: with the speed of the
/// warm-up right after the start, and after hours in which only the engine with all cores ran.
#[test]
fn a_first_burst_is_admitted_by_what_can_be_in_time() {
    let patience = 500 * MS;
    let burst = |at: Duration| (0..64).map(move |_| Arrival { at, patience });
    let wide = Serving { wide: Some(RUN / 4), ..SERVING };
    let alone = |i: u32| Arrival { at: i * 200 * MS, patience: PATIENT };
    for seed in 0..200 {
        for (serving, before) in [(SERVING, 0), (wide, 0), (wide, 300)] {
            let arrivals = (1..=before).map(alone).chain(burst((before + 5) * 200 * MS)).collect();
            let ends = serve(seed, serving, arrivals);
            let ends = &ends[before as usize..];
            let late = ends.iter().filter(|&&end| end == End::Late).count();
            let answered = latencies(ends.iter().copied()).len();
            let could = (patience.as_secs_f64() / RUN.as_secs_f64()) as usize;
            // the engine's runs differ by a fifth
            assert!(late <= 8, "seed {seed}, {before} before: {late} late, {answered} answered of {could}");
            assert!(answered >= could * 3 / 4, "seed {seed}, {before} before: {answered} of {could}");
        }
    }
}

/// A second after overload, a burst is absorbed as before.
#[test]
fn it_recovers_within_a_second() {
    for seed in 0..20 {
        let most = 1.0 / RUN.as_secs_f64();
        let mut arrivals = poisson(&mut Random::new(seed), 10.0 * most, 5_000, Duration::ZERO);
        let over = arrivals.last().map_or(Duration::ZERO, |last| last.at);
        arrivals.extend((0..14).map(|_| Arrival { at: over + 1000 * MS, patience: PATIENT }));
        let ends = serve(seed, SERVING, arrivals);
        let burst = &ends[ends.len() - 14..];
        assert!(burst.iter().all(|end| matches!(end, End::Answered(_))), "seed {seed}: {burst:?}");
    }
}
