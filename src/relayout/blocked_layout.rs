//! Graphs in the blocked layout (NCHWc) of ONNX Runtime's CPU kernels: as it would rewrite them itself when it loads them,
//! done with fewer copies of every weight.
//!
//! In blocks of `b`, a map `[N, C, H, W]` lies in memory as `[N, C/b, H, W, b]`, and a convolution's weight as
//! `[O/b, I/b, kh, kw, b, b]` (input before output channels), or as `[O/b, I, kh, kw, b]` where what it reads is no block: the
//! image, and one channel at a time. The operators are those that ONNX Runtime rewrites graphs to, of its domain
//! `com.microsoft.nchwc`. Nothing is promised about them: they are for graphs in memory and for a runtime that was seen to
//! take a [sample](super::sample) as it is meant, not for a file that nfold hands out.

use std::borrow::Cow;
use std::collections::HashMap;

use super::Kernels;
use super::fusions::{fuse, grouped_conv};
use super::side_outputs::{BLOCKED, Became, SideOutputs, reordering};
use crate::graph::{FLOAT, float, floats, int, ints, string};
use crate::kernels::DOMAIN;
use crate::kernels::grouped_conv::Groups;
use crate::pb::onnx::{GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto};

/// ONNX Runtime's domain of fused operators that take any layout.
const FUSED: &str = "com.microsoft";

/// Weights that a layout wants elsewhere, by name.
pub type Filters = HashMap<String, Filter>;

/// Lays a graph out in blocks of so many channels, but for the weights: those are still to be moved. `None` where nfold
/// didn't write the graph, a map's channels aren't whole blocks, or an operator isn't known to keep to them: it stays as it
/// is.
pub fn lay_out(model: &mut ModelProto, block: usize, kernels: Kernels) -> Option<Filters> {
    let ours = model.producer_name == env!("CARGO_PKG_NAME");
    let graph = model.graph.as_mut().filter(|_| ours)?;
    let side = SideOutputs::take(graph);
    let Some(layout) = Layout::read(graph, block, kernels) else {
        side.put_back(graph, |_| None);
        return None;
    };
    graph.node = layout.nodes.into_iter().flatten().collect();
    // before operators are fused: what they read must stay
    side.put_back(graph, |name| layout.maps.get(name).copied().map(Became::InBlocks));
    if kernels == Kernels::Own {
        fuse(graph, block);
    }
    // without numbers that became attributes
    graph.initializer.retain(|tensor| graph.node.iter().any(|node| node.input.contains(&tensor.name)));
    let domain = |name: &str| OperatorSetIdProto { domain: name.into(), version: 1 };
    model.opset_import.extend([BLOCKED, FUSED].map(domain));
    if kernels == Kernels::Own {
        model.opset_import.push(domain(DOMAIN));
    }
    Some(layout.filters)
}

/// What a graph becomes.
struct Layout {
    block: usize,
    kernels: Kernels,
    /// Operators so far; those that went into others left a gap.
    nodes: Vec<Option<NodeProto>>,
    /// Index of the operator that makes a map.
    makers: HashMap<String, usize>,
    /// Channels of each map in blocks.
    maps: HashMap<String, usize>,
    /// How often each value is read.
    readers: HashMap<String, usize>,
    /// Weights to move.
    filters: Filters,
}

/// What is read of the graph on the way.
struct Source<'a> {
    image: &'a str,
    constants: HashMap<&'a str, &'a TensorProto>,
}

impl Layout {
    fn read(graph: &GraphProto, block: usize, kernels: Kernels) -> Option<Self> {
        let [input] = graph.input.as_slice() else { return None };
        let constants = graph.initializer.iter().map(|t| (t.name.as_str(), t)).collect();
        let source = Source { image: &input.name, constants };
        let mut readers = HashMap::new();
        let outputs = graph.output.iter().map(|value| &value.name);
        for name in graph.node.iter().flat_map(|node| &node.input).chain(outputs) {
            *readers.entry(name.clone()).or_default() += 1;
        }
        let (nodes, makers) = (Vec::with_capacity(graph.node.len()), HashMap::new());
        let mut layout = Self { block, kernels, nodes, makers, maps: HashMap::new(), readers, filters: HashMap::new() };
        graph.node.iter().try_for_each(|node| layout.add(node.clone(), &source))?;
        let plain = graph.output.iter().all(|value| !layout.maps.contains_key(&value.name));
        plain.then_some(layout)
    }

