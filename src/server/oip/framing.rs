//! An inference as it travels over HTTP: JSON, with tensors in it or as bytes after it.
//!
//! Owns the framing of the binary-tensor extension in both directions. Knows no model.

use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::{DeserializeSeed, Deserializer, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::super::status::ApiError;
use super::datatype::Datatype;
use super::inference::{
    Answered, Contents, INPUT, Inference, InputTensor, OutputData, Parameters, Wanted, invalid, refuse_shared_memory,
    whole,
};
use crate::infer::error::InferError;
use crate::infer::top_k::check_finite;

/// How many bytes of a body are JSON; the tensors' bytes follow. 0: the body is one input and no JSON.
pub(in crate::server) const HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// Arrays in arrays, at most: a tensor of images needs four.
const MAX_DEPTH: usize = 16;

/// A request for an inference.
#[derive(Debug, Deserialize, ToSchema)]
pub(in crate::server) struct InferRequest<'a> {
    /// Echoed in the answer.
    id: Option<String>,
    /// `timeout` in microseconds, `priority` (lower numbers first), `binary_data_output`.
    #[schema(value_type = Option<std::collections::BTreeMap<String, serde_json::Value>>)]
    parameters: Option<Parameters>,
    /// One tensor, `input`.
    #[serde(borrow)]
    #[schema(min_items = 1, max_items = 1, value_type = Vec<InferInput>)]
    inputs: Vec<InferInput<'a>>,
    /// Outputs wanted; left out: all of them.
    outputs: Option<Vec<InferRequestedOutput>>,
}

/// A tensor: FP32 or FP16 `[N,3,H,W]` normalised, UINT8 `[N,H,W,3]` pixels, or BYTES `[N]` encoded images.
#[derive(Debug, Deserialize, ToSchema)]
pub(in crate::server) struct InferInput<'a> {
    /// `input`.
    name: String,
    /// The number of images first.
    shape: Vec<i64>,
    /// `FP32`, `FP16`, `UINT8` or `BYTES`.
    datatype: String,
    /// `binary_data_size`: bytes of this tensor after the JSON.
    #[schema(value_type = Option<std::collections::BTreeMap<String, serde_json::Value>>)]
    parameters: Option<Parameters>,
    /// Elements in row-major order, flat or nested; those of BYTES in base64. Left out when they follow as bytes.
    #[serde(borrow)]
    #[schema(value_type = Option<Vec<serde_json::Value>>)]
    data: Option<&'a RawValue>,
}

/// An output that is wanted.
#[derive(Debug, Deserialize, ToSchema)]
pub(in crate::server) struct InferRequestedOutput {
    /// `logits`.
    name: String,
    /// `classification`: the number of classes wanted, as `VALUE:INDEX:LABEL`. `binary_data`: as bytes after the JSON.
    #[schema(value_type = Option<std::collections::BTreeMap<String, serde_json::Value>>)]
    parameters: Option<Parameters>,
}

/// An inference's answer.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::server) struct InferResponse<'a> {
    model_name: &'a str,
    model_version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    outputs: Vec<InferOutput<'a>>,
}

/// A tensor of an answer.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::server) struct InferOutput<'a> {
    name: &'a str,
    /// `FP32`; `BYTES` for classes.
    datatype: &'a str,
    shape: [usize; 2],
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<BinarySize>,
    /// Left out when the elements follow as bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<serde_json::Value>>)]
    data: Option<JsonData<'a>>,
}

