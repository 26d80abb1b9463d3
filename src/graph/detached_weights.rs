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

/// Takes weights that are in `float_data`, of `from` bytes and more, out of the graph.
pub fn detach_weights(mut model: ModelProto, from: usize) -> Detached {
    let tensors = model.graph.as_mut().map_or(&mut [][..], |graph| &mut graph.initializer);
    let large = tensors.iter_mut().filter(|t| !t.float_data.is_empty() && size_of_val(t.float_data.as_slice()) >= from);
    let detach = |tensor: &mut TensorProto| {
        tensor.data_location = DataLocation::External.into();
        // a file has to be named, but nothing is ever read from there
        tensor.external_data = vec![StringStringEntryProto { key: "location".into(), value: "memory".into() }];
        let data = std::mem::take(&mut tensor.float_data);
        Weight { name: tensor.name.clone(), dims: tensor.dims.clone(), data }
    };
    Detached { weights: large.map(detach).collect(), onnx: model.encode_to_vec() }
}
