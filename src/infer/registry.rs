//! The live models: what the repository holds, opened, warmed and ready to answer.
//!
//! Owns the way from encoded images to labelled predictions. Knows neither how a model was folded nor which protocol
//! asks.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::error::InferError;
use super::job::{Golden, Job, OpenBackend, SchedulerOptions, StartError};
use super::request::{Input, Output, Terms, Timings};
use super::scheduler::{Health, Scheduler};
use super::system::Os;
use super::top_k::{NotFinite, Prediction, check_finite, top_k};
use crate::engine::graph_cache::GraphCache;
use crate::engine::verify;
use crate::engine::{self, Backend, Batch, EngineError, EngineOptions, Fitted, OrtBackend, Profile, Provider};
use crate::metrics::statistics::{Answered, Snapshot, Statistics};
use crate::metrics::{Metrics, ModelInfo, ModelMetrics, Phase};
use crate::model::{self, Manifest, ModelDir, ModelError};
use crate::pixels::Preprocessor;

/// Which models are served, and how.
#[derive(Debug, Clone)]
pub struct RegistryOptions {
    /// The model repository.
    pub repository: PathBuf,
    /// Models to serve, each with one version or all of them; empty: everything the repository holds.
    pub models: Vec<(String, Option<u32>)>,
    /// How engines are opened.
    pub engine: EngineOptions,
    /// Graphs as the runtime has rewritten them at an earlier start; none: it does so at every start.
    pub graph_cache: Option<GraphCache>,
    /// On the CPU: pad channels to whole [blocks](engine::channel_block) of its kernels and lay graphs out in them, where that
    /// pays.
    pub pad_channels: bool,
    /// Threads of one further engine, which runs an image that comes to an idle machine; below 2: there is none.
    pub elastic_threads: usize,
    /// How images are queued and batched.
    pub scheduler: SchedulerOptions,
}

/// Why the models can't be served.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The repository or a manifest.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The manifest's golden answer belongs to another input than this program makes.
    #[error("the golden input of model `{0}` can't be made by this version of nfold; fold the checkpoint again")]
    Golden(String),
    /// A model that does not start.
    #[error("model `{name}` version {version} does not start: {source}")]
    Start {
        /// The model.
        name: String,
        /// Its version.
        version: u32,
        /// Why.
        source: StartError,
    },
    /// There is no repository to load from.
    #[error("this server's models don't come from a repository; none can be loaded")]
    NoRepository,
    /// Nothing to serve.
    #[error("repository `{0}` holds no model; fold a checkpoint into it with `nfold fold CHECKPOINT --repository {0}`")]
    Empty(PathBuf),
}

/// What an image is, and where the time went.
#[derive(Debug, Clone)]
pub struct Classified {
    /// Most probable first.
    pub predictions: Vec<Prediction>,
    /// Where the time went.
    pub timings: Timings,
}

/// One version of one model with its queue and threads, warm.
#[derive(Debug)]
pub struct LiveModel {
    /// Name in the repository.
    pub name: String,
    /// Version in the repository.
    pub version: u32,
    /// What the model says about itself.
    pub manifest: Manifest,
    scheduler: Scheduler,
    metrics: ModelMetrics,
    info: ModelInfo,
}

/// What a model's compute threads run.
pub struct Engines {
    /// Opens a worker's engine.
    pub open: OpenBackend,
    /// Opens the one that has every core.
    pub open_wide: Option<OpenBackend>,
    /// Name of the hardware, for metrics.
    pub provider: &'static str,
}

impl LiveModel {
    /// Opens a model of the repository: the graph's digest is checked, every worker opens its session and warms it.
    /// Blocks for seconds.
    pub fn open(dir: &ModelDir, options: &RegistryOptions, metrics: &Metrics) -> Result<Self, RegistryError> {
        let onnx = dir.read_onnx()?;
        let what = dir.onnx().display().to_string();
        let engine = engine_of(dir, options);
        if engine.provider != Provider::Cpu {
            let p = &dir.manifest.preprocessing;
            let batch = Batch::zeros(options.scheduler.padded(1), p.height as usize, p.width as usize);
            let placement = engine::place(&onnx, &what, &engine, &batch).map_err(refused(dir))?;
            metrics.placed(&dir.name, dir.version, &placement);
            if !engine.gpu.allow_fallback {
                engine::check_placement(&placement, engine.provider, &what).map_err(refused(dir))?;
            }
        }
        // `read_onnx` has checked the digest
        let mut identity = dir.manifest.onnx_sha256.clone();
        let pads = options.pad_channels && engine.provider == Provider::Cpu;
        if let Some(block) = engine::channel_block().filter(|_| pads) {
            // by what made it so: another release may lay graphs out in another way
            identity.push_str(&format!(" in blocks of {block} by {}", env!("CARGO_PKG_VERSION")));
        }
        // once for all engines, and not at all where the cache has it
        let graph = Arc::new(LazyLock::new(move || match pads {
            true => Fitted::for_this_cpu(onnx),
            false => Fitted::as_it_is(onnx),
        }));
        let opener = |engine: EngineOptions| -> OpenBackend {
            let (graph, what) = (graph.clone(), what.clone());
            let (cache, identity) = (options.graph_cache.clone(), identity.clone());
            Box::new(move || {
                let backend = match &cache {
                    None => OrtBackend::open_fitted(&graph, &what, &engine)?,
                    Some(cache) => OrtBackend::open_cached(&|| &graph, &identity, &what, &engine, cache)?,
                };
                Ok(Box::new(backend) as Box<dyn Backend>)
            })
        };
        let engines = Engines {
            open: opener(engine.clone()),
            // it alone spins: several pools that do so disturb each other
            open_wide: (options.elastic_threads > engine.intra_threads).then(|| {
                opener(EngineOptions { intra_threads: options.elastic_threads, spinning: true, ..engine.clone() })
            }),
            provider: engine.provider.name(),
        };
        Self::start(dir, engines, &options.scheduler, metrics)
    }

