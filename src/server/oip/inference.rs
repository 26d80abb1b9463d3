//! One inference of either protocol: the request, its check against the model, the run, and the response.
//!
//! Owns which tensors a model accepts and returns. Knows neither JSON nor protobuf.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::Value;

use super::super::bodies::budget::Charge;
use super::super::bodies::threads::INLINE;
use super::super::bodies::{Bodies, Limits};
use super::super::served::Served;
use super::super::status::{ApiError, Code, cut};
use super::datatype::Datatype;
use crate::infer::error::InferError;
use crate::infer::registry::LiveModel;
use crate::infer::request::{Extras, Input, Output, Terms};
use crate::infer::top_k::{Prediction, Selection};
use crate::model::{FEATURES, INPUT, MAP, OUTPUT};
use crate::pixels::RawTensor;

/// Parameters of a request or a tensor.
pub type Parameters = BTreeMap<String, Value>;

/// An inference request: parsed, but not checked against a model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Inference {
    /// Repeated in the response.
    pub id: Option<String>,
    /// Longest that the client waits.
    pub timeout: Option<Duration>,
    /// Lower numbers first; 0 is the default.
    pub priority: u32,
    /// Input tensors.
    pub inputs: Vec<InputTensor>,
    /// Requested outputs; empty: all.
    pub outputs: Vec<Wanted>,
    /// Whether outputs are returned as bytes unless they say otherwise.
    pub binary_output: bool,
}

/// A tensor from a client.
#[derive(Debug, Clone, PartialEq)]
pub struct InputTensor {
    /// Name of the tensor.
    pub name: String,
    /// Dimensions; the first is the number of images.
    pub shape: Vec<i64>,
    /// Elements in row-major order.
    pub contents: Contents,
}

/// A tensor's elements.
#[derive(Debug, Clone, PartialEq)]
pub enum Contents {
    /// FP32 values as little-endian bytes, from numbers in JSON or typed fields.
    Fp32(Bytes),
    /// Elements as little-endian bytes; each of BYTES is preceded by its length (4 bytes).
    Raw(Datatype, Bytes),
    /// Elements of BYTES.
    Elements(Vec<Bytes>),
    /// A body without JSON: a single image's tensor, or an encoded image.
    Bare(Bytes),
}

/// A requested output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Name of the output.
    pub name: String,
    /// Return this many most probable classes instead of numbers.
    pub classes: Option<usize>,
    /// Whether to return bytes; `None`: as the request says.
    pub binary: Option<bool>,
}

/// An inference response.
#[derive(Debug)]
pub(in crate::server) struct Answered {
    pub(in crate::server) model: Arc<LiveModel>,
    pub(in crate::server) id: Option<String>,
    pub(in crate::server) outputs: Vec<OutputTensor>,
    pub(in crate::server) served: Served,
    /// Estimate of the response's most bytes, in any form; charged if it is more than a little.
    pub(in crate::server) size: usize,
    pub(in crate::server) charge: Charge,
}

/// A tensor of a response.
#[derive(Debug)]
pub(in crate::server) struct OutputTensor {
    pub(in crate::server) name: &'static str,
    pub(in crate::server) shape: Vec<usize>,
    pub(in crate::server) data: OutputData,
    pub(in crate::server) binary: bool,
}

#[derive(Debug)]
pub(in crate::server) enum OutputData {
    Numbers(Vec<f32>),
    /// `VALUE:INDEX:LABEL`, or without the label.
    Classes(Vec<String>),
}

impl OutputData {
    pub(in crate::server) fn datatype(&self) -> Datatype {
        match self {
            Self::Numbers(_) => Datatype::Fp32,
            Self::Classes(_) => Datatype::Bytes,
        }
    }

