//! An inference over HTTP: JSON, with tensors in it or as bytes after it.
//!
//! Owns the framing of the binary tensor data extension in both directions. Knows no model.

use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;
use serde::Serialize;
use serde::de::Error as _;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::super::bodies::json::{self, Cursor};
use super::super::bodies::numbers::numbers;
use super::super::bodies::upload::EXAMPLE;
use super::super::bodies::{Limits, base64};
use super::super::status::{ApiError, cut};
use super::datatype::Datatype;
use super::inference::{
    Answered, Contents, Inference, InputTensor, OutputData, Parameters, Wanted, invalid, refuse_shared_memory, whole,
};
use crate::infer::error::InferError;
use crate::infer::top_k::check_finite;
use crate::model::INPUT;

/// Bytes of JSON at the start of the body; the tensors' bytes follow. 0: the body is one input without JSON.
pub(in crate::server) const HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// Most levels of nested arrays: a tensor of images needs four.
const MAX_DEPTH: usize = 16;

/// Most inputs, and most outputs, of a request. Models have one of each, and refuse a second one themselves.
pub(in crate::server) const MAX_TENSORS: usize = 8;

/// Most dimensions of a tensor.
pub(in crate::server) const MAX_DIMENSIONS: usize = 16;

/// An inference request.
#[derive(ToSchema)]
#[schema(example = json!({
    "inputs": [{ "name": "input", "shape": [1], "datatype": "BYTES", "data": [EXAMPLE] }],
    "outputs": [{ "name": "logits", "parameters": { "classification": 2 } }],
}))]
#[allow(dead_code, reason = "only described: it is read member by member")]
pub(in crate::server) struct InferRequest {
    /// Repeated in the response; truncated to 200 characters.
    id: Option<String>,
    /// `timeout` in microseconds, `priority` (lower numbers first), `binary_data_output`. Scalars only.
    #[schema(value_type = Option<std::collections::BTreeMap<String, serde_json::Value>>)]
    parameters: Option<Parameters>,
    /// One tensor, `input`.
    #[schema(min_items = 1, max_items = 1)]
    inputs: Vec<InferInput>,
    /// Requested outputs; by default all.
    outputs: Option<Vec<InferRequestedOutput>>,
}

/// A tensor: FP32 or FP16 `[N,3,H,W]` normalised, UINT8 `[N,H,W,3]` pixels, or BYTES `[N]` encoded images.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only described: it is read member by member")]
pub(in crate::server) struct InferInput {
    /// `input`.
    name: String,
    /// Dimensions; the first is the number of images.
    shape: Vec<i64>,
    /// `FP32`, `FP16`, `UINT8` or `BYTES`.
    datatype: String,
    /// `binary_data_size`: bytes of this tensor after the JSON.
    #[schema(value_type = Option<std::collections::BTreeMap<String, serde_json::Value>>)]
    parameters: Option<Parameters>,
    /// Elements in row-major order, flat or nested; those of BYTES in base64. Omitted if they follow as bytes.
    data: Option<Vec<serde_json::Value>>,
}

/// A requested output.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only described: it is read member by member")]
pub(in crate::server) struct InferRequestedOutput {
    /// `logits`.
    name: String,
    /// `classification`: number of classes to return, as `VALUE:INDEX:LABEL`. `binary_data`: whether to return bytes
    /// after the JSON.
    #[schema(value_type = Option<std::collections::BTreeMap<String, serde_json::Value>>)]
    parameters: Option<Parameters>,
}

/// An inference response.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::server) struct InferResponse<'a> {
    model_name: &'a str,
    model_version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    outputs: Vec<InferOutput<'a>>,
}

/// A tensor of a response.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::server) struct InferOutput<'a> {
    name: &'a str,
    /// `FP32`; `BYTES` for classes.
    datatype: &'a str,
    shape: &'a [usize],
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<BinarySize>,
    /// Omitted if the elements follow as bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<serde_json::Value>>)]
    data: Option<JsonData<'a>>,
}

/// Bytes of this tensor after the JSON.
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