    /// The next operator of the graph, in its order.
    fn add(&mut self, node: NodeProto, source: &Source<'_>) -> Option<()> {
        let [output] = node.output.as_slice() else { return None };
        let (output, first) = (output.clone(), node.input.first()?.clone());
        let channels = self.maps.get(&first).copied();
        let (node, channels) = match (node.op_type.as_str(), channels) {
            ("Conv", channels) => self.convolution(node, channels, source)?,
            ("MaxPool" | "AveragePool" | "GlobalAveragePool" | "GlobalMaxPool", Some(_)) => (blocked(node), channels),
            ("Resize", Some(_)) => (upsampling(node, source)?, channels),
            ("Relu" | "LeakyRelu" | "Sigmoid" | "Tanh", Some(_)) => (self.activation(node, &first), channels),
            ("Clip", Some(_)) => (self.clip(node, &first, source), channels),
            ("Elu" | "Gelu" | "Selu", Some(_)) => (node, channels),
            ("Add", Some(_)) => (self.sum(node)?, channels),
            ("Mul", Some(_)) => (self.product(node)?, channels),
            ("Flatten" | "Reshape", Some(channels)) => (self.leave(node, channels)?, None),
            // a gate that mixes neighbouring channels, and the way back
            ("Sigmoid", None) => (self.activation(node, &first), None),
            ("Reshape", None) => self.enter(node, source)?,
            // the logits
            ("Gemm", None) => (node, None),
            _ => return None,
        };
        self.makers.insert(output.clone(), self.nodes.len());
        self.maps.extend(channels.map(|channels| (output, channels)));
        self.nodes.push(Some(node));
        Some(())
    }

    /// A convolution of a map of so many channels, or of the image, and its output's channels; or one over channels as they
    /// are.
    fn convolution(
        &mut self,
        node: NodeProto,
        channels: Option<usize>,
        source: &Source<'_>,
    ) -> Option<(NodeProto, Option<usize>)> {
        let (input, weight) = (node.input.first()?, node.input.get(1)?);
        let tensor = source.constants.get(weight.as_str())?;
        let dims: Vec<usize> = tensor.dims.iter().map(|&d| usize::try_from(d).ok()).collect::<Option<_>>()?;
        let &[rows, columns, height, width] = dims.as_slice() else {
            return (dims.len() == 3 && channels.is_none()).then_some((node, None));
        };
        let groups = super::channel_padding::groups(&node)?;
        let whole = |channels: usize| channels > 0 && channels.is_multiple_of(self.block);
        let (fits, unit) = match channels {
            None => (input == source.image && groups == 1 && columns < self.block, 1),
            Some(channels) if columns == 1 => (groups == channels && groups == rows, 1),
            Some(channels) => {
                let sizes = rows.is_multiple_of(groups) && whole(rows / groups) && whole(columns);
                (sizes && groups.checked_mul(columns)? == channels, self.block)
            }
        };
        // as many channels of a group out as in
        let even = channels == Some(rows) && Some(rows) == groups.checked_mul(columns) && height == width;
        let ours = Groups { block: self.block, group: columns, kernel: height };
        let ours = Some(ours).filter(|ours| self.kernels == Kernels::Own && even && ours.pays());
        // one that is dilated stays ONNX Runtime's, as its padding has it
        let ours = ours.and_then(|groups| Some((groups, grouped_conv(node.clone(), groups)?)));
        let fits = fits || ours.is_some();
        let groups = ours.as_ref().map(|(groups, _)| *groups);
        let filter = Filter { block: self.block, columns, area: height.checked_mul(width)?, unit, ours: groups };
        let values = rows.checked_mul(columns)?.checked_mul(filter.area)?;
        let all = values > 0 && count(tensor) == Some(values);
        // a tensor with two readers would be moved twice
        let alone = self.filters.insert(weight.clone(), filter).is_none() && self.readers.get(weight) == Some(&1);
        let node = match ours {
            Some((_, ours)) => ours,
            None => blocked(node),
        };
        (fits && whole(rows) && all && alone).then_some((node, Some(rows)))
    }

