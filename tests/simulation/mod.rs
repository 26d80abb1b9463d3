//! A deterministic simulation of scheduling: admission, queue, deadlines, cancellation, priorities, batching, the
//! elastic engine, reload and drain run unchanged, on a system whose clock and threads are driven by a seed.
//!
//! Scheduling has an interface of its own to the system ([`System`](crate::infer::system::System): time, threads,
//! parking); the simulation implements it with the coroutines of `generator`, and a clock of its own. docs/decisions
//! has the reasons, and why it is not `shuttle`.
//!
//! Invariants of every schedule: each reply goes to its request; every admitted image is answered exactly once; no
//! model holds more than its limit; slots return to zero; no thread sleeps beside work; nothing expired is computed; no
//! accepted image is lost by a drain or a reload; every thread ends.
//!
//! `make simulate` runs 100,000 schedules, `make test` 1,000. A failure prints its seed: `NFOLD_SEED=… cargo test --lib
//! simulation` runs that schedule again. `make mutants` reintroduces old faults and expects them to be found.

mod overload;
mod scenario;
mod system;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use scenario::Scenario;

use crate::metrics::Outcome;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|e| panic!("{variable} is no number: {e}")))
}

/// Runs one schedule, and counts its outcomes.
fn run(seed: u64, seen: &Seen) -> Result<(), String> {
    let scenario = Scenario::begin(seed);
    scenario.run().map_err(|violation| {
        format!("{violation}\nschedule {seed}: run it again with NFOLD_SEED={seed} cargo test --lib simulation")
    })?;
    for (count, outcome) in seen.images.iter().zip(OUTCOMES) {
        count.fetch_add(scenario.ended(outcome), Ordering::Relaxed);
    }
    for (count, result) in seen.reloads.iter().zip(RELOADS) {
        count.fetch_add(scenario.reloads(result), Ordering::Relaxed);
    }
    Ok(())
}

/// Every outcome of an image and of a reload. The simulation fails if one of them never occurs, as it would then not
/// test it.
const OUTCOMES: [Outcome; 8] = [
    Outcome::Ok,
    Outcome::UnsupportedMediaType,
    Outcome::InvalidRequest,
    Outcome::Overloaded,
    Outcome::DeadlineExceeded,
    Outcome::ShuttingDown,
    Outcome::Cancelled,
    Outcome::Internal,
];
const RELOADS: [&str; 2] = ["ok", "error"];

#[derive(Debug, Default)]
struct Seen {
    images: [AtomicU64; OUTCOMES.len()],
    reloads: [AtomicU64; RELOADS.len()],
}

#[test]
fn every_schedule_keeps_every_promise() {
    if let Some(seed) = number("NFOLD_SEED") {
        return run(seed, &Seen::default()).unwrap_or_else(|violation| panic!("{violation}"));
    }
    let schedules = number("NFOLD_SCHEDULES").unwrap_or(1000);
    let (next, first, seen) = (AtomicU64::new(0), Mutex::new(None::<(u64, String)>), Seen::default());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(seed) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&seed| seed < schedules) {
                    if let Err(violation) = run(seed, &seen) {
                        next.store(schedules, Ordering::Relaxed);
                        let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
                        if first.as_ref().is_none_or(|(earlier, _)| seed < *earlier) {
                            *first = Some((seed, violation));
                        }
                    }
                }
            });
        }
    });
    if let Some((_, violation)) = first.into_inner().unwrap_or_else(PoisonError::into_inner) {
        panic!("{violation}");
    }
    println!("{schedules} schedules: {OUTCOMES:?} {RELOADS:?}: {seen:?}");
    if schedules >= 1000 {
        assert!(seen.images.iter().chain(&seen.reloads).all(|count| count.load(Ordering::Relaxed) > 0), "{seen:?}");
    }
}

#[test]
fn a_seed_gives_the_same_schedule_every_time() {
    let told = |seed| {
        let scenario = Scenario::begin(seed);
        (scenario.run(), scenario.told())
    };
    for seed in 0..20 {
        assert_eq!(told(seed), told(seed), "schedule {seed}");
    }
}
