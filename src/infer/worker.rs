//! The compute threads: decode, resize, run, answer.
//!
//! A worker owns its engine (running takes `&mut`) and survives a panic in it: the engine is reopened, the batch retried
//! one by one. A decoder has no engine. What to do next is the scheduler's decision.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use super::error::InferError;
use super::job::StartError;
use super::queue::{Entry, Pending, Prepared};
use super::request::{Input, Output, Timings};
use super::scheduler::{Seat, Shared, Task};
use super::warm_up::{Warm, warm_up};
use crate::engine::{Backend, Batch, Logits};
use crate::metrics::{Phase, RunResult};
use crate::pixels;

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

/// The whole life of a compute thread. A worker reports once: warm, or why not.
pub(super) fn main(shared: &Shared, role: Role, report: Sender<Result<Warm, StartError>>) {
    let mut worker = match role {
        Role::Decoder => Worker { number: None, engine: None, reopen: None },
        Role::Worker(number) => {
            let opened = (shared.job.open)().map_err(StartError::from);
            let warmed = opened.and_then(|engine| {
                let mut worker = Worker { number: Some(number), engine: Some(engine), reopen: None };
                warm_up(shared, &mut worker, number == 0).map(|warm| (worker, warm))
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
            Task::Run { images, alone } => run(shared, &mut worker, images, alone),
            Task::Reopen => worker.reopen(shared),
            Task::Stop => break,
        }
    }
    if worker.engine.is_some() {
        shared.engines(-1);
    }
    worker.discard();
}

pub(super) struct Worker {
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

    /// One engine run, padded to a bucket; the error says what to log.
    pub(super) fn attempt(&mut self, shared: &Shared, batch: &mut Batch) -> Result<Logits, String> {
        let Some(engine) = self.engine.as_mut() else { return Err("the worker has no engine".into()) };
        let (count, result) = measured(shared, self.number, engine.as_mut(), batch);
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

/// One run of any engine, padded to a bucket, measured and counted; the error says what to log.
fn measured(
    shared: &Shared,
    worker: Option<usize>,
    engine: &mut dyn Backend,
    batch: &mut Batch,
) -> (RunResult, Result<Logits, String>) {
    let (images, len) = (batch.images, batch.data.len());
    let padded = shared.options.padded(images);
    if padded > images {
        batch.data.resize(len / images.max(1) * padded, 0.0);
        batch.images = padded;
    }
    let started = Instant::now();
    shared.runs(worker, started);
    let result = catch_unwind(AssertUnwindSafe(|| engine.run(batch)));
    let took = started.elapsed();
    let (count, result) = match result {
        Ok(Ok(logits)) => match check(&logits, batch, shared.job.classes) {
            Ok(()) => (RunResult::Ok, Ok(logits)),
            Err(reason) => (RunResult::Error, Err(reason)),
        },
        Ok(Err(error)) => (RunResult::Error, Err(error.to_string())),
        Err(panic) => (RunResult::Panic, Err(format!("the engine panicked: {}", message(panic.as_ref())))),
    };
    batch.data.truncate(len);
    batch.images = images;
    let result = result.map(|mut logits| {
        logits.data.truncate(images * logits.classes);
        logits.images = images;
        logits
    });
    let metrics = shared.metrics();
    metrics.phase(Phase::Inference, took);
    metrics.batch_size.observe(images as f64);
    metrics.padding.inc_by((padded - images) as u64);
    metrics.run(count);
    shared.ran(worker, images, took, result.is_ok());
    (count, result)
}

/// Runs one image on the engine that has every core, if there is one and nobody has it. Whatever goes wrong there, the
/// worker's own engine can still answer.
fn run_wide(shared: &Shared, worker: Option<usize>, batch: &mut Batch) -> Option<Logits> {
    let mut wide = shared.wide.try_lock().ok()?;
    let (count, result) = measured(shared, worker, wide.as_mut()?.as_mut(), batch);
    if count == RunResult::Panic {
        let broken = wide.take();
        let reopened = catch_unwind(AssertUnwindSafe(|| {
            drop(broken);
            shared.job.open_wide.as_ref().and_then(|open| open().ok())
        }));
        *wide = reopened.ok().flatten();
    }
    result
        .inspect_err(|reason| tracing::warn!(model = shared.job.what, reason, "the engine for an idle machine failed"))
        .ok()
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
        let decoder = pixels::Decoder { limits: shared.options.image_limits, jpeg: shared.options.jpeg_decoder };
        let needed = |width, height| job.preprocessor.resized(width, height);
        let decoded = decoder.decode(&bytes, job.exif_orientation, needed);
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
            let error: pixels::ImageError = error;
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
    let prepared = Prepared { tensor, decode: Duration::ZERO, preprocess: started.elapsed(), pending };
    shared.prepared(Some(prepared), Duration::ZERO);
}

fn run(shared: &Shared, worker: &mut Worker, mut images: Vec<Prepared>, alone: bool) {
    let started = Instant::now();
    let count = images.len();
    let (height, width) = (shared.job.preprocessor.height(), shared.job.preprocessor.width());
    let data = match images.as_mut_slice() {
        [only] => std::mem::take(&mut only.tensor),
        several => several.iter_mut().flat_map(|image| std::mem::take(&mut image.tensor)).collect(),
    };
    let mut batch = Batch { images: count, height, width, data };
    let wide = if alone { run_wide(shared, worker.number, &mut batch) } else { None };
    match wide.map_or_else(|| worker.attempt(shared, &mut batch), Ok) {
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
                let single = worker.attempt(shared, &mut Batch { images: 1, height, width, data: data.to_vec() });
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

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}
