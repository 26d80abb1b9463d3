//! Extracts the encoded images from a request: a single image, a form with files, or JSON with base64.
//!
//! Owns the three body formats of `/v1/classify`. Knows nothing of models.

use std::time::Instant;

use axum::extract::Request;
use axum::http::header;
use bytes::Bytes;
use serde::de::Error as _;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::super::status::{ApiError, Code, cut};
use super::budget::Charge;
use super::intake::{Held, whole};
use super::{Bodies, base64, form, json};
use crate::infer::error::InferError;
use crate::pixels::ImageError;

/// The encoded images of a request.
#[derive(Debug)]
pub(in crate::server) struct Upload {
    /// In the request's order; an error for an image whose base64 is invalid.
    pub(in crate::server) images: Vec<Result<Bytes, ImageError>>,
    /// Predictions per image, if the body gives a number.
    pub(in crate::server) top_k: Option<usize>,
    /// What a request in OpenAI's form says beside its images.
    pub(in crate::server) embeddings: Option<Embeddings>,
    /// The charge for the images' memory.
    pub(in crate::server) charge: Charge,
}

/// Images in base64.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only described: it is read member by member")]
pub(in crate::server) struct JsonBody {
    #[schema(min_items = 1)]
    images: Vec<JsonImage>,
    /// Predictions per image.
    #[schema(minimum = 1)]
    top_k: Option<usize>,
}

/// Files, each in a field of any name, and the number of predictions.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only described: it is read part by part")]
pub(in crate::server) struct Form {
    image: Vec<Vec<u8>>,
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
    /// The model's name.
    pub(in crate::server) model: Option<String>,
    /// Vectors as base64 of little-endian single-precision numbers.
    pub(in crate::server) base64: bool,
}

/// Images in base64: `images` as for classification, or `input` as OpenAI's clients send it.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only described: it is read member by member")]
pub(in crate::server) struct EmbedBody {
    #[schema(min_items = 1)]
    images: Option<Vec<JsonImage>>,
    /// Base64 of files; the answer has the shape of OpenAI's embeddings.
    #[schema(min_items = 1)]
    input: Option<Vec<String>>,
    /// With `input`: name of the model.
    model: Option<String>,
    /// With `input`: `float` or `base64`.
    encoding_format: Option<String>,
    /// With `input`: ignored.
    user: Option<String>,
}

/// Which members a JSON body may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::server) enum Members {
    /// Images and a number of predictions.
    Classify,
    /// Images in either form.
    Embed,
}

enum Shape {
    Single,
    Form(String),
    Json,
}

/// Reads the body by its content type, by `deadline`; at most `images` images.
pub(in crate::server) async fn read(
    bodies: &Bodies,
    request: Request,
    images: usize,
    deadline: Instant,
    members: Members,
) -> Result<Upload, ApiError> {
    let said = request.headers().get(header::CONTENT_TYPE).map(|v| v.to_str().unwrap_or("unreadable"));
    let said = said.unwrap_or_default();
    let kind = said.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let shape = match kind.as_str() {
        "multipart/form-data" => Shape::Form(form::boundary(said)?),
        "application/json" => Shape::Json,
        // `curl --data-binary` sends the third by default
        "" | "application/octet-stream" | "application/x-www-form-urlencoded" => Shape::Single,
        image if image.starts_with("image/") => Shape::Single,
        other => {
            let shown = cut(other).escape_default().to_string();
            return Err(ApiError::new(
                Code::UnsupportedMediaType,
                format!(
                    "content type `{shown}` is not taken; send image bytes as image/* or application/octet-stream, files as multipart/form-data, or application/json"
                ),
            ));
        }
    };
    let Held { bytes, charge } = whole(bodies, request, deadline).await?;
    let length = bytes.len();
    match shape {
        Shape::Single => Ok(Upload { images: vec![Ok(bytes)], top_k: None, embeddings: None, charge }),
        Shape::Form(boundary) => {
            bodies.threads.run(length, deadline, move || read_form(&bytes, &boundary, images, charge)).await
        }
        Shape::Json => {
            let read = if members == Members::Embed { read_embed_json } else { read_json };
            bodies.threads.run(length, deadline, move || read(&bytes, images, charge)).await
        }
    }
}

pub(in crate::server) fn read_form(
    body: &Bytes,
    boundary: &str,
    most: usize,
    charge: Charge,
) -> Result<Upload, ApiError> {
    let (mut images, mut top_k) = (Vec::new(), None);
    for form::Part { name, is_file, bytes } in form::parts(body, boundary, most)? {
        match (is_file, name.as_str()) {
            (true, _) => images.push(Ok(bytes)),
            (false, "top_k") => {
                let number = std::str::from_utf8(&bytes).ok().and_then(|t| t.trim().parse().ok());
                top_k =
                    Some(number.ok_or_else(|| {
                        ApiError::new(Code::InvalidRequest, "form field `top_k` is not a whole number")
                    })?);
            }
            (false, name) => {
                let text = format!(
                    "form field `{}` is no file; send images with a file name (curl: -F 'image=@FILE')",
                    name.escape_default()
                );
                return Err(ApiError::new(Code::InvalidRequest, text));
            }
        }
    }
    some_images(Upload { images, top_k, embeddings: None, charge })
}

