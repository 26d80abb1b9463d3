//! From standard ONNX with quantised operators to a [`Network`]: activations go into the tables of what is before them, sums
//! into what makes their last term, and every map gets a place in memory.

use std::collections::{BTreeMap, HashMap, HashSet};

use prost::Message as _;

use super::constants::{Constants, INT8};
use super::function::Function;
use super::network::{Network, Slot, Step, Work};
use super::operators::{Kind, Operator, Operators, Window};
use super::scale::{Scale, table, widening};
use super::{Int8Error, NETWORK};
use crate::kernels::DOMAIN;
use crate::kernels::int8::packed::Packed;
use crate::kernels::int8::processor::Processor;
use crate::kernels::int8::{Conv, Gated, Output, Pool, Read, ToBytes};
use crate::model::{FEATURES, INPUT, MAP, OUTPUT};
use crate::pb::onnx::{GraphProto, ModelProto, NodeProto};

/// How much finer than bytes a residual sum is.
const FINER: f32 = 64.0;
/// What sums stay below, and what they stay below once they are scaled.
const MOST: f64 = (1_u64 << 31) as f64;
const MOST_SCALED: f64 = (1 << 30) as f64;

/// A sum that nothing is done to.
const PLAIN_SUM: Output = Output::Sum { relu: false, read: None };

/// Most values of all maps together, of an image.
const MOST_VALUES: usize = 1 << 30;

/// Most values of a map: far more than any network has.
const LARGEST_MAP: usize = 1 << 28;

/// Whether a graph has quantised maps: whether it is one to [lower].
pub fn is_quantised(model: &ModelProto) -> bool {
    model.graph.as_ref().is_some_and(|graph| graph.node.iter().any(|node| node.op_type == "QuantizeLinear"))
}

/// As [`is_quantised`], of a file that may be no graph.
pub fn is_quantised_file(onnx: &[u8]) -> bool {
    // decoding copies weights: most files are seen not to be by the operator's name alone
    let named = onnx.split(|&byte| byte == b'Q').skip(1).any(|rest| rest.starts_with(b"uantizeLinear"));
    named && ModelProto::decode(onnx).is_ok_and(|model| is_quantised(&model))
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
    let model = ModelProto::decode(onnx).map_err(|e| Int8Error::Unreadable(e.to_string()))?;
    let graph = model.graph.as_ref().ok_or_else(|| Int8Error::Unreadable("there is no graph in it".into()))?;
    let operators = Operators::read(graph)?;
    let mut lowering = Lowering::new(&operators, graph, processor)?;
    for at in 0..operators.all.len() {
        if !lowering.done.contains(&at) {
            lowering.operator(&operators.all[at])?;
        }
    }
    lowering.finish()
}

/// A map in memory.
#[derive(Debug, Clone, Copy)]
struct Value {
    is_sum: bool,
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
    /// Operators, by place, that are part of others.
    done: HashSet<usize>,
    values: Vec<Value>,
    bytes: HashMap<&'a str, Slot>,
    sums: HashMap<&'a str, Slot>,
    steps: Vec<Step>,
    image: Slot,
    classes: Option<usize>,
    features: Option<usize>,
    map: Option<[usize; 3]>,
}

