//! Checkpoint → ONNX. Synchronous and offline: knows neither tokio nor ONNX Runtime.
//!
//! [`fold`] does it all: plan and tensors come from the checkpoint; `blocks` walks the plan and puts every scalar
//! where it belongs, with `nets::scaled_ws` and `batch_norm` for the weights; [`graph`](crate::graph) writes the bytes;
//! [`verified`] compares them with the unfolded graph. All arithmetic is in double precision, rounded once.

mod batch_norm;
mod blocks;
pub mod scores;
pub mod verified;

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use sha2::{Digest as _, Sha256};

use crate::checkpoint::{Checkpoint, CheckpointError};
pub use crate::graph::half_emulation::{LARGEST as LARGEST_HALF, PEAK};

use crate::graph::half_emulation;
use crate::graph::{Emission, GraphBuilder, GraphError};
use crate::model::{FoldReport, Gate, MANIFEST_FORMAT, Manifest, Precision, hex};
use crate::nets::Network;
use blocks::Emitter;
pub use scores::ScoreOptions;

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
    /// Scores can't be made as asked for.
    #[error("{0}")]
    Scores(String),
    /// The file would be larger than the protobuf format allows.
    #[error("the folded graph needs {0} bytes; ONNX files of 2 GiB and more are not supported")]
    TooLarge(u64),
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
#[derive(Debug, Clone, PartialEq)]
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
    /// How logits become scores.
    pub scores: ScoreOptions,
    /// What the graph gives beside logits.
    pub outputs: SideOutputs,
}

/// What a graph gives beside logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SideOutputs {
    /// The pooled map that the classifier reads, as timm's `forward_head(pre_logits=True)` gives it.
    pub features: bool,
    /// The map that is pooled, as timm's `forward_features` gives it.
    pub map: bool,
}

impl SideOutputs {
    /// Logits alone.
    pub const NONE: Self = Self { features: false, map: false };
}

impl Default for SideOutputs {
    fn default() -> Self {
        Self { features: true, map: false }
    }
}

impl Default for FoldOptions {
    fn default() -> Self {
        Self {
            size: Size::Checkpoint,
            precision: Precision::Fp32,
            gate: Gate::Resize,
            unfolded: false,
            exif_orientation: false,
            scores: ScoreOptions::default(),
            outputs: SideOutputs::default(),
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

/// A folded network on disk, not yet in a repository.
#[derive(Debug, Clone)]
pub struct FoldedFile {
    /// Bytes of the graph.
    pub len: u64,
    /// What to write beside it; its verification and golden answer are still empty.
    pub manifest: Manifest,
}

/// Folds a checkpoint. Every tensor is used exactly once, or the error names it. The same checkpoint and options give
/// the same bytes.
pub fn fold(checkpoint: &Checkpoint, options: &FoldOptions) -> Result<Folded, FoldError> {
    let mut onnx = Vec::new();
    let file = emit(checkpoint, options, None)?.write(&mut onnx)?;
    Ok(Folded { onnx, manifest: file.manifest })
}

/// As [`fold`], into a file that must not exist: one tensor is in memory at a time. Beside the file as much space again is
/// used meanwhile.
pub fn fold_to_file(checkpoint: &Checkpoint, options: &FoldOptions, path: &Path) -> Result<FoldedFile, FoldError> {
    let io = |e: io::Error| FoldError::Graph(GraphError::Io(format!("`{}`: {e}", path.display())));
    let store = tempfile::tempfile_in(path.parent().unwrap_or(Path::new("."))).map_err(io)?;
    let emitted = emit(checkpoint, options, Some(store))?;
    let mut file = BufWriter::with_capacity(1 << 20, File::create_new(path).map_err(io)?);
    let written = emitted.write(&mut file)?;
    file.into_inner().map_err(|e| io(e.into_error()))?.sync_all().map_err(io)?;
    Ok(written)
}

/// The folded graph with every weight and map rounded to half precision, arithmetic in single: what machines with true half
/// precision answer. Besides the logits its outputs are `NAME` + [`PEAK`] for every map, the largest magnitude there.
pub fn fold_in_half(checkpoint: &Checkpoint, options: &FoldOptions) -> Result<Vec<u8>, FoldError> {
    let single = FoldOptions {
        precision: Precision::Fp32,
        gate: Gate::Broadcast,
        unfolded: false,
        outputs: SideOutputs::NONE,
        ..options.clone()
    };
    Ok(half_emulation::emulate(&fold(checkpoint, &single)?.onnx)?)
}

/// A graph that is ready to be written.
struct Emitted<'a> {
    checkpoint: &'a Checkpoint,
    graph: GraphBuilder,
    /// Without the graph's digest.
    manifest: Manifest,
}

/// Emits the graph; large weights go to the `store`, where there is one.
fn emit<'a>(checkpoint: &'a Checkpoint, options: &FoldOptions, store: Option<File>) -> Result<Emitted<'a>, FoldError> {
    let size = match options.size {
        Size::Fixed(height, width) => Some((height, width)),
        Size::Checkpoint | Size::Dynamic => None,
    };
    let (mut preprocessing, mut source) = checkpoint.preprocessing(size).map_err(FoldError::Size)?;
    preprocessing.exif_orientation = options.exif_orientation;
    let scoring = options.scores.resolve(checkpoint, &mut source).map_err(FoldError::Scores)?;
    let dynamic = options.size == Size::Dynamic;
    let gate = if dynamic { Gate::Broadcast } else { options.gate };
    let emission = Emission {
        height: preprocessing.height,
        width: preprocessing.width,
        dynamic,
        // integers are made of a graph in single precision
        precision: if options.precision == Precision::Fp16 { Precision::Fp16 } else { Precision::Fp32 },
        gate,
        same_padding: checkpoint.network.same_padding(),
    };
    let (mut graph, input) = GraphBuilder::new(emission, preprocessing.channels());
    if let Some(store) = store {
        graph.store_in(store);
    }

