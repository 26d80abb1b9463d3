//! Graphs for kernels that take channels by blocks: padded to them, and laid out in them.

use bytes::Bytes;
use prost::Message as _;

use super::blocked_layout::lay_out;
use super::channel_padding::pad_channels;
use super::detached_weights::{Detached, detach_weights};
use crate::pb::onnx::ModelProto;

/// A graph in blocks.
#[derive(Debug)]
pub struct InBlocks {
    /// The graph, its large weights apart.
    pub graph: Detached,
    /// Whether it is [laid out](lay_out) too: nothing is left for the runtime to rewrite.
    pub laid_out: bool,
}

/// [Pads](pad_channels) a graph to blocks of so many channels and, if `lays_out`, lays it out in them where that can be.
/// Weights of `from` bytes and more are taken apart. `None` where nothing of this would change it.
pub fn in_blocks(onnx: Bytes, block: usize, lays_out: bool, from: usize) -> Option<InBlocks> {
    let padded = pad_channels(onnx.clone(), block);
    let changed = padded.is_some();
    let mut model = padded.or_else(|| ModelProto::decode(onnx).ok())?;
    let filters = if lays_out { lay_out(&mut model, block) } else { None };
    let laid_out = filters.is_some();
    (changed || laid_out).then_some(())?;
    Some(InBlocks { graph: detach_weights(model, &filters.unwrap_or_default(), from)?, laid_out })
}
