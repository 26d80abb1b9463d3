//! A graph made ready for the machine it runs on, before sessions are opened on it.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use ndarray::{Array, Axis, Slice};
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::value::{DynValue, Tensor};

use super::{Backend as _, Batch, EngineOptions, LARGE, OrtBackend, environment};
use crate::int8::network::Network;
use crate::int8::{Int8Error, lowering};
use crate::kernels::int8::processor::Processor as Integers;
use crate::kernels::processor::Processor;
use crate::relayout::detached_weights::Weight;
use crate::relayout::sample;
use crate::relayout::{Kernels, in_blocks};

/// A graph, and its large weights if they were made in memory: sessions use those in place, since writing them into the
/// graph's bytes and parsing those would take longer than all else that a load does.
#[derive(Debug)]
pub struct Fitted {
    onnx: Vec<u8>,
    weights: Vec<(String, Arc<DynValue>)>,
    laid_out: bool,
    /// The network of integers that the graph's one operator is; or why the graph, which is one, can't be run as that.
    network: Option<Result<Arc<Network>, Int8Error>>,
}

impl Fitted {
    /// The graph as this machine's CPU runs it fastest with these kernels: padded to whole [blocks](channel_block) and laid out
    /// in them, as far as that can be. A graph with quantised maps becomes a network of integers.
    pub fn for_this_cpu(onnx: Vec<u8>, kernels: Kernels) -> Self {
        let onnx = Bytes::from(onnx);
        if let Some(network) = lowering::lower_if_quantised(&onnx) {
            return Self::of_integers(network);
        }
        let Some(block) = channel_block() else { return Self::as_it_is(onnx.into()) };
        let lays_out = if environment().is_ok() { takes_layout(block, kernels) } else { None };
        Self::fit(onnx.clone(), block, lays_out).unwrap_or_else(|| Self::as_it_is(onnx.into()))
    }

    /// The graph as it was written.
    pub fn as_it_is(onnx: Vec<u8>) -> Self {
        Self { onnx, weights: Vec::new(), laid_out: false, network: None }
    }

    /// A network of integers as the one operator of a graph.
    fn of_integers(network: Result<Network, Int8Error>) -> Self {
        let network = network.map(Arc::new);
        let onnx = network.as_ref().map_or(Vec::new(), |network| lowering::one_operator(network));
        Self { network: Some(network), ..Self::as_it_is(onnx) }
    }

    /// Bytes that all sessions share: the graph's and those of its weights.
    pub fn bytes(&self) -> usize {
        let lent = |(_, value): &(String, Arc<DynValue>)| {
            value.try_extract_tensor::<f32>().map_or(0, |(_, values)| size_of_val(values))
        };
        let integers = self.network.as_ref().and_then(|network| network.as_ref().ok());
        self.onnx.len() + self.weights.iter().map(lent).sum::<usize>() + integers.map_or(0, |network| network.weights())
    }

    /// The network of integers that the graph's operator is, if it is one; or why it can't be run.
    pub(super) fn network(&self) -> Result<Option<&Arc<Network>>, &Int8Error> {
        self.network.as_ref().map(Result::as_ref).transpose()
    }

    /// The graph padded to blocks of so many channels, which need not be this CPU's; `None` where that does nothing.
    pub fn padded(onnx: Bytes, block: usize) -> Option<Self> {
        Self::fit(onnx, block, None)
    }

    /// Whether it is laid out in this CPU's blocks, so that ONNX Runtime rewrites nothing.
    pub fn is_laid_out(&self) -> bool {
        self.laid_out
    }

    fn fit(onnx: Bytes, block: usize, lays_out: Option<Kernels>) -> Option<Self> {
        // values can be made once ONNX Runtime is loaded
        environment().ok()?;
        let blocks = in_blocks(onnx, block, lays_out, LARGE)?;
        let weights = blocks.graph.weights.into_iter().map(value).collect::<Option<_>>()?;
        Some(Self { weights, laid_out: blocks.laid_out, ..Self::as_it_is(blocks.graph.onnx) })
    }

    pub(super) fn onnx(&self) -> &[u8] {
        &self.onnx
    }

    /// How much ONNX Runtime has to rewrite the graph.
    pub(super) fn level(&self) -> GraphOptimizationLevel {
        if self.laid_out || self.network.is_some() {
            GraphOptimizationLevel::Disable
        } else {
            GraphOptimizationLevel::All
        }
    }

    /// Gives a session the weights that aren't in [`onnx`](Self::onnx).
    pub(super) fn lend_weights(&self, mut builder: SessionBuilder) -> ort::Result<SessionBuilder> {
        for (name, value) in &self.weights {
            // what the graph refers to: copied by ONNX Runtime, freed once the session is open
            builder = builder.with_external_initializer(name, value.clone())?;
            if self.laid_out {
                // what the session uses instead of a copy, shared by all sessions of this graph
                builder = builder.with_initializer(name, value.clone())?;
            }
        }
        Ok(builder)
    }
}