    /// Little-endian bytes; each element of BYTES is preceded by its length.
    pub(in crate::server) fn to_bytes(&self) -> Bytes {
        match self {
            Self::Numbers(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::Classes(classes) => {
                let mut bytes = Vec::new();
                for class in classes {
                    // labels are far shorter than 4 GiB, as a manifest is
                    bytes.extend((class.len() as u32).to_le_bytes());
                    bytes.extend(class.as_bytes());
                }
                bytes.into()
            }
        }
    }
}

pub(super) fn invalid(text: impl Into<String>) -> ApiError {
    ApiError::new(Code::InvalidRequest, text)
}

/// A parameter that must be a non-negative integer.
pub(in crate::server) fn whole(parameters: &Parameters, name: &str) -> Result<Option<u64>, ApiError> {
    let Some(value) = parameters.get(name) else { return Ok(None) };
    let number = match value {
        Value::Number(n) => {
            n.as_u64().or_else(|| n.as_f64().filter(|f| f.fract() == 0.0 && (0.0..9e15).contains(f)).map(|f| f as u64))
        }
        // clients that only support strings send digits
        Value::String(text) => text.parse().ok(),
        _ => None,
    };
    number
        .map(Some)
        .ok_or_else(|| invalid(format!("parameter `{name}` is not a whole number: {}", cut(&value.to_string()))))
}

/// A parameter that must be a boolean.
pub(in crate::server) fn flag(parameters: &Parameters, name: &str) -> Result<Option<bool>, ApiError> {
    match parameters.get(name) {
        None => Ok(None),
        Some(Value::Bool(on)) => Ok(Some(*on)),
        Some(other) => {
            Err(invalid(format!("parameter `{name}` is neither true nor false: {}", cut(&other.to_string()))))
        }
    }
}

/// Refuses tensors in shared memory.
pub(in crate::server) fn refuse_shared_memory(parameters: &Parameters, tensor: &str) -> Result<(), ApiError> {
    if parameters.contains_key("shared_memory_region") {
        Err(invalid(format!(
            "tensor `{}` is in shared memory, which this server does not use; send its data in the request",
            tensor.escape_debug()
        )))
    } else {
        Ok(())
    }
}

impl Inference {
    /// Applies the request's parameters.
    pub(in crate::server) fn with_parameters(mut self, parameters: &Parameters) -> Result<Self, ApiError> {
        self.timeout = whole(parameters, "timeout")?.filter(|&us| us > 0).map(Duration::from_micros);
        let priority = whole(parameters, "priority")?.unwrap_or(0);
        self.priority = u32::try_from(priority).map_err(|_| invalid(format!("priority {priority} is too large")))?;
        self.binary_output = flag(parameters, "binary_data_output")?.unwrap_or(false);
        Ok(self)
    }
}

impl Wanted {
    /// Reads an output's parameters.
    pub(in crate::server) fn new(name: String, parameters: &Parameters) -> Result<Self, ApiError> {
        refuse_shared_memory(parameters, &name)?;
        let classes = whole(parameters, "classification")?.map(|k| usize::try_from(k).unwrap_or(usize::MAX));
        Ok(Self { name, classes: classes.filter(|&k| k > 0), binary: flag(parameters, "binary_data")? })
    }
}

/// What a request to `model` may hold.
pub(in crate::server) fn limits(model: &LiveModel) -> Limits {
    let preprocessing = &model.manifest.preprocessing;
    Limits { images: model.scheduler().queue_limit(), values: preprocessing.tensor_len() }
}

/// Runs an inference on `model`, by `deadline` or by the request's own timeout from `arrived` if that is earlier.
pub(in crate::server) async fn run(
    bodies: &Bodies,
    model: Arc<LiveModel>,
    inference: Inference,
    arrived: Instant,
    deadline: Instant,
) -> Result<Answered, ApiError> {
    let Inference { id, timeout, priority, inputs, outputs, binary_output } = inference;
    let deadline = timeout.and_then(|timeout| arrived.checked_add(timeout)).map_or(deadline, |at| at.min(deadline));
    let wanted = check_outputs(&model, outputs)?;
    let extras = Extras {
        features: wanted.iter().any(|wanted| wanted.name == FEATURES),
        map: wanted.iter().any(|wanted| wanted.name == MAP),
    };
    let images = images(&model, inputs)?;
    let count = images.len();
    let size = size(&model, &wanted, count);
    let mut charge = bodies.budget.charge();
    if size > INLINE {
        charge.answer(size)?;
    }
    let mut served = Served::new(&model, count);
    let most = wanted.iter().filter_map(|w| w.classes).max();
    let finish = |mut output: Output| {
        // only explanations show what the network saw
        output.input = Vec::new();
        let top = most.map(|k| model.select(&output.logits, Selection::top(k))).transpose()?;
        Ok((output, top.unwrap_or_default()))
    };
    let mut rows = Vec::with_capacity(count);
    let answers = model.infer_with(images, Terms { deadline, priority }, extras, finish).await?;
    for (i, answer) in answers.into_iter().enumerate() {
        let (row, timings) = answer.map_err(|error| numbered(error, i, count))?;
        served.add_timings(&timings);
        rows.push(row);
    }
    let made = model.clone();
    let outputs = bodies.threads.run(size, deadline, move || {
        Ok(wanted.into_iter().map(|wanted| output(&made, wanted, &rows, binary_output)).collect())
    });
    Ok(Answered { outputs: outputs.await?, model, id, served, size, charge })
}

/// The result for one image: its logits, and its most probable classes if they are requested.
type Row = (Output, Vec<Prediction>);

fn output(model: &LiveModel, wanted: Wanted, rows: &[Row], binary_output: bool) -> OutputTensor {
    let (labels, all) = (&model.manifest.labels, model.manifest.classes as usize);
    let numbers = |of: fn(&Output) -> &[f32]| {
        OutputData::Numbers(rows.iter().flat_map(|(output, _)| of(output).iter().copied()).collect())
    };
    let binary = wanted.binary.unwrap_or(binary_output);
    let side = |name: &'static str, sides: &[u32], data| {
        let sides = sides.iter().map(|&side| side as usize);
        OutputTensor { name, shape: std::iter::once(rows.len()).chain(sides).collect(), data, binary }
    };
    match wanted.name.as_str() {
        FEATURES => {
            return side(FEATURES, model.manifest.features.as_slice(), numbers(|output| &output.features));
        }
        MAP => {
            return side(MAP, model.manifest.map.as_ref().map_or(&[], |map| &map[..]), numbers(|output| &output.map));
        }
        _ => {}
    }
    let (width, data) = match wanted.classes {
        None => (all, numbers(|output| &output.logits)),
        Some(k) => {
            let k = k.min(all);
            let class = |logits: &[f32], index: usize, label: &str| {
                if labels.is_empty() {
                    format!("{:.6}:{index}", logits[index])
                } else {
                    format!("{:.6}:{index}:{label}", logits[index])
                }
            };
            let row = |(output, top): &Row| -> Vec<String> {
                top.iter().take(k).map(|p| class(&output.logits, p.index, &p.label)).collect()
            };
            (k, OutputData::Classes(rows.iter().flat_map(row).collect()))
        }
    };
    OutputTensor { name: OUTPUT, shape: vec![rows.len(), width], data, binary }
}

