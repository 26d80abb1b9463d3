//! One version of a model: open, warm and ready to answer.
//!
//! Owns the path from encoded images to labelled predictions. Knows neither where models come from nor which protocol
//! asks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::error::InferError;
use super::job::{Golden, Job, OpenBackend, SchedulerOptions, StartError};
use super::request::{Input, Output, Terms, Timings};
use super::scheduler::{Health, Scheduler};
use super::system::{Os, System};
use super::top_k::{NotFinite, Prediction, Selection, check_finite, select};
use crate::engine::verify;
use crate::metrics::statistics::{Answered, Snapshot, Statistics};
use crate::metrics::{Metrics, ModelInfo, ModelMetrics, Phase};
use crate::model::{Manifest, ModelDir, ModelError, Precision, Scoring};
use crate::pixels::Preprocessor;

/// Why a model can't be served.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The folder or its manifest is not valid.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The manifest's golden answer is for another input than this program computes.
    #[error("the golden input of model `{0}` can't be made by this version of nfold; fold the checkpoint again")]
    Golden(String),
    /// The model's input is above the limit of pixels.
    #[error(
        "model `{name}` version {version} takes images of {height}x{width}, more than the {most} pixels of --max-input-pixels; fold it for a smaller size (nfold fold --size), or raise that limit, and the memory for it"
    )]
    Input {
        /// The model.
        name: String,
        /// The model's version.
        version: u64,
        /// Height of the model's input, in pixels.
        height: u32,
        /// Width of the model's input, in pixels.
        width: u32,
        /// The limit, in pixels.
        most: u64,
    },
    /// The graph was not written by nfold.
    #[error("the graph of model `{name}` version {version} is refused: {reason}")]
    Graph {
        /// The model.
        name: String,
        /// The model's version.
        version: u64,
        /// What the graph holds.
        reason: String,
    },
    /// The model does not start.
    #[error("model `{name}` version {version} does not start: {source}")]
    Start {
        /// The model.
        name: String,
        /// The model's version.
        version: u64,
        /// Why.
        source: StartError,
    },
}

/// An image's predictions, and where the time went.
#[derive(Debug, Clone)]
pub struct Classified {
    /// Most probable first.
    pub predictions: Vec<Prediction>,
    /// Where the time went.
    pub timings: Timings,
}

/// One version of a model with its queue and threads, warm.
#[derive(Debug)]
pub struct LiveModel {
    /// Name in the repository.
    pub name: String,
    /// Version in the repository.
    pub version: u64,
    /// The model's manifest.
    pub manifest: Manifest,
    /// How its logits become scores.
    pub scoring: Scoring,
    scheduler: Scheduler,
    metrics: ModelMetrics,
    info: ModelInfo,
}

/// How a model's engines are opened.
pub struct Engines {
    /// Opens a worker's engine.
    pub open: OpenBackend,
    /// Opens the engine that uses every core.
    pub open_wide: Option<OpenBackend>,
    /// Name of the hardware, for metrics.
    pub provider: &'static str,
    /// Whether the engines multiply in less than single precision even for a single-precision graph (TensorFloat-32).
    pub reduced: bool,
}

impl LiveModel {
    /// Starts a model on these engines. Blocks for seconds.
    pub fn start(
        dir: &ModelDir,
        engines: Engines,
        options: &SchedulerOptions,
        metrics: &Metrics,
    ) -> Result<Self, LoadError> {
        Self::start_on(Arc::new(Os), dir, engines, options, metrics)
    }

    /// Like [`start`](Self::start), with another clock and other threads.
    pub fn start_on(
        system: Arc<dyn System>,
        dir: &ModelDir,
        engines: Engines,
        options: &SchedulerOptions,
        metrics: &Metrics,
    ) -> Result<Self, LoadError> {
        let (name, version, manifest) = (dir.name.clone(), dir.version, dir.manifest.clone());
        let Engines { open, open_wide, provider, reduced } = engines;
        let model_metrics = metrics.model(&name, version, provider);
        let job = Job {
            what: format!("{name}/{version}"),
            preprocessor: Preprocessor::new(&manifest.preprocessing),
            exif_orientation: manifest.preprocessing.exif_orientation,
            classes: manifest.classes as usize,
            open,
            open_wide,
            golden: golden(dir, reduced)?,
            metrics: model_metrics.clone(),
            system: system.clone(),
        };
        let started = system.now();
        let scheduler = Scheduler::start(job, options.clone()).map_err(|source| LoadError::Start {
            name: name.clone(),
            version,
            source,
        })?;
        let precision = serde_json::to_value(manifest.precision).unwrap_or_default();
        let info = [
            name.clone(),
            version.to_string(),
            manifest.architecture.clone(),
            precision.as_str().unwrap_or_default().into(),
            provider.into(),
            manifest.onnx_sha256.clone(),
            manifest.source_sha256.clone(),
        ];
        let info = metrics.model_info(info);
        tracing::info!(
            model = name,
            version,
            architecture = manifest.architecture,
            provider,
            workers = options.workers,
            max_batch = options.max_batch,
            duration_ms = system.now().saturating_duration_since(started).as_millis() as u64,
            "model {name} version {version} is warm"
        );
        let scoring = manifest.scoring();
        Ok(Self { name, version, manifest, scoring, scheduler, metrics: model_metrics, info })
    }

