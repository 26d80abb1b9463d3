//! What our own kernels do in a graph in blocks: convolutions in groups with the activations around them and the means of
//! their channels, convolutions of single pixels with the gates and activations before them and the sum and activation behind,
//! other gates with the activation behind them, and other activations in one pass.

use std::collections::{HashMap, HashSet};

use super::side_outputs::BLOCKED;
use crate::graph::{int, ints, string};
use crate::kernels::activation::Activation;
use crate::kernels::grouped_conv::Groups;
use crate::kernels::{ACTIVATION, DOMAIN, EXPAND_CONV, GATED, GROUPED_CONV, POINTWISE_CONV};
use crate::pb::onnx::{AttributeProto, GraphProto, NodeProto};

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

/// Puts our operators, for blocks of so many channels, in the place of several of ONNX Runtime's.
pub(super) fn fuse(graph: &mut GraphProto, block: usize) {
    let mut fusion = Fusion::read(graph);
    let single = fusion.single_pixels();
    let reads_many = |node: &NodeProto| node.input.first().is_some_and(|x| !single.contains(x));
    let mut pointwise = Vec::new();
    for (i, node) in fusion.nodes.iter().enumerate() {
        if node.as_ref().is_some_and(|node| is_pointwise(node, graph, block) && reads_many(node)) {
            pointwise.push(i);
        }
    }
    for i in 0..fusion.nodes.len() {
        fusion.convolution(i);
    }
    for i in 0..fusion.nodes.len() {
        fusion.gate(i);
    }
    // what is behind one is not before the next: that one reads its map as it is then
    for &i in &pointwise {
        fusion.pointwise(i);
    }
    for &i in &pointwise {
        fusion.before_pointwise(i);
    }
    for i in 0..fusion.nodes.len() {
        fusion.activation(i);
    }
    graph.node = fusion.nodes.into_iter().flatten().collect();
    // who reads what has changed
    let mut fusion = Fusion::read(graph);
    for i in 0..fusion.nodes.len() {
        fusion.expansion(i, block);
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

    /// Maps of one pixel: means, and what convolutions make of them. Their weights are read once, which ONNX Runtime does as fast.
    fn single_pixels(&self) -> HashSet<String> {
        let mut single = HashSet::new();
        for node in self.nodes.iter().flatten() {
            let pooled = matches!(node.op_type.as_str(), "GlobalAveragePool" | "GlobalMaxPool" | "ReorderInput");
            let after = node.input.first().is_some_and(|x| single.contains(x)) && node.op_type != "Upsample";
            if pooled || after {
                single.extend(node.output.iter().cloned());
            }
        }
        single
    }

    /// A convolution of single pixels, with what is read of its output as its own work.
    fn pointwise(&mut self, i: usize) -> Option<()> {
        let mut fused = self.node(i)?.clone();
        let attribute = |name: &str| fused.attribute.iter().find(|a| a.name == name);
        let stride = attribute("strides").and_then(|strides| strides.ints.first().copied()).unwrap_or(1);
        let given = attribute("activation").and_then(|a| Activation::named(str::from_utf8(&a.s).ok()?));
        let after = given.or_else(|| self.behind(&mut fused)).unwrap_or(Activation::None);
        let sums = i64::from(fused.input.len() == 4);
        fused.attribute = vec![int("stride", stride), string("after", after.name()), int("sums", sums)];
        self.place(i, ours(fused, POINTWISE_CONV));
        Some(())
    }

    /// A gate and an activation that only a convolution of single pixels reads, as its own work.
    fn before_pointwise(&mut self, i: usize) -> Option<()> {
        let mut fused = self.node(i)?.clone();
        let x = fused.input.first()?.clone();
        let maker = self.makers.get(&x).copied().filter(|_| self.readers(&x).len() == 1);
        let maker = maker.and_then(|maker| Some((maker, self.node(maker)?)));
        let (mut before, mut gated) = (Activation::None, 0);
        if let Some((maker, node)) = maker {
            if let Some(activation) = activation(node) {
                before = activation;
                fused.input[0] = self.nodes[maker].take()?.input.into_iter().next()?;
            } else if is_ours(node, GATED)
                && let [map, gate] = node.input.as_slice()
            {
                before = node.attribute.iter().find_map(|a| Activation::named(str::from_utf8(&a.s).ok()?))?;
                let (map, gate) = (map.clone(), gate.clone());
                self.nodes[maker] = None;
                fused.input[0] = map;
                fused.input.push(gate);
                gated = 1;
            }
        }
        fused.attribute.extend([string("before", before.name()), int("gated", gated)]);
        self.place(i, fused);
        Some(())
    }

    /// A convolution of single pixels that only one in groups of a block at most reads: one operator, without a map between.
    fn expansion(&mut self, i: usize, block: usize) -> Option<()> {
        let first = self.node(i).filter(|node| is_ours(node, POINTWISE_CONV) && node.input.len() == 3)?;
        let &[reader] = self.readers(first.output.first()?) else { return None };
        let second = self.node(reader).filter(|node| is_ours(node, GROUPED_CONV))?;
        let number = |node: &NodeProto, name: &str| node.attribute.iter().find(|a| a.name == name).map(|a| a.i);
        let named = |node: &NodeProto, name: &str| {
            let attribute = node.attribute.iter().find(|a| a.name == name);
            attribute.and_then(|a| Activation::named(str::from_utf8(&a.s).ok()?))
        };
        let group = usize::try_from(number(second, "channels_of_group")?).ok()?;
        let between = match (named(first, "after")?, named(second, "before")?) {
            (Activation::None, activation) | (activation, Activation::None) => activation,
            _ => return None,
        };
        if number(first, "stride") != Some(1) || group > block || second.input.first() != first.output.first() {
            return None;
        }
        let mut fused = second.clone();
        fused.input = first.input.iter().chain(&second.input[1..]).cloned().collect();
        fused.attribute.retain(|a| a.name != "before");
        fused.attribute.extend([string("first", named(first, "before")?.name()), string("before", between.name())]);
        self.nodes[i] = None;
        self.place(reader, ours(fused, EXPAND_CONV));
        Some(())
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

/// Whether a convolution of blocks is one of single pixels, all channels with all, that our kernels do as well.
fn is_pointwise(node: &NodeProto, graph: &GraphProto, block: usize) -> bool {
    let weight = node.input.get(1).and_then(|name| graph.initializer.iter().find(|tensor| tensor.name == *name));
    let dims = weight.map_or(&[][..], |weight| &weight.dims);
    let whole =
        |channels: i64| usize::try_from(channels).is_ok_and(|channels| channels > 0 && channels.is_multiple_of(block));
    let known = |attribute: &AttributeProto| match (attribute.name.as_str(), attribute.ints.as_slice()) {
        ("group", _) => attribute.i == 1,
        ("kernel_shape" | "dilations", sides) => sides.iter().all(|&side| side == 1),
        ("strides", &[height, width]) => height == width && height > 0,
        ("pads", pads) => pads.iter().all(|&pad| pad == 0),
        ("auto_pad", _) => attribute.s == b"NOTSET",
        ("activation", _) => attribute.s == b"Relu" || attribute.s == b"Sigmoid",
        _ => false,
    };
    node.domain == BLOCKED
        && node.op_type == "Conv"
        && matches!(*dims, [rows, columns, 1, 1] if whole(rows) && whole(columns))
        && matches!(node.input.len(), 3 | 4)
        && node.input.iter().all(|input| !input.is_empty())
        && node.attribute.iter().all(known)
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