/// What becomes of an operator's integers.
struct Finished<'a> {
    output: Output,
    /// The scale that they get.
    scale: f64,
    /// The map that sums are, where they are read.
    sums: Option<&'a str>,
    /// The map that bytes are, where they are read.
    bytes: Option<(&'a str, Scale)>,
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
        let mut lowering = Self {
            processor,
            operators,
            constants: Constants::of(graph),
            sizes: HashMap::from([(operators.input.as_str(), operators.shape)]),
            sum_scales: sum_scales(operators),
            done: HashSet::new(),
            values: Vec::new(),
            bytes: HashMap::new(),
            sums: HashMap::new(),
            steps: Vec::new(),
            image: 0,
            classes: None,
            features: None,
            map: None,
        };
        lowering.image = lowering.value(false, operators.shape)?;
        lowering.bytes.insert(&operators.input, lowering.image);
        for operator in &operators.all {
            let size = lowering.size_after(operator)?;
            lowering.sizes.insert(&operator.output, size);
        }
        Ok(lowering)
    }

    /// Channels, height and width of what an operator makes.
    fn size_after(&self, operator: &'a Operator) -> Result<[usize; 3], Int8Error> {
        let unknown = || Int8Error::Unreadable(format!("`{}` reads what nothing makes", operator.name));
        let inputs: Vec<[usize; 3]> = operator
            .inputs
            .iter()
            .map(|edge| self.sizes.get(edge.map.as_str()).copied().ok_or_else(unknown))
            .collect::<Result<_, _>>()?;
        let &[channels, height, width] = inputs.first().ok_or_else(unknown)?;
        let after = |window: &Window| {
            window.out_size([height, width]).ok_or_else(|| uncovered(operator, "its window is larger than the map"))
        };
        Ok(match &operator.kind {
            Kind::Conv { window, weight, .. } => {
                let filters = self.integers(weight).and_then(|[s8, _]| self.constants.dims(s8)?.first().copied());
                let [height, width] = after(window)?;
                [filters.ok_or_else(|| uncovered(operator, "its weights aren't integers"))?, height, width]
            }
            Kind::MaxPool(window) | Kind::AveragePool(window, _) => {
                let [height, width] = after(window)?;
                [channels, height, width]
            }
            Kind::Add if inputs.iter().any(|size| *size != [channels, height, width]) => {
                return Err(uncovered(operator, "its terms differ in size"));
            }
            Kind::Gate if inputs.get(1) != Some(&[channels, 1, 1]) => {
                return Err(uncovered(operator, "its factor isn't one pixel"));
            }
            Kind::ChannelConv { .. } if height * width != 1 => {
                return Err(uncovered(operator, "it is of more than one pixel"));
            }
            Kind::GlobalMean => [channels, 1, 1],
            Kind::Flatten if height * width != 1 => return Err(uncovered(operator, "it is of more than one pixel")),
            Kind::Linear { .. } if height * width != 1 => {
                return Err(uncovered(operator, "it is of more than one pixel"));
            }
            Kind::Linear { weight, .. } => {
                let classes = self.integers(weight).and_then(|[s8, _]| self.constants.dims(s8)?.first().copied());
                [classes.ok_or_else(|| uncovered(operator, "its weights aren't integers"))?, 1, 1]
            }
            _ => [channels, height, width],
        })
    }

    fn integers(&self, name: &str) -> Option<&'a [String; 2]> {
        self.operators.integers.get(name)
    }

    fn value(&mut self, is_sum: bool, size: [usize; 3]) -> Result<Slot, Int8Error> {
        let len = size.iter().try_fold(1_usize, |len, &side| len.checked_mul(side));
        let len = len
            .filter(|len| (1..=LARGEST_MAP).contains(len))
            .ok_or(Int8Error::Overflow { what: "the size", name: format!("a map of {size:?}") })?;
        self.values.push(Value { is_sum, len });
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
                let awaits = matches!(self.readers(output)[..], [(_, reader, false)] if reader.kind == Kind::Add);
                let finished = if awaits {
                    let scale = self.sum_scale(output)?;
                    Finished {
                        output: Output::Sum { relu: false, read: None },
                        scale: scale.into(),
                        sums: Some(output),
                        bytes: None,
                    }
                } else {
                    self.finished(operator, false)?
                };
                let step = match &operator.kind {
                    Kind::Gate => self.gate(operator, finished)?,
                    _ => self.convolution(operator, finished)?,
                };
                self.steps.push(step);
                Ok(())
            }
            Kind::Linear { .. } => {
                if operator.output != OUTPUT {
                    return Err(uncovered(operator, "it doesn't make the logits"));
                }
                let finished = Finished { output: Output::Singles, scale: 1.0, sums: None, bytes: None };
                let step = self.convolution(operator, finished)?;
                self.classes = Some(step.size[0]);
                self.steps.push(step);
                Ok(())
            }
            Kind::Add => self.sum(operator),
            Kind::Function(function) => {
                let (x, scale, size) = self.input(operator, 0)?;
                let to = self.scale(&operator.output)?;
                let work = Work::LookUp(Box::new(table(*function, scale, to)));
                self.bytes_step(operator, work, x, size)
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
                self.bytes_step(operator, Work::Pool(pool), x, size)
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
                self.steps.push(Step { x: Some(x), ..step(operator, work, size) });
                Ok(())
            }
        }
    }

    /// Adds a step that makes bytes of bytes.
    fn bytes_step(&mut self, operator: &'a Operator, work: Work, x: Slot, size: [usize; 3]) -> Result<(), Int8Error> {
        let (map, bytes) = (operator.output.as_str(), self.value(false, size)?);
        self.bytes.insert(map, bytes);
        let map = Some((map.to_string(), self.scale(map)?));
        self.steps.push(Step { x: Some(x), bytes: Some(bytes), map, ..step(operator, work, size) });
        Ok(())
    }

    fn sum_scale(&self, map: &str) -> Result<f32, Int8Error> {
        self.sum_scales.get(map).copied().ok_or_else(|| Int8Error::NoRange(map.into()))
    }

    /// What becomes of an operator's integers, by who reads them: a ReLU and an activation that read nothing else become
    /// part of it.
    fn finished(&mut self, operator: &'a Operator, is_sum: bool) -> Result<Finished<'a>, Int8Error> {
        let (mut map, mut relu, mut clips) = (operator.output.as_str(), false, false);
        if let [(at, reader, false)] = self.readers(map)[..]
            && let Kind::Function(function @ (Function::Relu | Function::Relu6)) = reader.kind
        {
            if is_sum && function == Function::Relu6 {
                return Err(uncovered(reader, "it is of a sum"));
            }
            self.done.insert(at);
            clips = function == Function::Relu6;
            (map, relu) = (&reader.output, true);
        }
        let readers = self.readers(map);
        let terms = readers.iter().filter(|(_, reader, bytes)| !bytes && reader.kind == Kind::Add).count();
        let as_bytes: Vec<_> = readers.iter().filter(|(.., bytes)| *bytes).collect();
        if terms + as_bytes.len() != readers.len() {
            return Err(uncovered(operator, "what reads it doesn't take integers"));
        }
        let mut bytes = None;
        let mut to = ToBytes { zero: 0, table: None };
        if !as_bytes.is_empty() {
            let scale = self.scale(map)?;
            to.zero = scale.zero;
            bytes = Some((map, scale));
            if let [(at, reader, _)] = as_bytes[..]
                && let Kind::Function(function) = reader.kind
            {
                let after = self.scale(&reader.output)?;
                to.table = Some(Box::new(table(function, scale, after)));
                bytes = Some((&reader.output, after));
                self.done.insert(*at);
            }
        }
        let is_sum = is_sum || terms > 0;
        if is_sum && clips {
            return Err(uncovered(operator, "a sum can't be limited to 6"));
        }
        if !is_sum {
            let scale = self.scale(map)?;
            if as_bytes.is_empty() || (relu && scale.zero != 0) {
                return Err(uncovered(operator, "what it makes isn't read as it has to be"));
            }
            return Ok(Finished { output: Output::Bytes(to), scale: scale.step(), sums: None, bytes });
        }
        let scale = self.sum_scale(map)?;
        if bytes.is_some() && 32_768.0 * f64::from(scale) / self.scale(map)?.step() >= MOST_SCALED {
            return Err(Int8Error::Overflow { what: "a sum read as bytes", name: operator.name.clone() });
        }
        let read = match bytes {
            Some(_) => Some(Read { factor: (f64::from(scale) / self.scale(map)?.step()) as f32, to }),
            None => None,
        };
        let sums = (terms > 0).then_some(map);
        Ok(Finished { output: Output::Sum { relu, read }, scale: scale.into(), sums, bytes })
    }

    /// A step with room for what it makes.
    fn placed(&mut self, mut step: Step, finished: &Finished<'a>) -> Result<Step, Int8Error> {
        (step.sums, step.bytes, step.map) = (None, None, None);
        if let Some(map) = finished.sums {
            let slot = self.value(true, step.size)?;
            self.sums.insert(map, slot);
            step.sums = Some(slot);
        }
        if let Some((map, scale)) = finished.bytes {
            let slot = self.value(false, step.size)?;
            self.bytes.insert(map, slot);
            step.bytes = Some(slot);
            step.map = Some((map.into(), scale));
        }
        Ok(step)
    }

    /// A convolution or the classifier.
    fn convolution(&mut self, operator: &'a Operator, finished: Finished<'a>) -> Result<Step, Int8Error> {
        let (x, input, [channels, height, width]) = self.input(operator, 0)?;
        let size = self.sizes[operator.output.as_str()];
        let one = Window { kernel: [1, 1], stride: [1, 1], dilation: [1, 1], pads: [0; 4] };
        // a pixel's channels as a row of pixels of one channel
        let row = |kernel: usize, pad: usize| Window { kernel: [1, kernel], pads: [0, pad, 0, pad], ..one };
        let mut places = [[channels, height, width], size];
        let (window, groups, weight, bias) = match &operator.kind {
            Kind::Conv { window, groups, weight, bias } => (*window, *groups, weight, Some(bias)),
            Kind::ChannelConv { kernel, pad, weight } => {
                places = [[1, 1, channels]; 2];
                (row(*kernel, *pad), 1, weight, None)
            }
            Kind::Linear { weight, bias } => (one, 1, weight, Some(bias)),
            _ => return Err(uncovered(operator, "it has no weights")),
        };
        let unreadable = || uncovered(operator, "its weights aren't integers that fit it");
        let [weight, scales] = self.integers(weight).ok_or_else(unreadable)?;
        let [[channels, height, width], out] = places;
        let dims = self.constants.dims(weight).ok_or_else(unreadable)?;
        let weight = self.constants.bytes(weight, INT8).ok_or_else(unreadable)?;
        let scales = self.constants.singles(scales).ok_or_else(unreadable)?;
        let (filters, depth, taps) = (out[0], channels / groups, window.kernel[0] * window.kernel[1]);
        let bias = match bias {
            Some(bias) => {
                let [bias, steps] = self.integers(bias).ok_or_else(unreadable)?;
                let step = |scale: &f32| (f64::from(*scale) * input.step()) as f32;
                let steps = self.constants.singles(steps).ok_or_else(unreadable)?;
                if !steps.iter().copied().eq(scales.iter().map(step)) {
                    return Err(uncovered(operator, "its biases have other scales than its products"));
                }
                self.constants.integers(bias).ok_or_else(unreadable)?
            }
            None => vec![0; filters],
        };
        let sides = dims.get(2..).unwrap_or_default();
        let fits = dims.get(..2) == Some(&[filters, depth][..])
            && [&window.kernel[..], &window.kernel[1..], &[]].contains(&sides)
            && sides.iter().product::<usize>() == taps
            && channels.is_multiple_of(groups)
            && filters.is_multiple_of(groups)
            && height * width > 0
            && bias.len() == filters
            && scales.len() == filters
            && scales.iter().all(|scale| scale.is_normal() && *scale > 0.0);
        if !fits {
            return Err(unreadable());
        }
        let mut conv = Conv {
            channels,
            size: [height, width],
            filters,
            out_size: [out[1], out[2]],
            groups,
            kernel: window.kernel,
            stride: window.stride,
            dilation: window.dilation,
            pads: [window.pads[0], window.pads[1]],
            zero: input.zero,
            weight: Vec::with_capacity(weight.len()),
            bias: Vec::with_capacity(filters),
            factor: Vec::with_capacity(filters),
            output: finished.output.clone(),
        };
        for ((filter, bias), scale) in weight.chunks_exact(depth * taps).zip(bias).zip(scales) {
            // channels last
            conv.weight.extend((0..taps).flat_map(|tap| (0..depth).map(move |d| filter[d * taps + tap] as i8)));
            let sums = |of: fn(i64) -> i64| filter.iter().map(|&w| of(i64::from(w as i8))).sum::<i64>();
            let folded = i64::from(bias) - i64::from(input.zero) * sums(|w| w);
            let factor = (input.step() * f64::from(scale) / finished.scale) as f32;
            let most = 255.0 * sums(i64::abs) as f64 + folded.abs() as f64;
            let overflows = |what| Int8Error::Overflow { what, name: operator.name.clone() };
            conv.bias.push(i32::try_from(folded).map_err(|_| overflows("a bias"))?);
            if most >= MOST {
                return Err(overflows("a sum"));
            }
            if !factor.is_finite() || most * f64::from(factor) >= MOST_SCALED {
                return Err(overflows("a scaled sum"));
            }
            conv.factor.push(factor);
        }
        let step = Step { x: Some(x), ..step(operator, Work::Conv(Box::new(Packed::new(self.processor, conv))), size) };
        self.placed(step, &finished)
    }

    fn gate(&mut self, operator: &'a Operator, finished: Finished<'a>) -> Result<Step, Int8Error> {
        let (x, map, size) = self.input(operator, 0)?;
        let (gate, factor, _) = self.input(operator, 1)?;
        let gated = Gated {
            zero: map.zero,
            gate_zero: factor.zero,
            factor: (map.step() * factor.step() / finished.scale) as f32,
            output: finished.output.clone(),
        };
        if f64::from(gated.factor) * 255.0 * 255.0 >= MOST_SCALED {
            return Err(Int8Error::Overflow { what: "a product", name: operator.name.clone() });
        }
        let step = Step { x: Some(x), gate: Some(gate), ..step(operator, Work::Gated(gated), size) };
        self.placed(step, &finished)
    }

    /// A sum becomes part of the step that makes its last term, if only the sum reads that.
    fn sum(&mut self, operator: &'a Operator) -> Result<(), Int8Error> {
        let [a, b] = operator.inputs.as_slice() else { return Err(uncovered(operator, "it has not two terms")) };
        let finished = self.finished(operator, true)?;
        let scale = self.sum_scale(&operator.output)?;
        let maker = |edge: &super::operators::Edge| {
            let slot = self.sums.get(edge.map.as_str()).filter(|_| !edge.bytes)?;
            let alone = self.operators.readers(&edge.map).count() == 1;
            // what is activated or read before the sum stays as it is
            let is_plain = |step: &Step| match &step.work {
                Work::Conv(packed) => packed.conv().output == PLAIN_SUM,
                Work::Gated(gated) => gated.output == PLAIN_SUM,
                _ => false,
            };
            let is_maker = |step: &Step| step.sums == Some(*slot) && is_plain(step);
            if alone {
                self.steps.iter().position(is_maker).filter(|&at| self.steps[at].addend.is_none())
            } else {
                None
            }
        };
        let last = match (maker(a), maker(b)) {
            (Some(i), Some(j)) if i > j => Some((i, b)),
            (_, Some(j)) => Some((j, a)),
            (Some(i), None) => Some((i, b)),
            (None, None) => None,
        };
        let size = self.sizes[operator.output.as_str()];
        if let Some((at, other)) = last {
            let addend = self.term(operator, other, scale)?;
            // terms are widened by steps at the end, and before what reads them
            let mut step = self.steps.remove(at);
            step.addend = Some(addend);
            match &mut step.work {
                Work::Conv(packed) => packed.set_output(finished.output.clone()),
                Work::Gated(gated) => gated.output = finished.output.clone(),
                _ => {}
            }
            let step = self.placed(step, &finished)?;
            self.steps.push(step);
            return Ok(());
        }
        let (terms, addend) = (self.term(operator, a, scale)?, self.term(operator, b, scale)?);
        let step = step(operator, Work::Add(finished.output.clone()), size);
        let step = self.placed(Step { terms: Some(terms), addend: Some(addend), ..step }, &finished)?;
        self.steps.push(step);
        Ok(())
    }

    /// Where a term of a sum is.
    fn term(
        &mut self,
        operator: &'a Operator,
        edge: &'a super::operators::Edge,
        scale: f32,
    ) -> Result<Slot, Int8Error> {
        let map = edge.map.as_str();
        if !edge.bytes {
            let slot = self.sums.get(map).copied();
            return slot.ok_or_else(|| uncovered(operator, "a term of the sum isn't made before it"));
        }
        let x = self
            .bytes
            .get(map)
            .copied()
            .ok_or_else(|| uncovered(operator, "a term of the sum isn't made before it"))?;
        let size = self.sizes[map];
        let sums = self.value(true, size)?;
        let work = Work::Widen(Box::new(widening(self.scale(map)?, scale)));
        self.steps.push(Step { x: Some(x), sums: Some(sums), ..step(operator, work, size) });
        Ok(sums)
    }

    /// The mean of a map: for a gate, or what the classifier reads.
    fn mean(&mut self, operator: &'a Operator) -> Result<(), Int8Error> {
        let (x, from, [channels, height, width]) = self.input(operator, 0)?;
        let pixels = height * width;
        let share = from.step() / pixels as f64;
        let mut map = operator.output.as_str();
        if let [(at, reader, false)] = self.readers(map)[..]
            && reader.kind == Kind::Flatten
        {
            self.done.insert(at);
            map = &reader.output;
        }
        let mut feature =
            if self.operators.outputs.iter().any(|output| output == map) { Some((map, share)) } else { None };
        for (at, reader, bytes) in self.readers(map) {
            match reader.kind {
                Kind::Times(factor) if !bytes => {
                    self.done.insert(at);
                    feature = Some((&reader.output, share * f64::from(factor)));
                }
                _ if bytes => {}
                _ => return Err(uncovered(reader, "it reads a mean that isn't quantised")),
            }
        }
        let size = [channels, 1, 1];
        if let Some((name, factor)) = feature {
            if name != FEATURES {
                return Err(uncovered(operator, "it isn't the output `features`"));
            }
            self.features = Some(channels);
            let work = Work::Features { zero: from.zero, factor: factor as f32 };
            self.steps.push(Step { x: Some(x), pixels, ..step(operator, work, size) });
        }
        let to = self.scale(map)?;
        let factor = (share / to.step()) as f32;
        if f64::from(factor) * 255.0 * pixels as f64 >= MOST_SCALED || 255.0 * pixels as f64 >= MOST {
            return Err(Int8Error::Overflow { what: "a mean", name: operator.name.clone() });
        }
        let bytes = self.value(false, size)?;
        self.bytes.insert(map, bytes);
        let work = Work::Mean { zero: from.zero, factor, to: ToBytes { zero: to.zero, table: None } };
        let map = Some((map.to_string(), to));
        self.steps.push(Step { x: Some(x), bytes: Some(bytes), pixels, map, ..step(operator, work, size) });
        Ok(())
    }

    /// Gives every value a slot that no value has which is still read.
    fn finish(self) -> Result<Network, Int8Error> {
        let Self { processor, mut steps, values, operators, image, .. } = self;
        let reads = |step: &Step| [step.x, step.gate, step.terms, step.addend].into_iter().flatten();
        let mut last: BTreeMap<Slot, usize> = BTreeMap::new();
        for (at, step) in steps.iter().enumerate() {
            last.extend(reads(step).map(|value| (value, at)));
        }
        let mut places = Places {
            values: &values,
            slots: [Vec::new(), Vec::new()],
            free: [Vec::new(), Vec::new()],
            of: HashMap::new(),
        };
        places.give(image);
        for (at, step) in steps.iter_mut().enumerate() {
            let read: Vec<Slot> = reads(step).collect();
            for value in [step.sums, step.bytes].into_iter().flatten() {
                places.give(value);
            }
            let written: Vec<Slot> = [step.sums, step.bytes].into_iter().flatten().collect();
            for slot in
                [&mut step.x, &mut step.gate, &mut step.terms, &mut step.addend, &mut step.sums, &mut step.bytes]
            {
                *slot = slot.and_then(|value| places.of.get(&value).copied());
            }
            let mut over: Vec<Slot> = read.into_iter().filter(|value| last[value] == at).collect();
            over.extend(written.into_iter().filter(|value| !last.contains_key(value)));
            over.sort_unstable();
            over.dedup();
            over.into_iter().for_each(|value| places.take_back(value));
        }
        let all = places.slots.iter().flatten().try_fold(0_usize, |all, &len| all.checked_add(len));
        if all.is_none_or(|all| all > MOST_VALUES) {
            return Err(Int8Error::Overflow { what: "the size", name: "all maps together".into() });
        }
        let image = places.of.get(&image).copied().unwrap_or_default();
        let Places { slots: [bytes, sums], .. } = places;
        let classes = self.classes.ok_or_else(|| Int8Error::Unreadable("it makes no logits".into()))?;
        let input = operators.scales.get(&operators.input).copied();
        let input = input.ok_or_else(|| Int8Error::NoRange(operators.input.clone()))?;
        Ok(Network {
            processor,
            steps,
            shape: operators.shape,
            input,
            image,
            bytes,
            sums,
            classes,
            features: self.features,
            map: self.map,
        })
    }
}