    /// Starts a model on these engines. Blocks for seconds.
    pub fn start(
        dir: &ModelDir,
        engines: Engines,
        options: &SchedulerOptions,
        metrics: &Metrics,
    ) -> Result<Self, RegistryError> {
        let (name, version, manifest) = (dir.name.clone(), dir.version, dir.manifest.clone());
        let Engines { open, open_wide, provider } = engines;
        let model_metrics = metrics.model(&name, version, provider);
        let job = Job {
            what: format!("{name}/{version}"),
            preprocessor: Preprocessor::new(&manifest.preprocessing),
            exif_orientation: manifest.preprocessing.exif_orientation,
            classes: manifest.classes as usize,
            open,
            open_wide,
            golden: golden(dir)?,
            metrics: model_metrics.clone(),
            system: Arc::new(Os),
        };
        let started = Instant::now();
        let scheduler = Scheduler::start(job, options.clone()).map_err(|source| RegistryError::Start {
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
            duration_ms = started.elapsed().as_millis() as u64,
            "model {name} version {version} is warm"
        );
        Ok(Self { name, version, manifest, scheduler, metrics: model_metrics, info })
    }

    /// The logits of one request's images, in order, each made into what is asked for by `finish`. The one way to an
    /// answer, whichever protocol asks. All are admitted or none; what is wrong with one image stays with
    /// that image, what concerns the request (overload, deadline, shutdown) is the outer error.
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
        // a client's own numbers may overflow the network (load generators send random bits), and it gets what comes of
        // them; an image can't
        let by_hand = !inputs.iter().all(|input| matches!(input, Input::Encoded(_)));
        let tickets = self.scheduler.submit(inputs, terms)?;
        let mut answers = Vec::with_capacity(tickets.len());
        for ticket in tickets {
            answers.push(match ticket.answer().await {
                Ok(Output { logits, timings }) => {
                    let started = Instant::now();
                    let checked = if by_hand { Ok(()) } else { check_finite(&logits) };
                    let finished = checked.and_then(|()| finish(logits));
                    let took = started.elapsed();
                    self.metrics.phase(Phase::Postprocess, took);
                    match finished {
                        Ok(answer) => {
                            request.answered(&timings, took);
                            Ok((answer, timings))
                        }
                        Err(error) if by_hand => Err(InferError::BadTensor(error.to_string())),
                        Err(error) => Err(InferError::Internal(error.to_string())),
                    }
                }
                Err(error @ (InferError::Image(_) | InferError::BadTensor(_) | InferError::Internal(_))) => Err(error),
                Err(error) => {
                    request.images = 0;
                    return Err(error);
                }
            });
        }
        Ok(answers)
    }

    /// Classifies the encoded images of one request, in order, as [`infer`](Self::infer) does.
    pub async fn classify(
        &self,
        images: Vec<Bytes>,
        k: usize,
        deadline: Instant,
    ) -> Result<Vec<Result<Classified, InferError>>, InferError> {
        let inputs = images.into_iter().map(Input::Encoded).collect();
        let answers = self.infer(inputs, deadline, |logits| top_k(&logits, k, &self.manifest.labels)).await?;
        let classified = |(predictions, timings)| Classified { predictions, timings };
        Ok(answers.into_iter().map(|answer| answer.map(classified)).collect())
    }

    /// How images are queued and batched.
    pub fn options(&self) -> &SchedulerOptions {
        self.scheduler.options()
    }

    /// What this model has done so far.
    pub fn statistics(&self) -> Snapshot {
        self.metrics.statistics.snapshot()
    }