/// A weight as a value of ONNX Runtime, which stays where it is.
fn value(weight: Weight) -> Option<(String, Arc<DynValue>)> {
    let mut values = Array::from_vec(weight.memory);
    values.slice_axis_inplace(Axis(0), Slice::from(weight.start..));
    let values = values.into_shape_with_order(weight.dims).ok()?;
    Some((weight.name, Arc::new(Tensor::from_array(values).ok()?.into_dyn())))
}

/// Channels per block in the kernels of this processor, [ours](crate::kernels) and ONNX Runtime's alike: 16 with AVX-512, 8
/// with AVX2. `None` on other processors: graphs run there as they were folded.
pub fn channel_block() -> Option<usize> {
    Processor::here().map(Processor::block)
}

/// The integer kernels of this processor, and whether they multiply bytes four at a time: others gain little on single precision.
pub fn integer_kernels() -> (&'static str, bool) {
    match Integers::here() {
        Integers::Portable => ("portable", false),
        Integers::Avx2 => ("AVX2", false),
        Integers::AvxVnni => ("AVX-VNNI", true),
        Integers::Avx512Vnni => ("AVX-512 VNNI", true),
        Integers::Amx => ("AMX", true),
    }
}

/// For whose kernels, of these or else of ONNX Runtime's, graphs can be [laid out](crate::relayout::blocked_layout) in this
/// CPU's blocks: seen once.
fn takes_layout(block: usize, kernels: Kernels) -> Option<Kernels> {
    static RUNTIME: OnceLock<bool> = OnceLock::new();
    static OWN: OnceLock<bool> = OnceLock::new();
    let runtime = *RUNTIME.get_or_init(|| {
        let takes = try_layout(block, Kernels::Runtime) == Some(true);
        if !takes {
            tracing::warn!(
                "ONNX Runtime does not take graphs laid out for it; it rewrites them itself, and models load slower"
            );
        }
        takes
    });
    let own = || {
        *OWN.get_or_init(|| {
            let takes = try_layout(block, Kernels::Own) == Some(true);
            if !takes {
                tracing::warn!(
                    "nfold's own kernels don't compute here what they should; ONNX Runtime's are used instead"
                );
            }
            takes
        })
    };
    match kernels {
        Kernels::Own if runtime && own() => Some(Kernels::Own),
        _ => runtime.then_some(Kernels::Runtime),
    }
}

/// Whether an image makes the same of a small graph with our layout as without. Blocks of another size, or operators that
/// mean something else by now, would make other logits. (Smaller blocks than meant divide ours: nothing is read past its end.)
fn try_layout(block: usize, kernels: Kernels) -> Option<bool> {
    let logits = |graph: Fitted| {
        let (side, data) = (sample::SIDE, sample::image());
        let mut backend = OrtBackend::open_fitted(&graph, "layout sample", &EngineOptions::default()).ok()?;
        Some(backend.run(&Batch { images: 1, height: side, width: side, data }).ok()?.data)
    };
    let onnx = sample::sample(block, kernels).ok()?;
    let ours = logits(Fitted::fit(onnx.clone().into(), block, Some(kernels)).filter(Fitted::is_laid_out)?)?;
    let theirs = logits(Fitted::as_it_is(onnx))?;
    Some(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-5))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_begin_where_their_weights_do() {
        environment().expect("ONNX Runtime");
        let weight =
            Weight { name: "w".into(), dims: vec![2, 3], memory: (0..9).map(|v| v as f32).collect(), start: 3 };
        let pointer = weight.values().as_ptr();
        let (name, value) = value(weight).expect("a value");
        let (shape, values) = value.try_extract_tensor::<f32>().expect("single precision");
        assert_eq!((name.as_str(), &shape[..], values), ("w", &[2, 3][..], &[3.0, 4.0, 5.0, 6.0, 7.0, 8.0][..]));
        assert_eq!(values.as_ptr(), pointer, "copied");
    }

    #[test]
    fn blocks_of_another_size_are_noticed() {
        let Some(block) = channel_block() else {
            println!("SKIPPED: without AVX2 nothing is laid out");
            return;
        };
        for kernels in [Kernels::Runtime, Kernels::Own] {
            assert_eq!(try_layout(block, kernels), Some(true), "{kernels:?}");
        }
        // not half of it: channels that are no whole blocks would be read and written past their end
        assert_eq!(try_layout(2 * block, Kernels::Runtime), Some(false));
    }
}
