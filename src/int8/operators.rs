//! A folded network as the operators that int8 covers, with quantised maps or without.

use std::collections::HashMap;
use std::fmt;

use super::Int8Error;
use super::constants::{Constants, INT8, UINT8, number, real, says, sizes};
use super::function::Function;
use super::scale::Scale;
use crate::pb::onnx::{GraphProto, NodeProto, dimension_proto};

/// A window that moves over a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Height and width.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride.
    pub stride: [usize; 2],
    /// Vertical and horizontal dilation.
    pub dilation: [usize; 2],
    /// Padding above, left, below, right.
    pub pads: [usize; 4],
}

impl Window {
    /// Height and width of what is made of a map of this size.
    pub fn out_size(&self, size: [usize; 2]) -> Option<[usize; 2]> {
        let side = |i: usize| {
            let reach = self.dilation[i].checked_mul(self.kernel[i].checked_sub(1)?)?.checked_add(1)?;
            let padded = size[i].checked_add(self.pads[i])?.checked_add(self.pads[i + 2])?;
            Some(padded.checked_sub(reach)?.checked_div(self.stride[i])? + 1)
        };
        Some([side(0)?, side(1)?])
    }
}

/// Largest side, stride, dilation and padding of a window: far more than any network has.
const LARGEST_SIDE: usize = 1 << 10;

/// Most operators of a network.
const MOST_OPERATORS: usize = 1 << 14;

/// Most bytes of a name: far more than any layer's has.
const LONGEST_NAME: usize = 1 << 9;

/// What an operator does.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// By the constants `weight` and `bias`, by name.
    Conv {
        /// The window.
        window: Window,
        /// Groups.
        groups: usize,
        /// Weights `[filters, channels / groups, height, width]`.
        weight: String,
        /// Biases.
        bias: String,
    },
    /// A convolution over the channels of one pixel, by the constant `weight`, `[1, 1, kernel]`.
    ChannelConv {
        /// Channels that a sum is of.
        kernel: usize,
        /// Channels of padding before the first.
        pad: usize,
        /// Weights.
        weight: String,
    },
    /// A function of every value.
    Function(Function),
    /// The sum of two maps.
    Add,
    /// A map times one pixel.
    Gate,
    /// The largest of each window.
    MaxPool(Window),
    /// The average of each window, and whether padding counts.
    AveragePool(Window, bool),
    /// The mean over all pixels.
    GlobalMean,
    /// One pixel as a vector.
    Flatten,
    /// A vector times the constant `weight`, `[classes, channels]`, and `bias`.
    Linear {
        /// Weights.
        weight: String,
        /// Biases.
        bias: String,
    },
    /// All values times a number.
    Times(f32),
}

/// What an operator reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edge {
    /// The map.
    pub map: String,
    /// Whether it is read as u8.
    pub bytes: bool,
}

/// An operator.
#[derive(Debug, Clone, PartialEq)]
pub struct Operator {
    /// What it does.
    pub kind: Kind,
    /// Its name in the file, which is its layer's.
    pub name: String,
    /// What it reads.
    pub inputs: Vec<Edge>,
    /// The map that it makes.
    pub output: String,
}

/// A network.
#[derive(Debug, Clone, PartialEq)]
pub struct Operators {
    /// In an order in which they can run.
    pub all: Vec<Operator>,
    /// The image's name.
    pub input: String,
    /// Its channels, height and width.
    pub shape: [usize; 3],
    /// Names of outputs.
    pub outputs: Vec<String>,
    /// Scales of u8 maps.
    pub scales: HashMap<String, Scale>,
    /// Weights and biases that are integers, by what operators call them: the names of their integers and of their scales.
    pub integers: HashMap<String, [String; 2]>,
    /// Operators that read a map, by its name: their places in `all`, and which of their inputs it is.
    readers: HashMap<String, Vec<(usize, usize)>>,
    /// Operators that make a map, by its name.
    makers: HashMap<String, usize>,
}

