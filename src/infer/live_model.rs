//! One version of a model: open, warm and ready to answer.
//!
//! Owns the path from encoded images to labelled predictions. Knows neither where models come from nor which protocol
//! asks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::runtime::{Handle, RuntimeFlavor};

use super::error::InferError;
use super::job::{Golden, Job, OpenBackend, SchedulerOptions, StartError};
use super::request::{Input, Output, Terms, Timings};
use super::scheduler::{Health, Scheduler};
use super::system::{Os, System};
use super::top_k::{NotFinite, Prediction, Selection, Summary, check_finite, select, summarise};
use crate::engine::{ClassMaps, Extras, verify};
use crate::metrics::statistics::{Answered, Snapshot, Statistics};
use crate::metrics::{Metrics, ModelInfo, ModelMetrics, Phase};
use crate::model::{FEATURES, MAP, Manifest, ModelDir, ModelError, Precision, Scoring};
use crate::pixels::Preprocessor;
use crate::pixels::heat::Grid;

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

/// Where an image speaks for a class.
#[derive(Debug, Clone)]
pub struct Explained {
    /// The class and its score.
    pub prediction: Prediction,
    /// The class activation map: its mean, and the class's bias, make the logit.
    pub grid: Grid,
    /// What the network saw, `[channels, height, width]`, normalised.
    pub input: Vec<f32>,
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
    class_maps: Option<Result<ClassMaps, &'static str>>,
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
        Ok(Self { name, version, manifest, scoring, class_maps: None, scheduler, metrics: model_metrics, info })
    }

    /// Takes the class activation maps of its graph, or why there are none.
    pub fn with_class_maps(mut self, class_maps: Result<ClassMaps, &'static str>) -> Self {
        self.class_maps = Some(class_maps);
        self
    }

    /// A class by its label, or by its position where no label is so.
    pub fn class(&self, name: &str) -> Option<usize> {
        let by_position = || name.parse().ok().filter(|&index| index < self.manifest.classes as usize);
        self.manifest.labels.iter().position(|label| label == name).or_else(by_position)
    }

    /// Refuses what has no class activation maps.
    pub fn explains(&self) -> Result<&ClassMaps, InferError> {
        self.gives(Extras { map: true, ..Extras::NONE })?;
        match &self.class_maps {
            Some(Ok(maps)) => Ok(maps),
            Some(Err(reason)) => {
                Err(InferError::NoClassMaps { model: self.name.clone(), version: self.version, reason })
            }
            None => Err(InferError::Internal("the classifier was not read".into())),
        }
    }

    /// Says where an encoded image speaks for a class, the most probable one where none is given. The class is one of the
    /// model's.
    pub async fn explain(
        &self,
        image: Bytes,
        class: Option<usize>,
        deadline: Instant,
    ) -> Result<Explained, InferError> {
        let maps = self.explains()?;
        let all = Selection::top(usize::MAX);
        let finish = |output: Output| {
            let named = self.select(&output.logits, if class.is_some() { all } else { Selection::top(1) })?;
            Ok((named.into_iter().find(|p| class.is_none_or(|class| class == p.index)), output))
        };
        let extras = Extras { map: true, ..Extras::NONE };
        let answer = self.infer_with(vec![Input::Encoded(image)], deadline, extras, finish).await?.pop();
        let ((prediction, output), timings) =
            answer.unwrap_or_else(|| Err(InferError::Internal("an image has no answer".into())))?;
        let internal = |what: &str| InferError::Internal(what.into());
        let prediction = prediction.ok_or_else(|| internal("the class is none of the model's"))?;
        let values = maps.grid(prediction.index, &output.map).ok_or_else(|| internal("the map has no class"))?;
        let [_, height, width] = self.manifest.map.unwrap_or_default().map(|side| side as usize);
        if values.len() != height * width {
            return Err(internal("the map has other sides than the manifest says"));
        }
        Ok(Explained { prediction, grid: Grid { height, width, values }, input: output.input, timings })
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
        self.infer_with(inputs, terms, Extras::NONE, |output| finish(output.logits)).await
    }

    /// As [`infer`](Self::infer), for more than logits. Fails where the model has no such output.
    pub async fn infer_with<T>(
        &self,
        inputs: Vec<Input>,
        terms: impl Into<Terms>,
        extras: Extras,
        finish: impl Fn(Output) -> Result<T, NotFinite>,
    ) -> Result<Vec<Result<(T, Timings), InferError>>, InferError> {
        self.gives(extras)?;
        let mut request = Counted {
            statistics: &self.metrics.statistics,
            started: Instant::now(),
            images: 0,
            times: Answered::default(),
        };
        // a client's own numbers may overflow the network (load generators send random bits); a decoded image can't
        let by_hand = !inputs.iter().all(|input| matches!(input, Input::Encoded(_)));
        let tickets = self.scheduler.submit_for(inputs, terms, extras)?;
        let mut answers = Vec::with_capacity(tickets.len());
        for ticket in tickets {
            let output = match ticket.answer().await {
                Ok(output) => output,
                Err(error) => {
                    answers.push(Err(error));
                    continue;
                }
            };
            let started = Instant::now();
            if let Err(error) = self.is_whole(&output, extras) {
                answers.push(Err(error));
                continue;
            }
            let timings = output.timings;
            let checked = if by_hand { Ok(()) } else { check_finite(&output.logits) };
            let finished = off_io_threads(output.logits.len(), || {
                if let Some(Summary { class, shares }) = summarise(&output.logits, &self.scoring) {
                    let label = self.manifest.labels.get(class).cloned().unwrap_or_else(|| class.to_string());
                    self.metrics.predicted(class, &label, shares);
                }
                checked.and_then(|()| finish(output))
            });
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

    /// Values of an image's map; 0 where the model gives none.
    pub fn map_values(&self) -> usize {
        self.manifest.map.map_or(0, |map| map.iter().map(|&side| side as usize).product())
    }

    /// Whether the engine gave as many values as the manifest says.
    fn is_whole(&self, output: &Output, extras: Extras) -> Result<(), InferError> {
        let width = self.manifest.features.unwrap_or_default() as usize;
        for (name, asked, found, due) in [
            (FEATURES, extras.features, output.features.len(), width),
            (MAP, extras.map, output.map.len(), self.map_values()),
        ] {
            if asked && found != due {
                return Err(InferError::Internal(format!("`{name}` has {found} values, and {due} by the manifest")));
            }
        }
        Ok(())
    }

    /// Refuses what the model was folded without.
    pub fn gives(&self, extras: Extras) -> Result<(), InferError> {
        for (output, wanted, there) in [
            (FEATURES, extras.features, self.manifest.features.is_some()),
            (MAP, extras.map, self.manifest.map.is_some()),
        ] {
            if wanted && !there {
                return Err(InferError::NoOutput { model: self.name.clone(), version: self.version, output });
            }
        }
        Ok(())
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

/// Most logits whose scores are computed on the thread that waits for them: some tens of microseconds.
const IN_PLACE: usize = 4096;

/// Runs work on this many logits. An async I/O thread first hands its other tasks to another thread where they are many.
fn off_io_threads<T>(logits: usize, work: impl FnOnce() -> T) -> T {
    // a runtime of one thread has nobody to hand them to
    let many_threads = || Handle::try_current().is_ok_and(|h| h.runtime_flavor() == RuntimeFlavor::MultiThread);
    if logits > IN_PLACE && many_threads() { tokio::task::block_in_place(work) } else { work() }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_of_many_classes_do_not_hold_the_io_threads_up() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().expect("a runtime");
        let (other_ran, ran) = std::sync::mpsc::channel();
        let waits = runtime.spawn(async move {
            off_io_threads(IN_PLACE + 1, || ran.recv_timeout(Duration::from_secs(20)).expect("the other task runs"));
        });
        runtime.spawn(async move { other_ran.send(()) });
        runtime.block_on(waits).expect("no panic");
        let alone = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        assert_eq!(alone.block_on(async { off_io_threads(IN_PLACE + 1, || 1) }), 1);
        assert_eq!(off_io_threads(IN_PLACE + 1, || 2), 2);
    }
}
