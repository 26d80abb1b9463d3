//! Sources of models: the repository, and how its models are opened on ONNX Runtime.

use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use super::job::{OpenBackend, SchedulerOptions};
use super::live_model::{Engines, LiveModel, LoadError};
use crate::engine::graph_cache::GraphCache;
use crate::engine::{
    self, Backend, Batch, BoundBackend, ClassMaps, EngineError, EngineOptions, Fitted, Kernels, OrtBackend, Profile,
    Provider, own_data,
};
use crate::metrics::Metrics;
use crate::model::{self, Listing, ModelDir, ModelError, Precision};

/// Which models are served, and how.
#[derive(Debug, Clone)]
pub struct RegistryOptions {
    /// The model repository.
    pub repository: PathBuf,
    /// Models to serve, each with one version or all of them; empty: all of the repository.
    pub models: Vec<(String, Option<u64>)>,
    /// How engines are opened.
    pub engine: EngineOptions,
    /// Cache of the graphs that the runtime has optimised; `None`: it does so at every start.
    pub graph_cache: Option<GraphCache>,
    /// On the CPU: pad channels to whole [blocks](engine::channel_block) of its kernels and lay graphs out in them,
    /// where that is faster.
    pub pad_channels: bool,
    /// Whose kernels such graphs are laid out for.
    pub kernels: Kernels,
    /// Threads of one further engine, which runs an image that arrives on an idle machine; below 2: no such engine.
    pub elastic_threads: usize,
    /// How images are queued and batched.
    pub scheduler: SchedulerOptions,
    /// Most pixels of a model's input: a batch of inputs is allocated at the start, and the feature maps are many times
    /// as large.
    pub max_input_pixels: u64,
    /// Serve the other models when some don't start.
    pub skip_broken: bool,
    /// The model for requests that name none; `None`: the only model.
    pub default_model: Option<String>,
}

/// Why the repository is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// On request: versions that could not be loaded are tried again.
    Asked,
    /// Periodically: versions that could not be loaded are tried again when they have changed, else after growing
    /// pauses.
    Again,
}

/// A source of models; tests have their own implementation.
pub trait Source: Send + Sync + std::fmt::Debug {
    /// Called before every [`list`](Self::list) but the first. Blocks for as long as it takes to fetch and fold.
    fn prepare(&self, _look: Look) {}

    /// The repository's contents.
    fn list(&self) -> Result<Listing, ModelError>;

    /// A version's manifest.
    fn read(&self, name: &str, version: u64) -> Result<ModelDir, ModelError>;

    /// A text that changes whenever a version's files do.
    fn fingerprint(&self, name: &str, version: u64) -> String;

    /// Opens and warms up a version. Blocks for seconds.
    fn open(&self, dir: &ModelDir, metrics: &Metrics) -> Result<LiveModel, LoadError>;
}

impl Source for RegistryOptions {
    fn list(&self) -> Result<Listing, ModelError> {
        model::list(&self.repository)
    }

    fn read(&self, name: &str, version: u64) -> Result<ModelDir, ModelError> {
        ModelDir::open_version(&self.repository, name, version)
    }

    fn fingerprint(&self, name: &str, version: u64) -> String {
        model::fingerprint(&self.repository, name, version)
    }

