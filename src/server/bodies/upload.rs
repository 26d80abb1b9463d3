//! Extracts the encoded images from a request: a single image, a form with files, or JSON with base64.
//!
//! Owns the three body shapes of `/v1/classify`; other contracts read JSON their own way (`instances`). Knows nothing of
//! models.

use std::time::Instant;

use axum::extract::Request;
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use serde::de::Error as _;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::super::query;
use super::super::status::{ApiError, Code, cut};
use super::budget::Charge;
use super::intake::{Held, whole};
use super::{Bodies, base64, form, json};
use crate::infer::error::InferError;
use crate::model::scoring::ScoreFunction;
use crate::pixels::ImageError;

/// Fields of a form that are no files.
const FIELDS: [&str; 3] = ["model", "version", "top_k"];
/// Most bytes that are read of such a field.
const FIELD: usize = 4096;

/// Base64 of a PNG of four pixels, for examples that run.
pub(in crate::server) const EXAMPLE: &str =
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR42mPQqNhyomILg0aFzYkKGwAo1gWh/yLA0gAAAABJRU5ErkJggg==";

/// Encoded images, as the client sent them.
#[derive(Debug)]
pub(in crate::server) struct Upload {
    /// In the request's order; an error for an image whose base64 is invalid.
    pub(in crate::server) images: Vec<Result<Bytes, ImageError>>,
    /// What the body asks for beside them.
    pub(in crate::server) asked: Asked,
    /// The memory of all of it.
    pub(in crate::server) charge: Charge,
}

/// What a body says beside its images.
#[derive(Debug, Default)]
pub(in crate::server) struct Asked {
    /// The model's name, cut if it is long.
    pub(in crate::server) model: Option<String>,
    pub(in crate::server) version: Option<u64>,
    /// Predictions per image.
    pub(in crate::server) top_k: Option<usize>,
    /// What makes scores, where it is not the model's own function.
    pub(in crate::server) scores: Option<ScoreFunction>,
    /// What a request of embeddings in OpenAI's form says.
    pub(in crate::server) embeddings: Option<Embeddings>,
    /// It came as a list, though it may have only one element.
    pub(in crate::server) is_list: bool,
}

/// How a contract reads a body of JSON: at most so many images of it, charged to the same.
pub(in crate::server) type Json = fn(&Bytes, usize, Charge) -> Result<Upload, ApiError>;

/// A file's bytes as they are.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[allow(dead_code, reason = "only described: it is read as bytes")]
pub(in crate::server) struct Binary(Vec<u8>);

/// Images in base64.
#[derive(ToSchema)]
#[schema(example = json!({ "images": [{ "b64": EXAMPLE }], "top_k": 2 }))]
#[allow(dead_code, reason = "only described: it is read member by member")]
pub(in crate::server) struct JsonBody {
    #[schema(min_items = 1)]
    images: Vec<JsonImage>,
    /// Name in the repository; may be left out when only one model is served.
    model: Option<String>,
    /// Left out: the highest.
    version: Option<u64>,
    /// Predictions per image.
    #[schema(minimum = 1)]
    top_k: Option<usize>,
}

/// Files, each in a field of any name, the model and the number of predictions.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only described: it is read part by part")]
pub(in crate::server) struct Form {
    #[schema(inline)]
    image: Vec<Binary>,
    /// Name in the repository; may be left out when only one model is served.
    model: Option<String>,
    /// Left out: the highest.
    version: Option<u64>,
    /// Predictions per image.
    #[schema(minimum = 1)]
    top_k: Option<usize>,
}

/// An encoded image.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only described: it is read member by member")]
pub(in crate::server) struct JsonImage {
    /// Base64 of the file. Line breaks, missing padding, the URL-safe alphabet and `data:` URLs are accepted.
    b64: String,
}

/// What a request of embeddings in OpenAI's form says beside its images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::server) struct Embeddings {
    /// Vectors as base64 of little-endian single-precision numbers.
    pub(in crate::server) base64: bool,
}

/// Images in base64: `images` as for classification, or `input` as OpenAI's clients send it.
#[derive(ToSchema)]
#[schema(example = json!({ "input": [EXAMPLE] }))]
#[allow(dead_code, reason = "only described: it is read member by member")]
pub(in crate::server) struct EmbedBody {
    #[schema(min_items = 1)]
    images: Option<Vec<JsonImage>>,
    /// Base64 of files; the answer has the shape of OpenAI's embeddings.
    #[schema(min_items = 1)]
    input: Option<Vec<String>>,
    /// Name in the repository; optional when only one model is served.
    model: Option<String>,
    /// Version; by default the highest.
    version: Option<u64>,
    /// With `input`: `float` or `base64`.
    encoding_format: Option<String>,
    /// With `input`: ignored.
    user: Option<String>,
}

