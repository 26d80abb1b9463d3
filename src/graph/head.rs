//! Reads back the classifier of a graph that [`GraphBuilder`](super::GraphBuilder) wrote: what each class makes of the map that
//! is pooled.

use half::f16;
use prost::Message as _;

use super::{FLOAT, FLOAT16, INT8};
use crate::model::MAP;
use crate::pb::onnx::{GraphProto, ModelProto, NodeProto, TensorProto};

/// A classifier that reads the mean of each channel of a map.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// `[classes, channels]`, of the output `map` as the graph gives it.
    pub weights: Vec<f32>,
    /// Channels of the map.
    pub channels: usize,
}

/// The classifier of a graph with the output `map`; the error says why it is none of that kind.
pub fn read(onnx: &[u8]) -> Result<Head, &'static str> {
    const UNKNOWN: &str = "its classifier can't be read back";
    let graph = ModelProto::decode(onnx).ok().and_then(|model| model.graph).ok_or(UNKNOWN)?;
    let made = |name: &str| graph.node.iter().find(|node| node.output.iter().any(|output| output == name));
    let maker = |name: &str| {
        let mut node = made(name)?;
        // a quantised map is the map
        for operator in ["DequantizeLinear", "QuantizeLinear"] {
            if node.op_type == operator {
                node = made(node.input.first()?)?;
            }
        }
        Some(node)
    };
    let mut gemms = graph.node.iter().filter(|node| node.op_type == "Gemm");
    let (Some(gemm), None) = (gemms.next(), gemms.next()) else {
        return Err("its classifier reads maxima beside means");
    };
    let of = |node: &NodeProto, op: &str| {
        node.input.first().and_then(|name| maker(name)).filter(|node| node.op_type == op).cloned()
    };
    let pool = of(gemm, "Flatten").and_then(|flat| flat.input.first().and_then(|name| maker(name)).cloned());
    match pool.as_ref().map(|node| node.op_type.as_str()) {
        Some("GlobalAveragePool") => {}
        Some("GlobalMaxPool" | "Add") => return Err("it pools by maxima"),
        _ => return Err(UNKNOWN),
    }
    let name = gemm.input.get(1).ok_or(UNKNOWN)?;
    let (weight, scales) = match constant(&graph, name) {
        Some(weight) => (weight, None),
        None => quantised(&graph, name).map(|(weight, scales)| (weight, Some(scales))).ok_or(UNKNOWN)?,
    };
    let (mut weights, &[_, channels]) = (values(weight).ok_or(UNKNOWN)?, weight.dims.as_slice()) else {
        return Err(UNKNOWN);
    };
    if let Some(scales) = scales.filter(|scales| !scales.is_empty()) {
        let row = weights.len().div_ceil(scales.len()).max(1);
        weights.chunks_mut(row).zip(scales).for_each(|(row, scale)| row.iter_mut().for_each(|weight| *weight *= scale));
    }
    let channels =
        usize::try_from(channels).ok().filter(|&n| n > 0 && weights.len().is_multiple_of(n)).ok_or(UNKNOWN)?;
    // the weights read the map without the gain that the output has
    let factor = maker(MAP).filter(|node| node.op_type == "Mul").and_then(|node| constant(&graph, node.input.get(1)?));
    if let Some(&factor) = factor.and_then(values).as_ref().and_then(|factor| factor.first()) {
        weights.iter_mut().for_each(|weight| *weight = (f64::from(*weight) / f64::from(factor)) as f32);
    }
    Ok(Head { weights, channels })
}

fn constant<'a>(graph: &'a GraphProto, name: &str) -> Option<&'a TensorProto> {
    graph.initializer.iter().find(|tensor| tensor.name == name)
}

/// Integers, and their scales by row, that a weight was made of.
fn quantised<'a>(graph: &'a GraphProto, name: &str) -> Option<(&'a TensorProto, Vec<f32>)> {
    let node = graph.node.iter().find(|node| node.output.first().is_some_and(|output| output == name))?;
    let node = Some(node).filter(|node| node.op_type == "DequantizeLinear")?;
    Some((constant(graph, node.input.first()?)?, values(constant(graph, node.input.get(1)?)?)?))
}

fn values(tensor: &TensorProto) -> Option<Vec<f32>> {
    match tensor.data_type {
        FLOAT => {
            let (values, []) = tensor.raw_data.as_chunks() else { return None };
            Some(values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
        }
        INT8 => Some(tensor.raw_data.iter().map(|&byte| f32::from(byte as i8)).collect()),
        FLOAT16 => {
            let (values, []) = tensor.raw_data.as_chunks() else { return None };
            Some(values.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect())
        }
        _ => None,
    }
}
