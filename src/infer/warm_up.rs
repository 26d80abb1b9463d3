//! What an engine goes through before it may answer: real runs of every shape that can occur, the model's golden answer,
//! and the same images alone and in company.
//!
//! Knows nothing of queues and callers.

use std::time::{Duration, Instant};

use super::job::{Invariance, StartError};
use super::scheduler::Shared;
use super::worker::Worker;
use crate::engine::verify;
use crate::engine::{Batch, Logits};

/// What warming up showed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Warm {
    /// Engine time per image in the largest batch.
    pub(super) run_cost: Duration,
    /// Largest difference of a logit between an image alone and in any batch, or on all cores.
    pub(super) max_abs_diff: f64,
}

/// Warms a worker's engine. The `first` worker of a model also does what need not be done for each of its twins: the golden
/// answer, every batch size, and the engine that has all cores.
pub(super) fn warm_up(shared: &Shared, worker: &mut Worker, first: bool) -> Result<Warm, StartError> {
    let test = first && shared.options.invariance != Invariance::Off;
    let largest = shared.options.max_batch;
    let images = images(shared, largest);
    let mut warm = Warm::default();
    if let Some(golden) = shared.job.golden.as_ref().filter(|_| first) {
        let (logits, _) = run(shared, &golden.input, |batch| worker.attempt(shared, batch))?;
        let difference = verify::compare(&golden.logits, &logits).max_abs_diff;
        if difference > golden.tolerance {
            return Err(StartError::Golden { difference, tolerance: golden.tolerance });
        }
    }
    let len = shared.job.preprocessor.tensor_len();
    let mut alone = Vec::new();
    for image in images.chunks(len).take(if test { largest } else { 1 }) {
        let (logits, cost) = run(shared, image, |batch| worker.attempt(shared, batch))?;
        alone.extend(logits);
        warm.run_cost = cost;
    }
    for count in (2..=largest).filter(|&n| test || n == largest || shared.options.buckets.contains(&n)) {
        let (logits, cost) = run(shared, &images[..count * len], |batch| worker.attempt(shared, batch))?;
        warm.run_cost = cost;
        if test {
            warm.max_abs_diff = warm.max_abs_diff.max(difference(&alone, &logits));
        }
    }
    if let Some(open) = shared.job.open_wide.as_ref().filter(|_| first) {
        let mut wide = open()?;
        for (i, image) in images.chunks(len).take(if test { 2 } else { 1 }).enumerate() {
            let (logits, _) = run(shared, image, |batch| wide.run(batch).map_err(|e| e.to_string()))?;
            if test {
                let classes = shared.job.classes;
                warm.max_abs_diff = warm.max_abs_diff.max(difference(&alone[i * classes..], &logits));
            }
        }
        if let Ok(mut place) = shared.wide.lock() {
            *place = Some(wide);
        }
    }
    if warm.max_abs_diff > 0.0 {
        tracing::warn!(
            model = shared.job.what,
            max_abs_diff = warm.max_abs_diff,
            "an image's logits depend on the batch it is in"
        );
    }
    Ok(warm)
}

/// Images that differ: any fixed numbers of an input's usual size will do.
fn images(shared: &Shared, count: usize) -> Vec<f32> {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let xorshift = |_| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 40) as f32 / (1 << 22) as f32 - 2.0
    };
    (0..count * shared.job.preprocessor.tensor_len()).map(xorshift).collect()
}

/// Logits of the images in `data`, all finite, and the time for each.
fn run<L>(shared: &Shared, data: &[f32], attempt: L) -> Result<(Vec<f32>, Duration), StartError>
where
    L: FnOnce(&mut Batch) -> Result<Logits, String>,
{
    let (height, width) = (shared.job.preprocessor.height(), shared.job.preprocessor.width());
    let images = data.len() / shared.job.preprocessor.tensor_len().max(1);
    let mut batch = Batch { images, height, width, data: data.to_vec() };
    let started = Instant::now();
    let logits = attempt(&mut batch).map_err(|reason| StartError::WarmUp { batch: images, reason })?;
    if let Some(i) = logits.data.iter().position(|l| !l.is_finite()) {
        let reason = format!("logit {} of image {} is not finite", i % logits.classes, i / logits.classes);
        return Err(StartError::WarmUp { batch: images, reason });
    }
    Ok((logits.data, started.elapsed() / images.max(1) as u32))
}

/// Largest difference between the first of `alone` and `together`.
fn difference(alone: &[f32], together: &[f32]) -> f64 {
    alone.iter().zip(together).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max)
}
