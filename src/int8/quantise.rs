//! A folded network in single precision, and the ranges of its maps, become standard ONNX with quantised operators:
//! `QuantizeLinear` and `DequantizeLinear` around everything that is integer.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use prost::Message as _;

use super::Int8Error;
use super::constants::{Constants, INT8, INT32, UINT8};
use super::function::Function;
use super::operators::{Kind, Operator, Operators};
use super::scale::Scale;
use crate::graph::{FLOAT, int};
use crate::model::MapRange;
use crate::pb::onnx::{GraphProto, ModelProto, NodeProto, TensorProto};

/// Names that are offered for one that isn't known.
const NEAREST: usize = 3;

/// Largest bias: exact in single precision.
const LARGEST_BIAS: f64 = (1 << 24) as f64;

/// A folded network in single precision, to be quantised.
#[derive(Debug)]
pub struct Plan {
    model: ModelProto,
    operators: Operators,
    /// Range of the numbers of images.
    image: (f32, f32),
    /// Layers that stay in single precision.
    kept: BTreeSet<String>,
    /// Maps that are u8, in the order they are made, and where those scales come from that aren't measured.
    maps: Vec<(String, Origin)>,
}

/// Where a map's scale comes from.
#[derive(Debug, Clone, PartialEq)]
enum Origin {
    /// From its range.
    Measured,
    /// From this range.
    Fixed(f32, f32),
    /// It is another map's.
    SameAs(String),
}

