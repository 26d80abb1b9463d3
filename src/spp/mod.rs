//! Signal propagation plots: mean and variance of a network's hidden activations, block by block (Brock, De & Smith
//! 2021, section 3), at initialisation or trained, on Gaussian noise or photographs.
//!
//! `resnet_v2` runs the paper's own networks at initialisation, one layer at a time; `taps` runs a classifier's graph
//! with its residual blocks as outputs; `statistics` accumulates; `health` finds problems; `render` prints. Must not
//! know checkpoints or how a network is folded: it receives graphs.

pub mod health;
pub mod render;
pub mod resnet_v2;
pub mod statistics;
pub mod taps;

use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution as _, StandardNormal};
use serde::Serialize;

use crate::engine::{BackendError, Batch, EngineError};
use crate::graph::GraphError;
use statistics::ChannelMoments;

/// Why statistics can't be computed.
#[derive(Debug, thiserror::Error)]
pub enum SppError {
    /// ONNX Runtime can't open a graph.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// ONNX Runtime can't run a graph.
    #[error(transparent)]
    Run(#[from] BackendError),
    /// A graph can't be written.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// The bytes are no ONNX graph.
    #[error("`{name}` is not an ONNX graph: {reason}; fold the checkpoint again")]
    NotOnnx {
        /// Name of the network.
        name: String,
        /// Message of the parser.
        reason: String,
    },
    /// The graph has no residual block.
    #[error("`{0}` has no residual block; signal propagation plots need a residual network")]
    NoBlocks(String),
    /// The specification of a network is invalid.
    #[error("network `{spec}`: {reason}")]
    BadSpec {
        /// The specification.
        spec: String,
        /// What is wrong, and what is valid.
        reason: String,
    },
}

/// Statistics of one network.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Profile {
    /// Name of the network in reports.
    pub network: String,
    /// Description of the input.
    pub input: String,
    /// Number of images.
    pub images: usize,
    /// Height and width of the input, in pixels.
    pub size: (usize, usize),
    /// Residual blocks in order.
    pub blocks: Vec<Signal>,
    /// Whether all logits were finite; `None` if the network has no classifier.
    pub finite_logits: Option<bool>,
    /// Wall-clock time, in seconds.
    pub seconds: f64,
}

/// Statistics at the end of one residual block, over all images and positions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Signal {
    /// The block's name, such as `stages.2.0`.
    pub block: String,
    /// Whether it is the last block of its stage.
    pub ends_stage: bool,
    /// Average channel squared mean of the block's output (shortcut + residual branch).
    pub squared_mean: f64,
    /// Average channel variance of the block's output.
    pub variance: f64,
    /// Average channel squared mean at the end of the residual branch, before SkipInit's gain and α.
    pub residual_squared_mean: Option<f64>,
    /// Average channel variance at the end of the residual branch, before SkipInit's gain and α.
    pub residual_variance: Option<f64>,
    /// Variance after the block that the plan expects; `None` for batch-normalised networks.
    pub expected_variance: Option<f64>,
    /// Largest magnitude in the block's output.
    pub max_abs: f64,
}

impl Signal {
    /// Builds the statistics from the moments of a block's output and of its residual branch multiplied by `scale`
    /// (`None` if the graph has no branch, or for a scale of 0).
    fn new(block: &str, output: &ChannelMoments, residual: Option<(&ChannelMoments, f64)>) -> Self {
        let before_scale = |value: f64, scale: f64| value / (scale * scale);
        Self {
            block: block.into(),
            ends_stage: false,
            squared_mean: output.squared_mean(),
            variance: output.variance(),
            residual_squared_mean: residual.map(|(m, scale)| before_scale(m.squared_mean(), scale)),
            residual_variance: residual.map(|(m, scale)| before_scale(m.variance(), scale)),
            expected_variance: None,
            max_abs: output.max_abs(),
        }
    }

    /// E\[x²\], averaged over channels.
    pub fn second_moment(&self) -> f64 {
        self.squared_mean + self.variance
    }
}

/// Marks the last block of each stage. A block's stage is its name without the last component.
fn mark_stages(blocks: &mut [Signal]) {
    let stage = |name: &str| name.rsplit_once('.').map(|(stage, _)| stage.to_string());
    for i in 0..blocks.len() {
        let next = blocks.get(i + 1).map(|b| stage(&b.block));
        blocks[i].ends_stage = next != Some(stage(&blocks[i].block));
    }
}

/// Writes unit Gaussian image number `image` to position `at` of `batch`. It depends only on seed and number.
pub fn gaussian_image(seed: u64, image: usize, batch: &mut Batch, at: usize) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(1 + image as u64);
    batch.image_mut(at).iter_mut().for_each(|v| *v = StandardNormal.sample(&mut rng));
}
