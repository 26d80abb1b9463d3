//! From a request's head and body to encoded images: raw bytes, a form with files, or JSON with base64.
//!
//! Owns the three body shapes of `/v1/classify` and the limits on bodies. Knows nothing of models.

use std::time::Instant;

use axum::body::Bytes;
use axum::extract::{FromRequest as _, Multipart, Request};
use axum::http::{StatusCode, header};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use utoipa::ToSchema;

use super::status::{ApiError, Code};
use crate::pixels::ImageError;

/// JSON bodies above this many bytes are parsed on a blocking thread: base64 of a large body takes milliseconds.
const PARSE_INLINE: usize = 64 * 1024;

/// Encoded images, as the client sent them.
#[derive(Debug)]
pub(super) struct Upload {
    /// In the request's order; an image that did not survive its transfer encoding is an error at its place.
    pub(super) images: Vec<Result<Bytes, ImageError>>,
    /// Predictions per image, where the body asks for a number.
    pub(super) top_k: Option<usize>,
}

/// Images in base64.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct JsonBody {
    #[schema(min_items = 1)]
    images: Vec<JsonImage>,
    /// Predictions per image.
    #[schema(minimum = 1)]
    top_k: Option<usize>,
}

/// Files, each in a field of any name, and the number of predictions.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only described: a form is read field by field")]
pub(super) struct Form {
    image: Vec<Vec<u8>>,
    top_k: Option<usize>,
}

/// An encoded image.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct JsonImage {
    /// Base64 of the file.
    b64: String,
}

/// The whole body, whatever it is, until `deadline` at the latest.
pub(super) async fn whole(request: Request, deadline: Instant) -> Result<Bytes, ApiError> {
    tokio::time::timeout_at(deadline.into(), raw(request)).await.unwrap_or_else(|_| Err(too_late()))
}

fn too_late() -> ApiError {
    ApiError::new(Code::DeadlineExceeded, "the deadline passed before the body had arrived")
}

/// Reads the body by its content type, until `deadline` at the latest.
pub(super) async fn read(request: Request, deadline: Instant) -> Result<Upload, ApiError> {
    match tokio::time::timeout_at(deadline.into(), read_any(request)).await {
        Ok(upload) => upload,
        Err(_) => Err(too_late()),
    }
}

async fn read_any(request: Request) -> Result<Upload, ApiError> {
    let kind = request.headers().get(header::CONTENT_TYPE).map(|v| v.to_str().unwrap_or("unreadable"));
    let kind = kind.unwrap_or_default().split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    match kind.as_str() {
        "multipart/form-data" => form(request).await,
        "application/json" => json(raw(request).await?).await,
        // the third is what `curl --data-binary` says when it is not told otherwise
        "" | "application/octet-stream" | "application/x-www-form-urlencoded" => single(request).await,
        image if image.starts_with("image/") => single(request).await,
        other => Err(ApiError::new(
            Code::UnsupportedMediaType,
            format!(
                "content type `{}` is not taken; send image bytes as image/* or application/octet-stream, files as multipart/form-data, or application/json",
                other.escape_default()
            ),
        )),
    }
}

async fn single(request: Request) -> Result<Upload, ApiError> {
    Ok(Upload { images: vec![Ok(raw(request).await?)], top_k: None })
}

/// A whole body. The byte limit is a layer of the router.
async fn raw(request: Request) -> Result<Bytes, ApiError> {
    Bytes::from_request(request, &()).await.map_err(|e| refusal(e.status(), &e.body_text()))
}

async fn form(request: Request) -> Result<Upload, ApiError> {
    let mut form = Multipart::from_request(request, &()).await.map_err(|e| refusal(e.status(), &e.body_text()))?;
    let mut upload = Upload { images: Vec::new(), top_k: None };
    loop {
        let field = match form.next_field().await {
            Ok(Some(field)) => field,
            Ok(None) => break,
            Err(e) => return Err(refusal(e.status(), &e.body_text())),
        };
        let (name, is_file) = (field.name().unwrap_or_default().to_string(), field.file_name().is_some());
        let bytes = field.bytes().await.map_err(|e| refusal(e.status(), &e.body_text()))?;
        match (is_file, name.as_str()) {
            (true, _) => upload.images.push(Ok(bytes)),
            (false, "top_k") => {
                let number = std::str::from_utf8(&bytes).ok().and_then(|t| t.trim().parse().ok());
                upload.top_k =
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
    some_images(upload)
}

async fn json(body: Bytes) -> Result<Upload, ApiError> {
    if body.len() <= PARSE_INLINE {
        return parse(&body);
    }
    let parsed = tokio::task::spawn_blocking(move || parse(&body)).await;
    parsed.unwrap_or_else(|e| Err(ApiError::internal(format!("parsing a JSON body panicked: {e}"))))
}

fn parse(body: &[u8]) -> Result<Upload, ApiError> {
    let body: JsonBody = serde_json::from_slice(body).map_err(|e| {
        let text =
            format!("the body is not the JSON that is taken, {{\"images\":[{{\"b64\":\"…\"}}],\"top_k\":5}}: {e}");
        ApiError::new(Code::InvalidRequest, text)
    })?;
    let decode = |image: JsonImage| {
        let bytes = STANDARD.decode(image.b64.as_bytes());
        bytes
            .map(Bytes::from)
            .map_err(|e| ImageError::Invalid { reason: "corrupt", detail: format!("its base64 is not valid: {e}") })
    };
    some_images(Upload { images: body.images.into_iter().map(decode).collect(), top_k: body.top_k })
}

fn some_images(upload: Upload) -> Result<Upload, ApiError> {
    match upload.images.is_empty() {
        true => Err(ApiError::new(Code::InvalidRequest, "the request holds no image")),
        false => Ok(upload),
    }
}

/// A body that could not be read, in our terms.
fn refusal(status: StatusCode, said: &str) -> ApiError {
    match status {
        StatusCode::PAYLOAD_TOO_LARGE => {
            ApiError::new(Code::BodyTooLarge, "the body is larger than this server takes (--body-limit)")
        }
        _ => ApiError::new(Code::InvalidRequest, format!("the body can't be read: {said}")),
    }
}
