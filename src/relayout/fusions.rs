//! What our own kernels do in a graph in blocks: convolutions in groups with the activations around them and the means of
//! their channels, gates with the activation behind them, and other activations in one pass.

use std::collections::HashMap;

use crate::graph::{int, ints, string};
use crate::kernels::activation::Activation;
use crate::kernels::grouped_conv::Groups;
use crate::kernels::{ACTIVATION, DOMAIN, GATED, GROUPED_CONV};
use crate::pb::onnx::{GraphProto, NodeProto};

/// A convolution of so grouped channels, as our operator. `None` where that isn't the same.
pub(super) fn grouped_conv(node: NodeProto, groups: Groups) -> Option<NodeProto> {
    let mut pads = [0; 4];
    let mut stride = 1;
    for attribute in &node.attribute {
        match (attribute.name.as_str(), attribute.ints.as_slice()) {
            ("group", _) | ("kernel_shape", _) => {}
            ("dilations", dilations) if dilations.iter().all(|&d| d == 1) => {}
            ("strides", &[height, width]) if height == width && matches!(height, 1 | 2) => stride = height,
            ("pads", &[top, left, bottom, right]) => {
                for (pad, side) in pads.iter_mut().zip([top, left, bottom, right]) {
                    *pad = usize::try_from(side).ok()?;
                }
            }
            ("auto_pad", _) if attribute.s == b"NOTSET" => {}
            _ => return None,
        }
    }
    let attribute = vec![
        int("channels_of_group", i64::try_from(groups.group).ok()?),
        int("kernel", i64::try_from(groups.kernel).ok()?),
        int("stride", stride),
        ints("pads", &pads),
    ];
    (node.input.len() == 3).then(|| ours(NodeProto { attribute, ..node }, GROUPED_CONV))
}

/// Puts our operators in the place of several of ONNX Runtime's.
pub(super) fn fuse(graph: &mut GraphProto) {
    let mut fusion = Fusion::read(graph);
    for i in 0..fusion.nodes.len() {
        fusion.convolution(i);
    }
    for i in 0..fusion.nodes.len() {
        fusion.gate(i);
    }
    for i in 0..fusion.nodes.len() {
        fusion.activation(i);
    }
    graph.node = fusion.nodes.into_iter().flatten().collect();
}

struct Fusion {
    /// The graph's operators; those that went into others left a gap.
    nodes: Vec<Option<NodeProto>>,
    /// Index of the operator that makes a map.
    makers: HashMap<String, usize>,
    /// Indices of the operators that read a map; what the graph hands out has one that there isn't.
    readers: HashMap<String, Vec<usize>>,
}

impl Fusion {
    fn read(graph: &mut GraphProto) -> Self {
        let nodes: Vec<_> = std::mem::take(&mut graph.node).into_iter().map(Some).collect();
        let (mut makers, mut readers) = (HashMap::new(), HashMap::<String, Vec<usize>>::new());
        for (i, node) in nodes.iter().enumerate().filter_map(|(i, node)| Some((i, node.as_ref()?))) {
            makers.extend(node.output.iter().map(|name| (name.clone(), i)));
            node.input.iter().for_each(|name| readers.entry(name.clone()).or_default().push(i));
        }
        for value in &graph.output {
            readers.entry(value.name.clone()).or_default().push(usize::MAX);
        }
        Self { nodes, makers, readers }
    }

    fn node(&self, i: usize) -> Option<&NodeProto> {
        self.nodes.get(i)?.as_ref()
    }

    fn readers(&self, map: &str) -> &[usize] {
        self.readers.get(map).map_or(&[], Vec::as_slice)
    }

    /// What is read of a convolution's input and output, as its own work.
    fn convolution(&mut self, i: usize) -> Option<()> {
        let node = self.node(i).filter(|node| is_ours(node, GROUPED_CONV))?;
        let x = node.input.first()?.clone();
        let before = self.makers.get(&x).copied().filter(|_| self.readers(&x).len() == 1);
        let before = before.and_then(|maker| Some((maker, activation(self.node(maker)?)?)));
        let mut fused = node.clone();
        if let Some((maker, _)) = before {
            fused.input[0] = self.nodes[maker].take()?.input.into_iter().next()?;
        }
        let after = self.behind(&mut fused);
        let named = |name, activation: Option<Activation>| string(name, activation.unwrap_or(Activation::None).name());
        fused.attribute.extend([named("before", before.map(|(_, a)| a)), named("after", after)]);
        let mean = self
            .readers(fused.output.first()?)
            .iter()
            .copied()
            .find(|&reader| self.node(reader).is_some_and(|node| node.op_type == "GlobalAveragePool"));
        if let Some(mean) = mean {
            fused.output.extend(self.nodes[mean].take()?.output);
        }
        self.place(i, fused);
        Some(())
    }

    /// A map times its gate, which was made as large as the map for it.
    fn gate(&mut self, i: usize) -> Option<()> {
        let node = self.node(i).filter(|node| node.op_type == "Mul")?;
        let [x, gate] = node.input.as_slice() else { return None };
        let upsampling = *self.makers.get(gate)?;
        let pixel = self.node(upsampling).filter(|node| node.op_type == "Upsample")?.input.first()?.clone();
        let input = vec![x.clone(), pixel];
        let alone = self.readers(gate).len() == 1;
        let mut fused = NodeProto { input, attribute: Vec::new(), ..node.clone() };
        let after = self.behind(&mut fused).unwrap_or(Activation::None);
        fused.attribute.push(string("activation", after.name()));
        if alone {
            self.nodes[upsampling] = None;
        }
        self.place(i, ours(fused, GATED));
        Some(())
    }

    /// Another activation that takes ONNX Runtime more than one pass or simple step.
    fn activation(&mut self, i: usize) -> Option<()> {
        let node = self.node(i)?;
        let activation = activation(node).filter(|&activation| activation != Activation::Relu)?;
        let attribute = vec![string("activation", activation.name())];
        let fused = ours(NodeProto { attribute, ..node.clone() }, ACTIVATION);
        self.place(i, fused);
        Some(())
    }

    /// The activation that alone reads an operator's output, from now on its own work.
    fn behind(&mut self, node: &mut NodeProto) -> Option<Activation> {
        let output = node.output.first()?;
        let &[reader] = self.readers(output) else { return None };
        let activation = activation(self.node(reader)?)?;
        node.output = self.nodes[reader].take()?.output;
        Some(activation)
    }

    fn place(&mut self, i: usize, node: NodeProto) {
        self.makers.extend(node.output.iter().map(|name| (name.clone(), i)));
        self.nodes[i] = Some(node);
    }
}

fn is_ours(node: &NodeProto, operator: &str) -> bool {
    node.domain == DOMAIN && node.op_type == operator
}

fn ours(node: NodeProto, operator: &str) -> NodeProto {
    NodeProto { domain: DOMAIN.into(), op_type: operator.into(), ..node }
}

/// Which of our activations this operator is.
fn activation(node: &NodeProto) -> Option<Activation> {
    match node.op_type.as_str() {
        "Relu" => Some(Activation::Relu),
        "QuickGelu" if node.attribute.iter().any(|a| a.name == "alpha" && a.f == 1.0) => Some(Activation::Silu),
        "Gelu" if node.attribute.iter().all(|a| a.name != "approximate" || a.s == b"none") => Some(Activation::Gelu),
        _ => None,
    }
}
