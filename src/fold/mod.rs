//! Checkpoint → ONNX. Synchronous and offline: knows neither tokio nor ONNX Runtime.
//!
//! The story is [`fold`]: plan and tensors come from the checkpoint; `blocks` walks the plan and puts every scalar
//! where it belongs, with `nets::scaled_ws` and `batch_norm` for the weights; [`graph`](crate::graph) writes the bytes;
//! [`verified`] compares them with the unfolded graph. All arithmetic is in double precision, rounded once.

mod batch_norm;
mod blocks;
pub mod verified;

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::graph::{Emission, GraphBuilder, GraphError};
use crate::model::{self, FoldReport, Gate, MANIFEST_FORMAT, Manifest, Precision};
use crate::nets::Network;
use blocks::Emitter;

/// What can go wrong while folding.
#[derive(Debug, thiserror::Error)]
pub enum FoldError {
    /// The checkpoint does not hold what its architecture needs.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The preprocessing can't be resolved for the size asked for.
    #[error("{0}; choose another --size")]
    Size(String),
    /// The graph can't be written.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// A running variance below zero.
    #[error(
        "batch normalisation `{layer}` has a negative running variance in channel {channel}; the checkpoint is damaged"
    )]
    NegativeVariance {
        /// The layer.
        layer: String,
        /// The channel.
        channel: usize,
    },
    /// The file would be larger than the protobuf format allows.
    #[error("the folded graph needs {0} bytes; ONNX files of 2 GiB and more are not supported")]
    TooLarge(usize),
}

/// The spatial size of a folded graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Size {
    /// The checkpoint's evaluation size.
    #[default]
    Checkpoint,
    /// Height and width in pixels.
    Fixed(u32, u32),
    /// Any size at run time; preprocessing uses the checkpoint's evaluation size.
    Dynamic,
}

/// How to fold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FoldOptions {
    /// Spatial size.
    pub size: Size,
    /// Number format.
    pub precision: Precision,
    /// How attention gates multiply. A dynamic graph always broadcasts.
    pub gate: Gate,
    /// Leave standardisation, normalisation, gains, α and β as operations.
    pub unfolded: bool,
    /// Have images turned upright by their EXIF orientation before anything else, which timm does not.
    pub exif_orientation: bool,
}

impl Default for FoldOptions {
    fn default() -> Self {
        Self {
            size: Size::Checkpoint,
            precision: Precision::Fp32,
            gate: Gate::Resize,
            unfolded: false,
            exif_orientation: false,
        }
    }
}

/// A folded network, not yet on disk.
#[derive(Debug, Clone)]
pub struct Folded {
    /// The graph.
    pub onnx: Vec<u8>,
    /// What to write beside it; its verification and golden answer are still empty.
    pub manifest: Manifest,
}

/// Folds a checkpoint. Every tensor is used exactly once, or the error names it. The same checkpoint and options give
/// the same bytes.
pub fn fold(checkpoint: &Checkpoint, options: &FoldOptions) -> Result<Folded, FoldError> {
    let size = match options.size {
        Size::Fixed(height, width) => Some((height, width)),
        Size::Checkpoint | Size::Dynamic => None,
    };
    let (mut preprocessing, source) = checkpoint.preprocessing(size).map_err(FoldError::Size)?;
    preprocessing.exif_orientation = options.exif_orientation;
    let dynamic = options.size == Size::Dynamic;
    let gate = if dynamic { Gate::Broadcast } else { options.gate };
    let (graph, input) = GraphBuilder::new(Emission {
        height: preprocessing.height,
        width: preprocessing.width,
        dynamic,
        precision: options.precision,
        gate,
        same_padding: matches!(&checkpoint.network, Network::NormFree(plan) if plan.same_padding),
    });

    let reader = checkpoint.reader();
    let mut emitter = Emitter::new(&reader, graph, options.unfolded);
    let (family, activation, gamma, blocks) = match &checkpoint.network {
        Network::NormFree(plan) => {
            ("nf", plan.activation, Some(plan.activation.gamma()), emitter.norm_free(plan, input)?)
        }
        Network::ResNet(plan) => {
            emitter.resnet(plan, input)?;
            ("resnet", plan.activation, None, Vec::new())
        }
        Network::BatchNormed(plan) => {
            emitter.batch_normed(plan, input)?;
            (plan.family, plan.activation, None, Vec::new())
        }
    };
    let graph = emitter.graph;
    reader.finish()?;

    let (macs, folded_parameters) = (graph.macs, graph.parameters);
    let classes = checkpoint.network.classes();
    let preprocessing_json = serde_json::to_string(&preprocessing).unwrap_or_default();
    let metadata = [
        ("producer", producer()),
        ("architecture", checkpoint.architecture.clone()),
        ("source_sha256", checkpoint.sha256.clone()),
        ("preprocessing", preprocessing_json),
    ];
    let onnx = graph.finish(classes, &metadata);
    if onnx.len() >= 1 << 31 {
        return Err(FoldError::TooLarge(onnx.len()));
    }
    let manifest = Manifest {
        format: MANIFEST_FORMAT,
        producer: producer(),
        architecture: checkpoint.architecture.clone(),
        precision: options.precision,
        graph_height: (!dynamic).then_some(preprocessing.height),
        graph_width: (!dynamic).then_some(preprocessing.width),
        classes: classes as u32,
        labels: checkpoint.labels.clone(),
        preprocessing,
        source_sha256: checkpoint.sha256.clone(),
        onnx_sha256: model::sha256(&onnx),
        source,
        fold: FoldReport {
            family: family.into(),
            activation: activation.name().into(),
            gamma,
            parameters: checkpoint.network.parameters(),
            folded_parameters,
            gmacs: macs as f64 / 1e9,
            gate,
            blocks,
            verification: None,
        },
        golden: None,
    };
    Ok(Folded { onnx, manifest })
}

fn producer() -> String {
    concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION")).into()
}
