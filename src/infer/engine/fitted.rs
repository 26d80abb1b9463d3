//! A graph made ready for the machine it runs on, before sessions are opened on it.

use std::sync::Arc;

use bytes::Bytes;
use ort::session::builder::SessionBuilder;
use ort::value::{DynValue, Tensor};

use super::{LARGE, configure, environment};
use crate::graph::channel_padding::pad_channels;
use crate::graph::detached_weights::{Weight, detach_weights};

/// A graph, and its large weights if they were made in memory: sessions take those as they are and share them, since writing
/// them into the graph's bytes and parsing those would take longer than all else that a load does.
#[derive(Debug)]
pub struct Fitted {
    onnx: Vec<u8>,
    weights: Vec<(String, Arc<DynValue>)>,
}

impl Fitted {
    /// The graph as this machine's CPU runs it fastest: with its channels padded to whole [blocks](channel_block), or as it is.
    pub fn for_this_cpu(onnx: Vec<u8>) -> Self {
        let Some(block) = channel_block() else { return Self::as_it_is(onnx) };
        let onnx = Bytes::from(onnx);
        Self::in_blocks(onnx.clone(), block).unwrap_or_else(|| Self::as_it_is(onnx.into()))
    }

    /// The graph as it was written.
    pub fn as_it_is(onnx: Vec<u8>) -> Self {
        Self { onnx, weights: Vec::new() }
    }

    /// The graph with its channels [padded](pad_channels) to whole blocks; `None` where that does nothing.
    pub fn in_blocks(onnx: Bytes, block: usize) -> Option<Self> {
        // values can be made once ONNX Runtime is loaded
        environment().ok()?;
        let graph = detach_weights(pad_channels(onnx, block)?, LARGE);
        let share = |weight: Weight| {
            let value = Tensor::from_array((weight.dims, weight.data)).ok()?;
            Some((weight.name, Arc::new(value.into_dyn())))
        };
        Some(Self { onnx: graph.onnx, weights: graph.weights.into_iter().map(share).collect::<Option<_>>()? })
    }

    pub(super) fn onnx(&self) -> &[u8] {
        &self.onnx
    }

    /// Gives a session the weights that aren't in [`onnx`](Self::onnx).
    pub(super) fn lend_weights(&self, mut builder: SessionBuilder) -> ort::Result<SessionBuilder> {
        for (name, value) in &self.weights {
            builder = builder.with_external_initializer(name, value.clone())?;
        }
        match self.weights.is_empty() {
            true => Ok(builder),
            // in a graph of our own, one pass of the rewriting rules finds all that there is
            false => configure(builder, [("session.graph_optimizations_loop_level", "0")]),
        }
    }
}

/// Channels that this processor's kernels take at a time, where padding to them was measured to pay: with AVX-512.
pub fn channel_block() -> Option<usize> {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        return Some(16);
    }
    None
}
