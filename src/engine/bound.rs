//! Engines on a GPU: a session for each number of images. Its input lies in host memory that the device reads by itself,
//! input and output are bound once, and a CUDA graph replays the kernels of the first run. All but the graph runs on the
//! CPU too, without gain, so that it is tested on machines without a GPU.
//!
//! Why a session for each number: ONNX Runtime keeps cuDNN's plan of a convolution for the last shape only, and makes all
//! of them anew when the shape changes: 50 ms and more for a network that runs in 7.

use std::sync::{PoisonError, RwLock};

use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{IoBinding, NoSelectedOutputs, RunOptions, Session};
use ort::value::Tensor;

use super::{
    Answers, Backend, BackendError, Batch, EngineError, EngineOptions, Extras, Fitted, Logits, OrtBackend, Provider,
    checked_logits, failed, run_selected, select,
};

/// While a CUDA graph is recorded, no other thread may allocate, free or wait on a GPU: CUDA ends the recording then, and
/// ONNX Runtime the process. A recording thread holds the lock exclusively; all other work on a GPU shares it.
static RECORDING: RwLock<()> = RwLock::new(());

/// Runs `work` on a GPU while no thread records a CUDA graph.
pub(super) fn shared<T>(work: impl FnOnce() -> T) -> T {
    let _shared = RECORDING.read().unwrap_or_else(PoisonError::into_inner);
    work()
}

/// Runs `work`, which records a CUDA graph, while no other thread uses a GPU.
fn alone<T>(work: impl FnOnce() -> T) -> T {
    let _alone = RECORDING.write().unwrap_or_else(PoisonError::into_inner);
    work()
}

/// ONNX Runtime's name for the number of a run's graph.
const GRAPH_NUMBER: &str = "gpu_graph_id";

/// ONNX Runtime's number for a run that neither records nor replays.
const NO_GRAPH: &str = "-1";

/// Sessions with bound tensors. Opened on the thread that runs them: a CUDA graph belongs to its thread.
pub struct BoundBackend {
    /// Ascending by number of images.
    engines: Vec<Engine>,
    /// Index of the session whose input was staged last.
    staged: Option<usize>,
    /// Logits stay on the device: for timing the graph alone.
    resident: bool,
}

/// A session for one number of images.
struct Engine {
    model: String,
    images: usize,
    input: String,
    output: String,
    // tensors go before the memory that they are in, and that before its session
    bound: Option<Bound>,
    device: Device,
    session: Session,
}

/// Where tensors lie.
struct Device {
    name: AllocationDevice<'static>,
    number: i32,
    /// Host memory that the device reads by itself.
    staging: Allocator,
    /// Memory of the device; only where CUDA graphs are used.
    memory: Option<Allocator>,
}

/// The tensors of one input shape.
struct Bound {
    shape: [usize; 4],
    binding: IoBinding,
    input: Tensor<f32>,
    /// Fixed places on the device, which a CUDA graph reads and writes.
    fixed: Option<Fixed>,
    run: RunOptions<NoSelectedOutputs>,
    /// Whether the next run records.
    records: bool,
}

struct Fixed {
    input: Tensor<f32>,
    output: Tensor<f32>,
    /// Where the logits are copied to.
    logits: Tensor<f32>,
}

impl BoundBackend {
    /// Opens a session for each number of images in `sizes`; `what` names the graph in messages. The graph has one float32
    /// input `[N, 3, H, W]`, and its first output is float32 `[N, classes]`; with CUDA graphs, `classes` is fixed.
    pub fn open(graph: &Fitted, what: &str, options: &EngineOptions, sizes: &[usize]) -> Result<Self, EngineError> {
        let mut sizes = sizes.to_vec();
        sizes.sort_unstable();
        sizes.dedup();
        let mut backend = Self { engines: Vec::new(), staged: None, resident: false };
        for images in sizes {
            backend.engines.push(shared(|| Engine::open(graph, what, options, images))?);
        }
        Ok(backend)
    }

    /// From now on logits stay on the device.
    pub fn keep_on_device(&mut self) {
        self.resident = true;
        shared(|| self.engines.iter_mut().for_each(|engine| engine.bound = None));
    }

