//! A compute thread's engine: opened, warmed up, run, and reopened after a panic.
//!
//! Before it may answer, an engine computes the model's golden answer, an encoded image, runs of every possible shape,
//! and the same images alone and in a batch. Knows nothing of queues and callers.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::job::{Invariance, StartError};
use super::shared::{Shared, Warm};
use super::top_k::top_k;
use crate::engine::{Answers, Backend, Batch, Extras, Logits, verify};
use crate::metrics::{Phase, RunResult};
use crate::panics::message;
use crate::pixels::Decoder;

/// Shortest and longest pause between two attempts to reopen an engine.
const REOPEN_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// A worker's engine, or when to try to reopen it.
pub(super) struct Lane {
    /// The worker's number.
    pub(super) number: usize,
    engine: Option<Box<dyn Backend>>,
    /// When to try again, and the pause after that attempt.
    reopen: Option<(Instant, Duration)>,
    /// What of the warm-up is left.
    warm_up: Option<Box<WarmUp>>,
}

impl Lane {
    /// Opens and warms up an engine, as far as that is due before the start; a panic meanwhile is reported like any other
    /// failure. The first worker of a model also does what is done once per model: the golden answer, every batch size, and the
    /// engine with all cores.
    pub(super) fn open(shared: &Shared, number: usize) -> Result<(Self, Warm), StartError> {
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let engine = Some((shared.job.open)()?);
            let mut lane = Self { number, engine, reopen: None, warm_up: None };
            let mut warm_up = WarmUp::begin(shared, &mut lane)?;
            if shared.options.warms_up_later() {
                let warm = warm_up.warm;
                lane.warm_up = Some(Box::new(warm_up));
                return Ok((lane, warm));
            }
            while warm_up.step(shared, &mut lane)? {}
            Ok((lane, warm_up.end(shared)))
        }));
        opened.unwrap_or_else(|panic| Err(StartError::Panic(message(panic.as_ref()))))
    }

    /// Whether a part of the warm-up is left that the engine can go on with.
    pub(super) fn warms_up(&self) -> bool {
        self.warm_up.is_some() && self.engine.is_some()
    }

    /// Goes on with the warm-up by a step. Batches that fail in it stay closed; the engine with all cores is for speed only.
    pub(super) fn warm_up(&mut self, shared: &Shared) {
        let Some(mut warm_up) = self.warm_up.take_if(|_| self.engine.is_some()) else { return };
        let stepped = catch_unwind(AssertUnwindSafe(|| warm_up.step(shared, self)));
        let reason = match stepped {
            Ok(Ok(true)) => return self.warm_up = Some(warm_up),
            Ok(Ok(false)) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => Some(message(panic.as_ref())),
        };
        let WarmUp { first, test, tried, .. } = *warm_up;
        let Warm { max_abs_diff, .. } = warm_up.end(shared);
        // after a failure, that no difference was seen says nothing of what was not run
        if test && (reason.is_none() || max_abs_diff > 0.0) {
            shared.differs(max_abs_diff);
        }
        if let Some(failed) = tried.filter(|_| reason.is_some()) {
            shared.limit_batches(failed.saturating_sub(1).max(1));
        }
        let (model, worker, max_batch) = (&shared.job.what, self.number, shared.max_batch());
        match reason {
            Some(reason) => tracing::error!(
                model,
                worker,
                max_batch,
                reason,
                "the rest of the warm-up failed; batches have up to {max_batch} images: {reason}"
            ),
            None if first => tracing::info!(model, max_batch, "batches of up to {max_batch} images are warm"),
            None => {}
        }
    }

    /// Whether there is an engine.
    pub(super) fn runs(&self) -> bool {
        self.engine.is_some()
    }

    /// When to try to reopen the engine.
    pub(super) fn reopen_at(&self) -> Option<Instant> {
        self.reopen.map(|(at, _)| at)
    }

    /// Tries to reopen the engine.
    pub(super) fn reopen(&mut self, shared: &Shared) {
        let pause = self.reopen.map_or(REOPEN_PAUSE.0, |(_, pause)| pause);
        let reason = match catch_unwind(AssertUnwindSafe(|| (shared.job.open)())) {
            Ok(Ok(engine)) => {
                self.engine = Some(engine);
                self.reopen = None;
                shared.engines(1);
                tracing::info!(model = shared.job.what, "engine reopened");
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(panic) => message(panic.as_ref()),
        };
        self.reopen = Some((shared.now() + pause, (pause * 2).min(REOPEN_PAUSE.1)));
        tracing::error!(
            model = shared.job.what,
            reason,
            retry_ms = pause.as_millis() as u64,
            "engine can't be reopened"
        );
    }

    /// One engine run, padded to a bucket; the error is for the log.
    pub(super) fn attempt(&mut self, shared: &Shared, batch: &mut Batch, extras: Extras) -> Result<Answers, String> {
        let Some(engine) = self.engine.as_mut() else { return Err("the worker has no engine".into()) };
        let (count, result) = measured(shared, self.number, Cores::Own, engine.as_mut(), batch, extras);
        if count == RunResult::Panic {
            self.lose(shared);
        }
        result
    }

    /// As [`attempt`](Self::attempt), for logits alone.
    fn logits(&mut self, shared: &Shared, batch: &mut Batch) -> Result<Logits, String> {
        self.attempt(shared, batch, Extras::NONE).map(|answers| answers.logits)
    }

    /// One run on the engine with all cores, if there is one and it is free. `None` on any failure: the lane's own
    /// engine can still answer.
    pub(super) fn attempt_wide(&self, shared: &Shared, batch: &mut Batch, extras: Extras) -> Option<Answers> {
        let mut wide = shared.wide.try_lock().ok()?;
        let (count, result) = measured(shared, self.number, Cores::All, wide.as_mut()?.as_mut(), batch, extras);
        if count == RunResult::Panic {
            let broken = wide.take();
            let reopened = catch_unwind(AssertUnwindSafe(|| {
                drop(broken);
                shared.job.open_wide.as_ref().and_then(|open| open().ok())
            }));
            *wide = reopened.ok().flatten();
        }
        let logged = |reason: &String| {
            tracing::warn!(model = shared.job.what, reason, "the engine for an idle machine failed");
        };
        result.inspect_err(logged).ok()
    }

    /// Drops the engine after a panic: its state can't be trusted.
    pub(super) fn lose(&mut self, shared: &Shared) {
        if self.engine.is_some() {
            self.discard();
            shared.engines(-1);
            self.reopen = Some((shared.now(), REOPEN_PAUSE.0));
        }
    }

    /// Drops the engine as the thread ends.
    pub(super) fn close(mut self, shared: &Shared) {
        if self.engine.is_some() {
            shared.engines(-1);
            self.discard();
        }
    }

    fn discard(&mut self) {
        let engine = self.engine.take();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(engine))) {
            tracing::error!(reason = message(panic.as_ref()), "an engine panicked while it was closed");
        }
    }
}

