//! Runs ONNX graphs with ONNX Runtime. The only room that names `ort`: it finds the library, opens sessions and moves
//! tensors. It knows nothing of images, labels or requests.

mod bound;
mod class_maps;
mod fitted;
mod gpu;
pub mod graph_cache;
mod int8;
mod library;
pub mod own_data;
mod placement;
pub mod verify;

use std::path::{Path, PathBuf};

use ort::environment::Environment;
use ort::operator::OperatorDomain;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{HasSelectedOutputs, OutputSelector, RunOptions, Session, SessionInputValue};
use ort::value::TensorRef;
use serde::{Deserialize, Serialize};

pub use self::bound::BoundBackend;
pub use self::class_maps::ClassMaps;
pub use self::fitted::{Fitted, channel_block, integer_kernels};
pub use self::gpu::{GpuOptions, Profile};
use self::graph_cache::GraphCache;
use self::int8::NetworkOperator;
pub use self::library::LIBRARY_VARIABLE;
use self::library::environment;
pub use self::placement::{Placement, check as check_placement};
use crate::files::DraftFolder;
use crate::int8::Int8Error;
use crate::kernels::operators;
use crate::model::{FEATURES, MAP};
use crate::printable::brief;
pub use crate::relayout::Kernels;

/// What can go wrong before a graph runs.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// No library was found in any of the usual places.
    #[error(
        "ONNX Runtime was not found (looked at: {looked}); {}, or set {LIBRARY_VARIABLE} to another libonnxruntime",
        library::how_to_get()
    )]
    NoLibrary {
        /// Every place looked at, comma-separated.
        looked: String,
    },
    /// A library was found but could not be used.
    #[error(
        "ONNX Runtime at `{path}` can't be used: {reason}; {}, or set {LIBRARY_VARIABLE} to another of 1.25 or newer",
        library::how_to_get()
    )]
    BadLibrary {
        /// The library.
        path: PathBuf,
        /// What the loader or the library said.
        reason: String,
    },
    /// The graph was refused.
    #[error("ONNX Runtime refuses `{model}`: {reason}")]
    BadModel {
        /// What was to be loaded.
        model: String,
        /// What ONNX Runtime said.
        reason: String,
    },
    /// The graph is of integers, and can't be computed as such.
    #[error("`{model}`: {reason}")]
    Integers {
        /// What was to be loaded.
        model: String,
        /// Why not.
        #[source]
        reason: Int8Error,
    },
    /// Where a graph's operators run can't be seen.
    #[error(
        "where its operators run can't be seen: ONNX Runtime has no temporary folder for its profile ({reason}); let the server \
         write to /tmp, or set TMPDIR"
    )]
    NoProfile {
        /// What the system said.
        reason: String,
    },
    /// A part of the graph runs elsewhere than asked.
    #[error(
        "of `{model}`, {there} operators run on {provider} and {elsewhere}; serve it with --allow-fallback if that is fast enough, or with another --provider"
    )]
    Fallback {
        /// What was loaded.
        model: String,
        /// The provider asked for.
        provider: &'static str,
        /// Operators there.
        there: usize,
        /// Operators by other provider.
        elsewhere: String,
    },
    /// The requested execution provider is not to be had.
    #[error(
        "execution provider `{provider}` is not available: {reason}; use --provider cpu, or a build with `--features gpu` and ONNX Runtime's GPU library ({LIBRARY_VARIABLE})"
    )]
    NoProvider {
        /// The provider asked for.
        provider: &'static str,
        /// What ONNX Runtime said.
        reason: String,
    },
}

/// What can go wrong while a graph runs. `Clone`, so that one failure can answer a whole batch.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BackendError {
    /// The batch does not have the shape the graph wants.
    #[error("batch of shape {found:?} does not fit the graph: {reason}")]
    Shape {
        /// Shape offered, `[N, C, H, W]`.
        found: [usize; 4],
        /// What ONNX Runtime said.
        reason: String,
    },
    /// The runtime failed.
    #[error("inference failed: {0}")]
    Run(String),
}

/// Images ready for the network: float32 `[images, channels, height, width]`, normalised; channels of RGB unless the network
/// has others.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Number of images.
    pub images: usize,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// `images × channels × height × width` values, row-major.
    pub data: Vec<f32>,
}

