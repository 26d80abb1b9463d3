//! The compute threads: decode, resize, run, answer.
//!
//! A worker owns its engine (running takes `&mut`) and survives a panic in it: the engine is reopened, the batch retried
//! one by one. A decoder has no engine. What to do next is the scheduler's decision.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use super::engine::{Backend, Batch, Logits};
use super::error::InferError;
use super::image;
use super::scheduler::{Entry, Input, Output, Pending, Prepared, Seat, Shared, StartError, Task, Timings};
use super::tensor;
use crate::metrics::{Phase, RunResult};

/// Shortest and longest pause between two tries to reopen an engine.
const REOPEN_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// What a thread is for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Role {
    /// Owns engine number `.0`.
    Worker(usize),
    /// Only prepares images.
    Decoder,
}

/// What warming up one engine showed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Warm {
    /// Engine time per image in the largest batch.
    pub(super) run_cost: Duration,
    /// Largest difference of a logit between an image alone and in any batch.
    pub(super) max_abs_diff: f64,
}

/// The whole life of a compute thread. A worker reports once: warm, or why not.
pub(super) fn main(shared: &Shared, role: Role, report: Sender<Result<Warm, StartError>>) {
    let mut worker = match role {
        Role::Decoder => Worker { number: None, engine: None, reopen: None },
        Role::Worker(number) => {
            let opened = (shared.job.open)().map_err(StartError::from);
            let warmed = opened.and_then(|engine| {
                let mut worker = Worker { number: Some(number), engine: Some(engine), reopen: None };
                warm(shared, &mut worker).map(|warm| (worker, warm))
            });
            match warmed {
                Ok((worker, warm)) => {
                    shared.engines(1);
                    let _ = report.send(Ok(warm));
                    worker
                }
                Err(error) => {
                    let _ = report.send(Err(error));
                    return;
                }
            }
        }
    };
    drop(report);
    loop {
        match shared.next(worker.seat()) {
            Task::Prepare(entry) => prepare(shared, entry),
            Task::Run(batch) => run(shared, &mut worker, batch),
            Task::Reopen => worker.reopen(shared),
            Task::Stop => break,
        }
    }
    if worker.engine.is_some() {
        shared.engines(-1);
    }
    worker.discard();
}

struct Worker {
    number: Option<usize>,
    engine: Option<Box<dyn Backend>>,
    /// When to try again, and the pause after that try.
    reopen: Option<(Instant, Duration)>,
}

impl Worker {
    fn seat(&self) -> Seat {
        Seat { worker: self.number, reopen_at: self.reopen.map(|(at, _)| at) }
    }

    fn reopen(&mut self, shared: &Shared) {
        let pause = self.reopen.map_or(REOPEN_PAUSE.0, |(_, pause)| pause);
        match catch_unwind(AssertUnwindSafe(|| (shared.job.open)())) {
            Ok(Ok(engine)) => {
                self.engine = Some(engine);
                self.reopen = None;
                shared.engines(1);
                tracing::info!(model = shared.job.what, "engine reopened");
            }
            failed => {
                let reason = match failed {
                    Ok(Err(error)) => error.to_string(),
                    Err(panic) => message(panic.as_ref()),
                    Ok(Ok(_)) => String::new(),
                };
                self.reopen = Some((Instant::now() + pause, (pause * 2).min(REOPEN_PAUSE.1)));
                tracing::error!(
                    model = shared.job.what,
                    reason,
                    retry_ms = pause.as_millis() as u64,
                    "engine can't be reopened"
                );
            }
        }
    }

