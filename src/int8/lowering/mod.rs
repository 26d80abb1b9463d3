//! From standard ONNX with quantised operators to a [`Network`]: activations go into the tables of what is before them, sums
//! into what makes their last term, and every map gets a slot in memory.

mod convolution;
mod layer;
mod mean;
mod outputs;
mod singles;
mod sizes;
mod slots;
mod sums;

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use prost::Message as _;

use self::outputs::Finished;
use self::singles::in_singles;
use self::sums::sum_scales;
use super::constants::Constants;
use super::network::{Network, Slot, Step, Work};
use super::operators::{Kind, Operator, Operators};
use super::scale::{Scale, table};
use super::{Int8Error, NETWORK};
use crate::kernels::DOMAIN;
use crate::kernels::int8::processor::Processor;
use crate::kernels::int8::{Output, Pool};
use crate::model::{FEATURES, INPUT, MAP, OUTPUT};
use crate::pb::onnx::{GraphProto, ModelProto, NodeProto};

/// What sums stay below, and what they stay below once they are scaled.
const MOST: f64 = (1_u64 << 31) as f64;
const MOST_SCALED: f64 = (1 << 30) as f64;

/// Most values of a map: far more than any network has.
const LARGEST_MAP: usize = 1 << 28;

/// The network of a file that has quantised maps, for the kernels that are best here; `None` of other files.
pub fn lower_if_quantised(onnx: &Bytes) -> Option<Result<Network, Int8Error>> {
    // most files are seen to have none by the operator's name alone
    let named = onnx.split(|&byte| byte == b'Q').skip(1).any(|rest| rest.starts_with(b"uantizeLinear"));
    // weights are the file's bytes and no copy
    let model = if named { ModelProto::decode(onnx.clone()).ok()? } else { return None };
    let has = |graph: &GraphProto| graph.node.iter().any(|node| node.op_type == "QuantizeLinear");
    model.graph.as_ref().is_some_and(has).then(|| lower_graph(&model, Processor::here()))
}

/// The graph in memory that a network is one operator of.
pub fn one_operator(network: &Network) -> Vec<u8> {
    let mut outputs = vec![(OUTPUT, vec![network.classes])];
    outputs.extend(network.features.map(|width| (FEATURES, vec![width])));
    outputs.extend(network.map.map(|map| (MAP, map.to_vec())));
    // the operator's outputs have fixed places
    let mut names = vec![OUTPUT.to_string()];
    names.push(network.features.map_or(String::new(), |_| FEATURES.into()));
    names.extend(network.map.map(|_| MAP.into()));
    let node = NodeProto {
        input: vec![INPUT.into()],
        output: names,
        name: NETWORK.into(),
        op_type: NETWORK.into(),
        domain: DOMAIN.into(),
        attribute: Vec::new(),
    };
    let graph = GraphProto {
        node: vec![node],
        name: NETWORK.into(),
        input: vec![crate::graph::batch_of(INPUT, &network.shape)],
        output: outputs.into_iter().map(|(name, sides)| crate::graph::batch_of(name, &sides)).collect(),
        ..GraphProto::default()
    };
    crate::graph::model(graph, DOMAIN).encode_to_vec()
}

/// Reads a network of integers, for the kernels that are best here.
pub fn lower(onnx: &[u8]) -> Result<Network, Int8Error> {
    lower_for(onnx, Processor::here())
}

/// The same for these kernels, which must be [here](Processor::is_here).
pub fn lower_for(onnx: &[u8], processor: Processor) -> Result<Network, Int8Error> {
    lower_graph(&ModelProto::decode(onnx).map_err(|e| Int8Error::Unreadable(e.to_string()))?, processor)
}

/// The same of a graph.
fn lower_graph(model: &ModelProto, processor: Processor) -> Result<Network, Int8Error> {
    let graph = model.graph.as_ref().ok_or_else(|| Int8Error::Unreadable("there is no graph in it".into()))?;
    let operators = Operators::read(graph)?;
    let mut lowering = Lowering::new(&operators, graph, processor)?;
    for at in 0..operators.all.len() {
        if !lowering.done.contains(&at) {
            let operator = &operators.all[at];
            if lowering.in_singles[at] {
                lowering.in_single_precision(operator)?;
            } else {
                lowering.operator(operator)?;
            }
        }
    }
    lowering.finish()
}

/// What numbers of a map are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Storage {
    /// u8.
    Bytes,
    /// s16.
    Sums,
    /// Single precision.
    Singles,
}

/// A map in memory.
#[derive(Debug, Clone, Copy)]
struct Value {
    storage: Storage,
    len: usize,
}