    let reader = checkpoint.reader();
    let mut emitter = Emitter::new(&reader, graph, options.unfolded, options.outputs);
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
    let (features, map) = (emitter.features, emitter.map);
    let graph = emitter.graph;
    reader.finish()?;

    let (macs, folded_parameters) = (graph.macs, graph.parameters);
    let classes = checkpoint.network.classes();
    let manifest = Manifest {
        format: if scoring.is_some() { MANIFEST_FORMAT } else { 1 },
        producer: producer(),
        architecture: checkpoint.architecture.clone(),
        precision: options.precision,
        graph_height: (!dynamic).then_some(preprocessing.height),
        graph_width: (!dynamic).then_some(preprocessing.width),
        classes: classes as u32,
        features,
        map,
        labels: checkpoint.labels.clone(),
        preprocessing,
        scoring,
        source_sha256: checkpoint.sha256.clone(),
        onnx_sha256: String::new(),
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
        quantisation: None,
        golden: None,
    };
    Ok(Emitted { checkpoint, graph, manifest })
}

impl Emitted<'_> {
    fn write(self, to: &mut dyn Write) -> Result<FoldedFile, FoldError> {
        let Self { checkpoint, graph, mut manifest } = self;
        let metadata = [
            ("producer", producer()),
            ("architecture", checkpoint.architecture.clone()),
            ("source_sha256", checkpoint.sha256.clone()),
            ("preprocessing", serde_json::to_string(&manifest.preprocessing).unwrap_or_default()),
        ];
        let mut to = Digesting { to, hash: Sha256::new(), len: 0 };
        graph.finish_to(manifest.classes as usize, &metadata, &mut to)?;
        if to.len >= 1 << 31 {
            return Err(FoldError::TooLarge(to.len));
        }
        manifest.onnx_sha256 = hex(&to.hash.finalize());
        Ok(FoldedFile { len: to.len, manifest })
    }
}

/// A writer that also computes the digest of what is written.
struct Digesting<'a> {
    to: &'a mut dyn Write,
    hash: Sha256,
    len: u64,
}

impl Write for Digesting<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.len += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

fn producer() -> String {
    concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION")).into()
}
