//! What a scheduler is started with: a model, how to open its engines, and how its images are queued and distributed.

use std::sync::Arc;
use std::time::Duration;

use super::system::System;
use crate::engine::{Backend, EngineError};
use crate::metrics::ModelMetrics;
use crate::pixels::{DecodeMemory, Decoder, Preprocessor};

/// Opens an engine for a compute thread: at the start, and again after the old one panicked.
pub type OpenBackend = Box<dyn Fn() -> Result<Box<dyn Backend>, EngineError> + Send + Sync>;

/// How the images of one model are queued, batched and distributed over threads.
#[derive(Debug, Clone)]
pub struct SchedulerOptions {
    /// Threads that own an engine each.
    pub workers: usize,
    /// Further threads that only decode and resize; with 0 the workers do that too. On a CPU the workers use every core
    /// already; a GPU's workers mostly wait, and need other threads to feed them.
    pub decoders: usize,
    /// Most images per engine run.
    pub max_batch: usize,
    /// How long an image may wait for others while an engine is free. Zero: not at all; a batch is then formed of the
    /// images that wait when a worker becomes free.
    pub max_queue_delay: Duration,
    /// Most images admitted and not yet answered.
    pub queue_limit: usize,
    /// An image that would wait longer, by the measured speed, is refused at once: under overload, a queue full of late
    /// images serves nobody. Two images per worker are always admitted.
    pub max_queue_wait: Duration,
    /// Replaces `max_queue_wait` in a standing queue: one whose wait has been above this for half a second.
    pub standing_wait: Duration,
    /// The decoder, with its limits on encoded images.
    pub decoder: Decoder,
    /// Memory for images that are being decoded, shared by all schedulers of the process.
    pub decode_memory: Arc<DecodeMemory>,
    /// Sizes that batches are padded to, ascending; empty: no padding. For engines whose arithmetic depends on the
    /// batch size, or that are built for some shapes only. The largest limits `max_batch`.
    pub buckets: Vec<usize>,
    /// What to do if an image's logits differ between alone and in a batch.
    pub invariance: Invariance,
    /// Warms up the workers one after the other, which leaves the other cores to models that are served already.
    pub one_by_one: bool,
    /// Starts once single images are warm; larger batches are run once they are, which workers see to between images. Not
    /// with [`Invariance::Require`] or `one_by_one`, where everything is tested first.
    pub ready_at_one: bool,
}

impl Default for SchedulerOptions {
    /// One worker; otherwise the defaults of `nfold serve` on a CPU.
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
            ready_at_one: false,
        }
    }
}

impl SchedulerOptions {
    /// Batch size of an engine run with `images` images, padding included.
    pub(super) fn padded(&self, images: usize) -> usize {
        self.buckets.iter().copied().find(|&bucket| bucket >= images).unwrap_or(images)
    }

    /// Whether the larger batches are warmed up after the start.
    pub(super) fn warms_up_later(&self) -> bool {
        self.ready_at_one && !self.one_by_one && self.invariance != Invariance::Require
    }

    /// Every batch size that an engine run can have, padding included; ascending.
    pub(super) fn sizes(&self) -> Vec<usize> {
        match self.buckets.as_slice() {
            [] => (1..=self.max_batch).collect(),
            buckets => buckets.to_vec(),
        }
    }
}

/// What the self-test at the start does. It compares the logits of the same images alone and in every possible batch
/// size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Invariance {
    /// Any difference in any bit fails the start.
    Require,
    /// The largest difference is logged and exported as a metric.
    #[default]
    Report,
    /// Not tested.
    Off,
}

/// The golden answer, which a model must reproduce before it is served: one image's tensor and its logits at folding.
#[derive(Debug, Clone)]
pub struct Golden {
    /// `[channels, height, width]`.
    pub input: Vec<f32>,
    /// `[classes]`.
    pub logits: Vec<f32>,
    /// Largest allowed difference of a logit.
    pub tolerance: f64,
}

/// What a scheduler runs.
pub struct Job {
    /// Name for threads and log lines.
    pub what: String,
    /// Makes a tensor of an image.
    pub preprocessor: Preprocessor,
    /// Whether images are turned upright by their EXIF orientation.
    pub exif_orientation: bool,
    /// Logits per image.
    pub classes: usize,
    /// Opens an engine.
    pub open: OpenBackend,
    /// Opens an engine that uses every core, for an image that arrives on an idle machine.
    pub open_wide: Option<OpenBackend>,
    /// The golden answer.
    pub golden: Option<Golden>,
    /// The model's metrics.
    pub metrics: ModelMetrics,
    /// Time, threads and waiting.
    pub system: Arc<dyn System>,
}

/// Why a model can't be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An engine can't be opened.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A run failed during warm-up.
    #[error("warm-up with a batch of {batch} failed: {reason}")]
    WarmUp {
        /// Images in the run.
        batch: usize,
        /// What went wrong.
        reason: String,
    },
    /// The logits are not the golden answer's: another model, or other arithmetic.
    #[error(
        "its logits differ by {difference:.3e} from those at folding (tolerance {tolerance:.3e}); fold the checkpoint again, or see what is different about this machine with `nfold inspect`"
    )]
    Golden {
        /// Largest difference of a logit.
        difference: f64,
        /// Largest allowed difference.
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
    /// A bug in this program or in the runtime.
    #[error("opening its engine panicked: {0}")]
    Panic(String),
    /// The system refused a thread, or the thread died.
    #[error("can't start a compute thread: {0}")]
    Thread(String),
}
