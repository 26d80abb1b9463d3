//! What half precision does to a graph, on machines whose kernels compute halves in single precision: every weight and every
//! map is rounded to half and back, and each map's largest magnitude becomes an output.

use half::f16;
use prost::Message as _;

use super::{FLOAT, FLOAT16, GraphError, int, typed};
use crate::pb::onnx::{ModelProto, NodeProto};

/// The largest magnitude that half precision holds.
pub const LARGEST: f64 = 65_504.0;
/// What the name of an output with a map's largest magnitude ends with.
pub const PEAK: &str = ".peak";

/// A single-precision graph as half precision would compute it: its logits, and for every map `NAME` an output `NAME.peak`.
/// Fails on bytes that are no graph.
pub fn emulate(onnx: &[u8]) -> Result<Vec<u8>, GraphError> {
    rounded(onnx).ok_or(GraphError::Unreadable)
}

fn rounded(onnx: &[u8]) -> Option<Vec<u8>> {
    let mut model = ModelProto::decode(onnx).ok()?;
    let graph = model.graph.as_mut()?;
    for tensor in graph.initializer.iter_mut().filter(|t| t.data_type == FLOAT && !t.name.ends_with(".scales")) {
        let (values, []) = tensor.raw_data.as_chunks() else { return None };
        let rounded = values.iter().flat_map(|v| f16::from_f32(f32::from_le_bytes(*v)).to_f32().to_le_bytes());
        tensor.raw_data = rounded.collect::<Vec<u8>>().into();
    }
    let input = graph.input.first()?.name.clone();
    let rounded_input = format!("{input}.rounded");
    let mut nodes = Vec::with_capacity(graph.node.len() * 5);
    round(&mut nodes, &input, &rounded_input);
    for mut node in std::mem::take(&mut graph.node) {
        for name in node.input.iter_mut().filter(|name| **name == input) {
            name.clone_from(&rounded_input);
        }
        // these hand on what they get
        if matches!(node.op_type.as_str(), "Cast" | "Reshape" | "Flatten" | "Resize" | "MaxPool") {
            nodes.push(node);
            continue;
        }
        let name = node.output.first()?.clone();
        let exact = format!("{name}.exact");
        (node.name, node.output) = (exact.clone(), vec![exact.clone()]);
        nodes.push(node);
        round(&mut nodes, &exact, &name);
        let (magnitude, peak) = (format!("{name}.magnitude"), format!("{name}{PEAK}"));
        nodes.push(plain("Abs", &exact, &magnitude));
        let mut largest = plain("ReduceMax", &magnitude, &peak);
        largest.attribute = vec![int("keepdims", 0)];
        nodes.push(largest);
        graph.output.push(typed(&peak, FLOAT, &[]));
    }
    graph.node = nodes;
    Some(model.encode_to_vec())
}

/// `from`, rounded to half precision, as `to`.
fn round(nodes: &mut Vec<NodeProto>, from: &str, to: &str) {
    let half = format!("{to}.half");
    for (from, to, element) in [(from, half.as_str(), FLOAT16), (half.as_str(), to, FLOAT)] {
        let mut cast = plain("Cast", from, to);
        cast.attribute = vec![int("to", element.into())];
        nodes.push(cast);
    }
}

fn plain(op: &str, from: &str, to: &str) -> NodeProto {
    NodeProto {
        input: vec![from.into()],
        output: vec![to.into()],
        name: to.into(),
        op_type: op.into(),
        attribute: Vec::new(),
        domain: String::new(),
    }
}