/// Whether a layer has this name, or is below it.
pub fn is_below(layer: &str, name: &str) -> bool {
    layer.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

impl Plan {
    /// Reads a folded graph; `image` is the range of the numbers of images.
    pub fn new(onnx: &[u8], image: (f32, f32)) -> Result<Self, Int8Error> {
        let model = ModelProto::decode(onnx).map_err(|e| Int8Error::Unreadable(e.to_string()))?;
        let graph = model.graph.as_ref().ok_or_else(|| Int8Error::Unreadable("there is no graph in it".into()))?;
        let operators = Operators::read(graph)?;
        let mut plan = Self { operators, image, kept: BTreeSet::new(), maps: Vec::new(), model };
        plan.arrange();
        Ok(plan)
    }

    /// Chooses the layers that stay in single precision, by name. What is read of them is u8 only where an operator of
    /// integers reads it, and what they read isn't where it comes from a convolution, a gate, a sum or a mean. Their [measured]
    /// maps are among those of a plan without them.
    ///
    /// [measured]: Self::measured
    pub fn keep(&mut self, layers: &BTreeSet<String>) {
        self.kept.clone_from(layers);
        self.arrange();
    }

    /// Finds the maps that are u8.
    fn arrange(&mut self) {
        let wanted = wanted(&self.operators, &self.kept);
        for (operator, inputs) in self.operators.all.iter_mut().zip(wanted) {
            for (edge, bytes) in operator.inputs.iter_mut().zip(inputs) {
                edge.bytes = bytes;
            }
        }
        let operators = &self.operators;
        let made = std::iter::once(&operators.input).chain(operators.all.iter().map(|operator| &operator.output));
        let is_read = |map: &&String| operators.readers(map).any(|(i, j)| operators.all[i].inputs[j].bytes);
        let origin = |map: &String| match operators.maker(map).map(|maker| (&maker.kind, &maker.inputs[..])) {
            None => Origin::Fixed(self.image.0, self.image.1),
            Some((Kind::MaxPool(_) | Kind::AveragePool(..), [from, ..])) => Origin::SameAs(from.map.clone()),
            Some((Kind::Function(Function::Sigmoid), _)) => Origin::Fixed(0.0, 1.0),
            Some(_) => Origin::Measured,
        };
        self.maps = made.filter(is_read).map(|map| (map.clone(), origin(map))).collect();
    }

    /// Maps whose ranges have to be known.
    pub fn measured(&self) -> impl Iterator<Item = &str> {
        self.maps.iter().filter(|(_, origin)| *origin == Origin::Measured).map(|(map, _)| map.as_str())
    }

    /// The activation of a map, if that is all that reads it as u8.
    pub fn activation(&self, map: &str) -> Option<Function> {
        let of = |(i, j): (usize, usize)| (&self.operators.all[i].kind, self.operators.all[i].inputs[j].bytes);
        let mut readers = self.operators.readers(map).map(of).filter(|(_, bytes)| *bytes);
        match (readers.next()?, readers.next()) {
            ((Kind::Function(function), _), None) => Some(*function),
            _ => None,
        }
    }

    /// Maps that a ReLU makes: ranges of theirs begin at 0.
    pub fn never_negative(&self) -> impl Iterator<Item = &str> {
        let makes = |maker: &Operator| {
            matches!(maker.kind, Kind::Function(Function::Relu | Function::Relu6 | Function::Sigmoid))
        };
        self.measured().filter(move |map| self.operators.maker(map).is_some_and(makes))
    }

    /// The folded graph with these maps as outputs: what to calibrate by.
    pub fn exposed(&self) -> Vec<u8> {
        let mut model = self.model.clone();
        if let Some(graph) = &mut model.graph {
            let maps: Vec<_> = self.measured().filter(|map| !self.operators.outputs.iter().any(|o| o == map)).collect();
            graph.output.extend(maps.into_iter().map(crate::graph::untyped));
        }
        model.encode_to_vec()
    }

    /// Layers with weights, in order.
    pub fn layers(&self) -> impl Iterator<Item = &str> {
        self.operators.all.iter().filter(|operator| has_weights(operator)).map(|operator| operator.name.as_str())
    }

    /// The layers that a name means: that one, or those below it, such as `stages.3`. Otherwise the nearest names there are.
    pub fn named(&self, name: &str) -> Result<Vec<&str>, String> {
        let found: Vec<&str> = self.layers().filter(|layer| is_below(layer, name)).collect();
        if !found.is_empty() {
            return Ok(found);
        }
        let ends = |layer: &'_ str| -> Vec<usize> {
            layer.match_indices('.').map(|(at, _)| at).chain([layer.len()]).collect()
        };
        let mut known: Vec<&str> =
            self.layers().flat_map(|layer| ends(layer).into_iter().map(move |end| &layer[..end])).collect();
        let likeness = |other: &str| strsim::normalized_damerau_levenshtein(name, other);
        known.sort_by(|a, b| likeness(b).total_cmp(&likeness(a)).then(a.cmp(b)));
        known.dedup();
        known.truncate(NEAREST);
        Err(known.join("`, `"))
    }

    /// The maps, of those that are `known`, that a map is made of.
    pub fn sources(&self, map: &str, known: impl Fn(&str) -> bool) -> Vec<&str> {
        let (mut found, mut seen, mut ahead) = (Vec::new(), HashSet::new(), vec![self.operators.maker(map)]);
        while let Some(maker) = ahead.pop() {
            for edge in maker.iter().flat_map(|maker| &maker.inputs) {
                if !seen.insert(edge.map.as_str()) {
                    continue;
                }
                if known(&edge.map) {
                    found.push(edge.map.as_str());
                } else {
                    ahead.push(self.operators.maker(&edge.map));
                }
            }
        }
        found
    }

    /// Every u8 map's scale.
    fn scales(&self, ranges: &BTreeMap<String, (f32, f32)>) -> Result<HashMap<&str, Scale>, Int8Error> {
        let mut scales = HashMap::new();
        for (map, origin) in &self.maps {
            let unknown = || Int8Error::NoRange(map.clone());
            let scale = match origin {
                Origin::Fixed(low, high) => Scale::of_range(*low, *high),
                Origin::SameAs(other) => *scales.get(other.as_str()).ok_or_else(unknown)?,
                Origin::Measured => {
                    let (low, high) = *ranges.get(map).ok_or_else(unknown)?;
                    Scale::of_range(low, high)
                }
            };
            scales.insert(map.as_str(), scale);
        }
        Ok(scales)
    }

    /// Every u8 map's numbers, with these ranges.
    pub fn map_ranges(&self, ranges: &BTreeMap<String, (f32, f32)>) -> Result<BTreeMap<String, MapRange>, Int8Error> {
        let of = |(map, scale): (&str, Scale)| {
            let (low, high) = (scale.value(0), scale.value(255));
            (map.to_string(), MapRange { low, high, scale: scale.scale, zero: scale.zero })
        };
        Ok(self.scales(ranges)?.into_iter().map(of).collect())
    }

    /// The network in integers, as ONNX.
    pub fn quantise(&self, ranges: &BTreeMap<String, (f32, f32)>) -> Result<Vec<u8>, Int8Error> {
        let graph = self.model.graph.as_ref().ok_or_else(|| Int8Error::Unreadable("there is no graph in it".into()))?;
        let scales = self.scales(ranges)?;
        let mut quantised = Quantised { constants: Constants::of(graph), nodes: Vec::new(), tensors: Vec::new() };
        let by_output: HashMap<&str, usize> =
            self.operators.all.iter().enumerate().map(|(i, operator)| (operator.output.as_str(), i)).collect();
        let mut u8_inputs: HashSet<(&str, &str)> = HashSet::new();
        for operator in &self.operators.all {
            for edge in operator.inputs.iter().filter(|edge| edge.bytes) {
                u8_inputs.insert((&operator.output, &edge.map));
            }
        }
        let silus: HashSet<&str> = self
            .operators
            .all
            .iter()
            .filter(|operator| operator.kind == Kind::Function(Function::Silu))
            .flat_map(|operator| operator.inputs.iter().filter(|edge| edge.bytes).map(|edge| edge.map.as_str()))
            .collect();
        for node in &graph.node {
            // the sigmoid of a SiLU reads what the product reads
            if let (None, [output], [input]) =
                (node.output.first().and_then(|o| by_output.get(o.as_str())), &node.output[..], &node.input[..])
                && silus.contains(input.as_str())
            {
                u8_inputs.insert((output, input));
            }
        }
        if let Some(scale) = scales.get(self.operators.input.as_str()) {
            quantised.map(&self.operators.input, *scale);
        }
        let mut replaced = HashSet::new();
        for node in &graph.node {
            let Some(output) = node.output.first() else { continue };
            let mut node = node.clone();
            let operator = by_output.get(output.as_str()).map(|&i| &self.operators.all[i]);
            let operator = operator.filter(|operator| !self.kept.contains(&operator.name));
            if let Some((Kind::ChannelConv { weight, .. }, edge)) =
                operator.and_then(|operator| Some((&operator.kind, operator.inputs.first()?)))
            {
                let scale = scales.get(edge.map.as_str()).ok_or_else(|| Int8Error::NoRange(edge.map.clone()))?;
                quantised.weights(&node.name, weight, None, *scale)?;
                replaced.insert(weight.clone());
                node.input.iter_mut().filter(|input| *input == weight).for_each(|input| input.push_str(".dq"));
            }
            if let Some((Kind::Conv { weight, bias, .. } | Kind::Linear { weight, bias }, edge)) =
                operator.and_then(|operator| Some((&operator.kind, operator.inputs.first()?)))
            {
                let scale = scales.get(edge.map.as_str()).ok_or_else(|| Int8Error::NoRange(edge.map.clone()))?;
                quantised.weights(&node.name, weight, Some(bias), *scale)?;
                for constant in [weight, bias] {
                    replaced.insert(constant.clone());
                    node.input.iter_mut().filter(|input| *input == constant).for_each(|input| input.push_str(".dq"));
                }
            }
            // what reads another shape of a u8 map reads it as u8
            let reshapes = node.op_type == "Reshape";
            for input in &mut node.input {
                let reads = |input: &str| u8_inputs.contains(&(output.as_str(), input));
                if reads(input) || (reshapes && scales.contains_key(input.as_str())) {
                    input.push_str(".dq");
                }
            }
            quantised.nodes.push(node);
            if let Some(scale) = scales.get(output.as_str()) {
                quantised.map(output, *scale);
            }
        }
        let Quantised { nodes, tensors, .. } = quantised;
        let kept = graph.initializer.iter().filter(|tensor| !replaced.contains(&tensor.name)).cloned();
        let initializer = kept.chain(tensors).collect();
        let graph = GraphProto { node: nodes, initializer, value_info: Vec::new(), ..graph.clone() };
        Ok(ModelProto { graph: Some(graph), ..self.model.clone() }.encode_to_vec())
    }
}

