//! Channels padded with zeros to whole blocks, so that a graph stays in the layout that the processor's kernels want.
//!
//! ONNX Runtime's blocked layout (NCHWc) takes 16 channels at a time with AVX-512. Convolutions between other widths, and
//! grouped ones whose groups are smaller, fall out of it and run several times slower: in `nf_regnet_b0`, whose groups have
//! 8 channels, every 3x3. (With AVX2 the block is 8, which divides every width and group of timm's networks.) So a
//! padded channel gets a filter and a bias of zeros, and zeros in all weights that read it: whatever finite value an
//! activation or a gate makes of it, nothing comes of it. Small groups are merged, with zeros where they must not mix.
//!
//! The folded file fits every machine and stays as it is; this is for the graph in memory.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use prost::Message as _;

use super::Kernels;
use super::fusions::grouped_conv;
use super::side_outputs::{Became, SideOutputs};
use crate::graph::{FLOAT, FLOAT16};
use crate::kernels::grouped_conv::Groups;
use crate::pb::onnx::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, dimension_proto};

/// The graph with every map's channels padded to whole blocks; its single-precision weights are in `float_data`. `None`
/// where there is nothing to pad, and for graphs that nfold didn't write or whose operators aren't all known here: those run
/// as they are.
pub fn pad_channels(onnx: Bytes, block: usize, kernels: Kernels) -> Option<ModelProto> {
    let mut model = ModelProto::decode(onnx).ok()?;
    if model.producer_name != env!("CARGO_PKG_NAME") {
        return None;
    }
    let graph = model.graph.as_mut()?;
    let side = SideOutputs::take(graph);
    let widths = Widths::read(graph, block, kernels)?;
    if widths.sets.iter().all(|set| set.padded() == set.channels) && !widths.merges() {
        return None;
    }
    widths.apply(graph)?;
    side.put_back(graph, |name| {
        let set = widths.of(name).filter(|set| set.padded() != set.channels)?;
        Some(Became::Padded(set.channels))
    });
    Some(model)
}

/// Maps whose channels operators tie together: they are padded alike.
#[derive(Debug, Clone, Copy)]
struct Set {
    channels: usize,
    /// What they are padded to a multiple of.
    unit: usize,
    /// Something counts these channels, so that they stay.
    fixed: bool,
}

impl Set {
    fn padded(&self) -> usize {
        if self.fixed { self.channels } else { self.channels.next_multiple_of(self.unit) }
    }
}

/// How many channels every map of a graph has, and will have.
#[derive(Debug)]
struct Widths {
    block: usize,
    kernels: Kernels,
    /// Set of each map by the map's name; sets that were united since point on.
    of: HashMap<String, usize>,
    links: Vec<usize>,
    sets: Vec<Set>,
    /// Grouped convolutions that aren't [ours](Self::stays): set of their maps, and channels of a group.
    groups: Vec<(usize, usize)>,
}

/// How a convolution with 2-D kernels reads channels.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Reads {
    All,
    One,
    /// Groups of so many, as many in as out.
    Group(usize),
}

impl Reads {
    fn of(node: &NodeProto, weight: &TensorProto) -> Option<Self> {
        let groups = groups(node)?;
        let &[rows, columns, _, _] = weight.dims.as_slice() else { return None };
        let (rows, columns) = (usize::try_from(rows).ok()?, usize::try_from(columns).ok()?);
        match (groups, columns) {
            (1, _) => Some(Self::All),
            (_, 1) if rows == groups => Some(Self::One),
            _ if columns > 0 && rows == groups.checked_mul(columns)? => Some(Self::Group(columns)),
            _ => None,
        }
    }
}

impl Widths {
    fn read(graph: &GraphProto, block: usize, kernels: Kernels) -> Option<Self> {
        let constants: HashMap<&str, &TensorProto> = graph.initializer.iter().map(|t| (t.name.as_str(), t)).collect();
        let mut widths =
            Self { block, kernels, of: HashMap::new(), links: Vec::new(), sets: Vec::new(), groups: Vec::new() };
        let [input] = graph.input.as_slice() else { return None };
        let image = widths.add(Set { channels: channels(input)?, unit: 1, fixed: true });
        widths.of.insert(input.name.clone(), image);
        for node in &graph.node {
            let [output] = node.output.as_slice() else { return None };
            let Some(&first) = widths.of.get(node.input.first()?) else {
                // logits on their way from half precision
                if node.op_type == "Cast" { continue } else { return None }
            };
            let set = match node.op_type.as_str() {
                "Conv" => widths.convolution(node, constants.get(node.input.get(1)?.as_str())?, first)?,
                // the logits: no map
                "Gemm" => continue,
                "Reshape" => widths.fix(first),
                "Resize" | "Clip" | "Flatten" | "Cast" | "AveragePool" | "MaxPool" | "GlobalAveragePool"
                | "GlobalMaxPool" => first,
                "Sigmoid" | "Relu" | "LeakyRelu" | "Elu" | "Selu" | "Gelu" | "HardSwish" | "Mish" | "Tanh" => first,
                "Add" | "Mul" => {
                    let [_, second] = node.input.as_slice() else { return None };
                    widths.tie(first, *widths.of.get(second)?)?
                }
                _ => return None,
            };
            widths.of.insert(output.clone(), set);
        }
        // a map that is handed out keeps its channels
        graph.output.iter().all(|value| !widths.of.contains_key(&value.name)).then_some(widths)
    }