/// How many of the cores an engine uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cores {
    /// The worker's share.
    Own,
    /// All, on an idle machine.
    All,
}

/// One run of an engine, padded to a bucket, measured and counted; the error is for the log.
fn measured(
    shared: &Shared,
    worker: usize,
    cores: Cores,
    engine: &mut dyn Backend,
    batch: &mut Batch,
    extras: Extras,
) -> (RunResult, Result<Answers, String>) {
    let (images, len) = (batch.images, batch.data.len());
    let padded = shared.options.padded(images);
    if padded > images {
        batch.data.resize(len / images.max(1) * padded, 0.0);
        batch.images = padded;
    }
    let started = shared.now();
    shared.runs(worker, started);
    let result = catch_unwind(AssertUnwindSafe(|| engine.run_with(batch, extras)));
    let took = shared.now().saturating_duration_since(started);
    let (count, result) = match result {
        Ok(Ok(answers)) => match check(&answers.logits, batch, shared.job.classes) {
            Ok(()) => (RunResult::Ok, Ok(answers)),
            Err(reason) => (RunResult::Error, Err(reason)),
        },
        Ok(Err(error)) => (RunResult::Error, Err(error.to_string())),
        Err(panic) => (RunResult::Panic, Err(format!("the engine panicked: {}", message(panic.as_ref())))),
    };
    batch.data.truncate(len);
    batch.images = images;
    let result = result.map(|mut answers| {
        let Answers { logits, features, map } = &mut answers;
        for values in [&mut logits.data, features, map] {
            values.truncate(values.len() / padded.max(1) * images);
        }
        logits.images = images;
        answers
    });
    let metrics = shared.metrics();
    metrics.phase(Phase::Inference, took);
    metrics.batch_size.observe(images as f64);
    metrics.padding.inc_by((padded - images) as u64);
    metrics.run(count);
    // a run on an idle machine says nothing about the speed of a busy one
    let cost = (cores == Cores::Own).then(|| took / images.max(1) as u32);
    shared.ran(worker, images, result.is_ok(), cost);
    (count, result)
}