impl Batch {
    /// A batch of zeros, of RGB images.
    pub fn zeros(images: usize, height: usize, width: usize) -> Self {
        Self::zeros_of(images, [3, height, width])
    }

    /// A batch of zeros, of tensors `[channels, height, width]`.
    pub fn zeros_of(images: usize, shape: [usize; 3]) -> Self {
        let [_, height, width] = shape;
        Self { images, height, width, data: vec![0.0; images * shape.iter().product::<usize>()] }
    }

    /// What `data` is by its length: `[images, channels, height, width]`. It may not fill that.
    pub fn shape(&self) -> [usize; 4] {
        let pixels = (self.images * self.height * self.width).max(1);
        [self.images, self.data.len() / pixels, self.height, self.width]
    }

    /// Values of image `i`: `[channels, height, width]`.
    pub fn image_mut(&mut self, i: usize) -> &mut [f32] {
        let len = self.data.len() / self.images.max(1);
        &mut self.data[i * len..(i + 1) * len]
    }
}

/// The network's output: float32 `[images, classes]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Logits {
    /// Number of images.
    pub images: usize,
    /// Number of classes.
    pub classes: usize,
    /// `images × classes` values, row-major.
    pub data: Vec<f32>,
}

impl Logits {
    /// Logits of image `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.classes..(i + 1) * self.classes]
    }
}

/// Which outputs beside the logits a run is to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Extras {
    /// The vectors that the classifier reads.
    pub features: bool,
    /// The maps that are pooled.
    pub map: bool,
}

impl Extras {
    /// Logits alone.
    pub const NONE: Self = Self { features: false, map: false };

    /// What either asks for.
    pub fn and(self, other: Self) -> Self {
        Self { features: self.features || other.features, map: self.map || other.map }
    }
}

/// What a run gives, image after image.
#[derive(Debug, Clone, PartialEq)]
pub struct Answers {
    /// Logits.
    pub logits: Logits,
    /// The vectors that the classifier reads, `images × width`; empty where they were not asked for.
    pub features: Vec<f32>,
    /// The maps that are pooled, `images × channels × height × width`; empty where they were not asked for.
    pub map: Vec<f32>,
}

impl From<Logits> for Answers {
    fn from(logits: Logits) -> Self {
        Self { logits, features: Vec::new(), map: Vec::new() }
    }
}

/// Something that turns a batch into logits. A worker thread owns its backend, so running takes `&mut self`.
pub trait Backend: Send {
    /// Logits for every image of the batch, in order.
    fn run(&mut self, batch: &Batch) -> Result<Logits, BackendError>;

    /// The same, and what else is asked for.
    fn run_with(&mut self, batch: &Batch, extras: Extras) -> Result<Answers, BackendError> {
        match extras {
            Extras::NONE => self.run(batch).map(Answers::from),
            _ => Err(BackendError::Run("this engine gives logits alone".into())),
        }
    }
}

/// Which hardware runs the graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// ONNX Runtime's own CPU kernels.
    #[default]
    Cpu,
    /// NVIDIA CUDA.
    Cuda,
    /// NVIDIA TensorRT, CUDA for what it can't take.
    TensorRt,
}

impl Provider {
    /// Name for messages, metrics and flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::TensorRt => "tensorrt",
        }
    }

    /// Name that ONNX Runtime has for it.
    pub fn in_runtime(self) -> &'static str {
        match self {
            Self::Cpu => "CPUExecutionProvider",
            Self::Cuda => "CUDAExecutionProvider",
            Self::TensorRt => "TensorrtExecutionProvider",
        }
    }
}

/// How a session is opened.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Hardware.
    pub provider: Provider,
    /// Threads inside one operator. 1 makes no thread of its own.
    pub intra_threads: usize,
    /// Let the pool's threads spin between operators, but not after a run: faster when one session owns the cores, harmful
    /// otherwise.
    pub spinning: bool,
    /// For GPUs.
    pub gpu: GpuOptions,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { provider: Provider::Cpu, intra_threads: 1, spinning: false, gpu: GpuOptions::default() }
    }
}

/// A session of ONNX Runtime over one graph.
pub struct OrtBackend {
    session: Session,
    input: String,
    output: String,
    /// How runs are told which outputs to give, by those.
    runs: Vec<(Extras, RunOptions<HasSelectedOutputs>)>,
}