/// A network in the making. Until it is finished, slots number [`Value`]s.
struct Lowering<'a> {
    processor: Processor,
    operators: &'a Operators,
    constants: Constants<'a>,
    /// Channels, height and width of maps.
    sizes: HashMap<&'a str, [usize; 3]>,
    /// Scales of residual sums.
    sum_scales: HashMap<&'a str, f32>,
    /// Whether operators compute in single precision.
    in_singles: Vec<bool>,
    /// Operators that are part of others, by number.
    done: HashSet<usize>,
    values: Vec<Value>,
    bytes: HashMap<&'a str, Slot>,
    sums: HashMap<&'a str, Slot>,
    singles: HashMap<&'a str, Slot>,
    /// Maps that are u8, in single precision.
    dequantised: HashMap<&'a str, Slot>,
    /// In order; `None`: it moved to the end, with what it is part of.
    steps: Vec<Option<Step>>,
    /// Steps that make residual sums, by value.
    makers: HashMap<Slot, usize>,
    image: Slot,
    image_singles: Option<Slot>,
    classes: Option<usize>,
    features: Option<usize>,
    map: Option<[usize; 3]>,
}

fn uncovered(operator: &Operator, reason: &'static str) -> Int8Error {
    let kind = match &operator.kind {
        Kind::Conv { .. } | Kind::ChannelConv { .. } => "Conv",
        Kind::Function(_) => "activation",
        Kind::Add => "Add",
        Kind::Gate | Kind::Times(_) => "Mul",
        Kind::MaxPool(_) => "MaxPool",
        Kind::AveragePool(..) => "AveragePool",
        Kind::GlobalMean => "GlobalAveragePool",
        Kind::Flatten => "Flatten",
        Kind::Linear { .. } => "Gemm",
    };
    Int8Error::uncovered(kind, &operator.name, reason)
}

impl<'a> Lowering<'a> {
    fn new(operators: &'a Operators, graph: &'a GraphProto, processor: Processor) -> Result<Self, Int8Error> {
        let sum_scales = sum_scales(operators);
        let mut lowering = Self {
            processor,
            operators,
            constants: Constants::of(graph),
            sizes: HashMap::from([(operators.input.as_str(), operators.shape)]),
            in_singles: in_singles(operators, &sum_scales),
            sum_scales,
            done: HashSet::new(),
            values: Vec::new(),
            bytes: HashMap::new(),
            sums: HashMap::new(),
            singles: HashMap::new(),
            dequantised: HashMap::new(),
            steps: Vec::new(),
            makers: HashMap::new(),
            image: 0,
            image_singles: None,
            classes: None,
            features: None,
            map: None,
        };
        lowering.image = lowering.value(Storage::Bytes, operators.shape)?;
        lowering.bytes.insert(&operators.input, lowering.image);
        for operator in &operators.all {
            let size = lowering.size_after(operator)?;
            lowering.sizes.insert(&operator.output, size);
        }
        Ok(lowering)
    }