    /// The set of a convolution's output.
    fn convolution(&mut self, node: &NodeProto, weight: &TensorProto, input: usize) -> Option<usize> {
        if weight.dims.len() == 3 {
            // a 1-D convolution over the channels themselves
            return Some(self.fix(input));
        }
        let reads = Reads::of(node, weight)?;
        let channels = usize::try_from(*weight.dims.first()?).ok()?;
        let read = if reads == Reads::All { usize::try_from(*weight.dims.get(1)?).ok()? } else { channels };
        // a graph whose shapes disagree is not padded: a wrong shape could ask for any amount of memory
        if self.sets[self.root(input)].channels != read {
            return None;
        }
        match reads {
            Reads::All => Some(self.add(Set { channels, unit: self.block, fixed: false })),
            Reads::One => Some(input),
            Reads::Group(size) => {
                let unit = lcm(size, self.block)?;
                let root = self.root(input);
                self.sets[root].unit = lcm(self.sets[root].unit, unit)?;
                if !self.stays(node, weight, size) {
                    self.groups.push((root, size));
                }
                Some(root)
            }
        }
    }

    fn add(&mut self, set: Set) -> usize {
        self.links.push(self.sets.len());
        self.sets.push(set);
        self.sets.len() - 1
    }

    fn root(&self, mut set: usize) -> usize {
        while self.links[set] != set {
            set = self.links[set];
        }
        set
    }

    fn fix(&mut self, set: usize) -> usize {
        let root = self.root(set);
        self.sets[root].fixed = true;
        root
    }

    fn tie(&mut self, a: usize, b: usize) -> Option<usize> {
        let (a, b) = (self.root(a), self.root(b));
        let (one, other) = (self.sets[a], self.sets[b]);
        let unit = lcm(one.unit, other.unit)?;
        self.sets[a] = Set { unit, fixed: one.fixed || other.fixed, ..one };
        self.sets[b] = self.sets[a];
        self.links[b] = a;
        (one.channels == other.channels).then_some(a)
    }

    /// Whether there are groups that are no whole blocks, and can be merged to some.
    fn merges(&self) -> bool {
        self.groups.iter().any(|&(set, size)| !self.sets[self.root(set)].fixed && !size.is_multiple_of(self.block))
    }

    /// Whether groups of so many channels aren't merged: our kernels take a block of several as it is.
    fn stays(&self, node: &NodeProto, weight: &TensorProto, size: usize) -> bool {
        let kernel = weight.dims.get(2).and_then(|&side| usize::try_from(side).ok()).unwrap_or(0);
        let groups = Groups { block: self.block, group: size, kernel };
        let square = weight.dims.get(2) == weight.dims.get(3);
        self.kernels == Kernels::Own && square && groups.pays() && grouped_conv(node.clone(), groups).is_some()
    }

    fn of(&self, map: &str) -> Option<Set> {
        self.of.get(map).map(|&set| self.sets[self.root(set)])
    }

    /// Pads weights, biases and what the graph says of shapes.
    fn apply(&self, graph: &mut GraphProto) -> Option<()> {
        let indices: HashMap<String, usize> =
            graph.initializer.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let mut done = HashSet::new();
        let mut widen = |tensors: &mut [TensorProto], name: &str, rows, columns, column: &dyn Fn(usize) -> usize| {
            let index = *indices.get(name)?;
            // a tensor with two readers would be padded twice
            if done.insert(index) { widen(&mut tensors[index], rows, columns, column) } else { None }
        };
        for node in &mut graph.node {
            match (node.op_type.as_str(), node.input.as_slice()) {
                ("Conv", [x, weight, bias @ ..]) => {
                    let tensor = graph.initializer.get(*indices.get(weight)?)?;
                    if tensor.dims.len() == 3 {
                        continue;
                    }
                    let reads = Reads::of(node, tensor)?;
                    let stays = |size| self.stays(node, tensor, size);
                    let (input, output) = (self.of(x)?, self.of(node.output.first()?)?.padded());
                    let (columns, groups, merged) = match reads {
                        Reads::All => (input.padded(), 1, 1),
                        Reads::One => (1, output, 1),
                        Reads::Group(size) => {
                            let merged = if input.fixed || stays(size) { 1 } else { lcm(size, self.block)? / size };
                            (size * merged, output / (size * merged), merged)
                        }
                    };
                    // where a group stands among those it is merged with
                    let size = columns / merged;
                    let column = |row: usize| if merged == 1 { 0 } else { row / size % merged * size };
                    widen(&mut graph.initializer, weight, output, columns, &column)?;
                    if let Some(bias) = bias.first() {
                        widen(&mut graph.initializer, bias, output, 1, &|_| 0)?;
                    }
                    let group = node.attribute.iter_mut().find(|a| a.name == "group");
                    match group {
                        Some(group) => group.i = groups as i64,
                        None if groups == 1 => {}
                        None => return None,
                    }
                }
                ("Gemm", [x, weight, ..]) => {
                    let tensor = graph.initializer.get(*indices.get(weight)?)?;
                    let rows = usize::try_from(*tensor.dims.first()?).ok()?;
                    let by_rows = node.attribute.iter().any(|a| a.name == "transB" && a.i == 1);
                    let set = self.of(x)?;
                    if !by_rows || tensor.dims.get(1) != Some(&(set.channels as i64)) {
                        return None;
                    }
                    widen(&mut graph.initializer, weight, rows, set.padded(), &|_| 0)?;
                }
                _ => {}
            }
        }
        for value in &mut graph.value_info {
            if let Some(set) = self.of(&value.name) {
                *channels_mut(value)? = set.padded() as i64;
            }
        }
        Some(())
    }
}

