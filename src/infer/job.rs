//! What a scheduler is started with: a model, how to open its engines, and how its images are queued and spread.

use std::sync::Arc;
use std::time::Duration;

use super::system::System;
use crate::engine::{Backend, EngineError};
use crate::metrics::ModelMetrics;
use crate::pixels::{DecodeMemory, Decoder, Preprocessor};

/// Opens a fresh engine for a compute thread: at the start, and again after a panic in the old one.
pub type OpenBackend = Box<dyn Fn() -> Result<Box<dyn Backend>, EngineError> + Send + Sync>;

/// How the images of one model are queued, batched and spread over threads.
#[derive(Debug, Clone)]
pub struct SchedulerOptions {
    /// Threads that own an engine each.
    pub workers: usize,
    /// Further threads that only decode and resize; with 0 the workers do that too. On a CPU the workers use every core
    /// already; a GPU's workers mostly wait, and need others to feed them.
    pub decoders: usize,
    /// Most images in one engine run.
    pub max_batch: usize,
    /// How long an image may wait for others while an engine is free. Zero: not at all; batches then form from what
    /// waits when a worker becomes free.
    pub max_queue_delay: Duration,
    /// Most images admitted and not yet answered.
    pub queue_limit: usize,
    /// An image that would wait longer, by the measured speed, is refused at once: under overload a queue
    /// that is full of late answers serves nobody. Two images per worker are always taken.
    pub max_queue_wait: Duration,
    /// Replaces `max_queue_wait` in a standing queue: one whose wait has been above this for half a second.
    pub standing_wait: Duration,
    /// What an encoded image may cost at most, and how it is decoded.
    pub decoder: Decoder,
    /// Memory for images that are being decoded, shared with every other scheduler of the process.
    pub decode_memory: Arc<DecodeMemory>,
    /// Sizes that batches are padded to, ascending; empty: every size as it comes. For engines whose arithmetic depends on
    /// the batch, or that are built for some shapes only. The largest limits `max_batch`.
    pub buckets: Vec<usize>,
    /// What a difference between an image alone and in a batch does.
    pub invariance: Invariance,
    /// Warm the workers one after the other: a model that is being served keeps the other cores.
    pub one_by_one: bool,
}

impl Default for SchedulerOptions {
    /// One worker, and otherwise what `nfold serve` begins with on a CPU.
    fn default() -> Self {
        Self {
            workers: 1,
            decoders: 0,
            max_batch: 8,
            max_queue_delay: Duration::ZERO,
            queue_limit: 256,
            max_queue_wait: Duration::from_secs(1),
            standing_wait: Duration::from_millis(100),
            decoder: Decoder::default(),
            decode_memory: DecodeMemory::new(DecodeMemory::DEFAULT),
            buckets: Vec::new(),
            invariance: Invariance::Report,
            one_by_one: false,
        }
    }
}

impl SchedulerOptions {
    /// Images in the engine run that `images` need, padding included.
    pub(super) fn padded(&self, images: usize) -> usize {
        self.buckets.iter().copied().find(|&bucket| bucket >= images).unwrap_or(images)
    }

    /// Every number of images that an engine run can have, padding included; ascending.
    pub(super) fn sizes(&self) -> Vec<usize> {
        match self.buckets.as_slice() {
            [] => (1..=self.max_batch).collect(),
            buckets => buckets.to_vec(),
        }
    }
}

/// What the self-test at the start does: the same images alone and in every batch size that can occur.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Invariance {
    /// Any difference in any bit stops the start.
    Require,
    /// The largest difference is logged and published.
    #[default]
    Report,
    /// Not tested.
    Off,
}

/// What a model must answer before it is served: one image's tensor and its logits, as they were when it was folded.
#[derive(Debug, Clone)]
pub struct Golden {
    /// `[channels, height, width]`.
    pub input: Vec<f32>,
    /// `[classes]`.
    pub logits: Vec<f32>,
    /// Largest difference of a logit that is taken.
    pub tolerance: f64,
}

/// What a scheduler runs.
pub struct Job {
    /// Name for threads and log lines.
    pub what: String,
    /// From image to tensor.
    pub preprocessor: Preprocessor,
    /// Turn images upright by their EXIF orientation.
    pub exif_orientation: bool,
    /// Logits per image.
    pub classes: usize,
    /// Opens an engine.
    pub open: OpenBackend,
    /// Opens an engine that has every core, for an image that comes to an idle machine.
    pub open_wide: Option<OpenBackend>,
    /// What it must answer.
    pub golden: Option<Golden>,
    /// The model's metrics.
    pub metrics: ModelMetrics,
    /// Time, threads and waiting.
    pub system: Arc<dyn System>,
}

/// Why a model could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A real run failed before the model was ready.
    #[error("warm-up with a batch of {batch} failed: {reason}")]
    WarmUp {
        /// Images in the run.
        batch: usize,
        /// What went wrong.
        reason: String,
    },
    /// Not the model that was folded, or not the arithmetic.
    #[error(
        "its logits differ by {difference:.3e} from those at folding (tolerance {tolerance:.3e}); fold the checkpoint again, or see what is different about this machine with `nfold inspect`"
    )]
    Golden {
        /// Largest difference of a logit.
        difference: f64,
        /// What is taken.
        tolerance: f64,
    },
    /// [`Invariance::Require`] is not met.
    #[error(
        "a logit differs by {difference:.3e} between an image alone and in a batch; serve with --batch-buckets, --max-batch-size 1 or --invariance report"
    )]
    Variant {
        /// Largest difference of a logit.
        difference: f64,
    },
    /// A fault of this program, or of the runtime.
    #[error("opening its engine panicked: {0}")]
    Panic(String),
    /// The system gave no thread, or the thread died.
    #[error("can't start a compute thread: {0}")]
    Thread(String),
}