    /// One engine run; the error says what to log.
    fn attempt(&mut self, shared: &Shared, batch: &Batch) -> Result<Logits, String> {
        let Some(engine) = self.engine.as_mut() else { return Err("the worker has no engine".into()) };
        let started = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| engine.run(batch)));
        let took = started.elapsed();
        let metrics = shared.metrics();
        metrics.phase(Phase::Inference, took);
        metrics.batch_size.observe(batch.images as f64);
        let (count, result) = match result {
            Ok(Ok(logits)) => match check(&logits, batch, shared.job.classes) {
                Ok(()) => (RunResult::Ok, Ok(logits)),
                Err(reason) => (RunResult::Error, Err(reason)),
            },
            Ok(Err(error)) => (RunResult::Error, Err(error.to_string())),
            Err(panic) => (RunResult::Panic, Err(format!("the engine panicked: {}", message(panic.as_ref())))),
        };
        metrics.run(count);
        shared.ran(batch.images, took, result.is_ok());
        if count == RunResult::Panic {
            // what a panic leaves behind is not to be trusted
            self.discard();
            shared.engines(-1);
            self.reopen = Some((Instant::now(), REOPEN_PAUSE.0));
        }
        result
    }

    fn discard(&mut self) {
        let engine = self.engine.take();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(engine))) {
            tracing::error!(reason = message(panic.as_ref()), "an engine panicked while it was closed");
        }
    }
}

fn check(logits: &Logits, batch: &Batch, classes: usize) -> Result<(), String> {
    let fits = logits.images == batch.images
        && logits.classes == classes
        && logits.data.len() == batch.images.saturating_mul(classes);
    match fits {
        true => Ok(()),
        false => Err(format!(
            "{} images of {classes} classes were due, logits [{}, {}] came",
            batch.images, logits.images, logits.classes
        )),
    }
}

fn prepare(shared: &Shared, entry: Entry) {
    let Entry { input, pending } = entry;
    let started = Instant::now();
    let bytes = match input {
        Input::Encoded(bytes) => bytes,
        Input::Tensor(tensor) => return take(shared, tensor, started, pending),
        Input::Raw(raw) => return take(shared, raw.tensor(&shared.job.preprocessor), started, pending),
    };
    let job = &shared.job;
    let result = catch_unwind(AssertUnwindSafe(|| {
        let decoded = image::decode(&bytes, &shared.options.image_limits, job.exif_orientation);
        let decode = started.elapsed();
        shared.metrics().phase(Phase::Decode, decode);
        let mut tensor = vec![0.0; job.preprocessor.tensor_len()];
        job.preprocessor.apply(&decoded?, &mut tensor);
        let preprocess = started.elapsed() - decode;
        shared.metrics().phase(Phase::Preprocess, preprocess);
        Ok((tensor, decode, preprocess))
    }));
    drop(bytes);
    let took = started.elapsed();
    match result {
        Ok(Ok((tensor, decode, preprocess))) => {
            shared.prepared(Some(Prepared { tensor, decode, preprocess, pending }), took);
        }
        Ok(Err(error)) => {
            let error: image::ImageError = error;
            shared.metrics().decode_reject(error.reason());
            pending.answer(Err(error.into()));
            shared.prepared(None, took);
        }
        Err(panic) => {
            pending.answer(Err(InferError::Internal(format!("decoding panicked: {}", message(panic.as_ref())))));
            shared.prepared(None, took);
        }
    }
}

/// A tensor that needs no decoding.
fn take(shared: &Shared, tensor: Vec<f32>, started: Instant, pending: Pending) {
    if let Err(error) = tensor::check(&tensor) {
        pending.answer(Err(error));
        return shared.prepared(None, Duration::ZERO);
    }
    let prepared = Prepared { tensor, decode: Duration::ZERO, preprocess: started.elapsed(), pending };
    shared.prepared(Some(prepared), Duration::ZERO);
}