    /// Computes the logits of one request's images and maps each with `finish`, in order; every protocol comes through
    /// here. All images are admitted or none. Errors of one image stay with that image, and so does what ends a request
    /// early (deadline, shutdown) once any image is answered; if none is, that is the outer error.
    pub async fn infer<T>(
        &self,
        inputs: Vec<Input>,
        terms: impl Into<Terms>,
        finish: impl Fn(Vec<f32>) -> Result<T, NotFinite>,
    ) -> Result<Vec<Result<(T, Timings), InferError>>, InferError> {
        let mut request = Counted {
            statistics: &self.metrics.statistics,
            started: Instant::now(),
            images: 0,
            times: Answered::default(),
        };
        // a client's own numbers may overflow the network (load generators send random bits); a decoded image can't
        let by_hand = !inputs.iter().all(|input| matches!(input, Input::Encoded(_)));
        let tickets = self.scheduler.submit(inputs, terms)?;
        let mut answers = Vec::with_capacity(tickets.len());
        for ticket in tickets {
            let Output { logits, timings } = match ticket.answer().await {
                Ok(output) => output,
                Err(error) => {
                    answers.push(Err(error));
                    continue;
                }
            };
            let started = Instant::now();
            let checked = if by_hand { Ok(()) } else { check_finite(&logits) };
            let finished = checked.and_then(|()| finish(logits));
            let elapsed = started.elapsed();
            self.metrics.phase(Phase::Postprocess, elapsed);
            answers.push(match finished {
                Ok(answer) => {
                    request.answered(&timings, elapsed);
                    Ok((answer, timings))
                }
                Err(error) if by_hand => Err(InferError::BadTensor(error.to_string())),
                Err(error) => Err(InferError::Internal(error.to_string())),
            });
        }
        let cut_short = |answer: &Result<_, InferError>| answer.as_ref().err().filter(|e| !e.is_of_an_image()).cloned();
        match answers.first().and_then(cut_short) {
            Some(error) if answers.iter().all(|answer| cut_short(answer).is_some()) => Err(error),
            _ => Ok(answers),
        }
    }

    /// The error if no image would be admitted now; checked before a request's body is read. Success reserves nothing.
    pub fn has_room(&self, deadline: Instant) -> Result<(), InferError> {
        self.scheduler.has_room(deadline).inspect_err(|_| self.metrics.statistics.failed(Duration::ZERO))
    }

    /// Classifies the encoded images of one request, in order; errors as in [`infer`](Self::infer).
    pub async fn classify(
        &self,
        images: Vec<Bytes>,
        selection: Selection,
        deadline: Instant,
    ) -> Result<Vec<Result<Classified, InferError>>, InferError> {
        let inputs = images.into_iter().map(Input::Encoded).collect();
        let answers = self.infer(inputs, deadline, |logits| self.select(&logits, selection)).await?;
        let classified = |(predictions, timings)| Classified { predictions, timings };
        Ok(answers.into_iter().map(|answer| answer.map(classified)).collect())
    }

    /// The classes that are named for an image's logits.
    pub fn select(&self, logits: &[f32], selection: Selection) -> Result<Vec<Prediction>, NotFinite> {
        select(logits, &self.scoring, selection, &self.manifest.labels)
    }

    /// How images are queued and batched.
    pub fn options(&self) -> &SchedulerOptions {
        self.scheduler.options()
    }

    /// The model's running totals.
    pub fn statistics(&self) -> Snapshot {
        self.metrics.statistics.snapshot()
    }

    /// Whether the engines work.
    pub fn health(&self) -> Health {
        self.scheduler.health()
    }

    /// Why the model is not ready; `None` if it is. Either no engine works, or one hangs or keeps failing.
    pub fn fault(&self, hang_limit: Duration) -> Option<String> {
        const STORM: u32 = 5;
        let Health { engines, failures, longest_run } = self.health();
        let what = if engines == 0 {
            "has no working engine".to_string()
        } else if longest_run.is_some_and(|age| age > hang_limit) {
            format!("has an engine run that hangs for more than {} s", hang_limit.as_secs_f64())
        } else if failures >= STORM {
            format!("failed {failures} engine runs in a row")
        } else {
            return None;
        };
        Some(format!("model {} version {} {what}", self.name, self.version))
    }

    /// Bytes claimed by all images of the process that are being decoded.
    pub fn decode_memory(&self) -> u64 {
        self.scheduler.options().decode_memory.used()
    }

    /// Updates the gauges that are measured at each scrape.
    pub fn observe(&self) {
        self.scheduler.observe();
        self.info.set();
    }

    /// The queue, for callers that send tensors or need logits.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }
}

/// Counts one request in the statistics on drop: as failed if no image was answered.
struct Counted<'a> {
    statistics: &'a Statistics,
    started: Instant,
    images: usize,
    times: Answered,
}

impl Counted<'_> {
    fn answered(&mut self, timings: &Timings, output: Duration) {
        self.images += 1;
        let times = &mut self.times;
        times.queue = times.queue.max(timings.queue);
        times.input = times.input.max(timings.decode + timings.preprocess);
        times.infer = times.infer.max(timings.inference);
        times.output += output;
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        let whole = self.started.elapsed();
        match self.images {
            0 => self.statistics.failed(whole),
            images => self.statistics.answered(images, &Answered { whole, ..self.times }),
        }
    }
}

/// The golden answer of the manifest.
fn golden(dir: &ModelDir, reduced: bool) -> Result<Option<Golden>, LoadError> {
    let Some(golden) = &dir.manifest.golden else { return Ok(None) };
    let p = &dir.manifest.preprocessing;
    let input = verify::images(p.shape()).next().unwrap_or_default();
    if verify::digest(&input) != golden.input_sha256 {
        return Err(LoadError::Golden(dir.name.clone()));
    }
    let span = verify::compare(&golden.logits, &golden.logits).logit_span;
    let least = if reduced { verify::tolerance(Precision::Fp16, span) } else { 0.0 };
    Ok(Some(Golden { input, logits: golden.logits.clone(), tolerance: golden.tolerance.max(least) }))
}