fn check(logits: &Logits, batch: &Batch, classes: usize) -> Result<(), String> {
    let fits = logits.images == batch.images
        && logits.classes == classes
        && logits.data.len() == batch.images.saturating_mul(classes);
    if fits {
        return Ok(());
    }
    Err(format!(
        "{} images of {classes} classes were due, logits [{}, {}] came",
        batch.images, logits.images, logits.classes
    ))
}

/// The warm-up of an engine, in steps of one run or few.
struct WarmUp {
    /// Whether the worker does what is done once per model.
    first: bool,
    /// Whether every batch size is run, and its logits compared.
    test: bool,
    /// As many as the largest batch has.
    images: Vec<f32>,
    /// Logits of the first of them, each run alone.
    alone: Vec<f32>,
    /// Images in the next batch that is considered.
    next: usize,
    /// Images in the batch that is being run, and failed if it still is when a step ends.
    tried: Option<usize>,
    wide: bool,
    /// Time and images of the large batches.
    large: (Duration, u32),
    warm: Warm,
}

impl WarmUp {
    /// Runs the golden answer and an encoded image, if the worker is the model's first, and an image alone.
    fn begin(shared: &Shared, lane: &mut Lane) -> Result<Self, StartError> {
        let first = lane.number == 0;
        let mut warm_up = Self {
            first,
            test: first && shared.options.invariance != Invariance::Off,
            images: images(shared, shared.options.max_batch),
            alone: Vec::new(),
            next: 2,
            tried: None,
            wide: first && shared.job.open_wide.is_some(),
            large: (Duration::ZERO, 0),
            warm: Warm::default(),
        };
        if let Some(golden) = shared.job.golden.as_ref().filter(|_| first) {
            let (logits, _) = run(shared, &golden.input, |batch| lane.logits(shared, batch))?;
            let difference = verify::compare(&golden.logits, &logits).max_abs_diff;
            let tolerance = golden.tolerance;
            if difference > tolerance {
                return Err(StartError::Golden { difference, tolerance });
            }
            tracing::info!(model = shared.job.what, difference, tolerance, "the golden answer is given");
        }
        if first {
            let started = shared.now();
            let tensor = match shared.job.preprocessor.takes_images() {
                true => photograph(shared).map_err(|reason| StartError::WarmUp { batch: 1, reason })?,
                false => warm_up.images[..shared.job.preprocessor.tensor_len()].to_vec(),
            };
            warm_up.warm.prepare_cost = shared.now().saturating_duration_since(started);
            let (logits, _) = run(shared, &tensor, |batch| lane.logits(shared, batch))?;
            top_k(&logits, 1, &[]).map_err(|e| StartError::WarmUp { batch: 1, reason: e.to_string() })?;
        }
        warm_up.run_alone(shared, lane)?;
        Ok(warm_up)
    }

    /// The next step; whether there was one.
    fn step(&mut self, shared: &Shared, lane: &mut Lane) -> Result<bool, StartError> {
        let (largest, classes) = (shared.options.max_batch, shared.job.classes);
        if self.test && self.alone.len() < largest * classes {
            self.run_alone(shared, lane)?;
            return Ok(true);
        }
        while self.next <= largest {
            let count = self.next;
            self.next += 1;
            if !(self.test || count == largest || shared.options.buckets.contains(&count)) {
                continue;
            }
            self.tried = Some(count);
            let images = &self.images[..count * shared.job.preprocessor.tensor_len()];
            let (logits, cost) = run(shared, images, |batch| lane.logits(shared, batch))?;
            self.tried = None;
            if 2 * count > largest {
                // the cost in large batches, averaged over all of them
                let (took, ran) = &mut self.large;
                (*took, *ran) = (*took + cost * count as u32, *ran + count as u32);
                self.warm.run_cost = *took / *ran;
            }
            if self.test {
                self.compare(shared, 0, &logits);
            }
            if self.first {
                shared.warms(count);
            }
            return Ok(true);
        }
        let Some(open) = shared.job.open_wide.as_ref().filter(|_| std::mem::take(&mut self.wide)) else {
            return Ok(false);
        };
        let mut wide = open()?;
        let len = shared.job.preprocessor.tensor_len();
        for i in 0..if self.test { largest.min(2) } else { 1 } {
            let image = &self.images[i * len..(i + 1) * len];
            let (logits, _) = run(shared, image, |batch| wide.run(batch).map_err(|e| e.to_string()))?;
            if self.test {
                self.compare(shared, i, &logits);
            }
        }
        if let Ok(mut idle) = shared.wide.lock() {
            *idle = Some(wide);
        }
        Ok(true)
    }