/// What a body is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::server) enum Kind {
    /// An image's bytes.
    Single,
    /// A form, and its boundary.
    Form(String),
    Json,
}

impl Kind {
    /// By the content type.
    pub(in crate::server) fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        let said = headers.get(header::CONTENT_TYPE).map(|v| v.to_str().unwrap_or("unreadable")).unwrap_or_default();
        let kind = said.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        Ok(match kind.as_str() {
            "multipart/form-data" => Self::Form(form::boundary(said)?),
            "application/json" => Self::Json,
            // what AWS's and Google's command lines say, SageMaker's and what `curl --data-binary` says by itself
            ""
            | "application/octet-stream"
            | "binary/octet-stream"
            | "application/x-image"
            | "application/x-www-form-urlencoded" => Self::Single,
            image if image.starts_with("image/") => Self::Single,
            other => {
                let shown = cut(other).escape_default().to_string();
                return Err(ApiError::new(
                    Code::UnsupportedMediaType,
                    format!(
                        "content type `{shown}` is not taken; send image bytes as image/* or application/octet-stream, files as multipart/form-data, or application/json"
                    ),
                ));
            }
        })
    }

    /// Whether a body of this kind can say which model it is for.
    pub(in crate::server) fn may_name_a_model(&self) -> bool {
        *self != Self::Single
    }
}

/// Reads the body, until `deadline` at the latest; at most `images` of them.
pub(in crate::server) async fn read(
    bodies: &Bodies,
    request: Request,
    kind: Kind,
    json: Json,
    images: usize,
    deadline: Instant,
) -> Result<Upload, ApiError> {
    let Held { bytes, charge } = whole(bodies, request, deadline).await?;
    let length = bytes.len();
    match kind {
        Kind::Single => Ok(Upload { images: vec![Ok(bytes)], asked: Asked::default(), charge }),
        Kind::Form(boundary) => {
            bodies.threads.run(length, deadline, move || read_form(&bytes, &boundary, images, charge)).await
        }
        Kind::Json => bodies.threads.run(length, deadline, move || json(&bytes, images, charge)).await,
    }
}

pub(in crate::server) fn read_form(
    body: &Bytes,
    boundary: &str,
    most: usize,
    charge: Charge,
) -> Result<Upload, ApiError> {
    let (mut images, mut asked) = (Vec::new(), Asked::default());
    for form::Part { name, is_file, bytes } in form::parts(body, boundary, most)? {
        if is_file {
            images.push(Ok(bytes));
            continue;
        }
        let text = String::from_utf8_lossy(&bytes[..bytes.len().min(FIELD)]);
        let text = text.trim();
        match name.as_str() {
            // an empty field is what a page sends where nothing was typed
            "model" => asked.model = Some(cut(text).into_owned()).filter(|name| !name.is_empty()),
            "version" => asked.version = query::whole("version", text).map(Some)?,
            "top_k" => asked.top_k = query::whole("top_k", text).map(Some)?,
            name => {
                let text = format!(
                    "{}; images need a file name (curl: -F 'image=@FILE')",
                    query::unknown("form field without a file", name, &FIELDS)
                );
                return Err(ApiError::new(Code::InvalidRequest, text));
            }
        }
    }
    some_images(Upload { images, asked, charge })
}

pub(in crate::server) fn read_json(body: &Bytes, most: usize, mut charge: Charge) -> Result<Upload, ApiError> {
    let other = |e: serde_json::Error| {
        let text =
            format!("the body is not the JSON that is taken, {{\"images\":[{{\"b64\":\"…\"}}],\"top_k\":5}}: {e}");
        ApiError::new(Code::InvalidRequest, text)
    };
    let (mut elements, mut asked) = (None, Asked::default());
    for (name, value) in json::document(body).map_err(other)? {
        match name.as_str() {
            "images" => elements = Some(json::array(value, most).map_err(other)?),
            "model" => asked.model = json::text("model", value).map_err(other)?,
            "version" => asked.version = json::whole("version", value).map_err(other)?,
            "top_k" => asked.top_k = json::whole("top_k", value).map_err(other)?,
            name => return Err(other(unknown(name, &["images", "model", "version", "top_k"]))),
        }
    }
    let elements = elements.ok_or_else(|| other(serde_json::Error::missing_field("images")))?;
    let elements = elements.map_err(|images| InferError::TooManyImages { images, limit: most })?;
    let mut images = Vec::with_capacity(elements.len());
    for element in elements {
        images.push(decoded(base64_of(element).map_err(other)?, &mut charge)?);
    }
    // the text is dropped, the images stay
    charge.shrink(body.len());
    some_images(Upload { images, asked, charge })
}