    /// Checks the graph's digest; every worker opens a session and warms it up.
    fn open(&self, dir: &ModelDir, metrics: &Metrics) -> Result<LiveModel, LoadError> {
        let options = self;
        // the graph may have been replaced since its manifest was read
        let (dir, onnx) = dir.clone().with_onnx()?;
        let dir = &dir;
        let p = &dir.manifest.preprocessing;
        let (height, width, most) = (p.height, p.width, options.max_input_pixels);
        if u64::from(height) * u64::from(width) > most {
            return Err(LoadError::Input { name: dir.name.clone(), version: dir.version, height, width, most });
        }
        let max_batch = options.scheduler.max_batch;
        tracing::info!(
            model = dir.name,
            version = dir.version,
            height,
            width,
            max_batch,
            "warming model {} version {} with batches of up to {max_batch} images of {height}x{width}",
            dir.name,
            dir.version
        );
        own_data::check(&onnx).map_err(|reason| LoadError::Graph {
            name: dir.name.clone(),
            version: dir.version,
            reason,
        })?;
        // clients may see the text: it has no paths of this machine
        let what = format!("{}/{}/{}", dir.name, dir.version, model::MODEL_FILE);
        let engine = engine_of(dir, options);
        let integers = dir.manifest.precision == Precision::Int8;
        if integers && engine.provider != Provider::Cpu {
            return Err(LoadError::Graph {
                name: dir.name.clone(),
                version: dir.version,
                reason: format!(
                    "it is an int8 network, which nfold runs on CPUs alone, and not on {}; fold it for GPUs with --precision fp16",
                    engine.provider.name()
                ),
            });
        }
        if engine.provider != Provider::Cpu {
            let p = &dir.manifest.preprocessing;
            let batch = Batch::zeros_of(options.scheduler.padded(1), p.shape());
            match engine::placement(&onnx, &what, &engine, &batch) {
                // the model is correct: serve it, and log what was not verified
                Err(error @ EngineError::NoProfile { .. }) => tracing::warn!(model = what, "{what}: {error}"),
                Err(error) => return Err(refused(dir)(error)),
                Ok(placement) => {
                    metrics.placed(&dir.name, dir.version, &placement);
                    if !engine.gpu.allow_fallback {
                        engine::check_placement(&placement, engine.provider, &what).map_err(refused(dir))?;
                    }
                }
            }
        }
        // `with_onnx` has checked the digest
        let mut identity = dir.manifest.onnx_sha256.clone();
        let kernels = options.kernels;
        let (kernels_of_integers, are_fast) = engine::integer_kernels();
        if integers && are_fast {
            tracing::info!(model = dir.name, kernels = kernels_of_integers, "{} runs in integers", dir.name);
        } else if integers {
            tracing::warn!(
                model = dir.name,
                kernels = kernels_of_integers,
                "{} runs in integers by {kernels_of_integers} kernels: this processor has none that multiply bytes four at a time \
                 (VNNI), and single precision may be faster here; `nfold bench engine` compares them",
                dir.name
            );
        }
        // integers are no layout of ONNX Runtime's: there is nothing to leave as it is
        let pads = (options.pad_channels || integers) && engine.provider == Provider::Cpu;
        if let Some(block) = engine::channel_block().filter(|_| pads) {
            // names the release, as another one may lay graphs out in another way
            identity.push_str(&format!(" in blocks of {block} for {kernels:?} by {}", env!("CARGO_PKG_VERSION")));
        }
        let class_maps = dir.manifest.map.map(|_| ClassMaps::of(&onnx));
        // once for all engines, and not at all if the graph is cached
        let graph =
            Arc::new(LazyLock::new(
                move || if pads { Fitted::for_this_cpu(onnx, kernels) } else { Fitted::as_it_is(onnx) },
            ));
        let opener = |engine: EngineOptions| -> OpenBackend {
            let (graph, what) = (graph.clone(), what.clone());
            // a network of integers is no graph that ONNX Runtime could keep
            let (cache, identity) = (options.graph_cache.clone().filter(|_| !integers), identity.clone());
            let sizes = options.scheduler.sizes();
            Box::new(move || {
                if engine.provider != Provider::Cpu {
                    return Ok(Box::new(BoundBackend::open(&graph, &what, &engine, &sizes)?) as Box<dyn Backend>);
                }
                let backend = match &cache {
                    None => OrtBackend::open_fitted(&graph, &what, &engine)?,
                    Some(cache) => OrtBackend::open_cached(&|| &graph, &identity, &what, &engine, cache)?,
                };
                Ok(Box::new(backend) as Box<dyn Backend>)
            })
        };
        let engines = Engines {
            open: opener(engine.clone()),
            // only this engine's threads spin: several spinning pools slow each other down
            open_wide: (options.elastic_threads > engine.intra_threads).then(|| {
                opener(EngineOptions { intra_threads: options.elastic_threads, spinning: true, ..engine.clone() })
            }),
            provider: engine.provider.name(),
            reduced: engine.gpu.tf32,
        };
        let model = LiveModel::start(dir, engines, &options.scheduler, metrics)?;
        Ok(match class_maps {
            Some(maps) => model.with_class_maps(maps),
            None => model,
        })
    }
}

/// Engine options of a model: TensorRT caches by the graph's digest, and builds for the possible batch sizes.
fn engine_of(dir: &ModelDir, options: &RegistryOptions) -> EngineOptions {
    let mut engine = options.engine.clone();
    let (p, scheduler) = (&dir.manifest.preprocessing, &options.scheduler);
    let [channels, height, width] = p.shape();
    let profile = |least, most| Profile { least, most, channels, height, width };
    engine.gpu.profiles = match scheduler.buckets.as_slice() {
        [] => vec![profile(1, scheduler.max_batch)],
        buckets => buckets.iter().map(|&bucket| profile(bucket, bucket)).collect(),
    };
    engine.gpu.tensorrt_cache = engine.gpu.tensorrt_cache.map(|folder| folder.join(&dir.manifest.onnx_sha256));
    engine
}

fn refused(dir: &ModelDir) -> impl Fn(EngineError) -> LoadError {
    let (name, version) = (dir.name.clone(), dir.version);
    move |error| LoadError::Start { name: name.clone(), version, source: error.into() }
}