    fn run_alone(&mut self, shared: &Shared, lane: &mut Lane) -> Result<(), StartError> {
        let len = shared.job.preprocessor.tensor_len();
        let at = self.alone.len() / shared.job.classes.max(1);
        let (logits, cost) = run(shared, &self.images[at * len..(at + 1) * len], |batch| lane.logits(shared, batch))?;
        self.alone.extend(logits);
        self.warm.run_cost = cost;
        Ok(())
    }

    /// Compares logits of the images from `at` on with those of each alone.
    fn compare(&mut self, shared: &Shared, at: usize, logits: &[f32]) {
        let difference = difference(&self.alone[at * shared.job.classes..], logits);
        self.warm.max_abs_diff = self.warm.max_abs_diff.max(difference);
    }

    /// What was measured.
    fn end(self, shared: &Shared) -> Warm {
        if self.warm.max_abs_diff > 0.0 {
            tracing::warn!(
                model = shared.job.what,
                max_abs_diff = self.warm.max_abs_diff,
                "an image's logits depend on the batch it is in"
            );
        }
        self.warm
    }
}

/// Decodes, resizes and normalises an encoded image of twice the network's input size, so that a setting that breaks
/// every image is found before the first client finds it.
fn photograph(shared: &Shared) -> Result<Vec<f32>, String> {
    let job = &shared.job;
    // without the clients' limits, which may be smaller than this image
    let side = |pixels: usize| (2 * pixels).clamp(16, 2048).next_multiple_of(4) as u32;
    let file = bitmap(side(job.preprocessor.width()), side(job.preprocessor.height()));
    let image = Decoder::default().decode(&file, job.exif_orientation, |w, h| job.preprocessor.resized(w, h));
    let image = image.map_err(|e| format!("a test image can't be decoded: {e}"))?;
    let mut tensor = vec![0.0; job.preprocessor.tensor_len()];
    job.preprocessor.apply(&image, &mut tensor);
    match tensor.iter().position(|value| !value.is_finite()) {
        None => Ok(tensor),
        Some(i) => {
            Err(format!("value {i} of a test image's tensor is not finite; are mean and std of the manifest right?"))
        }
    }
}

/// A BMP file of gradients; `width` is a multiple of 4.
fn bitmap(width: u32, height: u32) -> Vec<u8> {
    const HEADER: u32 = 14 + 40;
    let pixels = (0..height).flat_map(|y| (0..width).flat_map(move |x| [5 * x, 7 * y, 3 * (x + y)].map(|v| v as u8)));
    let mut file = b"BM".to_vec();
    for word in [HEADER + 3 * width * height, 0, HEADER, 40, width, height, 1 | 24 << 16, 0, 0, 0, 0, 0, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(pixels);
    file
}

/// Different images of fixed pseudo-random values.
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

/// Logits of the images in `data`, all finite, and the time per image.
fn run<L>(shared: &Shared, data: &[f32], attempt: L) -> Result<(Vec<f32>, Duration), StartError>
where
    L: FnOnce(&mut Batch) -> Result<Logits, String>,
{
    let (height, width) = (shared.job.preprocessor.height(), shared.job.preprocessor.width());
    let images = data.len() / shared.job.preprocessor.tensor_len().max(1);
    let mut batch = Batch { images, height, width, data: data.to_vec() };
    let started = shared.now();
    let logits = attempt(&mut batch).map_err(|reason| StartError::WarmUp { batch: images, reason })?;
    if let Some(i) = logits.data.iter().position(|l| !l.is_finite()) {
        let reason = format!("logit {} of image {} is not finite", i % logits.classes, i / logits.classes);
        return Err(StartError::WarmUp { batch: images, reason });
    }
    Ok((logits.data, shared.now().saturating_duration_since(started) / images.max(1) as u32))
}

/// Largest absolute difference between the first values of `alone` and `together`.
fn difference(alone: &[f32], together: &[f32]) -> f64 {
    alone.iter().zip(together).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max)
}
