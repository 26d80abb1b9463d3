//! A graph and its large weights apart, so that they reach a runtime without being written and parsed once more, and all its
//! sessions can use the same.

use prost::Message as _;

use super::blocked_layout::Filters;
use crate::graph::FLOAT;
use crate::pb::onnx::{DataLocation, ModelProto, StringStringEntryProto, TensorProto};

/// Bytes of a cache line.
const LINE: usize = 64;

/// A graph whose large single-precision weights are not in its bytes.
#[derive(Debug)]
pub struct Detached {
    /// The graph as ONNX; it says of the weights beside it that they are external.
    pub onnx: Vec<u8>,
    /// What has to come with it.
    pub weights: Vec<Weight>,
}

/// A single-precision weight, row-major, at whole cache lines: kernels read it by those, and two to three per cent more
/// slowly where each straddles two.
#[derive(Debug)]
pub struct Weight {
    /// Its name in the graph.
    pub name: String,
    /// Its shape.
    pub dims: Vec<usize>,
    /// Memory that ends with its values.
    pub memory: Vec<f32>,
    /// Where in this memory its values begin.
    pub start: usize,
}

/// Takes single-precision weights of `from` bytes and more out of the graph, and moves those that have a filter to where its
/// layout wants them. `None` for a graph whose weights aren't as large as their shapes say.
pub fn detach_weights(mut model: ModelProto, filters: &Filters, from: usize) -> Option<Detached> {
    let mut weights = Vec::new();
    let tensors = model.graph.as_mut().map_or(&mut [][..], |graph| &mut graph.initializer);
    for tensor in tensors.iter_mut().filter(|t| t.data_type == FLOAT) {
        let count = tensor.float_data.len() + tensor.raw_data.len() / size_of::<f32>();
        let large = count * size_of::<f32>() >= from;
        if large || filters.contains_key(&tensor.name) {
            let weight = Weight::read(tensor, filters, count)?;
            // let go, for the next to use the same memory
            (tensor.raw_data, tensor.float_data) = Default::default();
            if large {
                tensor.data_location = DataLocation::External.into();
                // a file has to be named, but nothing is ever read from there
                tensor.external_data = vec![StringStringEntryProto { key: "location".into(), value: "memory".into() }];
                weights.push(weight);
            } else {
                tensor.float_data = weight.values().to_vec();
            }
        }
    }
    Some(Detached { onnx: model.encode_to_vec(), weights })
}

impl Weight {
    /// Its values.
    pub fn values(&self) -> &[f32] {
        self.memory.get(self.start..).unwrap_or_default()
    }

    fn read(tensor: &TensorProto, filters: &Filters, count: usize) -> Option<Self> {
        let dims = tensor.dims.iter().map(|&d| usize::try_from(d).ok()).collect::<Option<Vec<_>>>()?;
        let mut memory: Vec<f32> = Vec::with_capacity(count + LINE / size_of::<f32>());
        let start = memory.as_ptr().align_offset(LINE).min(LINE / size_of::<f32>());
        memory.resize(start, 0.0);
        let (raw, []) = tensor.raw_data.as_chunks() else { return None };
        let number = |v: [u8; 4]| f32::from_le_bytes(v);
        match (filters.get(&tensor.name), raw.is_empty()) {
            (Some(filter), true) => filter.side_by_side(&tensor.float_data, |v| v, &mut memory),
            (Some(filter), false) => filter.side_by_side(raw, number, &mut memory),
            (None, true) => memory.extend_from_slice(&tensor.float_data),
            (None, false) => memory.extend(raw.iter().map(|v| number(*v))),
        }
        let fits = dims.iter().try_fold(1, |all: usize, &d| all.checked_mul(d)) == Some(memory.len() - start);
        fits.then(|| Self { name: tensor.name.clone(), dims, memory, start })
    }
}