    /// Moves a batch to the device. Its number of images is one that sessions were opened for.
    pub fn stage(&mut self, batch: &Batch) -> Result<(), BackendError> {
        self.staged = None;
        let at = self.engine_for(batch.images)?;
        shared(|| self.engines[at].stage(batch, self.resident))?;
        self.staged = Some(at);
        Ok(())
    }

    /// Index of the session for so many images.
    fn engine_for(&self, images: usize) -> Result<usize, BackendError> {
        self.engines.binary_search_by_key(&images, |engine| engine.images).map_err(|_| {
            let sizes: Vec<_> = self.engines.iter().map(|engine| engine.images).collect();
            BackendError::Run(format!("{images} images came, sessions are open for {sizes:?}"))
        })
    }

    /// Runs on what was [staged](Self::stage) last; where logits stay on the device, there are none to return.
    pub fn repeat(&mut self) -> Result<Option<Logits>, BackendError> {
        let engine = self.staged.and_then(|at| self.engines.get_mut(at));
        let engine = engine.ok_or_else(|| BackendError::Run("no batch was staged".into()))?;
        let resident = self.resident;
        if engine.bound.as_ref().is_some_and(|bound| bound.records) {
            return alone(|| engine.run(resident));
        }
        shared(|| engine.run(resident))
    }
}

impl Backend for BoundBackend {
    fn run(&mut self, batch: &Batch) -> Result<Logits, BackendError> {
        self.stage(batch)?;
        self.repeat()?.ok_or_else(|| BackendError::Run("its logits stay on the device".into()))
    }

    /// What else is asked for comes by an unbound run, so that runs for logits alone stay what they are.
    fn run_with(&mut self, batch: &Batch, extras: Extras) -> Result<Answers, BackendError> {
        if extras == Extras::NONE {
            return self.run(batch).map(Answers::from);
        }
        let at = self.engine_for(batch.images)?;
        shared(|| self.engines[at].run_unbound(batch, extras))
    }
}

impl Drop for BoundBackend {
    fn drop(&mut self) {
        shared(|| self.engines.clear());
    }
}

impl Engine {
    fn open(graph: &Fitted, what: &str, options: &EngineOptions, images: usize) -> Result<Self, EngineError> {
        let builder = OrtBackend::builder(what, options, GraphOptimizationLevel::All)?;
        let OrtBackend { session, input, output, .. } = OrtBackend::commit(builder, graph, what)?;
        let device = Device::new(&session, options).map_err(|e| EngineError::BadModel {
            model: what.into(),
            reason: format!("memory of {} can't be had: {e}", options.provider.name()),
        })?;
        Ok(Self { model: what.into(), images, input, output, session, device, bound: None })
    }

    fn stage(&mut self, batch: &Batch, resident: bool) -> Result<(), BackendError> {
        let shape = batch.shape();
        let bound = match self.bound.take().filter(|bound| bound.shape == shape) {
            Some(bound) => bound,
            None => self.bind(shape, resident).map_err(|e| BackendError::Run(format!("binding {shape:?}: {e}")))?,
        };
        let bound = self.bound.insert(bound);
        let (_, staging) = bound.input.extract_tensor_mut();
        if staging.len() != batch.data.len() {
            let reason = format!("{} values came", batch.data.len());
            return Err(BackendError::Shape { found: shape, reason });
        }
        staging.copy_from_slice(&batch.data);
        match &mut bound.fixed {
            Some(fixed) => bound.input.copy_into(&mut fixed.input),
            // copies to the device
            None => bound.binding.bind_input(self.input.as_str(), &bound.input),
        }
        .map_err(failed)
    }