    /// Whether the engines work.
    pub fn health(&self) -> Health {
        self.scheduler.health()
    }

    /// The queue, for callers that bring tensors or want logits.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }
}

/// One request in the statistics, counted when it is dropped: as failed if no image was answered.
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

type Models = BTreeMap<String, BTreeMap<u32, Arc<LiveModel>>>;

/// The models that are served now.
#[derive(Debug, Default)]
pub struct Registry {
    models: RwLock<Models>,
    /// Where models come from that are loaded later, beside those that serve; none: nowhere.
    source: Option<RegistryOptions>,
    /// Held by whoever loads: one at a time.
    reloading: Mutex<()>,
}

impl Registry {
    /// Opens what the options ask for, or everything. Blocks until all of it is warm.
    pub fn open(options: &RegistryOptions, metrics: &Metrics) -> Result<Self, RegistryError> {
        let mut source = options.clone();
        source.scheduler.one_by_one = true;
        let registry = Self { source: Some(source), ..Self::default() };
        for (name, version) in select(options)? {
            let dir = ModelDir::open(&options.repository, Some(&name), Some(version))?;
            registry.add(LiveModel::open(&dir, options, metrics)?);
        }
        Ok(registry)
    }

    /// Adds a warm model, in place of one of the same name and version. Requests that have found the old one still get its
    /// answer; it ends with the last of them.
    pub fn add(&self, model: LiveModel) {
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        models.entry(model.name.clone()).or_default().insert(model.version, Arc::new(model));
    }

    /// Opens the named model's newest version and adds it. Blocks until it is warm.
    pub fn load(&self, name: &str, metrics: &Metrics) -> Result<(), RegistryError> {
        let _one = self.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        let source = self.source.as_ref().ok_or(RegistryError::NoRepository)?;
        let opened = ModelDir::open(&source.repository, Some(name), None).map_err(RegistryError::from);
        let opened = opened.and_then(|dir| LiveModel::open(&dir, source, metrics));
        metrics.reloaded(name, opened.is_ok());
        self.add(opened?);
        Ok(())
    }

    /// Takes every version of the named model out of service. Requests that have found it still get their answer.
    pub fn unload(&self, name: &str) -> Result<(), InferError> {
        self.find(Some(name), None)?;
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        models.remove(name);
        tracing::info!(model = name, "model unloaded");
        Ok(())
    }

    /// Brings what is served in line with the repository: new and changed versions are opened beside the old ones, warmed
    /// and tested, and only then take their place; what has gone from the repository goes. Whatever fails leaves the old
    /// model serving. Blocks until all of it is warm.
    pub fn reload(&self, metrics: &Metrics) -> Result<(), RegistryError> {
        let _one = self.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        let source = self.source.as_ref().ok_or(RegistryError::NoRepository)?;
        let wanted = select(source)?;
        for (name, version) in &wanted {
            let opened = ModelDir::open(&source.repository, Some(name), Some(*version)).map_err(RegistryError::from);
            let serves =
                |dir: &ModelDir| self.find(Some(name), Some(*version)).is_ok_and(|m| m.manifest == dir.manifest);
            if opened.as_ref().is_ok_and(serves) {
                continue;
            }
            let opened = opened.and_then(|dir| LiveModel::open(&dir, source, metrics));
            metrics.reloaded(name, opened.is_ok());
            match opened {
                Ok(model) => self.add(model),
                Err(error) => {
                    tracing::error!(model = name, version, %error, "not reloaded, what was served stays: {error}")
                }
            }
        }
        let gone = |wanted: &[(String, u32)]| -> Vec<Arc<LiveModel>> {
            let kept = |model: &Arc<LiveModel>| wanted.iter().any(|(n, v)| *n == model.name && *v == model.version);
            self.all().into_iter().filter(|model| !kept(model)).collect()
        };
        if gone(&wanted).is_empty() {
            return Ok(());
        }
        // a version that is being replaced is away for a moment
        std::thread::sleep(Duration::from_secs(1));
        let mut wanted = wanted;
        wanted.extend(select(source)?);
        for model in gone(&wanted) {
            let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(versions) = models.get_mut(&model.name) {
                versions.remove(&model.version);
            }
            models.retain(|_, versions| !versions.is_empty());
            tracing::info!(model = model.name, version = model.version, "gone from the repository, no longer served");
        }
        Ok(())
    }