    /// An operator that takes values in the order of ONNX, of a map that is in blocks.
    fn leave(&mut self, mut node: NodeProto, channels: usize) -> Option<NodeProto> {
        let channels = int("channels", i64::try_from(channels).ok()?);
        let plain = format!("{}.input", node.output.first()?);
        let map = std::mem::replace(node.input.first_mut()?, plain.clone());
        self.nodes.push(Some(reordering("ReorderOutput", map, plain, vec![channels])));
        Some(node)
    }

    /// The map that a `Reshape` to one pixel makes of values in the order of ONNX, and its channels.
    fn enter(&mut self, mut node: NodeProto, source: &Source<'_>) -> Option<(NodeProto, Option<usize>)> {
        let shape = source.constants.get(node.input.get(1)?.as_str())?.raw_data.as_chunks();
        let (&[_, channels, height, width], []) = shape else { return None };
        let channels = usize::try_from(i64::from_le_bytes(channels)).ok()?;
        let one = 1_i64.to_le_bytes();
        if height != one || width != one || channels == 0 || !channels.is_multiple_of(self.block) {
            return None;
        }
        let output = node.output.first_mut()?;
        let plain = format!("{output}.plain");
        let map = std::mem::replace(output, plain.clone());
        self.nodes.push(Some(node));
        Some((reordering("ReorderInput", plain, map, Vec::new()), Some(channels)))
    }

    /// An activation of `x`, as part of the convolution before it where that is possible.
    fn activation(&mut self, node: NodeProto, x: &str) -> NodeProto {
        let alpha = node.attribute.iter().find(|a| a.name == "alpha").map(|alpha| alpha.f);
        self.fused(node, x, alpha.as_slice())
    }

    /// An activation with these parameters, as part of the convolution that makes `x` where that is possible.
    fn fused(&mut self, node: NodeProto, x: &str, parameters: &[f32]) -> NodeProto {
        let Some(mut convolution) = self.withdraw(x, 4) else { return node };
        convolution.attribute.push(string("activation", &node.op_type));
        if !parameters.is_empty() {
            convolution.attribute.push(floats("activation_params", parameters));
        }
        if convolution.domain.is_empty() {
            (convolution.op_type, convolution.domain) = ("FusedConv".into(), FUSED.into());
        }
        NodeProto { output: node.output, ..convolution }
    }

    /// Bounds of a map, as part of the convolution that makes it where that is possible.
    fn clip(&mut self, node: NodeProto, x: &str, source: &Source<'_>) -> NodeProto {
        let bound = |name: &String| match *values(source.constants.get(name.as_str())?)? {
            [bound] => Some(bound),
            _ => None,
        };
        let bounds: Option<Vec<f32>> = node.input.iter().skip(1).map(bound).collect();
        match bounds {
            Some(bounds) if bounds.len() == 2 => self.fused(node, x, &bounds),
            _ => node,
        }
    }

    /// The sum of two maps, as part of a convolution that makes one of them where that is possible.
    fn sum(&mut self, node: NodeProto) -> Option<NodeProto> {
        let [a, b] = node.input.as_slice() else { return None };
        if self.maps.get(a)? != self.maps.get(b)? {
            return None;
        }
        for (term, other) in [(a, b), (b, a)] {
            if let Some(mut convolution) = self.withdraw(term, 3) {
                convolution.input.resize(3, String::new());
                convolution.input.push(other.clone());
                return Some(NodeProto { output: node.output, ..convolution });
            }
        }
        Some(node)
    }

