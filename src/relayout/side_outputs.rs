//! Outputs beside the logits, and the operators that only they need: taken off a graph before it is rewritten, and put back
//! after, reading what has become of the values that they read. So they cost the rewritten graph nothing but themselves.

use std::collections::HashSet;

use crate::graph::{int, integers};
use crate::pb::onnx::{AttributeProto, GraphProto, NodeProto, ValueInfoProto};

/// ONNX Runtime's domain of operators on maps in blocks.
pub(super) const BLOCKED: &str = "com.microsoft.nchwc";

/// What a graph has beside the way to its first output.
#[derive(Debug)]
pub(super) struct SideOutputs {
    outputs: Vec<ValueInfoProto>,
    nodes: Vec<NodeProto>,
}

/// What has become of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Became {
    /// Its channels are padded: these are its own.
    Padded(usize),
    /// It lies in blocks, of so many channels.
    InBlocks(usize),
}

impl SideOutputs {
    /// Takes them off a graph whose operators come after what they read.
    pub(super) fn take(graph: &mut GraphProto) -> Self {
        if graph.output.len() < 2 {
            return Self { outputs: Vec::new(), nodes: Vec::new() };
        }
        let outputs = graph.output.split_off(1);
        let mut needed: HashSet<&str> = graph.output.iter().map(|value| value.name.as_str()).collect();
        let mut main = vec![false; graph.node.len()];
        for (node, main) in graph.node.iter().zip(&mut main).rev() {
            if node.output.iter().any(|output| needed.contains(output.as_str())) {
                *main = true;
                needed.extend(node.input.iter().map(String::as_str));
            }
        }
        let (mut kept, mut nodes) = (Vec::with_capacity(main.len()), Vec::new());
        for (node, main) in std::mem::take(&mut graph.node).into_iter().zip(main) {
            if main { kept.push(node) } else { nodes.push(node) }
        }
        graph.node = kept;
        Self { outputs, nodes }
    }

    /// Puts them back; `became` says of a value by its name what has become of it, if anything has.
    pub(super) fn put_back(self, graph: &mut GraphProto, became: impl Fn(&str) -> Option<Became>) {
        let own: HashSet<&str> = self.nodes.iter().flat_map(|node| &node.output).map(String::as_str).collect();
        let read = self.nodes.iter().flat_map(|node| &node.input).chain(self.outputs.iter().map(|value| &value.name));
        let mut read: Vec<String> = read.filter(|name| !own.contains(name.as_str())).cloned().collect();
        read.sort_unstable();
        read.dedup();
        for name in read {
            let Some(became) = became(&name) else { continue };
            let there = format!("{name}.there");
            let values = graph.node.iter_mut().flat_map(|node| node.input.iter_mut().chain(&mut node.output));
            let described = graph.value_info.iter_mut().map(|value| &mut value.name);
            values.chain(described).filter(|value| **value == name).for_each(|value| value.clone_from(&there));
            let back = match became {
                Became::InBlocks(channels) => {
                    reordering("ReorderOutput", there, name, vec![int("channels", channels as i64)])
                }
                Became::Padded(channels) => {
                    let mut input = vec![there.clone()];
                    for (what, value) in [("starts", 0), ("ends", channels as i64), ("axes", 1)] {
                        let tensor = integers(&format!("{there}.{what}"), &[value]);
                        input.push(tensor.name.clone());
                        graph.initializer.push(tensor);
                    }
                    let (op_type, output) = ("Slice".into(), vec![name]);
                    NodeProto { name: there, op_type, input, output, ..NodeProto::default() }
                }
            };
            graph.node.push(back);
        }
        graph.node.extend(self.nodes);
        graph.output.extend(self.outputs);
    }
}

/// An operator that moves a map into blocks, or out of them.
pub(super) fn reordering(op: &str, input: String, output: String, attribute: Vec<AttributeProto>) -> NodeProto {
    let (input, output) = (vec![input], vec![output]);
    NodeProto { input, output, name: String::new(), op_type: op.into(), attribute, domain: BLOCKED.into() }
}