    /// The model a request means: the named one, or the only one; the given version, or the highest.
    pub fn find(&self, name: Option<&str>, version: Option<u32>) -> Result<Arc<LiveModel>, InferError> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let available = || models.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let (name, versions) = match name {
            Some(wanted) => models
                .get_key_value(wanted)
                .ok_or_else(|| InferError::ModelNotFound { model: wanted.into(), available: available() })?,
            None if models.len() > 1 => return Err(InferError::ModelNotNamed { available: available() }),
            None => models.iter().next().ok_or(InferError::NotReady)?,
        };
        let found = match version {
            Some(v) => versions.get(&v),
            None => versions.values().next_back(),
        };
        found.cloned().ok_or_else(|| InferError::ModelNotFound {
            model: version.map_or_else(|| name.clone(), |v| format!("{name} version {v}")),
            available: versions.keys().map(|v| format!("{name} version {v}")).collect::<Vec<_>>().join(", "),
        })
    }

    /// Every live model, by name and version.
    pub fn all(&self) -> Vec<Arc<LiveModel>> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        models.values().flat_map(BTreeMap::values).cloned().collect()
    }

    /// Why no request should be sent here, if so: a model without a working engine, or with one that hangs or keeps
    /// failing.
    pub fn fault(&self, hang_limit: Duration) -> Option<String> {
        const STORM: u32 = 5;
        let fault = |m: &Arc<LiveModel>| {
            let Health { engines, failures, longest_run } = m.health();
            let what = if engines == 0 {
                "has no working engine".to_string()
            } else if longest_run.is_some_and(|age| age > hang_limit) {
                format!("has an engine run that hangs for more than {} s", hang_limit.as_secs_f64())
            } else if failures >= STORM {
                format!("failed {failures} engine runs in a row")
            } else {
                return None;
            };
            Some(format!("model {} version {} {what}", m.name, m.version))
        };
        self.all().iter().find_map(fault)
    }

    /// Sets the gauges that are measured when somebody looks.
    pub fn observe(&self) {
        for model in self.all() {
            model.scheduler.observe();
            model.info.set();
        }
    }

    /// Takes no new images; what is queued is still answered.
    pub fn close(&self) {
        self.all().iter().for_each(|model| model.scheduler.close());
    }

    /// Answers everything queued with a refusal.
    pub fn abort(&self) {
        self.all().iter().for_each(|model| model.scheduler.abort());
    }

    /// Waits for all compute threads until `deadline`; returns how many still run. Blocks.
    pub fn join(&self, deadline: Instant) -> usize {
        self.all().iter().map(|model| model.scheduler.join(deadline)).sum()
    }
}

/// A model's engine: what TensorRT keeps is kept by the graph's digest, and built for the batches that can occur.
fn engine_of(dir: &ModelDir, options: &RegistryOptions) -> EngineOptions {
    let mut engine = options.engine.clone();
    let (p, scheduler) = (&dir.manifest.preprocessing, &options.scheduler);
    let profile = |least, most| Profile { least, most, height: p.height as usize, width: p.width as usize };
    engine.gpu.profiles = match scheduler.buckets.as_slice() {
        [] => vec![profile(1, scheduler.max_batch)],
        buckets => buckets.iter().map(|&bucket| profile(bucket, bucket)).collect(),
    };
    engine.gpu.tensorrt_cache = engine.gpu.tensorrt_cache.map(|folder| folder.join(&dir.manifest.onnx_sha256));
    engine
}

fn refused(dir: &ModelDir) -> impl Fn(EngineError) -> RegistryError {
    let (name, version) = (dir.name.clone(), dir.version);
    move |error| RegistryError::Start { name: name.clone(), version, source: error.into() }
}

/// Names and versions that the options ask for.
fn select(options: &RegistryOptions) -> Result<Vec<(String, u32)>, RegistryError> {
    let held = model::list(&options.repository)?;
    let all = |(name, versions): &(String, Vec<u32>)| versions.iter().map(|&v| (name.clone(), v)).collect::<Vec<_>>();
    let mut selected = Vec::new();
    if options.models.is_empty() {
        selected.extend(held.iter().flat_map(all));
    }
    for (name, version) in &options.models {
        match (version, held.iter().find(|(n, _)| n == name)) {
            (None, Some(model)) => selected.extend(all(model)),
            _ => {
                let dir = ModelDir::open(&options.repository, Some(name), *version)?;
                selected.push((dir.name, dir.version));
            }
        }
    }
    if selected.is_empty() { Err(RegistryError::Empty(options.repository.clone())) } else { Ok(selected) }
}

/// What the manifest says that the model must answer.
fn golden(dir: &ModelDir) -> Result<Option<Golden>, RegistryError> {
    let Some(golden) = &dir.manifest.golden else { return Ok(None) };
    let p = &dir.manifest.preprocessing;
    let input = verify::images((p.height as usize, p.width as usize)).next().unwrap_or_default();
    if verify::digest(&input) != golden.input_sha256 {
        return Err(RegistryError::Golden(dir.name.clone()));
    }
    Ok(Some(Golden { input, logits: golden.logits.clone(), tolerance: golden.tolerance }))
}