impl OrtBackend {
    /// Opens a session on ONNX bytes; `what` names them in messages.
    ///
    /// The graph has one float32 input `[N, C, H, W]` and its first output is float32 `[N, classes]`.
    pub fn open(onnx: &[u8], what: &str, options: &EngineOptions) -> Result<Self, EngineError> {
        let mut builder = Self::builder(what, options, GraphOptimizationLevel::All)?;
        Self::of(builder.commit_from_memory(onnx).map_err(refused(what))?, what)
    }

    /// As [`open`](Self::open), from a file.
    pub fn open_file(path: &Path, what: &str, options: &EngineOptions) -> Result<Self, EngineError> {
        let mut builder = Self::builder(what, options, GraphOptimizationLevel::All)?;
        Self::of(builder.commit_from_file(path).map_err(refused(what))?, what)
    }

    /// As [`open_file`](Self::open_file), and runs the graph as it is written: weight arithmetic is done by each run, weight
    /// by weight, instead of before the first for all weights at once, which takes several times their memory.
    pub fn open_file_as_written(path: &Path, what: &str, options: &EngineOptions) -> Result<Self, EngineError> {
        let mut builder = Self::builder(what, options, GraphOptimizationLevel::Disable)?;
        Self::of(builder.commit_from_file(path).map_err(refused(what))?, what)
    }

    /// As [`open`](Self::open).
    pub fn open_fitted(graph: &Fitted, what: &str, options: &EngineOptions) -> Result<Self, EngineError> {
        Self::commit(Self::builder_of(graph, what, options)?, graph, what)
    }

    /// A builder with the graph's own operators.
    fn builder_of(graph: &Fitted, what: &str, options: &EngineOptions) -> Result<SessionBuilder, EngineError> {
        let bad = |reason: String| EngineError::BadModel { model: what.into(), reason };
        let refused = |reason: &Int8Error| EngineError::Integers { model: what.into(), reason: reason.clone() };
        match graph.network().map_err(refused)? {
            None => Self::builder(what, options, graph.level()),
            Some(network) => {
                // before anything else: it loads the library
                let environment = environment()?;
                let operator = NetworkOperator { network: network.clone(), threads: options.intra_threads };
                let domain = operators::domain().and_then(|domain| domain.add(operator)).map_err(|e| bad(brief(e)))?;
                let builder = prepare_with(environment, options, graph.level(), domain);
                builder.map_err(|e| bad(brief(e)))
            }
        }
    }

