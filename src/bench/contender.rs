//! What is timed: a graph, and how its session is opened.

use super::accuracy::Published;
use crate::engine::EngineOptions;

/// A graph to time.
#[derive(Debug, Clone)]
pub struct Contender {
    /// Name: the architecture, or what the user called it.
    pub model: String,
    /// `folded`, `unpadded`, `unfolded`, `fp16`, `broadcast` or `onnx`.
    pub variant: String,
    /// How its session differs from the others'.
    pub settings: Vec<Setting>,
    /// Channels of its input.
    pub channels: usize,
    /// Height of its input in pixels.
    pub height: usize,
    /// Width of its input in pixels.
    pub width: usize,
    /// The graph.
    pub onnx: Vec<u8>,
    /// Pad its channels to whole blocks, where this processor gains by that.
    pub pad_channels: bool,
    /// Trainable parameters, where known.
    pub parameters: Option<u64>,
    /// Billions of multiply-accumulates an image, where known.
    pub gmacs: Option<f64>,
    /// Published accuracy, where known.
    pub published: Option<Published>,
}

impl Contender {
    /// `model@size`, with variant and settings where it isn't plainly folded.
    pub fn label(&self) -> String {
        let Self { model, height, width, .. } = self;
        let size = if height == width { height.to_string() } else { format!("{height}x{width}") };
        match self.variant().as_str() {
            "folded" => format!("{model}@{size}"),
            variant => format!("{model}@{size}:{variant}"),
        }
    }

    /// The variant and every setting, as the command line names them.
    pub fn variant(&self) -> String {
        self.settings.iter().fold(self.variant.clone(), |text, setting| text + "+" + setting.name())
    }
}

/// How a session differs from the others'.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// Input and output are bound, and stay on the device: on a GPU always so.
    Bound,
    /// Kernels are replayed as a CUDA graph; bound as well.
    Graph,
    /// TensorFloat-32.
    Tf32,
    /// Channels last.
    Nhwc,
}

impl Setting {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Bound, Self::Graph, Self::Tf32, Self::Nhwc];

    /// As the command line names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bound => "bound",
            Self::Graph => "graph",
            Self::Tf32 => "tf32",
            Self::Nhwc => "nhwc",
        }
    }

    /// Whether it means something to GPUs only.
    pub fn is_for_gpu(self) -> bool {
        matches!(self, Self::Tf32 | Self::Nhwc)
    }

    pub(super) fn apply(self, options: &mut EngineOptions) {
        match self {
            Self::Bound => {}
            Self::Graph => options.gpu.cuda_graph = true,
            Self::Tf32 => options.gpu.tf32 = true,
            Self::Nhwc => options.gpu.prefer_nhwc = true,
        }
    }
}