    fn run(&mut self, resident: bool) -> Result<Option<Logits>, BackendError> {
        let Some(bound) = self.bound.as_mut() else { return Err(BackendError::Run("no batch was staged".into())) };
        if bound.records {
            if let Err(error) = self.session.run_binding_with_options(&bound.binding, &bound.run).map(drop) {
                if resident {
                    // what is timed as a graph is one
                    return Err(failed(error));
                }
                let (model, images) = (&self.model, self.images);
                tracing::warn!(
                    model, images, %error,
                    "`{model}`: CUDA can't record batches of {images}, which run without a graph; channels last (--cuda-nhwc) may record"
                );
                bound.run = RunOptions::new().map_err(failed)?;
                bound.run.set(GRAPH_NUMBER, NO_GRAPH).map_err(failed)?;
            }
            bound.records = false;
        }
        let outputs = self.session.run_binding_with_options(&bound.binding, &bound.run).map_err(failed)?;
        if resident {
            return Ok(None);
        }
        let logits = match &mut bound.fixed {
            Some(fixed) => {
                drop(outputs);
                fixed.output.copy_into(&mut fixed.logits).map_err(failed)?;
                let (shape, data) = fixed.logits.extract_tensor();
                checked_logits(&self.output, self.images, shape, data)?
            }
            None => {
                let (shape, data) = outputs[self.output.as_str()].try_extract_tensor::<f32>().map_err(failed)?;
                checked_logits(&self.output, self.images, shape, data)?
            }
        };
        Ok(Some(logits))
    }

    fn run_unbound(&mut self, batch: &Batch, extras: Extras) -> Result<Answers, BackendError> {
        let mut options = select(&self.session, &self.output, extras)?;
        // recorded runs give what was bound when they were recorded
        options.set(GRAPH_NUMBER, NO_GRAPH).map_err(failed)?;
        run_selected(&mut self.session, [&self.input, &self.output], batch, extras, &options)
    }

    fn bind(&self, shape: [usize; 4], resident: bool) -> ort::Result<Bound> {
        let input = Tensor::<f32>::new(&self.device.staging, shape)?;
        let mut binding = self.session.create_binding()?;
        let mut run = RunOptions::new()?;
        let Some(memory) = &self.device.memory else {
            let memory = if resident { self.device.memory()? } else { host()? };
            binding.bind_output_to_device(self.output.as_str(), &memory)?;
            return Ok(Bound { shape, input, binding, fixed: None, run, records: false });
        };
        let classes = self.session.outputs().first().and_then(|o| o.dtype().tensor_shape()?.get(1).copied());
        let classes = classes.and_then(|c| usize::try_from(c).ok());
        let classes = classes.ok_or_else(|| ort::Error::new("a CUDA graph needs a fixed number of classes"))?;
        let mut fixed = Fixed {
            input: Tensor::new(memory, shape)?,
            output: Tensor::new(memory, [shape[0], classes])?,
            logits: Tensor::new(&Allocator::default(), [shape[0], classes])?,
        };
        binding.bind_input(self.input.as_str(), &fixed.input)?;
        binding.bind_output(self.output.as_str(), &mut fixed.output)?;
        // graphs of a session are told apart by the height and width that they were recorded for
        run.set(GRAPH_NUMBER, (shape[2] << 14 | shape[3]).to_string())?;
        Ok(Bound { shape, input, binding, fixed: Some(fixed), run, records: true })
    }
}

impl Device {
    fn new(session: &Session, options: &EngineOptions) -> ort::Result<Self> {
        let number = i32::from(options.gpu.device);
        let graphs = options.gpu.cuda_graph;
        if options.provider == Provider::Cpu {
            let memory = graphs.then(Allocator::default);
            return Ok(Self { name: AllocationDevice::CPU, number: 0, staging: Allocator::default(), memory });
        }
        let own = |name, kind| MemoryInfo::new(name, number, AllocatorType::Device, kind);
        let pinned = own(AllocationDevice::CUDA_PINNED, MemoryType::CPUInput)?;
        let memory = own(AllocationDevice::CUDA, MemoryType::Default)?;
        Ok(Self {
            name: AllocationDevice::CUDA,
            number,
            staging: Allocator::new(session, pinned)?,
            memory: graphs.then(|| Allocator::new(session, memory)).transpose()?,
        })
    }

    fn memory(&self) -> ort::Result<MemoryInfo<'static>> {
        MemoryInfo::new(self.name.clone(), self.number, AllocatorType::Device, MemoryType::Default)
    }
}

fn host() -> ort::Result<MemoryInfo<'static>> {
    MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::CPUOutput)
}