fn has_weights(operator: &Operator) -> bool {
    matches!(operator.kind, Kind::Conv { .. } | Kind::ChannelConv { .. } | Kind::Linear { .. })
}

/// Maps that can be had in single precision without having been u8 last.
fn unrounded(operators: &Operators) -> HashSet<&str> {
    let mut maps = HashSet::from([operators.input.as_str()]);
    for operator in &operators.all {
        let is_unrounded = match &operator.kind {
            Kind::Conv { .. } | Kind::ChannelConv { .. } | Kind::Linear { .. } | Kind::Add | Kind::Gate => true,
            Kind::GlobalMean | Kind::Flatten => true,
            Kind::Function(_) => operator.inputs.iter().all(|edge| maps.contains(edge.map.as_str())),
            Kind::MaxPool(_) | Kind::AveragePool(..) | Kind::Times(_) => false,
        };
        if is_unrounded {
            maps.insert(&operator.output);
        }
    }
    maps
}

/// Which operators compute in single precision: layers that are kept, and activations right before or after them.
fn in_singles(operators: &Operators, kept: &BTreeSet<String>, unrounded: &HashSet<&str>) -> Vec<bool> {
    let is_kept = |operator: &Operator| has_weights(operator) && kept.contains(&operator.name);
    let mut singles = vec![false; operators.all.len()];
    // readers before what they read
    for (at, operator) in operators.all.iter().enumerate().rev() {
        singles[at] = match (&operator.kind, operator.inputs.first()) {
            (Kind::Function(_), Some(edge)) => {
                let is_read = || operators.readers(&operator.output).any(|(i, _)| singles[i]);
                let is_after = operators.maker(&edge.map).is_some_and(is_kept);
                is_after || (unrounded.contains(edge.map.as_str()) && is_read())
            }
            _ => is_kept(operator),
        };
    }
    singles
}