/// Bytes of JSON in the body, from the header [`HEADER_LENGTH`].
pub(in crate::server) fn json_length(headers: &HeaderMap) -> Result<Option<usize>, ApiError> {
    let Some(value) = headers.get(HEADER_LENGTH) else { return Ok(None) };
    let length = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    length.map(Some).ok_or_else(|| invalid("header `inference-header-content-length` is not a whole number"))
}

/// Asks for memory before bytes are converted into others.
pub type Room<'a> = &'a mut dyn FnMut(usize) -> Result<(), ApiError>;

/// Parses a request's body, of which the first `json_length` bytes are JSON (`None`: all). Keeps nothing beyond
/// `limits`, or that `room` refuses.
pub fn parse(json_length: Option<usize>, body: &Bytes, limits: &Limits, room: Room<'_>) -> Result<Inference, ApiError> {
    if json_length == Some(0) {
        let bare = InputTensor { name: INPUT.into(), shape: vec![1], contents: Contents::Bare(body.clone()) };
        return Ok(Inference { inputs: vec![bare], binary_output: true, ..Inference::default() });
    }
    let length = json_length.unwrap_or(body.len());
    let json = body.get(..length).ok_or_else(|| {
        invalid(format!("`inference-header-content-length` is {length}, the body has only {} bytes", body.len()))
    })?;
    let (mut inputs, mut outputs) = (None, Vec::new());
    let (mut inference, mut parameters) = (Inference::default(), Parameters::new());
    let mut cursor = Cursor::new(json);
    let read = cursor.members(|name, json| {
        match name.as_str() {
            "id" => inference.id = json::text("id", json.value()?)?,
            "parameters" => parameters = json::scalars("parameters", json.value()?)?,
            "inputs" => {
                let inputs = inputs.insert(Vec::new());
                json.elements(MAX_TENSORS, "inputs", |json| {
                    inputs.push(Input::read(json, limits, room)?);
                    Ok::<_, Wrong>(())
                })?;
            }
            "outputs" => match json.value()? {
                none if none.get() == "null" => {}
                given => outputs = few("outputs", given)?,
            },
            _ => json.value().map(|_| ())?,
        }
        Ok::<_, Wrong>(())
    });
    read.and_then(|()| Ok(cursor.end()?)).map_err(Wrong::told)?;
    let other = |e: serde_json::Error| Wrong::from(e).told();
    let inputs = inputs.ok_or_else(|| other(serde_json::Error::missing_field("inputs")))?;
    let mut binary = body.slice(length..);
    for input in inputs {
        inference.inputs.push(input.tensor(&mut binary)?);
    }
    if !binary.is_empty() {
        return Err(invalid(format!("{} bytes after the last tensor belong to no input", binary.len())));
    }
    for output in outputs {
        let (mut name, mut parameters) = (None, Parameters::new());
        for (member, value) in json::object(output.get().as_bytes()).map_err(other)? {
            match member.as_str() {
                "name" => name = json::text("name", value).map_err(other)?,
                "parameters" => parameters = json::scalars("parameters", value).map_err(other)?,
                _ => {}
            }
        }
        let name = name.ok_or_else(|| other(serde_json::Error::missing_field("name")))?;
        inference.outputs.push(Wanted::new(name, &parameters)?);
    }
    inference.with_parameters(&parameters)
}

/// The elements of an array of tensors.
fn few<'a>(name: &str, json: &'a RawValue) -> Result<Vec<&'a RawValue>, serde_json::Error> {
    let many = |count| format!("{count} {name}, at most {MAX_TENSORS} are read");
    json::array(json, MAX_TENSORS)?.map_err(|count| serde_json::Error::custom(many(count)))
}

/// Why a request can't be read: it is no JSON of the protocol, or what it says is refused.
enum Wrong {
    Json(serde_json::Error),
    Refused(ApiError),
}

impl From<serde_json::Error> for Wrong {
    fn from(error: serde_json::Error) -> Self {
        Self::Json(error)
    }
}

impl From<ApiError> for Wrong {
    fn from(error: ApiError) -> Self {
        Self::Refused(error)
    }
}

impl Wrong {
    fn told(self) -> ApiError {
        match self {
            Self::Json(error) => invalid(format!("the body is no inference request of the protocol: {error}")),
            Self::Refused(error) => error,
        }
    }
}