/// Makes a tensor `[r, c, …]` (or `[r]`) into `[rows, columns, …]`, what is new being zero; row `r` begins at column
/// `column(r)`.
fn widen(tensor: &mut TensorProto, rows: usize, columns: usize, column: &dyn Fn(usize) -> usize) -> Option<()> {
    let dims: Vec<usize> = tensor.dims.iter().map(|&d| usize::try_from(d).ok()).collect::<Option<_>>()?;
    let (had_rows, had_columns) = (*dims.first()?, dims.get(1).copied().unwrap_or(1));
    let cell = dims.iter().skip(2).try_fold(1, |all: usize, &d| all.checked_mul(d))?;
    let row = had_columns.checked_mul(cell)?;
    let shape = Widening { had: had_rows.checked_mul(row)?, row, rows, columns, cell, column };
    let raw = std::mem::take(&mut tensor.raw_data);
    match tensor.data_type {
        FLOAT => tensor.float_data = shape.widen(&raw, |v: [u8; 4]| f32::from_le_bytes(v))?,
        FLOAT16 => tensor.raw_data = shape.widen(&raw, |v: [u8; 2]| v)?.into_flattened().into(),
        _ => return None,
    }
    tensor.dims[0] = rows as i64;
    if let Some(second) = tensor.dims.get_mut(1) {
        *second = columns as i64;
    }
    Some(())
}

/// How a tensor's values move when it is widened.
struct Widening<'a> {
    /// Values that there were, and of them in a row.
    had: usize,
    row: usize,
    rows: usize,
    columns: usize,
    /// Values of a column.
    cell: usize,
    column: &'a dyn Fn(usize) -> usize,
}

impl Widening<'_> {
    fn widen<const N: usize, T: Copy + Default>(&self, raw: &[u8], read: impl Fn([u8; N]) -> T) -> Option<Vec<T>> {
        let (values, []) = raw.as_chunks::<N>() else { return None };
        // before memory is asked for: what a shape says costs nothing, values do
        if values.len() != self.had {
            return None;
        }
        let mut wide = vec![T::default(); self.rows.checked_mul(self.columns)?.checked_mul(self.cell)?];
        for (r, values) in values.chunks(self.row.max(1)).enumerate() {
            let start = r.checked_mul(self.columns)?.checked_add((self.column)(r))?.checked_mul(self.cell)?;
            let target = wide.get_mut(start..start.checked_add(values.len())?)?;
            target.iter_mut().zip(values).for_each(|(target, value)| *target = read(*value));
        }
        Some(wide)
    }
}

pub(super) fn groups(node: &NodeProto) -> Option<usize> {
    node.attribute.iter().find(|a| a.name == "group").map_or(Some(1), |a| usize::try_from(a.i).ok())
}

fn channels(value: &ValueInfoProto) -> Option<usize> {
    let shape = value.r#type.as_ref()?.tensor_type.as_ref()?.shape.as_ref()?;
    match shape.dim.get(1)?.value.as_ref()? {
        dimension_proto::Value::DimValue(channels) => usize::try_from(*channels).ok(),
        dimension_proto::Value::DimParam(_) => None,
    }
}

fn channels_mut(value: &mut ValueInfoProto) -> Option<&mut i64> {
    let shape = value.r#type.as_mut()?.tensor_type.as_mut()?.shape.as_mut()?;
    match shape.dim.get_mut(1)?.value.as_mut()? {
        dimension_proto::Value::DimValue(channels) => Some(channels),
        dimension_proto::Value::DimParam(_) => None,
    }
}

fn lcm(a: usize, b: usize) -> Option<usize> {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a.checked_div(x)?.checked_mul(b)
}
