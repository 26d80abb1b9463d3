//! Running totals of one model, as the Open Inference Protocol's statistics extension defines them.
//!
//! Owns counters only. Request totals are updated when a request is answered, run totals when an engine has run;
//! warm-up counts in neither. Durations are in nanoseconds.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A count and a total duration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Total {
    /// Number of events.
    pub count: u64,
    /// Total nanoseconds.
    pub ns: u64,
}

#[derive(Debug, Default)]
struct Running {
    count: AtomicU64,
    ns: AtomicU64,
}

impl Running {
    fn add(&self, duration: Duration) {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.ns.fetch_add(nanos(duration), Ordering::Relaxed);
    }

    fn total(&self) -> Total {
        Total { count: self.count.load(Ordering::Relaxed), ns: self.ns.load(Ordering::Relaxed) }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Where the time of an answered request went; for several images, the longest of each phase.
#[derive(Debug, Clone, Copy, Default)]
pub struct Answered {
    /// From admission to the answer.
    pub whole: Duration,
    /// Waiting.
    pub queue: Duration,
    /// Decoding, resizing, normalising.
    pub input: Duration,
    /// The engine run.
    pub infer: Duration,
    /// Logits to outputs.
    pub output: Duration,
}

/// Totals of one model since it was opened.
#[derive(Debug, Default)]
pub struct Statistics {
    success: Running,
    fail: Running,
    queue: Running,
    input: Running,
    infer: Running,
    output: Running,
    images: AtomicU64,
    runs: AtomicU64,
    last: AtomicU64,
    batches: Mutex<BTreeMap<usize, Batches>>,
}

/// Runs of one batch size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Batches {
    /// Decoding and normalising all images of the run.
    pub input: Total,
    /// The runs.
    pub infer: Total,
}

/// [`Statistics`] at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Answered requests, from admission on.
    pub success: Total,
    /// Requests without any answered image.
    pub fail: Total,
    /// Waiting, of answered requests.
    pub queue: Total,
    /// Decoding, resizing, normalising, of answered requests.
    pub input: Total,
    /// Engine time, of answered requests.
    pub infer: Total,
    /// Logits to outputs, of answered requests.
    pub output: Total,
    /// Images answered.
    pub images: u64,
    /// Engine runs that returned logits.
    pub runs: u64,
    /// When the last request was answered, in milliseconds since 1970; 0 before the first.
    pub last_ms: u64,
    /// By batch size.
    pub batches: BTreeMap<usize, Batches>,
}

impl Statistics {
    /// Records that a request got answers for `images` images.
    pub fn answered(&self, images: usize, times: &Answered) {
        let Answered { whole, queue, input, infer, output } = *times;
        self.success.add(whole);
        self.queue.add(queue);
        self.input.add(input);
        self.infer.add(infer);
        self.output.add(output);
        self.images.fetch_add(images as u64, Ordering::Relaxed);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.last.store(u64::try_from(now.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Records that a request got no answer.
    pub fn failed(&self, whole: Duration) {
        self.fail.add(whole);
    }

    /// Records that an engine run of `images` images returned logits; preparing them had taken `input` in all.
    pub fn ran(&self, images: usize, input: Duration, infer: Duration) {
        self.runs.fetch_add(1, Ordering::Relaxed);
        let mut batches = self.batches.lock().unwrap_or_else(PoisonError::into_inner);
        let batch = batches.entry(images).or_default();
        for (total, duration) in [(&mut batch.input, input), (&mut batch.infer, infer)] {
            total.count += 1;
            total.ns = total.ns.saturating_add(nanos(duration));
        }
    }

    /// The current totals. Those that are being updated may be one request apart.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            success: self.success.total(),
            fail: self.fail.total(),
            queue: self.queue.total(),
            input: self.input.total(),
            infer: self.infer.total(),
            output: self.output.total(),
            images: self.images.load(Ordering::Relaxed),
            runs: self.runs.load(Ordering::Relaxed),
            last_ms: self.last.load(Ordering::Relaxed),
            batches: self.batches.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}