    /// As [`open_fitted`](Self::open_fitted), from what ONNX Runtime made of the same graph before, if `cache` has it, else putting it
    /// there: the logits are the same bits either way. `identity` is the cache key of the graph that `graph` returns. A cache that
    /// can't be read or written is logged, and the graph is opened without it. On a GPU there is nothing to keep, and the
    /// graph is opened.
    pub fn open_cached<'a>(
        graph: &dyn Fn() -> &'a Fitted,
        identity: &str,
        what: &str,
        options: &EngineOptions,
        cache: &GraphCache,
    ) -> Result<Self, EngineError> {
        if options.provider != Provider::Cpu {
            return Self::open_fitted(graph(), what, options);
        }
        // threads and spinning change how a graph runs, not what it is
        let folder = cache.folder(&[identity, &runtime_build()?, options.provider.name(), "all"]);
        let path = folder.display();
        let _alone = cache.alone();
        let cached = cache.read(&folder).unwrap_or_else(|reason| {
            tracing::warn!(%path, reason, "graph cache: `{path}` can't be used: {reason}; making it anew");
            None
        });
        if let Some(onnx) = cached {
            let opened = Self::builder(what, options, GraphOptimizationLevel::Disable)
                .map_err(brief)
                .and_then(|builder| {
                    let entry = ("session.model_external_initializers_file_folder_path", folder.to_string_lossy());
                    configure(builder, [entry]).map_err(brief)
                })
                .and_then(|mut builder| builder.commit_from_memory(&onnx).map_err(brief))
                .and_then(|session| Self::of(session, what).map_err(brief));
            match opened {
                Ok(backend) => {
                    tracing::info!(model = what, %path, "graph cache: hit");
                    return Ok(backend);
                }
                Err(reason) => {
                    tracing::warn!(%path, reason, "graph cache: `{path}` is refused: {reason}; making it anew");
                    if let Err(error) = cache.discard(&folder) {
                        tracing::warn!(%path, %error, "graph cache: `{path}` can't be removed: {error}");
                    }
                }
            }
        }
        let kept = cache.draft().map_err(brief).and_then(|draft| {
            let graph = graph();
            let builder = Self::builder(what, options, graph.level()).map_err(brief)?;
            let builder = builder.with_optimized_model_path(draft.graph()).map_err(brief)?;
            let entries = [
                ("session.optimized_model_external_initializers_file_name", draft.weights()),
                ("session.optimized_model_external_initializers_min_size_in_bytes", LARGE.to_string()),
            ];
            let builder = configure(builder, entries).map_err(brief)?;
            let backend = Self::commit(builder, graph, what).map_err(brief)?;
            match cache.keep(draft, &folder) {
                Ok(()) => tracing::info!(model = what, %path, "graph cache: miss, written"),
                Err(error) => tracing::warn!(%path, %error, "graph cache: `{path}` can't be written: {error}"),
            }
            Ok(backend)
        });
        kept.or_else(|reason: String| {
            tracing::warn!(%path, reason, "graph cache: `{path}` can't be written: {reason}; going on without");
            Self::open_fitted(graph(), what, options)
        })
    }

    fn builder(
        what: &str,
        options: &EngineOptions,
        level: GraphOptimizationLevel,
    ) -> Result<SessionBuilder, EngineError> {
        prepare(environment()?, options, level).map_err(|e| match options.provider {
            Provider::Cpu => EngineError::BadModel { model: what.into(), reason: brief(e) },
            _ => EngineError::NoProvider { provider: options.provider.name(), reason: brief(e) },
        })
    }

    /// A session on a graph and the weights beside it.
    fn commit(builder: SessionBuilder, graph: &Fitted, what: &str) -> Result<Self, EngineError> {
        let mut builder = graph.lend_weights(builder).map_err(refused(what))?;
        let session = builder.commit_from_memory(graph.onnx()).map_err(refused(what))?;
        Self::of(session, what)
    }

    fn of(session: Session, what: &str) -> Result<Self, EngineError> {
        let bad = |reason: &str| EngineError::BadModel { model: what.into(), reason: reason.into() };
        let name = |outlets: &[ort::value::Outlet]| outlets.first().map(|o| o.name().to_string());
        let input = name(session.inputs()).ok_or_else(|| bad("it has no input"))?;
        let output = name(session.outputs()).ok_or_else(|| bad("it has no output"))?;
        Ok(Self { session, input, output, runs: Vec::new() })
    }

    /// Channels of the graph's input; `None` where it is no image's.
    pub fn input_channels(&self) -> Option<usize> {
        let &[_, channels, ..] = &self.session.inputs().first()?.dtype().tensor_shape()?[..] else { return None };
        usize::try_from(channels).ok().filter(|&channels| channels > 0)
    }

    /// Height and width that the graph's input is fixed to, in pixels; `None` where it takes any.
    pub fn input_size(&self) -> Option<(usize, usize)> {
        let &[_, _, height, width] = &self.session.inputs().first()?.dtype().tensor_shape()?[..] else { return None };
        Some((usize::try_from(height).ok()?, usize::try_from(width).ok()?))
    }
}

/// ONNX Runtime's own line on its build: version, commit, flags.
pub fn runtime_build() -> Result<String, EngineError> {
    environment().map(|_| ort::info().into())
}

/// Single-precision feature maps on their way into or out of a graph: `[images, chs, height, width]`, row-major.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MapView<'a> {
    /// The tensor's name in the graph.
    pub name: &'a str,
    /// `[images, chs, height, width]`.
    pub shape: [usize; 4],
    /// That many values.
    pub data: &'a [f32],
}

/// A session of ONNX Runtime over a graph of feature maps, any number of them in and out.
#[derive(Debug)]
pub struct MapBackend {
    session: Session,
}

impl MapBackend {
    /// Opens a session on ONNX bytes; `what` names them in messages.
    pub fn open(onnx: &[u8], what: &str, options: &EngineOptions) -> Result<Self, EngineError> {
        let mut builder = prepare(environment()?, options, GraphOptimizationLevel::All).map_err(refused(what))?;
        Ok(Self { session: builder.commit_from_memory(onnx).map_err(refused(what))? })
    }