/// As [`read_json`], of `{"images":[{"b64":"…"}]}` or `{"input":["…"],"model":"…"}`.
pub(in crate::server) fn read_embed_json(body: &Bytes, most: usize, mut charge: Charge) -> Result<Upload, ApiError> {
    let other = |e: serde_json::Error| {
        let text = format!(
            "the body is not the JSON that is taken, {{\"input\":[\"BASE64\"]}} or {{\"images\":[{{\"b64\":\"…\"}}]}}: {e}"
        );
        ApiError::new(Code::InvalidRequest, text)
    };
    let wrong = |text: &str| other(serde_json::Error::custom(text));
    let (mut elements, mut input, mut format, mut asked) = (None, None, None, Asked::default());
    for (name, value) in json::document(body).map_err(other)? {
        match name.as_str() {
            "images" => elements = Some(json::array(value, most).map_err(other)?),
            "input" => input = Some(value),
            "model" => asked.model = json::text("model", value).map_err(other)?,
            "version" => asked.version = json::whole("version", value).map_err(other)?,
            "encoding_format" => format = json::short::<String>("encoding_format", value).map_err(other)?,
            // OpenAI's clients may send it; it changes no answer
            "user" => {}
            name => {
                return Err(other(unknown(name, &["images", "input", "model", "version", "encoding_format", "user"])));
            }
        }
    }
    let base64 = match format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(wrong("`encoding_format` is neither `float` nor `base64`")),
    };
    let too_many = |images| InferError::TooManyImages { images, limit: most };
    let texts = match (elements, input) {
        (Some(_), Some(_)) => return Err(wrong("it has both `images` and `input`")),
        (Some(_), None) if format.is_some() => return Err(wrong("`encoding_format` goes with `input`")),
        (Some(elements), None) => {
            let elements = elements.map_err(too_many)?;
            elements.into_iter().map(base64_of).collect::<Result<Vec<_>, _>>().map_err(other)?
        }
        (None, Some(input)) => {
            let elements = match json::quoted(input) {
                Some(_) => vec![input],
                None => json::array(input, most).map_err(other)?.map_err(too_many)?,
            };
            let text = |element| json::quoted(element).ok_or_else(|| wrong("an element of `input` is no string"));
            asked.embeddings = Some(Embeddings { base64 });
            elements.into_iter().map(text).collect::<Result<Vec<_>, _>>()?
        }
        (None, None) => return Err(other(serde_json::Error::missing_field("input"))),
    };
    let images = texts.into_iter().map(|text| decoded(text, &mut charge)).collect::<Result<_, _>>()?;
    charge.shrink(body.len());
    some_images(Upload { images, asked, charge })
}

/// An image in base64, charged.
pub(super) fn decoded(text: &str, charge: &mut Charge) -> Result<Result<Bytes, ImageError>, ApiError> {
    charge.grow(base64::most(text.len()))?;
    Ok(base64::decode(text)
        .map(Bytes::from)
        .map_err(|e| ImageError::Invalid { reason: "corrupt", detail: format!("its base64 is not valid: {e}") }))
}

/// The content of the string in `{"b64": "…"}`.
fn base64_of(image: &RawValue) -> Result<&str, serde_json::Error> {
    let mut text = None;
    for (name, value) in json::object(image.get().as_bytes())? {
        match name.as_str() {
            "b64" => text = Some(json::quoted(value).ok_or_else(|| serde_json::Error::custom("`b64` is no string"))?),
            name => return Err(unknown(name, &["b64"])),
        }
    }
    text.ok_or_else(|| serde_json::Error::missing_field("b64"))
}

pub(super) fn unknown(name: &str, known: &[&str]) -> serde_json::Error {
    serde_json::Error::custom(query::unknown("field", name, known))
}

pub(super) fn some_images(upload: Upload) -> Result<Upload, ApiError> {
    if upload.images.is_empty() {
        return Err(ApiError::new(Code::InvalidRequest, "the request holds no image"));
    }
    Ok(upload)
}