    /// `x · sigmoid(x)` as one operator, or a map times its gate for every pixel.
    fn product(&mut self, mut node: NodeProto) -> Option<NodeProto> {
        let [x, factor] = node.input.as_slice() else { return None };
        if self.maps.get(x)? != self.maps.get(factor)? {
            return None;
        }
        let index = *self.makers.get(factor)?;
        let maker = self.nodes.get(index)?.as_ref()?;
        match maker.op_type.as_str() {
            "Upsample" => Some(node),
            "Sigmoid" if maker.input.first() == Some(x) && self.readers.get(factor) == Some(&1) => {
                self.nodes[index] = None;
                node.input.truncate(1);
                node.attribute.push(float("alpha", 1.0));
                Some(NodeProto { op_type: "QuickGelu".into(), domain: FUSED.into(), ..node })
            }
            // another factor may be one pixel for all, which isn't found by blocks
            _ => None,
        }
    }

    /// Takes back a convolution of so many inputs at most that only the next operator reads, for it to do that one's work too.
    fn withdraw(&mut self, output: &str, inputs: usize) -> Option<NodeProto> {
        let maker = self.nodes.get_mut(*self.makers.get(output)?)?;
        let able = |node: &mut NodeProto| {
            node.op_type == "Conv"
                && node.input.len() <= inputs
                && node.attribute.iter().all(|a| a.name != "activation")
        };
        if self.readers.get(output) == Some(&1) { maker.take_if(able) } else { None }
    }
}

/// A gate's one pixel, for every pixel of a map.
fn upsampling(mut node: NodeProto, source: &Source<'_>) -> Option<NodeProto> {
    let scales = values(source.constants.get(node.input.get(2)?.as_str())?)?;
    let &[1.0, 1.0, height, width] = &*scales else { return None };
    let said = |name: &str, value: &str| node.attribute.iter().any(|a| a.name == name && a.s == value.as_bytes());
    let alike = said("mode", "nearest")
        && said("coordinate_transformation_mode", "asymmetric")
        && said("nearest_mode", "floor");
    if !alike || height.fract() != 0.0 || width.fract() != 0.0 {
        return None;
    }
    node.attribute.retain(|a| a.name != "nearest_mode");
    node.attribute.push(ints("scales", &[1, 1, height as usize, width as usize]));
    node.input.truncate(1);
    Some(NodeProto { op_type: "Upsample".into(), domain: BLOCKED.into(), ..node })
}

fn blocked(node: NodeProto) -> NodeProto {
    NodeProto { domain: BLOCKED.into(), ..node }
}

/// Single-precision values, row-major.
fn values(tensor: &TensorProto) -> Option<Cow<'_, [f32]>> {
    match tensor.raw_data.as_chunks() {
        ([], []) if tensor.data_type == FLOAT => Some(Cow::Borrowed(&tensor.float_data)),
        (values, []) if tensor.data_type == FLOAT => Some(values.iter().map(|v| f32::from_le_bytes(*v)).collect()),
        _ => None,
    }
}

/// How many [`values`] there are.
fn count(tensor: &TensorProto) -> Option<usize> {
    let bytes = tensor.raw_data.len();
    let count = if bytes == 0 { tensor.float_data.len() } else { bytes / size_of::<f32>() };
    (tensor.data_type == FLOAT && bytes.is_multiple_of(size_of::<f32>())).then_some(count)
}

/// A convolution's weight of any number of rows `[columns, area]`, `unit` columns being read together.
#[derive(Debug)]
pub struct Filter {
    block: usize,
    columns: usize,
    area: usize,
    unit: usize,
    /// The order is that of our own kernels.
    ours: Option<Groups>,
}

impl Filter {
    /// Appends values `[rows, columns, area]` as `[rows/b, columns/unit, area, unit, b]`: every `b` rows side by side.
    pub(super) fn side_by_side<T: Copy>(&self, values: &[T], number: impl Fn(T) -> f32, moved: &mut Vec<f32>) {
        if let Some(groups) = &self.ours {
            return groups.arrange(values, number, moved);
        }
        let row = self.columns * self.area;
        for rows in values.chunks_exact(self.block * row) {
            for units in (0..row).step_by(self.unit * self.area) {
                for i in 0..self.area {
                    for first in (units + i..units + self.unit * self.area).step_by(self.area) {
                        moved.extend((first..rows.len()).step_by(row).map(|at| number(rows[at])));
                    }
                }
            }
        }
    }
}