/// Estimate of a response's most bytes: as text, a number has up to 16 bytes, and a class its label and some 60 more.
fn size(model: &LiveModel, wanted: &[Wanted], images: usize) -> usize {
    let classes = model.manifest.classes as usize;
    let label = || model.manifest.labels.iter().map(String::len).max().unwrap_or_default();
    let row = |wanted: &Wanted| match wanted.classes {
        None if wanted.name == FEATURES => model.manifest.features.unwrap_or_default() as usize * 16,
        // 26 bits of them at most
        None if wanted.name == MAP => model.map_values() * 16,
        None => classes * 16,
        Some(k) => k.min(classes) * (label() + 64),
    };
    images * wanted.iter().map(row).sum::<usize>()
}

/// An image's error, with its index if the request has several images.
fn numbered(error: InferError, index: usize, images: usize) -> ApiError {
    let mut error = ApiError::from(error);
    if images > 1 && error.code != Code::Internal {
        error.message = format!("image {index} of the batch: {}", error.message);
    }
    error
}

/// Refuses outputs that the model has not, or that are asked for more than once; none means the logits.
fn check_outputs(model: &LiveModel, outputs: Vec<Wanted>) -> Result<Vec<Wanted>, ApiError> {
    let manifest = &model.manifest;
    let there = [(OUTPUT, true), (FEATURES, manifest.features.is_some()), (MAP, manifest.map.is_some())];
    for (i, wanted) in outputs.iter().enumerate() {
        let name = wanted.name.escape_debug();
        match there.iter().find(|(known, _)| wanted.name == *known) {
            None => {
                let names: Vec<_> = there.iter().filter(|(_, is)| *is).map(|(name, _)| format!("`{name}`")).collect();
                return Err(invalid(format!("output `{name}` does not exist; there is {}", names.join(", "))));
            }
            Some((known, true)) if wanted.classes.is_some() && *known != OUTPUT => {
                return Err(invalid(format!("output `{name}` has no classes; ask `{OUTPUT}` for the classification")));
            }
            // named with what to do by the model itself
            Some(_) => {}
        }
        if outputs[..i].iter().any(|other| other.name == wanted.name) {
            return Err(invalid(format!("output `{name}` is asked for more than once")));
        }
    }
    if outputs.is_empty() {
        return Ok(vec![Wanted { name: OUTPUT.into(), classes: None, binary: None }]);
    }
    Ok(outputs)
}