pub(in crate::server) fn read_json(body: &Bytes, most: usize, mut charge: Charge) -> Result<Upload, ApiError> {
    let other = |e: serde_json::Error| {
        let text =
            format!("the body is not the JSON that is taken, {{\"images\":[{{\"b64\":\"…\"}}],\"top_k\":5}}: {e}");
        ApiError::new(Code::InvalidRequest, text)
    };
    let (mut elements, mut top_k) = (None, None);
    for (name, value) in json::document(body).map_err(other)? {
        match name.as_str() {
            "images" => elements = Some(json::array(value, most).map_err(other)?),
            "top_k" => top_k = json::short("top_k", value).map_err(other)?,
            name => return Err(other(unknown(name))),
        }
    }
    let elements = elements.ok_or_else(|| other(serde_json::Error::missing_field("images")))?;
    let elements = elements.map_err(|images| InferError::TooManyImages { images, limit: most })?;
    let texts = elements.into_iter().map(base64_of).collect::<Result<Vec<_>, _>>().map_err(other)?;
    let images = decoded(texts, &mut charge)?;
    // the text is dropped, the decoded images stay
    charge.shrink(body.len());
    some_images(Upload { images, top_k, embeddings: None, charge })
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
    let (mut elements, mut input, mut model, mut format) = (None, None, None, None);
    for (name, value) in json::document(body).map_err(other)? {
        match name.as_str() {
            "images" => elements = Some(json::array(value, most).map_err(other)?),
            "input" => input = Some(value),
            "model" => model = json::short::<String>("model", value).map_err(other)?,
            "encoding_format" => format = json::short::<String>("encoding_format", value).map_err(other)?,
            // OpenAI's clients may send it; it changes no answer
            "user" => {}
            name => return Err(other(unknown(name))),
        }
    }
    let base64 = match format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(wrong("`encoding_format` is neither `float` nor `base64`")),
    };
    let too_many = |images| InferError::TooManyImages { images, limit: most };
    let (texts, embeddings) = match (elements, input) {
        (Some(_), Some(_)) => return Err(wrong("it has both `images` and `input`")),
        (Some(_), None) if model.is_some() || format.is_some() => {
            return Err(wrong("`model` and `encoding_format` go with `input`"));
        }
        (Some(elements), None) => {
            let elements = elements.map_err(too_many)?;
            (elements.into_iter().map(base64_of).collect::<Result<Vec<_>, _>>().map_err(other)?, None)
        }
        (None, Some(input)) => {
            let elements = match json::quoted(input) {
                Some(_) => vec![input],
                None => json::array(input, most).map_err(other)?.map_err(too_many)?,
            };
            let text = |element| json::quoted(element).ok_or_else(|| wrong("an element of `input` is no string"));
            let texts = elements.into_iter().map(text).collect::<Result<Vec<_>, _>>()?;
            (texts, Some(Embeddings { model, base64 }))
        }
        (None, None) => return Err(other(serde_json::Error::missing_field("input"))),
    };
    let images = decoded(texts, &mut charge)?;
    charge.shrink(body.len());
    some_images(Upload { images, top_k: None, embeddings, charge })
}

/// Files from their base64.
fn decoded(texts: Vec<&str>, charge: &mut Charge) -> Result<Vec<Result<Bytes, ImageError>>, ApiError> {
    let mut images = Vec::with_capacity(texts.len());
    for text in texts {
        charge.grow(base64::most(text.len()))?;
        images.push(
            base64::decode(text).map(Bytes::from).map_err(|e| ImageError::Invalid {
                reason: "corrupt",
                detail: format!("its base64 is not valid: {e}"),
            }),
        );
    }
    Ok(images)
}

/// The content of the string in `{"b64": "…"}`.
fn base64_of(image: &RawValue) -> Result<&str, serde_json::Error> {
    let mut text = None;
    for (name, value) in json::object(image.get().as_bytes())? {
        match name.as_str() {
            "b64" => text = Some(json::quoted(value).ok_or_else(|| serde_json::Error::custom("`b64` is no string"))?),
            name => return Err(unknown(name)),
        }
    }
    text.ok_or_else(|| serde_json::Error::missing_field("b64"))
}

fn unknown(name: &str) -> serde_json::Error {
    serde_json::Error::custom(format!("unknown field `{}`", name.escape_debug()))
}

fn some_images(upload: Upload) -> Result<Upload, ApiError> {
    if upload.images.is_empty() {
        return Err(ApiError::new(Code::InvalidRequest, "the request holds no image"));
    }
    Ok(upload)
}