impl Operators {
    /// Reads a graph.
    pub fn read(graph: &GraphProto) -> Result<Self, Int8Error> {
        let unreadable = |reason: &str| Int8Error::Unreadable(reason.into());
        short_names(graph)?;
        let [input] = graph.input.as_slice() else { return Err(unreadable("it has not one input")) };
        let sides = input.r#type.as_ref().and_then(|t| t.tensor_type.as_ref()).and_then(|t| t.shape.as_ref());
        let sides: Vec<Option<usize>> = sides.map_or(Vec::new(), |shape| {
            let side = |dim: &dimension_proto::Value| match dim {
                dimension_proto::Value::DimValue(side) => usize::try_from(*side).ok(),
                dimension_proto::Value::DimParam(_) => None,
            };
            shape.dim.iter().map(|dim| dim.value.as_ref().and_then(side)).collect()
        });
        let &[_, Some(channels), Some(height), Some(width)] = sides.as_slice() else {
            return Err(Int8Error::uncovered("input", &input.name, "its size isn't fixed"));
        };
        if channels == 0 || height == 0 || width == 0 || graph.node.len() > MOST_OPERATORS {
            return Err(unreadable("its input is empty, or it has more operators than any network"));
        }
        made_once(graph)?;
        let mut reading = Reading {
            constants: Constants::of(graph),
            quantised: HashMap::new(),
            bytes: HashMap::new(),
            reshaped: HashMap::new(),
            all: Vec::new(),
            makers: HashMap::new(),
            read: Self {
                all: Vec::new(),
                input: input.name.clone(),
                shape: [channels, height, width],
                outputs: graph.output.iter().map(|output| output.name.clone()).collect(),
                scales: HashMap::new(),
                integers: HashMap::new(),
                readers: HashMap::new(),
                makers: HashMap::new(),
            },
        };
        graph.node.iter().try_for_each(|node| reading.node(node))?;
        let Reading { read: mut operators, all, .. } = reading;
        operators.all = all.into_iter().flatten().collect();
        for (i, operator) in operators.all.iter().enumerate() {
            operators.makers.insert(operator.output.clone(), i);
            for (j, edge) in operator.inputs.iter().enumerate() {
                operators.readers.entry(edge.map.clone()).or_default().push((i, j));
            }
        }
        if let Some(output) = operators.outputs.iter().find(|name| !operators.makers.contains_key(*name)) {
            return Err(Int8Error::Unreadable(format!("nothing makes its output `{output}`")));
        }
        Ok(operators)
    }

    /// Operators that read a map, by their places, and which of their inputs it is.
    pub fn readers(&self, map: &str) -> impl ExactSizeIterator<Item = (usize, usize)> {
        self.readers.get(map).map_or(&[][..], Vec::as_slice).iter().copied()
    }

    /// The operator that makes a map.
    pub fn maker(&self, map: &str) -> Option<&Operator> {
        self.makers.get(map).and_then(|&at| self.all.get(at))
    }
}

/// A graph being read.
struct Reading<'a> {
    constants: Constants<'a>,
    /// Maps by the names of their u8 numbers.
    quantised: HashMap<&'a str, &'a str>,
    /// Maps by the names of what those numbers mean.
    bytes: HashMap<&'a str, &'a str>,
    /// Maps in another shape.
    reshaped: HashMap<&'a str, Edge>,
    /// Operators; `None`: it is part of a later one.
    all: Vec<Option<Operator>>,
    /// Operators that make a map, by its name.
    makers: HashMap<&'a str, usize>,
    /// All else.
    read: Operators,
}

impl<'a> Reading<'a> {
    /// The scale by which an operator reads or writes u8.
    fn step_of(&self, node: &NodeProto) -> Option<Scale> {
        let scale = self.constants.single(node.input.get(1)?)?;
        let zero = self.constants.bytes(node.input.get(2)?, UINT8)?;
        Some(Scale { scale, zero: *zero.first()? })
    }

    /// Whether an operator's zero points are 0, or left out.
    fn is_symmetric(&self, node: &NodeProto) -> bool {
        let zeros = node.input.get(2).map(|name| self.constants.bytes(name, INT8));
        zeros.is_none_or(|zeros| zeros.is_some_and(|zeros| zeros.iter().all(|&zero| zero == 0)))
    }

    fn edge(&self, name: &str) -> Edge {
        match (self.reshaped.get(name), self.bytes.get(name)) {
            (Some(edge), _) => edge.clone(),
            (None, Some(map)) => Edge { map: (*map).into(), bytes: true },
            (None, None) => Edge { map: name.into(), bytes: false },
        }
    }