/// Slots being given to values.
struct Places<'a> {
    values: &'a [Value],
    /// Sizes of slots: of bytes, and of sums.
    slots: [Vec<usize>; 2],
    free: [Vec<Slot>; 2],
    of: HashMap<Slot, Slot>,
}

impl Places<'_> {
    fn give(&mut self, value: Slot) {
        let Value { is_sum, len } = self.values[value];
        let (slots, free) = (&mut self.slots[usize::from(is_sum)], &mut self.free[usize::from(is_sum)]);
        // the one that is nearest in size
        let nearest = free.iter().enumerate().min_by_key(|(_, slot)| slots[**slot].abs_diff(len)).map(|(i, _)| i);
        let slot = match nearest {
            Some(i) => free.swap_remove(i),
            None => {
                slots.push(0);
                slots.len() - 1
            }
        };
        slots[slot] = slots[slot].max(len);
        self.of.insert(value, slot);
    }

    fn take_back(&mut self, value: Slot) {
        if let Some(slot) = self.of.remove(&value) {
            self.free[usize::from(self.values[value].is_sum)].push(slot);
        }
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
        sums: None,
        bytes: None,
        size,
        pixels: 0,
        map: None,
    }
}

/// Scales of residual sums: one for all maps that sums connect, finer than the coarsest bytes that are read of them.
fn sum_scales(operators: &Operators) -> HashMap<&str, f32> {
    let mut stream: HashMap<&str, usize> = HashMap::new();
    let join = |maps: &[&'_ str], stream: &mut HashMap<&'_ str, usize>| {
        let known: Vec<usize> = maps.iter().filter_map(|map| stream.get(map).copied()).collect();
        let own = known.iter().copied().min().unwrap_or(stream.len());
        stream.values_mut().filter(|of| known.contains(of)).for_each(|of| *of = own);
        own
    };
    for operator in &operators.all {
        let plain = operator.inputs.iter().filter(|edge| !edge.bytes).map(|edge| edge.map.as_str());
        let is_sum = match operator.kind {
            Kind::Add => true,
            // of a sum
            Kind::Function(_) => plain.clone().any(|map| stream.contains_key(map)),
            _ => false,
        };
        if is_sum {
            let maps: Vec<&str> = plain.chain([operator.output.as_str()]).collect();
            let own = join(&maps, &mut stream);
            stream.extend(maps.into_iter().map(|map| (map, own)));
        }
    }
    let mut coarsest: HashMap<usize, f32> = HashMap::new();
    for (map, of) in &stream {
        let read = operators.readers(map).any(|(i, j)| operators.all[i].inputs[j].bytes);
        if let Some(scale) = operators.scales.get(*map).filter(|_| read) {
            let entry = coarsest.entry(*of).or_insert(0.0);
            *entry = entry.max(scale.scale);
        }
    }
    stream.into_iter().filter_map(|(map, of)| Some((map, coarsest.get(&of)? / FINER))).collect()
}