    /// As [`open`](Self::open), and runs the graph as it is written.
    pub fn open_as_written(onnx: &[u8], what: &str, options: &EngineOptions) -> Result<Self, EngineError> {
        let mut builder = prepare(environment()?, options, GraphOptimizationLevel::Disable).map_err(refused(what))?;
        Ok(Self { session: builder.commit_from_memory(onnx).map_err(refused(what))? })
    }

    /// Runs the graph on `inputs` and shows `each` output once, in half precision widened. An output that is no
    /// feature map has its missing sides shown as 1.
    pub fn run(&mut self, inputs: &[MapView<'_>], mut each: impl FnMut(MapView<'_>)) -> Result<(), BackendError> {
        let failed = |e: ort::Error| BackendError::Run(brief(e));
        let mut values = Vec::with_capacity(inputs.len());
        for input in inputs {
            let view = TensorRef::from_array_view((input.shape, input.data));
            let view = view.map_err(|e| BackendError::Shape { found: input.shape, reason: brief(e) })?;
            values.push((input.name, SessionInputValue::from(view)));
        }
        let outputs = self.session.run(values).map_err(failed)?;
        for (name, value) in outputs.iter() {
            let shape = |dims: &[i64]| {
                let mut sides = dims.iter().map(|&d| d as usize);
                std::array::from_fn(|_| sides.next().unwrap_or(1))
            };
            if let Ok((dims, data)) = value.try_extract_tensor::<f32>() {
                each(MapView { name, shape: shape(dims), data });
            } else {
                let (dims, data) = value.try_extract_tensor::<half::f16>().map_err(failed)?;
                let wide: Vec<f32> = data.iter().map(|v| v.to_f32()).collect();
                each(MapView { name, shape: shape(dims), data: &wide });
            }
        }
        Ok(())
    }
}

/// Runs the graph once and says which provider ran which part of it. For this the graph is opened anew: profiling is slow.
pub fn placement(onnx: &[u8], what: &str, options: &EngineOptions, batch: &Batch) -> Result<Placement, EngineError> {
    let bad = |reason: String| EngineError::BadModel { model: what.into(), reason };
    let folder = DraftFolder::scratch().map_err(|e| EngineError::NoProfile { reason: brief(e) })?;
    // a CUDA graph has no operators to tell of
    let gpu = GpuOptions { cuda_graph: false, ..options.gpu.clone() };
    let options = EngineOptions { gpu, ..options.clone() };
    let profile = bound::shared(|| {
        let builder = OrtBackend::builder(what, &options, GraphOptimizationLevel::All)?;
        let mut builder = builder.with_profiling(folder.path().join("profile")).map_err(|e| bad(brief(e)))?;
        let session = builder.commit_from_memory(onnx).map_err(|e| bad(brief(e)))?;
        let mut backend = OrtBackend::of(session, what)?;
        backend.run(batch).map_err(|e| bad(brief(e)))?;
        backend.session.end_profiling().map_err(|e| bad(brief(e)))
    })?;
    let profile = std::fs::read(profile).map_err(|e| bad(format!("its profile can't be read: {e}")))?;
    placement::read(&profile).map_err(bad)
}

/// Writes the graph as ONNX Runtime rewrites it for this machine's CPU to `path`: to see which operators really run.
pub fn write_optimized(graph: &Fitted, what: &str, path: &Path) -> Result<(), EngineError> {
    let builder = OrtBackend::builder_of(graph, what, &EngineOptions::default())?;
    let builder = builder.with_optimized_model_path(path).map_err(|e| refused(what)(e.into()))?;
    OrtBackend::commit(builder, graph, what).map(drop)
}

fn refused(what: &str) -> impl Fn(ort::Error) -> EngineError {
    move |e| EngineError::BadModel { model: what.into(), reason: brief(e) }
}

fn prepare(
    environment: &Environment,
    options: &EngineOptions,
    level: GraphOptimizationLevel,
) -> ort::Result<SessionBuilder> {
    prepare_with(environment, options, level, operators::domain()?)
}

fn prepare_with(
    environment: &Environment,
    options: &EngineOptions,
    level: GraphOptimizationLevel,
    domain: OperatorDomain,
) -> ort::Result<SessionBuilder> {
    let builder = Session::builder(environment)?
        .with_optimization_level(level)?
        .with_intra_threads(options.intra_threads.max(1))?
        .with_inter_threads(1)?
        .with_intra_op_spinning(options.spinning)?
        .with_config_entry("session.force_spinning_stop", if options.spinning { "1" } else { "0" })?
        .with_inter_op_spinning(false)?;
    match options.provider {
        Provider::Cpu => Ok(builder.with_operators(domain)?),
        provider => gpu::register(builder, provider, &options.gpu),
    }
}

