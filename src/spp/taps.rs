//! Runs a classifier's graph, folded or not, with the ends of its residual blocks as outputs.
//!
//! A residual block ends in an `Add` of its branch and its shortcut, in this order: the sum is the block's output (in a
//! batch-normalised ResNet, before the activation that follows), its first input is the branch, multiplied by the scale
//! that folding left in it.

use std::time::Instant;

use prost::Message as _;

use super::statistics::ChannelMoments;
use super::{Profile, Signal, SppError, mark_stages};
use crate::engine::{Batch, EngineOptions, MapBackend, MapView};
use crate::graph::{FLOAT, FLOAT16};
use crate::model::OUTPUT;
use crate::pb::onnx::{GraphProto, ModelProto, TensorTypeProto, TypeProto, ValueInfoProto};

/// Data about a residual block from its plan.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockFacts {
    /// The block's name.
    pub block: String,
    /// Factor on the residual branch before the sum: α times SkipInit's gain.
    pub scale: f64,
    /// Expected variance after the block.
    pub expected_variance: f64,
}

/// A session of a graph with its residual blocks as outputs.
#[derive(Debug)]
pub struct Exposed {
    network: String,
    backend: MapBackend,
    taps: Vec<Tap>,
    input: String,
}

#[derive(Debug)]
struct Tap {
    block: String,
    output: String,
    residual: String,
    facts: Option<BlockFacts>,
}

impl Exposed {
    /// Opens `onnx` with every residual block as an output. Ignores `facts` of blocks that the graph doesn't have.
    pub fn open(onnx: &[u8], network: &str, facts: &[BlockFacts]) -> Result<Self, SppError> {
        let not_onnx = |reason: String| SppError::NotOnnx { name: network.into(), reason };
        let mut model = ModelProto::decode(onnx).map_err(|e| not_onnx(e.to_string()))?;
        let graph = model.graph.as_mut().ok_or_else(|| not_onnx("there is no graph in it".into()))?;
        let input = graph.input.first().ok_or_else(|| not_onnx("it has no input".into()))?.name.clone();
        let taps = taps(graph, facts);
        if taps.is_empty() {
            return Err(SppError::NoBlocks(network.into()));
        }
        let element = if graph.initializer.iter().any(|t| t.data_type == FLOAT16) { FLOAT16 } else { FLOAT };
        for name in taps.iter().flat_map(|t| [&t.output, &t.residual]) {
            if !graph.output.iter().any(|o| o.name == *name) {
                let tensor = TensorTypeProto { elem_type: element, shape: None };
                let r#type = Some(TypeProto { tensor_type: Some(tensor) });
                graph.output.push(ValueInfoProto { name: name.clone(), r#type });
            }
        }
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let options = EngineOptions { intra_threads: threads, ..EngineOptions::default() };
        let backend = MapBackend::open(&model.encode_to_vec(), network, &options)?;
        Ok(Self { network: network.into(), backend, taps, input })
    }

    /// Statistics over all `batches`, run one by one. `input` describes them.
    pub fn profile<'a>(&mut self, input: &str, batches: impl Iterator<Item = &'a Batch>) -> Result<Profile, SppError> {
        let started = Instant::now();
        let mut moments: Vec<[ChannelMoments; 2]> = self.taps.iter().map(|_| Default::default()).collect();
        let (mut images, mut size, mut finite) = (0, (0, 0), true);
        for batch in batches {
            let shape = [batch.images, 3, batch.height, batch.width];
            let view = MapView { name: &self.input, shape, data: &batch.data };
            self.backend.run(&[view], |map| {
                for (tap, [output, residual]) in self.taps.iter().zip(&mut moments) {
                    if map.name == tap.output {
                        output.add(map.shape, map.data);
                    }
                    if map.name == tap.residual {
                        residual.add(map.shape, map.data);
                    }
                }
                if map.name == OUTPUT {
                    finite &= map.data.iter().all(|v| v.is_finite());
                }
            })?;
            images += batch.images;
            size = (batch.height, batch.width);
        }
        let signal = |(tap, [output, residual]): (&Tap, &[ChannelMoments; 2])| {
            let scale = tap.facts.as_ref().map_or(1.0, |f| f.scale);
            let mut signal = Signal::new(&tap.block, output, (scale != 0.0).then_some((residual, scale)));
            signal.expected_variance = tap.facts.as_ref().map(|f| f.expected_variance);
            signal
        };
        let mut blocks: Vec<Signal> = self.taps.iter().zip(&moments).map(signal).collect();
        mark_stages(&mut blocks);
        Ok(Profile {
            network: self.network.clone(),
            input: input.into(),
            images,
            size,
            blocks,
            finite_logits: Some(finite),
            seconds: started.elapsed().as_secs_f64(),
        })
    }
}

/// All residual sums, in the graph's order.
fn taps(graph: &GraphProto, facts: &[BlockFacts]) -> Vec<Tap> {
    // an unfolded graph also has sums in the computation of weights
    let sums = graph.node.iter().filter(|n| n.op_type == "Add" && !n.name.contains(".weight"));
    sums.filter_map(|node| {
        let (output, residual) = (node.output.first()?, node.input.first()?);
        let block = node.name.strip_suffix(".sum").unwrap_or(&node.name);
        let facts = facts.iter().find(|f| f.block == block).cloned();
        Some(Tap { block: block.into(), output: output.clone(), residual: residual.clone(), facts })
    })
    .collect()
}
