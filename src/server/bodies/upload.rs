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
        Shape::Single => Ok(Upload { images: vec![Ok(bytes)], top_k: None, charge }),
        Shape::Form(boundary) => {
            bodies.threads.run(length, deadline, move || read_form(&bytes, &boundary, images, charge)).await
        }
        Shape::Json => bodies.threads.run(length, deadline, move || read_json(&bytes, images, charge)).await,
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
    some_images(Upload { images, top_k, charge })
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
    let mut images = Vec::with_capacity(elements.len());
    for element in elements {
        let text = base64_of(element).map_err(other)?;
        charge.grow(base64::most(text.len()))?;
        images.push(
            base64::decode(text).map(Bytes::from).map_err(|e| ImageError::Invalid {
                reason: "corrupt",
                detail: format!("its base64 is not valid: {e}"),
            }),
        );
    }
    // the text is dropped, the decoded images stay
    charge.shrink(body.len());
    some_images(Upload { images, top_k, charge })
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