    fn integers(&self, name: &str) -> Option<&'a [String; 2]> {
        self.operators.integers.get(name)
    }

    fn value(&mut self, storage: Storage, size: [usize; 3]) -> Result<Slot, Int8Error> {
        let len = size.iter().try_fold(1_usize, |len, &side| len.checked_mul(side));
        let len = len
            .filter(|len| (1..=LARGEST_MAP).contains(len))
            .ok_or(Int8Error::Overflow { what: "the size", name: format!("a map of {size:?}") })?;
        self.values.push(Value { storage, len });
        Ok(self.values.len() - 1)
    }

    fn scale(&self, map: &str) -> Result<Scale, Int8Error> {
        self.operators.scales.get(map).copied().ok_or_else(|| Int8Error::NoRange(map.into()))
    }

    /// Where an operator's input is, as bytes.
    fn input(&self, operator: &'a Operator, i: usize) -> Result<(Slot, Scale, [usize; 3]), Int8Error> {
        let edge = operator.inputs.get(i).filter(|edge| edge.bytes);
        let edge = edge.ok_or_else(|| uncovered(operator, "what it reads isn't quantised"))?;
        let slot = self.bytes.get(edge.map.as_str()).copied();
        let slot = slot.ok_or_else(|| Int8Error::Unreadable(format!("`{}` is read before it is made", edge.map)))?;
        Ok((slot, self.scale(&edge.map)?, self.sizes[edge.map.as_str()]))
    }

    /// Operators that read a map, and whether as bytes.
    fn readers(&self, map: &'a str) -> Vec<(usize, &'a Operator, bool)> {
        let operators = self.operators;
        operators.readers(map).map(|(i, j)| (i, &operators.all[i], operators.all[i].inputs[j].bytes)).collect()
    }

    fn operator(&mut self, operator: &'a Operator) -> Result<(), Int8Error> {
        match &operator.kind {
            Kind::Conv { .. } | Kind::ChannelConv { .. } | Kind::Gate => {
                let output: &'a str = &operator.output;
                // the sum that it is a term of decides
                let awaits = match self.readers(output)[..] {
                    [(at, reader, false)] => reader.kind == Kind::Add && !self.in_singles[at],
                    _ => false,
                };
                let finished = if awaits {
                    let scale = self.sum_scale(output)?.into();
                    let plain = Output::Sum { relu: false, read: None };
                    Finished { map: output, output: plain, scale, sums: Some(output), bytes: None, singles: None }
                } else {
                    self.finished(operator, false)?
                };
                let map = finished.map;
                let step = match &operator.kind {
                    Kind::Gate => self.gate(operator, finished)?,
                    _ => self.convolution(operator, finished)?,
                };
                self.push(step);
                self.read_otherwise(operator, map)
            }
            Kind::Linear { .. } => {
                if operator.output != OUTPUT {
                    return Err(uncovered(operator, "it doesn't make the logits"));
                }
                let finished = Finished {
                    map: OUTPUT,
                    output: Output::Singles,
                    scale: 1.0,
                    sums: None,
                    bytes: None,
                    singles: None,
                };
                let step = self.convolution(operator, finished)?;
                self.classes = Some(step.size[0]);
                self.push(step);
                Ok(())
            }
            Kind::Add => self.sum(operator),
            Kind::Function(function) => {
                let (x, scale, size) = self.input(operator, 0)?;
                let to = self.scale(&operator.output)?;
                let work = Work::LookUp(Box::new(table(*function, scale, to)));
                self.bytes_step(&operator.output, Step { x: Some(x), ..step(operator, work, size) })
            }
            Kind::MaxPool(window) | Kind::AveragePool(window, _) => {
                let (x, scale, [channels, height, width]) = self.input(operator, 0)?;
                let size = self.sizes[operator.output.as_str()];
                if self.scale(&operator.output)? != scale {
                    return Err(uncovered(operator, "its scale changes"));
                }
                let pool = Pool {
                    channels,
                    size: [height, width],
                    out_size: [size[1], size[2]],
                    kernel: window.kernel,
                    stride: window.stride,
                    pads: [window.pads[0], window.pads[1]],
                    largest: matches!(operator.kind, Kind::MaxPool(_)),
                    counts_padding: matches!(operator.kind, Kind::AveragePool(_, true)),
                    zero: scale.zero,
                };
                if window.dilation != [1, 1] {
                    return Err(uncovered(operator, "its window is dilated"));
                }
                self.bytes_step(&operator.output, Step { x: Some(x), ..step(operator, Work::Pool(pool), size) })
            }
            Kind::GlobalMean => self.mean(operator),
            Kind::Flatten => Err(uncovered(operator, "it isn't of a mean")),
            Kind::Times(factor) => {
                let (x, scale, size) = self.input(operator, 0)?;
                if operator.output != MAP {
                    return Err(uncovered(operator, "it isn't the output `map`"));
                }
                let factor = (scale.step() * f64::from(*factor)) as f32;
                self.map = Some(size);
                let work = Work::Map { zero: scale.zero, factor };
                self.push(Step { x: Some(x), ..step(operator, work, size) });
                Ok(())
            }
        }
    }

    /// Adds a step at the end.
    fn push(&mut self, step: Step) {
        if let Some(value) = step.sums {
            self.makers.insert(value, self.steps.len());
        }
        self.steps.push(Some(step));
    }

    /// Adds a step that makes a map in bytes.
    fn bytes_step(&mut self, map: &'a str, step: Step) -> Result<(), Int8Error> {
        let bytes = self.value(Storage::Bytes, step.size)?;
        self.bytes.insert(map, bytes);
        let map = Some((map.to_string(), self.scale(map)?));
        self.push(Step { bytes: Some(bytes), map, ..step });
        Ok(())
    }

    fn sum_scale(&self, map: &str) -> Result<f32, Int8Error> {
        self.sum_scales.get(map).copied().ok_or_else(|| Int8Error::NoRange(map.into()))
    }
}

fn step(operator: &Operator, work: Work, size: [usize; 3]) -> Step {
    let name = operator.name.clone();
    Step {
        name,
        work,
        x: None,
        gate: None,
        terms: None,
        addend: None,
        from: None,
        from_too: None,
        sums: None,
        bytes: None,
        singles: None,
        size,
        pixels: 0,
        map: None,
    }
}
