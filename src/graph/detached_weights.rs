//! A graph and its large weights apart, so that they reach a runtime without being written and parsed once more.

use prost::Message as _;

use crate::pb::onnx::{DataLocation, ModelProto, StringStringEntryProto, TensorProto};

/// A graph whose large single-precision weights are not in its bytes.
#[derive(Debug)]
pub struct Detached {
    /// The graph as ONNX; it says of the weights beside it that they are external.
    pub onnx: Vec<u8>,
    /// What has to come with it.
    pub weights: Vec<Weight>,
}

/// A single-precision weight.
#[derive(Debug)]
pub struct Weight {
    /// Its name in the graph.
    pub name: String,
    /// Its shape.
    pub dims: Vec<i64>,
    /// Its values, row-major.
    pub data: Vec<f32>,
}

/// Takes weights of `from` bytes and more out of the graph.
pub fn detach_weights(mut model: ModelProto, from: usize) -> Detached {
    let tensors = model.graph.as_mut().map_or(&mut [][..], |graph| &mut graph.initializer);
    let weights = tensors.iter_mut().filter_map(|tensor| {
        let data = take_data(tensor, from)?;
        Some(Weight { name: tensor.name.clone(), dims: tensor.dims.clone(), data })
    });
    Detached { weights: weights.collect(), onnx: model.encode_to_vec() }
}

fn take_data(tensor: &mut TensorProto, from: usize) -> Option<Vec<f32>> {
    if tensor.data_type != 1 || (tensor.raw_data.len() < from && tensor.float_data.len() * 4 < from) {
        return None;
    }
    let mut data = std::mem::take(&mut tensor.float_data);
    if data.is_empty() {
        let (values, _) = tensor.raw_data.as_chunks();
        data = values.iter().map(|value| f32::from_le_bytes(*value)).collect();
        tensor.raw_data.clear();
    }
    tensor.data_location = DataLocation::External.into();
    // a file has to be named, but nothing is ever read from there
    tensor.external_data = vec![StringStringEntryProto { key: "location".into(), value: "memory".into() }];
    Some(data)
}
