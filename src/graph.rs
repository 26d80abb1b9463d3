//! Writes convolution graphs as ONNX: plain operators, deterministic bytes. Knows shapes and operators; nothing of
//! checkpoints, gains or what a weight means.
//!
//! The emission is chosen for ONNX Runtime's blocked CPU layout (NCHWc) and stays plain ONNX: SiLU as
//! `Sigmoid` + `Mul` (fused at load), gates resized to the map so that their product has provably equal shapes.

pub mod half_emulation;
pub mod head;

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};

use half::f16;
use prost::Message as _;

use crate::model::{FEATURES, Gate, INPUT, MAP, OUTPUT, Precision};
use crate::nets::activation::Activation;
use crate::nets::{Conv, ShortcutPool};
use crate::pb::onnx::{self as pb, AttributeProto, AttributeType, NodeProto, TensorProto, ValueInfoProto};

/// Version of the file format, and of the operator set: `Gelu` came with 20.
const IR_VERSION: i64 = 10;
const OPSET: i64 = 20;
/// Symbolic name of the batch dimension. One name everywhere: equal shapes can then be proved.
const BATCH: &str = "batch";

/// ONNX element types.
pub(crate) const FLOAT: i32 = 1;
pub(crate) const INT8: i32 = 3;
const INT64: i32 = 7;
pub(crate) const FLOAT16: i32 = 10;
const DOUBLE: i32 = 11;

/// What can't be written.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GraphError {
    /// A weight is too large for the number format.
    #[error("`{name}` folds to {value:e}, which {precision} can't hold; try --precision fp32")]
    Overflow {
        /// The tensor.
        name: String,
        /// The value.
        value: f64,
        /// The number format.
        precision: Precision,
    },
    /// Bytes that are no graph of ours.
    #[error("the graph can't be read back")]
    Unreadable,
    /// The graph can't be written, or its values not kept meanwhile.
    #[error("can't write the graph: {0}; is the disk full?")]
    Io(String),
}

/// Values of a weight.
#[derive(Debug)]
enum Values {
    /// In memory.
    Here(Vec<u8>),
    /// In the file that [`GraphBuilder::store_in`] was given.
    Stored { offset: u64, len: u64 },
}

impl Values {
    fn len(&self) -> u64 {
        match self {
            Self::Here(bytes) => bytes.len() as u64,
            Self::Stored { len, .. } => *len,
        }
    }
}

/// Bytes from which on values are stored.
const STORED: usize = 1 << 12;

/// Field numbers of the messages that are written piece by piece.
const GRAPH_FIELD: u32 = 7;
const INITIALIZER_FIELD: u32 = 5;
const RAW_DATA_FIELD: u32 = 9;

/// What stands before a field of so many bytes: its number and kind, its length.
fn field_head(field: u32, len: u64) -> Vec<u8> {
    let mut head = Vec::with_capacity(12);
    prost::encoding::encode_key(field, prost::encoding::WireType::LengthDelimited, &mut head);
    prost::encoding::encode_varint(len, &mut head);
    head
}

/// Bytes of a field whose number is below 16, head and all; an empty one is left out.
fn field_len(len: u64) -> u64 {
    if len == 0 { 0 } else { 1 + prost::encoding::encoded_len_varint(len) as u64 + len }
}

/// A feature map `[N, chs, height, width]` of the graph under construction.
#[derive(Debug, Clone, PartialEq)]
pub struct Map {
    /// Name of the tensor.
    pub name: String,
    /// Channels.
    pub chs: usize,
    /// Height in pixels, at the nominal size when the graph is dynamic.
    pub height: usize,
    /// Width in pixels, at the nominal size when the graph is dynamic.
    pub width: usize,
}

/// A term of the logits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Term {
    /// Name of values `[N, width]`.
    pub values: String,
    /// How many there are of an image.
    pub width: usize,
    /// Name of their weights, `[classes, width]`.
    pub weight: String,
}

