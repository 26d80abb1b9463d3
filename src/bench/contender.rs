//! Contenders of the benchmark: a graph, and settings of its session.

use super::accuracy::Published;
use crate::engine::{EngineOptions, Kernels};

/// A graph to time.
#[derive(Debug, Clone)]
pub struct Contender {
    /// Name of the model: the architecture, or the user's name for it.
    pub model: String,
    /// `folded`, `runtime`, `unpadded`, `unfolded`, `fp16`, `int8`, `broadcast` or `onnx`.
    pub variant: String,
    /// Settings of the session that differ from the default.
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
    /// Whose kernels it is laid out for, where it is padded.
    pub kernels: Kernels,
    /// It computes in integers.
    pub integers: bool,
    /// Trainable parameters, where known.
    pub parameters: Option<u64>,
    /// Billions of multiply-accumulates per image, if known.
    pub gmacs: Option<f64>,
    /// Published accuracy, if known.
    pub published: Option<Published>,
}

impl Contender {
    /// `model@size`, with variant and settings unless they are the default.
    pub fn label(&self) -> String {
        let Self { model, height, width, .. } = self;
        let size = if height == width { height.to_string() } else { format!("{height}x{width}") };
        match self.variant().as_str() {
            "folded" => format!("{model}@{size}"),
            variant => format!("{model}@{size}:{variant}"),
        }
    }

    /// The variant followed by all settings, in the command line's syntax.
    pub fn variant(&self) -> String {
        self.settings.iter().fold(self.variant.clone(), |text, setting| text + "+" + setting.name())
    }
}

/// A setting of a session that differs from the default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// I/O binding: input and output stay on the device. Always used on a GPU.
    Bound,
    /// Kernels are replayed as a CUDA graph; implies I/O binding.
    Graph,
    /// TensorFloat-32.
    Tf32,
    /// Channels-last layout (NHWC).
    Nhwc,
    /// Biases are added in cuDNN's own kernels.
    Fuse,
}

impl Setting {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Bound, Self::Graph, Self::Tf32, Self::Nhwc, Self::Fuse];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bound => "bound",
            Self::Graph => "graph",
            Self::Tf32 => "tf32",
            Self::Nhwc => "nhwc",
            Self::Fuse => "fuse",
        }
    }

    /// Whether it affects GPUs only.
    pub fn is_for_gpu(self) -> bool {
        matches!(self, Self::Tf32 | Self::Nhwc | Self::Fuse)
    }

    pub(super) fn apply(self, options: &mut EngineOptions) {
        match self {
            Self::Bound => {}
            Self::Graph => options.gpu.cuda_graph = true,
            Self::Tf32 => options.gpu.tf32 = true,
            Self::Nhwc => options.gpu.prefer_nhwc = true,
            Self::Fuse => options.gpu.fuse_conv_bias = true,
        }
    }
}
