//! Separates a graph from its large weights, so that these reach a runtime without being serialised and parsed again,
//! and all its sessions can share them.

use prost::Message as _;

use super::blocked_layout::Filters;
use crate::graph::FLOAT;
use crate::pb::onnx::{DataLocation, ModelProto, StringStringEntryProto, TensorProto};

/// Bytes of a cache line.
const LINE: usize = 64;

/// A graph whose large single-precision weights are not in its bytes.
#[derive(Debug)]
pub struct Detached {
    /// The graph as ONNX, which declares the separate weights as external data.
    pub onnx: Vec<u8>,
    /// The separate weights.
    pub weights: Vec<Weight>,
}

/// A single-precision weight, row-major, aligned to cache lines: kernels read it by whole lines, and are two to three
/// per cent slower if each read straddles two.
#[derive(Debug)]
pub struct Weight {
    /// Name in the graph.
    pub name: String,
    /// Its shape.
    pub dims: Vec<usize>,
    /// Memory whose last part is the values.
    pub memory: Vec<f32>,
    /// Index in `memory` of the first value.
    pub start: usize,
}

/// Separates single-precision weights of `from` bytes and more from the graph, and rearranges those that have a filter
/// for its layout. `None` if a weight isn't as large as its shape says.
pub fn detach_weights(mut model: ModelProto, filters: &Filters, from: usize) -> Option<Detached> {
    let mut weights = Vec::new();
    let tensors = model.graph.as_mut().map_or(&mut [][..], |graph| &mut graph.initializer);
    for tensor in tensors.iter_mut().filter(|t| t.data_type == FLOAT) {
        let count = tensor.float_data.len() + tensor.raw_data.len() / size_of::<f32>();
        let large = count * size_of::<f32>() >= from;
        if large || filters.contains_key(&tensor.name) {
            let weight = Weight::read(tensor, filters, count)?;
            // freed here, so that the next weight can reuse the memory
            (tensor.raw_data, tensor.float_data) = Default::default();
            if large {
                tensor.data_location = DataLocation::External.into();
                // a location is required, but nothing is read from it
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
    /// Values of the weight.
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