/// How a graph is emitted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Emission {
    /// Height of the input in pixels.
    pub height: u32,
    /// Width of the input in pixels.
    pub width: u32,
    /// Leave height and width symbolic; the two above then only serve to count work.
    pub dynamic: bool,
    /// Number format of weights and arithmetic.
    pub precision: Precision,
    /// How gates multiply.
    pub gate: Gate,
    /// TensorFlow's SAME padding.
    pub same_padding: bool,
}

/// A graph under construction.
#[derive(Debug)]
pub struct GraphBuilder {
    emission: Emission,
    nodes: Vec<NodeProto>,
    initializers: Vec<(TensorProto, Values)>,
    /// Where large values wait for the graph to be written; in memory where there is none.
    store: Option<File>,
    /// Bytes of values in memory so far, and of those in the store.
    kept: u64,
    kept_stored: u64,
    value_info: Vec<ValueInfoProto>,
    inputs: Vec<ValueInfoProto>,
    outputs: Vec<ValueInfoProto>,
    /// Outputs after the logits.
    side_outputs: Vec<ValueInfoProto>,
    /// Multiply-accumulates of one image so far.
    pub macs: u64,
    /// Weights and biases so far.
    pub parameters: u64,
}

impl GraphBuilder {
    /// An empty graph.
    pub fn empty(emission: Emission) -> Self {
        Self {
            emission,
            nodes: Vec::new(),
            initializers: Vec::new(),
            store: None,
            kept: 0,
            kept_stored: 0,
            value_info: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            side_outputs: Vec::new(),
            macs: 0,
            parameters: 0,
        }
    }

    /// Keeps large values in this empty file until the graph is written, instead of in memory.
    pub fn store_in(&mut self, file: File) {
        self.store = Some(file);
    }

    /// A classifier's graph so far: its input map, `input`, float32 `[batch, channels, H, W]`.
    pub fn new(emission: Emission, channels: usize) -> (Self, Map) {
        let mut graph = Self::empty(emission);
        let mut input = graph.input(INPUT, channels, emission.height as usize, emission.width as usize);
        if emission.precision == Precision::Fp16 {
            let cast = graph.node("Cast", "input.fp16", &["input"], vec![int("to", FLOAT16.into())]);
            input.name = cast;
        }
        (graph, input)
    }

    /// Declares a float32 input map.
    pub fn input(&mut self, name: &str, chs: usize, height: usize, width: usize) -> Map {
        let side = |name: &str, size: usize| if self.emission.dynamic { dim(name) } else { fixed(size) };
        let dims = [dim(BATCH), fixed(chs), side("height", height), side("width", width)];
        self.inputs.push(typed(name, FLOAT, &dims));
        Map { name: name.into(), chs, height, width }
    }

    /// Declares a map to be an output, under its own name. Its size must be fixed.
    pub fn output(&mut self, x: &Map) {
        self.outputs.push(self.value(&x.name, &[dim(BATCH), fixed(x.chs), fixed(x.height), fixed(x.width)]));
    }

    /// A constant of the graph's precision (`dims`, row-major). Fails on a value that the precision can't hold.
    pub fn constant(&mut self, name: &str, dims: &[usize], values: &[f64]) -> Result<String, GraphError> {
        let precision = self.emission.precision;
        let overflow = |v: &&f64| match precision {
            Precision::Fp32 | Precision::Int8 => !(**v as f32).is_finite(),
            Precision::Fp16 => !f16::from_f64(**v).is_finite(),
        };
        if let Some(value) = values.iter().find(overflow) {
            return Err(GraphError::Overflow { name: name.into(), value: *value, precision });
        }
        let raw: Vec<u8> = match precision {
            Precision::Fp32 | Precision::Int8 => values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
            Precision::Fp16 => values.iter().flat_map(|v| f16::from_f64(*v).to_le_bytes()).collect(),
        };
        self.weight(name, dims, self.element(), raw)
    }