/// How many bytes of this tensor follow the JSON.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::server) struct BinarySize {
    binary_data_size: usize,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum JsonData<'a> {
    Numbers(&'a [f32]),
    Texts(&'a [String]),
}

/// Length of a body's JSON, from the header of that name.
pub(in crate::server) fn json_length(headers: &HeaderMap) -> Result<Option<usize>, ApiError> {
    let Some(value) = headers.get(HEADER_LENGTH) else { return Ok(None) };
    let length = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    length.map(Some).ok_or_else(|| invalid("header `inference-header-content-length` is not a whole number"))
}

/// A request's body. `json_length`: how many of its bytes are JSON, where the request says so.
pub fn parse(json_length: Option<usize>, body: &Bytes) -> Result<Inference, ApiError> {
    if json_length == Some(0) {
        let bare = InputTensor { name: INPUT.into(), shape: vec![1], contents: Contents::Bare(body.clone()) };
        return Ok(Inference { inputs: vec![bare], binary_output: true, ..Inference::default() });
    }
    let length = json_length.unwrap_or(body.len());
    let json = body.get(..length).ok_or_else(|| {
        invalid(format!("`inference-header-content-length` is {length}, the body has only {} bytes", body.len()))
    })?;
    let request: InferRequest<'_> = serde_json::from_slice(json)
        .map_err(|e| invalid(format!("the body is no inference request of the protocol: {e}")))?;
    let mut binary = body.slice(length..);
    let mut inference = Inference { id: request.id, ..Inference::default() };
    for input in request.inputs {
        inference.inputs.push(input.tensor(&mut binary)?);
    }
    if !binary.is_empty() {
        return Err(invalid(format!("{} bytes after the last tensor belong to no input", binary.len())));
    }
    for output in request.outputs.unwrap_or_default() {
        inference.outputs.push(Wanted::new(output.name, &output.parameters.unwrap_or_default())?);
    }
    inference.with_parameters(&request.parameters.unwrap_or_default())
}

impl InferInput<'_> {
    /// Takes its bytes off the front of `binary` if it says that they are there.
    fn tensor(self, binary: &mut Bytes) -> Result<InputTensor, ApiError> {
        let Self { name, shape, datatype, parameters, data } = self;
        let parameters = parameters.unwrap_or_default();
        let shown = name.escape_debug().to_string();
        refuse_shared_memory(&parameters, &name)?;
        let known = Datatype::parse(&datatype)
            .ok_or_else(|| invalid(format!("`{}` is no datatype of the protocol", datatype.escape_debug())))?;
        let size = whole(&parameters, "binary_data_size")?;
        let contents = match (size, data) {
            (Some(_), Some(_)) => {
                return Err(invalid(format!("input `{shown}` has both `data` and `binary_data_size`")));
            }
            (None, None) => return Err(invalid(format!("input `{shown}` has no `data`"))),
            (Some(size), None) => {
                let size = usize::try_from(size).ok().filter(|&size| size <= binary.len()).ok_or_else(|| {
                    invalid(format!("input `{shown}` says {size} bytes, {} are left of the body", binary.len()))
                })?;
                Contents::Raw(known, binary.split_to(size))
            }
            (None, Some(data)) => {
                let most = shape.iter().try_fold(1_usize, |n, &side| n.checked_mul(usize::try_from(side).ok()?));
                let most = most.ok_or_else(|| invalid(format!("input `{shown}` can't have shape {shape:?}")))?;
                elements(known, data, most)
                    .map_err(|e| invalid(format!("`data` of input `{shown}` is not {datatype}: {e}")))?
            }
        };
        Ok(InputTensor { name, shape, contents })
    }
}

/// Elements in JSON, `most` of them at most.
fn elements(datatype: Datatype, data: &RawValue, most: usize) -> Result<Contents, serde_json::Error> {
    match datatype {
        Datatype::Fp32 => Ok(Contents::Fp32(flat(data, most)?)),
        Datatype::Uint8 => Ok(Contents::Raw(datatype, flat::<u8>(data, most)?.into())),
        Datatype::Bytes => {
            let texts: Vec<String> = flat(data, most)?;
            let decode = |text: String| STANDARD.decode(text).map(Bytes::from).map_err(serde_json::Error::custom);
            Ok(Contents::Elements(texts.into_iter().map(decode).collect::<Result<_, _>>()?))
        }
        Datatype::Fp16 | Datatype::Bf16 => Err(serde_json::Error::custom("it has no JSON form; send it as bytes")),
        // refused with a better text once the model is known
        other => Ok(Contents::Raw(other, Bytes::new())),
    }
}

fn flat<T: Element>(data: &RawValue, most: usize) -> Result<Vec<T>, serde_json::Error> {
    let mut out = Vec::new();
    let mut json = serde_json::Deserializer::from_str(data.get());
    List { out: &mut out, most, depth: 0 }.deserialize(&mut json)?;
    Ok(out)
}