/// Which inputs of each operator are u8: all, but what is a term of a residual sum and wasn't u8 before, what a ReLU
/// reads that is part of the operator before it, and what is read in single precision.
fn wanted(operators: &Operators, kept: &BTreeSet<String>) -> Vec<Vec<bool>> {
    let is_sum = |map: &str| match operators.maker(map) {
        Some(maker) => match &maker.kind {
            Kind::Conv { .. } | Kind::Gate | Kind::Add => true,
            Kind::Function(Function::Relu) => {
                let from = maker.inputs.first().and_then(|edge| operators.maker(&edge.map));
                from.is_some_and(|from| from.kind == Kind::Add)
            }
            _ => false,
        },
        None => false,
    };
    let unrounded = unrounded(operators);
    let singles = in_singles(operators, kept, &unrounded);
    let wants = |at: usize, kind: &Kind, map: &str| {
        let maker = operators.maker(map).map(|maker| &maker.kind);
        let alone = operators.readers(map).len() == 1;
        match (kind, maker) {
            _ if singles[at] => !unrounded.contains(map),
            (Kind::Add, _) => !is_sum(map),
            (Kind::Function(Function::Relu | Function::Relu6), Some(Kind::Conv { .. })) => !alone,
            (Kind::Function(Function::Relu), Some(Kind::Add)) => !alone,
            (Kind::Times(_), Some(Kind::Flatten)) | (Kind::Flatten, _) => false,
            _ => true,
        }
    };
    let of = |(at, operator): (usize, &Operator)| {
        operator.inputs.iter().map(|edge| wants(at, &operator.kind, &edge.map)).collect()
    };
    operators.all.iter().enumerate().map(of).collect()
}

/// A graph in the making.
struct Quantised<'a> {
    constants: Constants<'a>,
    nodes: Vec<NodeProto>,
    tensors: Vec<TensorProto>,
}