/// Splits the input tensor into images.
fn images(model: &LiveModel, mut inputs: Vec<InputTensor>) -> Result<Vec<Input>, ApiError> {
    let (Some(InputTensor { name, shape, contents }), true) = (inputs.pop(), inputs.is_empty()) else {
        return Err(invalid(format!("exactly one input is taken, `{INPUT}`")));
    };
    if name != INPUT {
        return Err(invalid(format!("input `{}` does not exist; there is `{INPUT}`", name.escape_debug())));
    }
    let [channels, height, width] = model.manifest.preprocessing.shape();
    let len = channels * height * width;
    let limit = model.scheduler().queue_limit();
    let planes = |contents: &str| shaped(&shape, &[channels, height, width], limit, contents);
    match contents {
        Contents::Bare(bytes) if bytes.len() == 4 * len => Ok(vec![Input::Raw(RawTensor::Fp32(bytes))]),
        Contents::Bare(bytes) => Ok(vec![Input::Encoded(bytes)]),
        Contents::Fp32(values) => {
            let count = planes("FP32")?;
            sized(values.len() / 4, count * len, "values")?;
            Ok(split(values, count, 4 * len)?.map(|b| Input::Raw(RawTensor::Fp32(b))).collect())
        }
        Contents::Raw(Datatype::Fp32, bytes) => {
            let count = planes("FP32")?;
            Ok(split(bytes, count, 4 * len)?.map(|b| Input::Raw(RawTensor::Fp32(b))).collect())
        }
        Contents::Raw(Datatype::Fp16, bytes) => {
            let count = planes("FP16")?;
            Ok(split(bytes, count, 2 * len)?.map(|b| Input::Raw(RawTensor::Fp16(b))).collect())
        }
        Contents::Raw(Datatype::Uint8, bytes) => {
            let count = shaped(&shape, &[height, width, channels], limit, "UINT8")?;
            Ok(split(bytes, count, len)?.map(|b| Input::Raw(RawTensor::Pixels(b))).collect())
        }
        Contents::Raw(Datatype::Bytes, bytes) => encoded(elements(&bytes, limit)?, &shape, limit),
        Contents::Elements(elements) => encoded(elements, &shape, limit),
        Contents::Raw(other, _) => Err(invalid(format!(
            "input `{INPUT}` is not taken as {}; send FP32 or FP16 [N,{channels},{height},{width}] normalised, UINT8 [N,{height},{width},{channels}] pixels, or BYTES [N] encoded images",
            other.name()
        ))),
    }
}

/// Number of images of a tensor whose shape must be `[N, …each]`.
fn shaped(shape: &[i64], each: &[usize], limit: usize, datatype: &str) -> Result<usize, ApiError> {
    let fits = shape.len() == each.len() + 1 && shape[1..].iter().zip(each).all(|(&a, &b)| usize::try_from(a) == Ok(b));
    let count = shape.first().and_then(|&n| usize::try_from(n).ok()).filter(|&n| fits && n > 0);
    let count = count.ok_or_else(|| {
        let each = each.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        invalid(format!("input `{INPUT}` has shape {shape:?}; as {datatype} it must be [N,{each}]"))
    })?;
    at_most(count, limit)
}

fn at_most(images: usize, limit: usize) -> Result<usize, ApiError> {
    if images <= limit { Ok(images) } else { Err(InferError::TooManyImages { images, limit }.into()) }
}

fn sized(found: usize, due: usize, what: &str) -> Result<(), ApiError> {
    if found == due {
        Ok(())
    } else {
        Err(invalid(format!("input `{INPUT}` has {found} {what}, its shape needs {due}")))
    }
}

/// Splits bytes into `count` images of `len` bytes each, without copying.
fn split(bytes: Bytes, count: usize, len: usize) -> Result<impl Iterator<Item = Bytes>, ApiError> {
    sized(bytes.len(), count.saturating_mul(len), "bytes")?;
    Ok((0..count).map(move |i| bytes.slice(i * len..(i + 1) * len)))
}

/// Encoded images, shape `[N]` or `[N, 1]`.
fn encoded(elements: Vec<Bytes>, shape: &[i64], limit: usize) -> Result<Vec<Input>, ApiError> {
    let each: &[usize] = if shape.len() > 1 { &[1] } else { &[] };
    let count = shaped(shape, each, limit, "BYTES")?;
    sized(elements.len(), count, "elements")?;
    Ok(elements.into_iter().map(Input::Encoded).collect())
}

/// Elements of BYTES, each preceded by its length (4 bytes, little-endian).
fn elements(whole: &Bytes, limit: usize) -> Result<Vec<Bytes>, ApiError> {
    let (mut found, mut at) = (Vec::new(), 0);
    while at < whole.len() {
        at_most(found.len() + 1, limit)?;
        let element = whole.get(at..at + 4).and_then(|length| {
            let start = at + 4;
            let end = start.checked_add(u32::from_le_bytes(length.try_into().ok()?) as usize)?;
            (end <= whole.len()).then_some(start..end)
        });
        let Some(range) = element else {
            return Err(invalid(format!("element {} of input `{INPUT}` reaches past the data's end", found.len())));
        };
        at = range.end;
        found.push(whole.slice(range));
    }
    Ok(found)
}