/// What a JSON array may hold.
trait Element: Sized {
    fn number(value: f64) -> Option<Self>;
    fn text(value: &str) -> Option<Self>;
}

impl Element for f32 {
    fn number(value: f64) -> Option<Self> {
        Some(value as f32)
    }
    fn text(_: &str) -> Option<Self> {
        None
    }
}

impl Element for u8 {
    fn number(value: f64) -> Option<Self> {
        (value.fract() == 0.0 && (0.0..=255.0).contains(&value)).then_some(value as u8)
    }
    fn text(_: &str) -> Option<Self> {
        None
    }
}

impl Element for String {
    fn number(_: f64) -> Option<Self> {
        None
    }
    fn text(value: &str) -> Option<Self> {
        Some(value.to_string())
    }
}

/// An array of elements or of arrays, or (inside one) an element: what there is goes to `out`.
struct List<'a, T> {
    out: &'a mut Vec<T>,
    most: usize,
    depth: usize,
}

impl<T: Element> List<'_, T> {
    fn push<E: serde::de::Error>(self, element: Option<T>, what: &str) -> Result<(), E> {
        if self.depth == 0 {
            return Err(E::custom("an array is due"));
        }
        let element = element.ok_or_else(|| E::custom(format!("{what} can't be an element")))?;
        if self.out.len() >= self.most {
            return Err(E::custom(format!("more than the {} elements of the shape", self.most)));
        }
        self.out.push(element);
        Ok(())
    }
}

impl<'de, T: Element> DeserializeSeed<'de> for List<'_, T> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Element> Visitor<'de> for List<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array of elements, flat or nested")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        if self.depth == MAX_DEPTH {
            return Err(A::Error::custom("nested too deep"));
        }
        while seq.next_element_seed(List { out: self.out, most: self.most, depth: self.depth + 1 })?.is_some() {}
        Ok(())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<(), E> {
        self.push(T::number(value), &value.to_string())
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<(), E> {
        self.visit_f64(value as f64)
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<(), E> {
        self.visit_f64(value as f64)
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<(), E> {
        self.push(T::text(value), "a string")
    }
}

/// The answer: JSON, and after it the outputs that are wanted as bytes.
pub(in crate::server) fn respond(answered: Answered) -> Result<Response, ApiError> {
    let Answered { model, id, outputs, served } = answered;
    let mut binary = Vec::new();
    let mut shown = Vec::with_capacity(outputs.len());
    for output in &outputs {
        if let (OutputData::Logits(values), false) = (&output.data, output.binary) {
            // JSON has no word for them
            check_finite(values).map_err(|e| InferError::BadTensor(e.to_string()))?;
        }
        let bytes = output.binary.then(|| output.data.to_bytes());
        shown.push(InferOutput {
            name: output.name,
            datatype: output.data.datatype().name(),
            shape: output.shape,
            parameters: bytes.as_ref().map(|bytes| BinarySize { binary_data_size: bytes.len() }),
            data: match (&bytes, &output.data) {
                (Some(_), _) => None,
                (None, OutputData::Logits(values)) => Some(JsonData::Numbers(values)),
                (None, OutputData::Classes(classes)) => Some(JsonData::Texts(classes)),
            },
        });
        binary.extend(bytes);
    }
    let version = model.version.to_string();
    let answer = InferResponse { model_name: &model.name, model_version: version, id: id.as_deref(), outputs: shown };
    let mut body =
        serde_json::to_vec(&answer).map_err(|e| ApiError::internal(format!("an answer has no JSON: {e}")))?;
    let length = body.len();
    let kind = if binary.is_empty() { "application/json" } else { "application/octet-stream" };
    let is_binary = !binary.is_empty();
    binary.iter().for_each(|bytes| body.extend_from_slice(bytes));
    let mut response = ([(header::CONTENT_TYPE, kind)], body).into_response();
    if is_binary {
        response.headers_mut().insert(HEADER_LENGTH, HeaderValue::from(length));
    }
    if let Ok(value) = HeaderValue::from_str(&served.server_timing()) {
        response.headers_mut().insert("server-timing", value);
    }
    response.extensions_mut().insert(served);
    Ok(response)
}