impl Quantised<'_> {
    fn tensor(&mut self, name: String, dims: &[usize], data_type: i32, raw: Vec<u8>) -> String {
        let dims = dims.iter().map(|&side| side as i64).collect();
        self.tensors.push(TensorProto {
            dims,
            data_type,
            name: name.clone(),
            raw_data: raw.into(),
            ..TensorProto::default()
        });
        name
    }

    fn node(&mut self, operator: &str, input: Vec<String>, output: String, axis: Option<i64>) {
        let attribute = axis.map(|axis| int("axis", axis)).into_iter().collect();
        let (name, output) = (output.clone(), vec![output]);
        let op_type = operator.into();
        self.nodes.push(NodeProto { input, output, name, op_type, attribute, domain: String::new() });
    }

    /// A map as u8 and back.
    fn map(&mut self, map: &str, scale: Scale) {
        let step = self.tensor(format!("{map}.scale"), &[], FLOAT, scale.scale.to_le_bytes().to_vec());
        let zero = self.tensor(format!("{map}.zero"), &[], UINT8, vec![scale.zero]);
        let bytes = format!("{map}.u8");
        self.node("QuantizeLinear", vec![map.into(), step.clone(), zero.clone()], bytes.clone(), None);
        self.node("DequantizeLinear", vec![bytes, step, zero], format!("{map}.dq"), None);
    }

    /// A layer's weights and biases as integers, and back.
    fn weights(&mut self, layer: &str, weight: &str, bias: Option<&str>, input: Scale) -> Result<(), Int8Error> {
        let unreadable = || Int8Error::Unreadable(format!("the weights of `{layer}` aren't all there"));
        let dims = self.constants.dims(weight).ok_or_else(unreadable)?;
        let values = self.constants.singles(weight).ok_or_else(unreadable)?;
        let filters = dims.first().copied().unwrap_or(0);
        let biases = match bias {
            Some(bias) => self.constants.singles(bias).ok_or_else(unreadable)?,
            None => vec![0.0; filters],
        };
        if filters == 0 || values.is_empty() || biases.len() != filters {
            return Err(unreadable());
        }
        let (mut weights, mut integers, mut scales) = (Vec::with_capacity(values.len()), Vec::new(), Vec::new());
        for (values, &bias) in values.chunks_exact(values.len() / filters).zip(&biases) {
            let largest = values.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
            // so that the bias has room, too
            let least = f64::from(bias.abs()) / (input.step() * LARGEST_BIAS);
            let scale = (f64::from(largest) / 127.0).max(least) as f32;
            let scale = if scale < f32::MIN_POSITIVE { 1.0 } else { scale };
            let round = |value: f64, most: f64| value.round_ties_even().clamp(-most, most);
            weights.extend(values.iter().map(|&value| round(f64::from(value) / f64::from(scale), 127.0) as i8 as u8));
            let step = f64::from(scale) * input.step();
            integers.push(round(f64::from(bias) / step, LARGEST_BIAS) as i32);
            scales.push(scale);
        }
        let steps = scales.iter().flat_map(|&scale| ((f64::from(scale) * input.step()) as f32).to_le_bytes()).collect();
        let scales = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        let integers = integers.iter().flat_map(|integer| integer.to_le_bytes()).collect();
        let s8 = self.tensor(format!("{weight}.s8"), &dims, INT8, weights);
        let scale = self.tensor(format!("{weight}.scale"), &[filters], FLOAT, scales);
        // ONNX Runtime's `QGemm` refuses scales without zero points
        let zero = self.tensor(format!("{weight}.zero"), &[filters], INT8, vec![0; filters]);
        self.node("DequantizeLinear", vec![s8, scale, zero], format!("{weight}.dq"), Some(0));
        if let Some(bias) = bias {
            let s32 = self.tensor(format!("{bias}.s32"), &[filters], INT32, integers);
            let step = self.tensor(format!("{bias}.scale"), &[filters], FLOAT, steps);
            self.node("DequantizeLinear", vec![s32, step], format!("{bias}.dq"), Some(0));
        }
        Ok(())
    }
}