    /// The next operator of the graph, in its order.
    fn node(&mut self, node: &'a NodeProto) -> Result<(), Int8Error> {
        let uncovered = |reason| Int8Error::uncovered(&node.op_type, &node.name, reason);
        // without a name: left out
        let output = match node.output.as_slice() {
            [output, others @ ..] if !output.is_empty() && others.iter().all(String::is_empty) => output,
            _ => return Err(uncovered("it has not one output")),
        };
        let given = |i: usize| node.input.get(i).map(String::as_str).filter(|name| !name.is_empty());
        let input = |i: usize| given(i).ok_or_else(|| uncovered("an input is missing"));
        let first = input(0)?;
        // only gates that mix channels read what was reshaped
        let takes = |i: usize| match node.op_type.as_str() {
            "Conv" => i == 0 && node.input.len() == 2,
            "Mul" => i == 1,
            _ => false,
        };
        let is_reshaped = |(i, name): (usize, &String)| self.reshaped.contains_key(name.as_str()) && !takes(i);
        if node.input.iter().enumerate().any(is_reshaped) {
            return Err(uncovered("it reads what was reshaped"));
        }
        let mut inputs = vec![self.edge(first)];
        let kind = match node.op_type.as_str() {
            "QuantizeLinear" => {
                let scale = self.constants.single(input(1)?).filter(|scale| scale.is_normal() && *scale > 0.0);
                let zero = self.constants.bytes(input(2)?, UINT8).and_then(|zero| zero.first().copied());
                let (Some(scale), Some(zero)) = (scale, zero) else {
                    return Err(uncovered("its scale isn't one number"));
                };
                // pooling keeps the scale: such a map may be quantised twice
                let scale = Scale { scale, zero };
                if self.read.scales.insert(first.into(), scale).is_some_and(|known| known != scale) {
                    return Err(uncovered("a map has two scales"));
                }
                self.quantised.insert(output, first);
                return Ok(());
            }
            "DequantizeLinear" => {
                match self.quantised.get(first) {
                    Some(map) if self.step_of(node) != self.read.scales.get(*map).copied() => {
                        return Err(uncovered("it has another scale than its map"));
                    }
                    Some(map) => drop(self.bytes.insert(output, map)),
                    None if number(node, "axis", 1) != 0 || !self.is_symmetric(node) => {
                        return Err(uncovered("weights need scales by row, and zero points of 0"));
                    }
                    None => drop(self.read.integers.insert(output.clone(), [first.into(), input(1)?.into()])),
                }
                return Ok(());
            }
            // over channels: as a row of one pixel
            "Conv" if node.input.len() == 2 => {
                let kernel = sizes::<1>(node, "kernel_shape").filter(|[kernel]| *kernel > 0);
                let pads = sizes::<2>(node, "pads");
                match (kernel, pads) {
                    (Some([kernel]), Some([pad, end])) if pad == end && pad == kernel / 2 && kernel % 2 == 1 => {
                        Kind::ChannelConv { kernel, pad, weight: input(1)?.into() }
                    }
                    _ => return Err(uncovered("it has no bias")),
                }
            }
            "Conv" => {
                let (weight, bias) = (input(1)?.to_string(), input(2)?.to_string());
                let window = window(node).ok_or_else(|| uncovered("it is not over height and width"))?;
                let groups = usize::try_from(number(node, "group", 1)).ok().filter(|&groups| groups > 0);
                Kind::Conv { window, groups: groups.ok_or_else(|| uncovered("its groups"))?, weight, bias }
            }
            "Relu" => Kind::Function(Function::Relu),
            "Clip" => match [input(1)?, input(2)?].map(|bound| self.constants.single(bound)) {
                [Some(0.0), Some(6.0)] => Kind::Function(Function::Relu6),
                _ => return Err(uncovered("its bounds aren't 0 and 6")),
            },
            "LeakyRelu" => Kind::Function(Function::LeakyRelu(real(node, "alpha").unwrap_or(0.01))),
            "Elu" if real(node, "alpha").is_none_or(|alpha| alpha == 1.0) => Kind::Function(Function::Elu),
            "Selu" if node.attribute.is_empty() => Kind::Function(Function::Selu),
            "Gelu" => Kind::Function(Function::Gelu),
            "HardSwish" => Kind::Function(Function::HardSwish),
            "Mish" => Kind::Function(Function::Mish),
            "Sigmoid" => Kind::Function(Function::Sigmoid),
            "Tanh" => Kind::Function(Function::Tanh),
            "Add" => {
                inputs.push(self.edge(input(1)?));
                Kind::Add
            }
            "Mul" => match self.constants.single(input(1)?) {
                Some(factor) => Kind::Times(factor),
                None => {
                    let factor = self.edge(input(1)?);
                    let at = self.makers.get(factor.map.as_str()).copied();
                    let sigmoid = at.and_then(|at| self.all.get_mut(at));
                    let is_silu = |operator: &Operator| {
                        operator.kind == Kind::Function(Function::Sigmoid) && operator.inputs == inputs && !factor.bytes
                    };
                    match sigmoid.filter(|made| made.as_ref().is_some_and(is_silu)) {
                        Some(sigmoid) => {
                            *sigmoid = None;
                            Kind::Function(Function::Silu)
                        }
                        None => {
                            inputs.push(factor);
                            Kind::Gate
                        }
                    }
                }
            },
            "MaxPool" | "AveragePool" => {
                let window = window(node).filter(|_| number(node, "ceil_mode", 0) == 0);
                let window = window.ok_or_else(|| uncovered("its window depends on the image's size"))?;
                match node.op_type.as_str() {
                    "MaxPool" => Kind::MaxPool(window),
                    _ => Kind::AveragePool(window, number(node, "count_include_pad", 0) == 1),
                }
            }
            "GlobalAveragePool" => Kind::GlobalMean,
            "Flatten" => Kind::Flatten,
            "Identity" => Kind::Times(1.0),
            "Gemm" if number(node, "transB", 0) == 1 => {
                Kind::Linear { weight: input(1)?.into(), bias: input(2)?.into() }
            }
            "GlobalMaxPool" | "Concat" => return Err(uncovered("only mean pooling before the classifier is covered")),
            // of one pixel, to a row and back
            "Reshape" => {
                let edge = inputs.remove(0);
                self.reshaped.insert(output, edge);
                return Ok(());
            }
            _ => return Err(uncovered("it is not among those covered")),
        };
        self.makers.insert(output, self.all.len());
        self.all.push(Some(Operator { kind, name: node.name.clone(), inputs, output: output.clone() }));
        Ok(())
    }
}

