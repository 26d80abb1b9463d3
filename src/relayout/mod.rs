//! An ONNX graph rewritten for this processor, in memory only: padded to the blocks of channels that the kernels process, and
//! laid out in them. Files stay as they were folded.
//!
//! Knows nothing of sessions; `engine` opens what comes out.

pub mod blocked_layout;
pub mod channel_padding;
pub mod detached_weights;
mod fusions;
pub mod sample;
mod side_outputs;

use bytes::Bytes;
use prost::Message as _;

use self::blocked_layout::lay_out;
use self::channel_padding::pad_channels;
use self::detached_weights::{Detached, detach_weights};
use crate::kernels::{DOMAIN, GROUPED_CONV};
use crate::pb::onnx::ModelProto;

/// A graph in blocks.
#[derive(Debug)]
pub struct InBlocks {
    /// The graph, its large weights apart.
    pub graph: Detached,
    /// Whether it is [laid out](lay_out) too: nothing is left for the runtime to rewrite.
    pub laid_out: bool,
}

/// Whose kernels a graph is written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernels {
    /// [Ours](crate::kernels) where they pay, else ONNX Runtime's.
    Own,
    /// ONNX Runtime's.
    Runtime,
}

/// [Pads](pad_channels) a graph to blocks of so many channels and, if `lays_out`, lays it out in them for these kernels where
/// that can be. Weights of `from` bytes and more are taken apart. `None` where nothing of this would change it.
pub fn in_blocks(onnx: Bytes, block: usize, lays_out: Option<Kernels>, from: usize) -> Option<InBlocks> {
    if lays_out == Some(Kernels::Own) {
        // groups that aren't merged are for our kernels alone
        let mut model = match pad_channels(onnx.clone(), block, Kernels::Own) {
            Some(padded) => padded,
            None => ModelProto::decode(onnx.clone()).ok()?,
        };
        // without convolutions in groups ONNX Runtime's own are as fast, and write activations in place
        let filters = lay_out(&mut model, block, Kernels::Own).filter(|_| has_grouped_conv(&model));
        if let Some(filters) = filters {
            return Some(InBlocks { graph: detach_weights(model, &filters, from)?, laid_out: true });
        }
    }
    let padded = pad_channels(onnx.clone(), block, Kernels::Runtime);
    let changed = padded.is_some();
    let mut model = padded.or_else(|| ModelProto::decode(onnx).ok())?;
    let filters = if lays_out.is_some() { lay_out(&mut model, block, Kernels::Runtime) } else { None };
    let laid_out = filters.is_some();
    if !changed && !laid_out {
        return None;
    }
    Some(InBlocks { graph: detach_weights(model, &filters.unwrap_or_default(), from)?, laid_out })
}

fn has_grouped_conv(model: &ModelProto) -> bool {
    let nodes = model.graph.iter().flat_map(|graph| &graph.node);
    nodes.into_iter().any(|node| node.domain == DOMAIN && node.op_type == GROUPED_CONV)
}