impl Backend for OrtBackend {
    fn run(&mut self, batch: &Batch) -> Result<Logits, BackendError> {
        self.run_with(batch, Extras::NONE).map(|answers| answers.logits)
    }

    fn run_with(&mut self, batch: &Batch, extras: Extras) -> Result<Answers, BackendError> {
        let at = match self.runs.iter().position(|(asked, _)| *asked == extras) {
            Some(at) => at,
            None => {
                let options = select(&self.session, &self.output, extras)?;
                self.runs.push((extras, options));
                self.runs.len() - 1
            }
        };
        run_selected(&mut self.session, [&self.input, &self.output], batch, extras, &self.runs[at].1)
    }
}

/// How a session is told to give these outputs alone.
fn select(session: &Session, logits: &str, extras: Extras) -> Result<RunOptions<HasSelectedOutputs>, BackendError> {
    let mut outputs = OutputSelector::no_default().with(logits);
    for (name, wanted) in [(FEATURES, extras.features), (MAP, extras.map)] {
        if wanted && !session.outputs().iter().any(|output| output.name() == name) {
            return Err(BackendError::Run(format!("the graph has no output `{name}`")));
        }
        outputs = if wanted { outputs.with(name) } else { outputs };
    }
    Ok(RunOptions::new().map_err(failed)?.with_outputs(outputs))
}

/// Runs a session whose input and logits have these names, for the outputs that `options` select.
fn run_selected(
    session: &mut Session,
    [input, logits]: [&str; 2],
    batch: &Batch,
    extras: Extras,
    options: &RunOptions<HasSelectedOutputs>,
) -> Result<Answers, BackendError> {
    let found = batch.shape();
    let view = TensorRef::from_array_view((found, batch.data.as_slice()))
        .map_err(|e| BackendError::Shape { found, reason: brief(e) })?;
    let outputs = session.run_with_options(ort::inputs![input => view], options).map_err(failed)?;
    let extra = |name: &str, wanted: bool| {
        if !wanted {
            return Ok(Vec::new());
        }
        let (shape, data) = outputs[name].try_extract_tensor::<f32>().map_err(failed)?;
        let rows = shape.first().copied().unwrap_or_default();
        match usize::try_from(rows) {
            Ok(rows) if rows == batch.images && rows > 0 && data.len().is_multiple_of(rows) => Ok(data.to_vec()),
            _ => {
                Err(BackendError::Run(format!("{} images went in, `{name}` of shape {shape:?} came out", batch.images)))
            }
        }
    };
    let (features, map) = (extra(FEATURES, extras.features)?, extra(MAP, extras.map)?);
    let (shape, data) = outputs[logits].try_extract_tensor::<f32>().map_err(failed)?;
    Ok(Answers { logits: checked_logits(logits, batch.images, shape, data)?, features, map })
}

fn failed(error: ort::Error) -> BackendError {
    BackendError::Run(brief(error))
}

/// The first output of a run over so many images, if it is what a classifier answers.
fn checked_logits(output: &str, images: usize, shape: &[i64], data: &[f32]) -> Result<Logits, BackendError> {
    let &[rows, classes] = shape else {
        return Err(BackendError::Run(format!("output `{output}` has shape {shape:?}, not [N, classes]")));
    };
    if rows as usize != images || data.len() != images * classes as usize {
        return Err(BackendError::Run(format!("{images} images went in, logits of shape {shape:?} came out")));
    }
    Ok(Logits { images, classes: classes as usize, data: data.to_vec() })
}

fn configure<const N: usize>(
    mut builder: SessionBuilder,
    entries: [(&str, impl AsRef<str>); N],
) -> ort::Result<SessionBuilder> {
    for (key, value) in entries {
        builder = builder.with_config_entry(key, value)?;
    }
    Ok(builder)
}

/// Bytes from which on a weight stays out of its graph's bytes. Of a kept graph each is a mapping of every session: below
/// this they are many and save nothing.
const LARGE: usize = 1 << 16;