/// A tensor as it stands in the JSON.
struct Input {
    name: String,
    shape: Vec<i64>,
    datatype: Datatype,
    parameters: Parameters,
    contents: Option<Contents>,
}

impl Input {
    /// Reads a tensor where it stands. Its elements are read in the same pass where its shape and datatype come before them, as
    /// every client writes it; else when those are known.
    fn read(json: &mut Cursor<'_>, limits: &Limits, room: Room<'_>) -> Result<Self, Wrong> {
        let (mut name, mut shape, mut datatype) = (None, None, None);
        let (mut parameters, mut contents, mut later) = (Parameters::new(), None, None);
        json.members(|member, json| {
            match member.as_str() {
                "name" => name = json::text("name", json.value()?)?,
                "shape" => shape = json::short::<Vec<i64>>("shape", json.value()?)?.map(few_dimensions).transpose()?,
                "datatype" => datatype = json::text("datatype", json.value()?)?.map(known).transpose()?,
                "parameters" => parameters = json::scalars("parameters", json.value()?)?,
                "data" => match (&shape, datatype) {
                    _ if json.is_null()? => {}
                    (Some(shape), Some(datatype)) => {
                        contents = Some(elements(json, name.as_deref(), datatype, shape, limits, room)?);
                    }
                    _ => later = Some(json.skip()?),
                },
                _ => json.value().map(|_| ())?,
            }
            Ok::<_, Wrong>(())
        })?;
        let missing = serde_json::Error::missing_field;
        let shape = shape.ok_or_else(|| missing("shape"))?;
        let name = name.ok_or_else(|| missing("name"))?;
        let datatype = datatype.ok_or_else(|| missing("datatype"))?;
        if let Some(mut data) = later {
            contents = Some(elements(&mut data, Some(&name), datatype, &shape, limits, room)?);
        }
        Ok(Self { name, shape, datatype, parameters, contents })
    }

    /// Takes its bytes off the front of `binary` if it says that they are there.
    fn tensor(self, binary: &mut Bytes) -> Result<InputTensor, ApiError> {
        let Self { name, shape, datatype, parameters, contents } = self;
        let shown = name.escape_debug().to_string();
        refuse_shared_memory(&parameters, &name)?;
        let size = whole(&parameters, "binary_data_size")?;
        let contents = match (size, contents) {
            (Some(_), Some(_)) => {
                return Err(invalid(format!("input `{shown}` has both `data` and `binary_data_size`")));
            }
            (None, None) => return Err(invalid(format!("input `{shown}` has no `data`"))),
            (Some(size), None) => {
                let size = usize::try_from(size).ok().filter(|&size| size <= binary.len()).ok_or_else(|| {
                    invalid(format!("input `{shown}` says {size} bytes, {} are left of the body", binary.len()))
                })?;
                Contents::Raw(datatype, binary.split_to(size))
            }
            (None, Some(contents)) => contents,
        };
        Ok(InputTensor { name, shape, contents })
    }
}

fn few_dimensions(shape: Vec<i64>) -> Result<Vec<i64>, serde_json::Error> {
    if shape.len() > MAX_DIMENSIONS {
        let text = format!("a shape of {} dimensions, at most {MAX_DIMENSIONS} are read", shape.len());
        return Err(serde_json::Error::custom(text));
    }
    Ok(shape)
}

fn known(datatype: String) -> Result<Datatype, ApiError> {
    let unknown = || invalid(format!("`{}` is no datatype of the protocol", datatype.escape_debug()));
    Datatype::parse(&datatype).ok_or_else(unknown)
}