fn run(shared: &Shared, worker: &mut Worker, mut images: Vec<Prepared>) {
    let started = Instant::now();
    let count = images.len();
    let (height, width) = (shared.job.preprocessor.height(), shared.job.preprocessor.width());
    let data = match images.as_mut_slice() {
        [only] => std::mem::take(&mut only.tensor),
        several => several.iter_mut().flat_map(|image| std::mem::take(&mut image.tensor)).collect(),
    };
    let batch = Batch { images: count, height, width, data };
    match worker.attempt(shared, &batch) {
        Ok(logits) => {
            let took = started.elapsed();
            let input = images.iter().map(|image| image.decode + image.preprocess).sum();
            shared.metrics().statistics.ran(count, input, took);
            for (i, image) in images.into_iter().enumerate() {
                answer(shared, image, (started, took), count, Ok(logits.row(i).to_vec()));
            }
        }
        Err(reason) if count == 1 => {
            for image in images {
                answer(shared, image, (started, started.elapsed()), 1, Err(reason.clone()));
            }
        }
        Err(reason) => {
            // one image must not spoil its neighbours' answers
            tracing::warn!(
                model = shared.job.what,
                images = count,
                reason,
                "a batch failed, its images are run one by one"
            );
            let len = batch.data.len() / count;
            for (image, data) in images.into_iter().zip(batch.data.chunks(len.max(1))) {
                if worker.engine.is_none() {
                    worker.reopen(shared);
                }
                let started = Instant::now();
                let single = worker.attempt(shared, &Batch { images: 1, height, width, data: data.to_vec() });
                let row = single.map(|logits| logits.data);
                if row.is_ok() {
                    shared.metrics().statistics.ran(1, image.decode + image.preprocess, started.elapsed());
                }
                answer(shared, image, (started, started.elapsed()), 1, row);
            }
        }
    }
}

fn answer(shared: &Shared, image: Prepared, run: (Instant, Duration), batch: usize, row: Result<Vec<f32>, String>) {
    let Prepared { decode, preprocess, pending, .. } = image;
    let (started, inference) = run;
    let queue = started.saturating_duration_since(pending.arrived).saturating_sub(decode + preprocess);
    shared.metrics().phase(Phase::Queue, queue);
    let timings = Timings { decode, preprocess, queue, inference, batch };
    pending.answer(row.map(|logits| Output { logits, timings }).map_err(InferError::Internal));
}

/// Runs every batch size that can occur up to 8, then powers of two and the largest, on images that differ, and
/// compares each row with the same image alone.
fn warm(shared: &Shared, worker: &mut Worker) -> Result<Warm, StartError> {
    let largest = shared.options.max_batch;
    let (height, width) = (shared.job.preprocessor.height(), shared.job.preprocessor.width());
    let mut all = Batch::zeros(largest, height, width);
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for value in &mut all.data {
        // xorshift: any fixed numbers of an input's usual size will do
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        *value = (random >> 40) as f32 / (1 << 22) as f32 - 2.0;
    }
    let len = shared.job.preprocessor.tensor_len();
    let mut run = |images: usize, data: &[f32]| {
        let batch = Batch { images, height, width, data: data.to_vec() };
        let started = Instant::now();
        let logits = worker.attempt(shared, &batch).map_err(|reason| StartError::WarmUp { batch: images, reason })?;
        if let Some(i) = logits.data.iter().position(|l| !l.is_finite()) {
            let reason = format!("logit {} of image {} is not finite", i % logits.classes, i / logits.classes);
            return Err(StartError::WarmUp { batch: images, reason });
        }
        Ok((logits, started.elapsed() / images as u32))
    };
    let mut alone = Vec::with_capacity(largest);
    let mut warm = Warm::default();
    for data in all.data.chunks(len) {
        let (logits, cost) = run(1, data)?;
        alone.push(logits.data);
        warm.run_cost = cost;
    }
    for images in (2..=largest).filter(|&n| n <= 8 || n.is_power_of_two() || n == largest) {
        let (logits, cost) = run(images, &all.data[..images * len])?;
        warm.run_cost = cost;
        let together = logits.data.iter().zip(alone.iter().flatten());
        warm.max_abs_diff = together.map(|(a, b)| f64::from((a - b).abs())).fold(warm.max_abs_diff, f64::max);
    }
    Ok(warm)
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}