/// What makes a map.
#[derive(Clone, Copy)]
enum Maker<'a> {
    Input,
    Constant,
    Node(&'a NodeProto),
}

impl fmt::Display for Maker<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Input => f.write_str("the input"),
            Self::Constant => f.write_str("a constant"),
            Self::Node(node) => write!(f, "`{}` at `{}`", node.op_type, node.name),
        }
    }
}

/// Refuses a graph in which a name is of two maps or constants: who reads it would depend on their order. An output without a
/// name is one that is left out.
fn made_once(graph: &GraphProto) -> Result<(), Int8Error> {
    let inputs = graph.input.iter().map(|input| (&input.name, Maker::Input));
    let constants = graph.initializer.iter().map(|tensor| (&tensor.name, Maker::Constant));
    let maps = graph.node.iter().flat_map(|node| {
        let named = node.output.iter().filter(|name| !name.is_empty());
        named.map(move |name| (name, Maker::Node(node)))
    });
    let mut makers = HashMap::new();
    for (map, second) in inputs.chain(constants).chain(maps) {
        if let Some(first) = makers.insert(map.as_str(), second) {
            return Err(Int8Error::MadeTwice { map: map.clone(), makers: format!("{first} and by {second}") });
        }
    }
    Ok(())
}

/// Refuses names longer than any network's: operators and errors repeat them.
fn short_names(graph: &GraphProto) -> Result<(), Int8Error> {
    let of_node = |node: &NodeProto| {
        let maps = node.input.iter().chain(&node.output).map(String::len).max();
        node.name.len().max(node.op_type.len()).max(maps.unwrap_or(0))
    };
    let ends = graph.input.iter().chain(&graph.output).map(|end| end.name.len());
    let constants = graph.initializer.iter().map(|tensor| tensor.name.len());
    match ends.chain(constants).chain(graph.node.iter().map(of_node)).max() {
        Some(bytes) if bytes > LONGEST_NAME => {
            Err(Int8Error::Unreadable(format!("a name in it has {bytes} bytes, at most {LONGEST_NAME} are read")))
        }
        _ => Ok(()),
    }
}

/// The window of an operator over height and width.
fn window(node: &NodeProto) -> Option<Window> {
    if says(node, "auto_pad") {
        return None;
    }
    let window = Window {
        kernel: sizes(node, "kernel_shape")?,
        stride: if says(node, "strides") { sizes(node, "strides")? } else { [1, 1] },
        dilation: if says(node, "dilations") { sizes(node, "dilations")? } else { [1, 1] },
        pads: if says(node, "pads") { sizes(node, "pads")? } else { [0; 4] },
    };
    let mut sides = window.kernel.iter().chain(&window.stride).chain(&window.dilation);
    if !sides.all(|side| (1..=LARGEST_SIDE).contains(side)) || window.pads.iter().any(|&pad| pad > LARGEST_SIDE) {
        return None;
    }
    // no window is of padding alone
    let reach = |i: usize| window.dilation[i].checked_mul(window.kernel[i] - 1);
    let within = |i: usize| reach(i).is_some_and(|reach| window.pads[i] <= reach && window.pads[i + 2] <= reach);
    (within(0) && within(1)).then_some(window)
}