/// The elements of `data`, of which there may be as many as `shape` says, if `limits` and `room` let them in.
fn elements(
    data: &mut Cursor<'_>,
    name: Option<&str>,
    datatype: Datatype,
    shape: &[i64],
    limits: &Limits,
    room: Room<'_>,
) -> Result<Contents, ApiError> {
    let shown = name.unwrap_or(INPUT).escape_debug().to_string();
    let most = shape.iter().try_fold(1_usize, |n, &side| n.checked_mul(usize::try_from(side).ok()?));
    let most = most.ok_or_else(|| invalid(format!("input `{shown}` can't have shape {shape:?}")))?;
    let per_image = if datatype == Datatype::Bytes { 1 } else { limits.values };
    let wrong = |e: serde_json::Error| {
        invalid(format!("`data` of input `{shown}` is not {}: {}", datatype.name(), cut(&e.to_string())))
    };
    if most > limits.images.saturating_mul(per_image) {
        // no model takes that shape, and says so: nothing of it need be read
        data.skip().map_err(wrong)?;
        return Ok(Contents::Raw(datatype, Bytes::new()));
    }
    // an element is a digit and a comma at least
    let count = most.min(data.left() / 2 + 1);
    let due = serde_json::Error::custom;
    let read = match datatype {
        Datatype::Fp32 => {
            room(4 * count)?;
            let mut bytes = Vec::with_capacity(4 * count);
            let keep = |value: f32| bytes.extend_from_slice(&value.to_le_bytes());
            numbers(data, most, MAX_DEPTH, keep).map(|()| Contents::Fp32(bytes.into()))
        }
        Datatype::Uint8 => {
            room(count)?;
            let mut bytes = Vec::with_capacity(count);
            numbers(data, most, MAX_DEPTH, |value| bytes.push(value)).map(|()| Contents::Raw(datatype, bytes.into()))
        }
        Datatype::Bytes => {
            let data = data.value().map_err(wrong)?;
            room(base64::most(data.get().len()))?;
            let mut elements = Vec::new();
            texts(data, 0, most, &mut elements).map(|()| Contents::Elements(elements))
        }
        Datatype::Fp16 | Datatype::Bf16 => Err(due("it has no JSON form; send it as bytes")),
        // refused with a better text once the model is known
        other => data.skip().map(|_| Contents::Raw(other, Bytes::new())),
    };
    read.map_err(wrong)
}

/// Byte strings in base64, at most `most`, in nested arrays; `depth` counts the levels.
fn texts(data: &RawValue, depth: usize, most: usize, out: &mut Vec<Bytes>) -> Result<(), serde_json::Error> {
    let too_many = || serde_json::Error::custom(format!("more than the {most} elements of the shape"));
    match json::quoted(data) {
        Some(_) if depth == 0 => Err(serde_json::Error::custom("an array is due")),
        Some(_) if out.len() >= most => Err(too_many()),
        Some(text) => {
            let bytes = base64::decode(text);
            let bytes = bytes.map_err(|e| serde_json::Error::custom(format!("an element's base64 is not valid: {e}")));
            out.push(bytes?.into());
            Ok(())
        }
        None if depth == MAX_DEPTH => Err(serde_json::Error::custom("nested too deep")),
        None => {
            let elements = json::array(data, most)?.map_err(|_| too_many())?;
            elements.into_iter().try_for_each(|element| texts(element, depth + 1, most, out))
        }
    }
}

/// The answer: JSON, and after it the outputs that are wanted as bytes.
pub(in crate::server) fn respond(answered: Answered) -> Result<Response, ApiError> {
    let Answered { model, id, outputs, served, charge, .. } = answered;
    let mut binary = Vec::new();
    let mut shown = Vec::with_capacity(outputs.len());
    for output in &outputs {
        if let (OutputData::Numbers(values), false) = (&output.data, output.binary) {
            // JSON can't express infinities and NaN
            check_finite(values).map_err(|e| InferError::BadTensor(e.to_string()))?;
        }
        let bytes = output.binary.then(|| output.data.to_bytes());
        shown.push(InferOutput {
            name: output.name,
            datatype: output.data.datatype().name(),
            shape: &output.shape,
            parameters: bytes.as_ref().map(|bytes| BinarySize { binary_data_size: bytes.len() }),
            data: match (&bytes, &output.data) {
                (Some(_), _) => None,
                (None, OutputData::Numbers(values)) => Some(JsonData::Numbers(values)),
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
    let mut response = served.respond(kind, body, charge);
    if is_binary {
        response.headers_mut().insert(HEADER_LENGTH, HeaderValue::from(length));
    }
    Ok(response)
}