    /// A value in double precision, for the weight arithmetic that an unfolded graph carries. Stored in single precision
    /// where that is exact, as it is for every checkpoint but F64 ones: half the file.
    pub fn double(&mut self, name: &str, dims: &[usize], values: &[f64]) -> Result<String, GraphError> {
        if values.iter().any(|&v| f64::from(v as f32) != v) {
            return self.weight(name, dims, DOUBLE, values.iter().flat_map(|v| v.to_le_bytes()).collect());
        }
        let raw = values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect();
        let stored = self.weight(name, dims, FLOAT, raw)?;
        Ok(self.node("Cast", &format!("{name}.double"), &[&stored], vec![int("to", DOUBLE.into())]))
    }

    /// A constant list of integers: shapes and axes.
    pub fn integers(&mut self, name: &str, values: &[i64]) -> String {
        self.initializer(name, &[values.len()], INT64, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    /// A small constant.
    fn initializer(&mut self, name: &str, dims: &[usize], data_type: i32, raw: Vec<u8>) -> String {
        self.kept += raw.len() as u64;
        let dims = dims.iter().map(|&d| d as i64).collect();
        let tensor = TensorProto { dims, data_type, name: name.into(), ..TensorProto::default() };
        self.initializers.push((tensor, Values::Here(raw)));
        name.into()
    }

    /// A constant of any size: large ones are stored, where there is a store.
    fn weight(&mut self, name: &str, dims: &[usize], data_type: i32, raw: Vec<u8>) -> Result<String, GraphError> {
        let len = raw.len();
        let Some(file) = self.store.as_mut().filter(|_| len >= STORED) else {
            return Ok(self.initializer(name, dims, data_type, raw));
        };
        let offset = self.kept_stored;
        file.write_all(&raw).map_err(|e| GraphError::Io(e.to_string()))?;
        self.kept_stored += len as u64;
        let name = self.initializer(name, dims, data_type, Vec::new());
        if let Some((_, values)) = self.initializers.last_mut() {
            *values = Values::Stored { offset, len: len as u64 };
        }
        Ok(name)
    }

    fn element(&self) -> i32 {
        match self.emission.precision {
            Precision::Fp32 | Precision::Int8 => FLOAT,
            Precision::Fp16 => FLOAT16,
        }
    }

    /// An operator with one output, named after it.
    pub fn node(&mut self, op: &str, name: &str, inputs: &[&str], attribute: Vec<AttributeProto>) -> String {
        self.nodes.push(NodeProto {
            input: inputs.iter().map(|i| i.to_string()).collect(),
            output: vec![name.into()],
            name: name.into(),
            op_type: op.into(),
            attribute,
            domain: String::new(),
        });
        name.into()
    }

    /// A double-precision value (by name) as the graph's precision.
    pub fn narrow(&mut self, name: &str, value: &str) -> String {
        self.node("Cast", name, &[value], vec![int("to", self.element().into())])
    }

    /// A 2-D convolution by the named weights and, where given, bias.
    pub fn conv(&mut self, x: &Map, c: &Conv, weight: &str, bias: Option<&str>) -> Map {
        let (k, s, d) = (c.kernel, c.stride, c.dilation);
        let mut attributes = vec![
            ints("dilations", &[d, d]),
            int("group", c.groups as i64),
            ints("kernel_shape", &[k, k]),
            ints("strides", &[s, s]),
        ];
        let reach = d * (k - 1);
        let (height, width);
        if self.emission.same_padding && s > 1 {
            (height, width) = (x.height.div_ceil(s), x.width.div_ceil(s));
            if self.emission.dynamic {
                attributes.push(string("auto_pad", "SAME_UPPER"));
            } else {
                let total = |size: usize, out: usize| ((out - 1) * s + reach + 1).saturating_sub(size);
                let (h, w) = (total(x.height, height), total(x.width, width));
                attributes.push(ints("pads", &[h / 2, w / 2, h - h / 2, w - w / 2]));
            }
        } else {
            let pad = (s - 1 + reach) / 2;
            let out = |size: usize| (size + 2 * pad).saturating_sub(reach + 1) / s + 1;
            (height, width) = (out(x.height), out(x.width));
            attributes.push(ints("pads", &[pad; 4]));
        }
        let inputs: Vec<&str> = [x.name.as_str(), weight].into_iter().chain(bias).collect();
        let name = self.node("Conv", &c.name, &inputs, attributes);
        let weights = (c.out_chs * c.fan_in()) as u64;
        self.parameters += weights + bias.map_or(0, |_| c.out_chs as u64);
        self.macs = self.macs.saturating_add(weights.saturating_mul((height * width) as u64));
        Map { name, chs: c.out_chs, height, width }
    }

    /// Batch normalisation by the named scale, shift, mean and variance.
    pub fn batch_norm(&mut self, x: &Map, layer: &str, parameters: [&str; 4], eps: f64) -> Map {
        let inputs: Vec<&str> = std::iter::once(x.name.as_str()).chain(parameters).collect();
        let name = self.node("BatchNormalization", layer, &inputs, vec![float("epsilon", eps as f32)]);
        Map { name, ..x.clone() }
    }

    /// The activation, applied to every element.
    pub fn activation(&mut self, x: &Map, activation: Activation, name: &str) -> Map {
        let (op, attributes) = match activation {
            Activation::Identity => return x.clone(),
            Activation::Silu => {
                let sigmoid = self.node("Sigmoid", &format!("{name}.sigmoid"), &[&x.name], vec![]);
                let name = self.node("Mul", name, &[&x.name, &sigmoid], vec![]);
                return Map { name, ..x.clone() };
            }
            Activation::Relu6 => {
                let low = self.bound("relu6.low", 0.0);
                let high = self.bound("relu6.high", 6.0);
                let name = self.node("Clip", name, &[&x.name, &low, &high], vec![]);
                return Map { name, ..x.clone() };
            }
            Activation::Relu => ("Relu", vec![]),
            Activation::LeakyRelu => ("LeakyRelu", vec![float("alpha", 0.01)]),
            // at α = 1, timm's only one, CELU is ELU; the operator `Celu` has no half precision
            Activation::Elu | Activation::Celu => ("Elu", vec![float("alpha", 1.0)]),
            Activation::Selu => ("Selu", vec![]),
            Activation::Gelu => ("Gelu", vec![string("approximate", "none")]),
            Activation::HardSwish => ("HardSwish", vec![]),
            Activation::Mish => ("Mish", vec![]),
            Activation::Sigmoid => ("Sigmoid", vec![]),
            Activation::Tanh => ("Tanh", vec![]),
        };
        let name = self.node(op, name, &[&x.name], attributes);
        Map { name, ..x.clone() }
    }

    /// A scalar constant shared by every use.
    fn bound(&mut self, name: &str, value: f32) -> String {
        if !self.initializers.iter().any(|(t, _)| t.name == name) {
            let raw = match self.emission.precision {
                Precision::Fp32 | Precision::Int8 => value.to_le_bytes().to_vec(),
                Precision::Fp16 => f16::from_f32(value).to_le_bytes().to_vec(),
            };
            self.initializer(name, &[], self.element(), raw);
        }
        name.into()
    }

    /// `x · scalar`, for graphs that carry their scalars. The same product is written once.
    pub fn scale(&mut self, x: &Map, scalar: f64) -> Result<Map, GraphError> {
        let name = format!("{}.times{scalar}", x.name);
        if !self.nodes.iter().any(|n| n.name == name) {
            let factor = self.constant(&format!("{name}.factor"), &[], &[scalar])?;
            self.node("Mul", &name, &[&x.name, &factor], vec![]);
        }
        Ok(Map { name, ..x.clone() })
    }

    /// Element-wise sum of two maps of one shape.
    pub fn add(&mut self, a: &Map, b: &Map, name: &str) -> Map {
        let name = self.node("Add", name, &[&a.name, &b.name], vec![]);
        Map { name, ..a.clone() }
    }

    /// 3x3 maximum, stride 2, padding 1.
    pub fn max_pool(&mut self, x: &Map, name: &str) -> Map {
        let attributes = vec![ints("kernel_shape", &[3, 3]), ints("pads", &[1; 4]), ints("strides", &[2, 2])];
        let name = self.node("MaxPool", name, &[&x.name], attributes);
        Map { name, chs: x.chs, height: x.height.div_ceil(2), width: x.width.div_ceil(2) }
    }

    /// 2x2 average on a shortcut. Partial windows at the far border: with a fixed size by explicit padding that is
    /// not counted, which every runtime reads alike, and otherwise by `ceil_mode`.
    pub fn average_pool(&mut self, x: &Map, pool: ShortcutPool, name: &str) -> Map {
        let mut attributes = vec![ints("kernel_shape", &[2, 2])];
        let (height, width);
        match pool {
            ShortcutPool::None => return x.clone(),
            ShortcutPool::Average2 => {
                (height, width) = (x.height.div_ceil(2), x.width.div_ceil(2));
                attributes.extend([ints("strides", &[2, 2]), int("count_include_pad", 0)]);
                attributes.push(if self.emission.dynamic {
                    int("ceil_mode", 1)
                } else {
                    ints("pads", &[0, 0, x.height % 2, x.width % 2])
                });
            }
            ShortcutPool::AverageSame => {
                (height, width) = (x.height, x.width);
                let pads = ints("pads", &[0, 0, 1, 1]);
                attributes.extend([ints("strides", &[1, 1]), int("count_include_pad", 1), pads]);
            }
        }
        let name = self.node("AveragePool", name, &[&x.name], attributes);
        Map { name, chs: x.chs, height, width }
    }

    /// Mean over height and width: `[N, C, 1, 1]`.
    pub fn global_average_pool(&mut self, x: &Map, name: &str) -> Map {
        let name = self.node("GlobalAveragePool", name, &[&x.name], vec![]);
        Map { name, chs: x.chs, height: 1, width: 1 }
    }

    /// Maximum over height and width: `[N, C, 1, 1]`.
    pub fn global_max_pool(&mut self, x: &Map, name: &str) -> Map {
        let name = self.node("GlobalMaxPool", name, &[&x.name], vec![]);
        Map { name, chs: x.chs, height: 1, width: 1 }
    }

    /// 1-D convolution over the channels of a `[N, C, 1, 1]` map, then a sigmoid, shape kept. `weight` is
    /// `[1, 1, kernel]`.
    pub fn channel_conv(&mut self, x: &Map, weight: &str, kernel: usize, name: &str) -> Result<Map, GraphError> {
        let shape = self.integers(&format!("{name}.as_row"), &[0, 1, x.chs as i64]);
        let row = self.node("Reshape", &format!("{name}.row"), &[&x.name, &shape], vec![]);
        let attributes = vec![ints("kernel_shape", &[kernel]), ints("pads", &[kernel / 2; 2])];
        let mixed = self.node("Conv", name, &[&row, weight], attributes);
        self.parameters += kernel as u64;
        self.macs = self.macs.saturating_add((kernel * x.chs) as u64);
        let gate = self.node("Sigmoid", &format!("{name}.sigmoid"), &[&mixed], vec![]);
        let shape = self.integers(&format!("{name}.as_map"), &[0, x.chs as i64, 1, 1]);
        let mut map = self.node("Reshape", &format!("{name}.map"), &[&gate, &shape], vec![]);
        if self.resizes() {
            // multiplies by one: its only job is to re-enter the blocked layout, where the product stays
            let ones = self.constant(&format!("{name}.ones"), &[x.chs, 1, 1, 1], &vec![1.0; x.chs])?;
            let attributes = vec![int("group", x.chs as i64), ints("kernel_shape", &[1, 1])];
            map = self.node("Conv", &format!("{name}.reenter"), &[&map, &ones], attributes);
        }
        Ok(Map { name: map, ..x.clone() })
    }

    /// Sigmoid of a gate's logits.
    pub fn sigmoid(&mut self, x: &Map, name: &str) -> Map {
        let name = self.node("Sigmoid", name, &[&x.name], vec![]);
        Map { name, ..x.clone() }
    }

    /// `x · gate`, gate `[N, C, 1, 1]`.
    pub fn gate(&mut self, x: &Map, gate: &Map, name: &str) -> Map {
        let mut factor = gate.name.clone();
        if self.resizes() {
            let scales = format!("{name}.scales");
            let values = [1.0, 1.0, x.height as f32, x.width as f32];
            self.initializer(&scales, &[4], FLOAT, values.iter().flat_map(|v| v.to_le_bytes()).collect());
            let attributes = vec![
                string("coordinate_transformation_mode", "asymmetric"),
                string("mode", "nearest"),
                string("nearest_mode", "floor"),
            ];
            factor = self.node("Resize", &format!("{name}.resize"), &[&factor, "", &scales], attributes);
            // without this the runtime can't prove the product's shapes equal and leaves its blocked layout
            self.value_info.push(self.value(&factor, &[dim(BATCH), fixed(x.chs), fixed(x.height), fixed(x.width)]));
        }
        let name = self.node("Mul", name, &[&x.name, &factor], vec![]);
        Map { name, ..x.clone() }
    }

    fn resizes(&self) -> bool {
        self.emission.gate == Gate::Resize && !self.emission.dynamic
    }

    /// Whether its values are of single precision.
    pub fn is_single(&self) -> bool {
        self.emission.precision == Precision::Fp32
    }

    /// Values of a `[N, C, 1, 1]` map as `[N, C]`.
    pub fn flatten(&mut self, x: &Map, name: &str) -> String {
        self.node("Flatten", name, &[&x.name], vec![])
    }

    /// The output `features`: values (`[N, width]` in all), each times `factor`.
    pub fn features(&mut self, parts: &[String], width: usize, factor: f64) {
        let mut value = match parts {
            [only] => only.clone(),
            several => {
                let parts: Vec<&str> = several.iter().map(String::as_str).collect();
                let half = self.emission.precision == Precision::Fp16;
                let name = if factor == 1.0 && !half { FEATURES } else { "features.parts" };
                self.node("Concat", name, &parts, vec![int("axis", 1)])
            }
        };
        value = self.side_value(&value, FEATURES, factor);
        debug_assert_eq!(value, FEATURES);
        self.side_outputs.push(typed(FEATURES, FLOAT, &[dim(BATCH), fixed(width)]));
    }

    /// The output `map`: a map, each value times `factor`.
    pub fn map(&mut self, x: &Map, factor: f64) {
        self.side_value(&x.name, MAP, factor);
        let side = |name: &str, size: usize| if self.emission.dynamic { dim(name) } else { fixed(size) };
        let dims = [dim(BATCH), fixed(x.chs), side("map_height", x.height), side("map_width", x.width)];
        self.side_outputs.push(typed(MAP, FLOAT, &dims));
    }

    /// `value · factor` in single precision, under this name.
    fn side_value(&mut self, value: &str, name: &str, factor: f64) -> String {
        let mut value = value.to_string();
        if self.emission.precision == Precision::Fp16 {
            let cast = if factor == 1.0 { name.to_string() } else { format!("{name}.single") };
            value = self.node("Cast", &cast, &[&value], vec![int("to", FLOAT.into())]);
        }
        if factor != 1.0 {
            let scale = format!("{name}.factor");
            self.initializer(&scale, &[], FLOAT, (factor as f32).to_le_bytes().to_vec());
            return self.node("Mul", name, &[&value, &scale], vec![]);
        }
        if value == name { value } else { self.node("Identity", name, &[&value], vec![]) }
    }

    /// The logits: `bias`, and of every term values `[N, C]` times their weights (`[classes, C]`).
    pub fn classifier(&mut self, terms: &[Term], bias: &str, classes: usize, name: &str) -> String {
        let output = if self.emission.precision == Precision::Fp32 { OUTPUT } else { name };
        self.parameters += classes as u64;
        let mut logits = bias.to_string();
        for (i, Term { values, width, weight }) in terms.iter().enumerate() {
            let sum = if i + 1 == terms.len() { output.into() } else { format!("{name}.term{i}") };
            self.parameters += (classes * width) as u64;
            self.macs = self.macs.saturating_add((classes * width) as u64);
            logits = self.node("Gemm", &sum, &[values, weight, &logits], vec![int("transB", 1)]);
        }
        match self.emission.precision {
            Precision::Fp32 | Precision::Int8 => logits,
            Precision::Fp16 => self.node("Cast", OUTPUT, &[&logits], vec![int("to", FLOAT.into())]),
        }
    }

    /// A classifier as ONNX bytes: input `input` `[batch, channels, H, W]`, output `logits` `[batch, classes]`, both float32.
    pub fn finish(self, classes: usize, metadata: &[(&str, String)]) -> Result<Vec<u8>, GraphError> {
        let mut bytes = Vec::with_capacity(usize::try_from(self.kept).unwrap_or(0) + (64 << 10));
        self.finish_to(classes, metadata, &mut bytes)?;
        Ok(bytes)
    }

    /// As [`finish`](Self::finish), written piece by piece.
    pub fn finish_to(
        mut self,
        classes: usize,
        metadata: &[(&str, String)],
        to: &mut dyn Write,
    ) -> Result<(), GraphError> {
        self.outputs.push(typed(OUTPUT, FLOAT, &[dim(BATCH), fixed(classes)]));
        let after = std::mem::take(&mut self.side_outputs);
        self.outputs.extend(after);
        self.write(metadata, to)
    }

    /// The graph as ONNX bytes, with the inputs and outputs declared.
    pub fn encode(self, metadata: &[(&str, String)]) -> Result<Vec<u8>, GraphError> {
        let mut bytes = Vec::new();
        self.write(metadata, &mut bytes)?;
        Ok(bytes)
    }

    /// Writes the graph as the message it is, weights one by one: the same bytes wherever they are kept meanwhile.
    fn write(mut self, metadata: &[(&str, String)], to: &mut dyn Write) -> Result<(), GraphError> {
        // fields in the order of their numbers: nodes and name, weights, the rest
        let before =
            pb::GraphProto { node: std::mem::take(&mut self.nodes), name: "nfold".into(), ..Default::default() };
        let after = pb::GraphProto {
            input: std::mem::take(&mut self.inputs),
            output: std::mem::take(&mut self.outputs),
            value_info: std::mem::take(&mut self.value_info),
            ..Default::default()
        };
        let (before, after) = (before.encode_to_vec(), after.encode_to_vec());
        let weights: Vec<(Vec<u8>, Values)> = std::mem::take(&mut self.initializers)
            .into_iter()
            .map(|(tensor, values)| (tensor.encode_to_vec(), values))
            .collect();
        let tensor_len = |(head, values): &(Vec<u8>, Values)| head.len() as u64 + field_len(values.len());
        let graph_len =
            before.len() as u64 + weights.iter().map(|w| field_len(tensor_len(w))).sum::<u64>() + after.len() as u64;

        let entry =
            |(key, value): &(&str, String)| pb::StringStringEntryProto { key: (*key).into(), value: value.clone() };
        let first = pb::ModelProto {
            ir_version: IR_VERSION,
            producer_name: env!("CARGO_PKG_NAME").into(),
            producer_version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        };
        let last = pb::ModelProto {
            opset_import: vec![pb::OperatorSetIdProto { domain: String::new(), version: OPSET }],
            metadata_props: metadata.iter().map(entry).collect(),
            ..Default::default()
        };
        let io = |source: io::Error| GraphError::Io(source.to_string());
        to.write_all(&first.encode_to_vec()).map_err(io)?;
        to.write_all(&field_head(GRAPH_FIELD, graph_len)).map_err(io)?;
        to.write_all(&before).map_err(io)?;
        for weight in &weights {
            to.write_all(&field_head(INITIALIZER_FIELD, tensor_len(weight))).map_err(io)?;
            let (head, values) = weight;
            to.write_all(head).map_err(io)?;
            if values.len() > 0 {
                to.write_all(&field_head(RAW_DATA_FIELD, values.len())).map_err(io)?;
                self.copy(values, to).map_err(io)?;
            }
        }
        to.write_all(&after).map_err(io)?;
        to.write_all(&last.encode_to_vec()).map_err(io)
    }

    fn copy(&mut self, values: &Values, to: &mut dyn Write) -> io::Result<()> {
        match (values, &mut self.store) {
            (Values::Here(bytes), _) => to.write_all(bytes),
            (Values::Stored { offset, len }, Some(file)) => {
                file.seek(SeekFrom::Start(*offset))?;
                let copied = io::copy(&mut file.take(*len), to)?;
                if copied == *len { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
            }
            (Values::Stored { .. }, None) => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn value(&self, name: &str, dims: &[pb::DimensionProto]) -> ValueInfoProto {
        typed(name, self.element(), dims)
    }
}

/// A constant list of integers.
pub(crate) fn integers(name: &str, values: &[i64]) -> TensorProto {
    let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let dims = vec![values.len() as i64];
    TensorProto { dims, data_type: INT64, name: name.into(), raw_data: raw.into(), ..TensorProto::default() }
}

fn typed(name: &str, elem_type: i32, dims: &[pb::DimensionProto]) -> ValueInfoProto {
    let shape = Some(pb::TensorShapeProto { dim: dims.to_vec() });
    let tensor = pb::TensorTypeProto { elem_type, shape };
    ValueInfoProto { name: name.into(), r#type: Some(pb::TypeProto { tensor_type: Some(tensor) }) }
}

fn dim(name: &str) -> pb::DimensionProto {
    pb::DimensionProto { value: Some(pb::dimension_proto::Value::DimParam(name.into())) }
}

fn fixed(size: usize) -> pb::DimensionProto {
    pb::DimensionProto { value: Some(pb::dimension_proto::Value::DimValue(size as i64)) }
}

pub(crate) fn int(name: &str, i: i64) -> AttributeProto {
    AttributeProto { name: name.into(), i, r#type: AttributeType::Int.into(), ..Default::default() }
}

pub(crate) fn float(name: &str, f: f32) -> AttributeProto {
    AttributeProto { name: name.into(), f, r#type: AttributeType::Float.into(), ..Default::default() }
}

pub(crate) fn floats(name: &str, values: &[f32]) -> AttributeProto {
    AttributeProto {
        name: name.into(),
        floats: values.to_vec(),
        r#type: AttributeType::Floats.into(),
        ..Default::default()
    }
}

pub(crate) fn ints(name: &str, values: &[usize]) -> AttributeProto {
    let ints = values.iter().map(|&v| v as i64).collect();
    AttributeProto { name: name.into(), ints, r#type: AttributeType::Ints.into(), ..Default::default() }
}

pub(crate) fn string(name: &str, value: &str) -> AttributeProto {
    let s = value.as_bytes().to_vec();
    AttributeProto { name: name.into(), s, r#type: AttributeType::String.into(), ..Default::default() }
}

/// A map in single precision, of a shape that is not said.
pub(crate) fn untyped(name: &str) -> ValueInfoProto {
    let tensor = pb::TensorTypeProto { elem_type: FLOAT, shape: None };
    ValueInfoProto { name: name.into(), r#type: Some(pb::TypeProto { tensor_type: Some(tensor) }) }
}

/// A batch of so many values each, in single precision.
pub(crate) fn batch_of(name: &str, sides: &[usize]) -> ValueInfoProto {
    let sides: Vec<_> = std::iter::once(dim(BATCH)).chain(sides.iter().map(|&side| fixed(side))).collect();
    typed(name, FLOAT, &sides)
}

/// A graph with operators of a domain of our own, as nfold's model.
pub(crate) fn model(graph: pb::GraphProto, domain: &str) -> pb::ModelProto {
    let set = |domain: &str, version| pb::OperatorSetIdProto { domain: domain.into(), version };
    pb::ModelProto {
        ir_version: IR_VERSION,
        producer_name: env!("CARGO_PKG_NAME").into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        graph: Some(graph),
        opset_import: vec![set("", OPSET), set(domain, 1)],
        ..Default::default()
    }
}
