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
use crate::kernels::activation::Activation;
use crate::kernels::{DOMAIN, EXPAND_CONV, GROUPED_CONV};
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
        let filters = lay_out(&mut model, block, Kernels::Own).filter(|_| pay(&model));
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

/// Whether our kernels are faster than ONNX Runtime's: for convolutions in small groups, and for activations that it computes
/// in passes of their own. With nothing but ReLU it is as fast or faster.
fn pay(model: &ModelProto) -> bool {
    let slow = [Activation::Silu, Activation::Gelu].map(Activation::name);
    let nodes = model.graph.iter().flat_map(|graph| &graph.node).filter(|node| node.domain == DOMAIN);
    nodes.into_iter().any(|node| {
        let fused = node.attribute.iter().any(|a| slow.iter().any(|name| a.s == name.as_bytes()));
        fused || [GROUPED_CONV, EXPAND_CONV].contains(&node.op_type.as_str())
    })
}
