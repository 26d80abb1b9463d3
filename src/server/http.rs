//! The HTTP port: route table and the `/v1` handlers. Reads requests, asks the engine room, writes answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{self, Body};
use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequest as _, Multipart, Query, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};

use super::App;
use super::status::Failure;
use crate::infer::error::InferError;
use crate::infer::registry::Classified;
use crate::infer::scheduler::Timings;
use crate::metrics::{Outcome, Protocol};

/// Classes named when a request does not say how many.
const DEFAULT_TOP_K: usize = 5;
/// Header with a request's own deadline, in milliseconds.
const REQUEST_TIMEOUT: &str = "x-request-timeout-ms";
/// Where an answer's time went, in milliseconds, by phase.
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// Every route of the HTTP port, and what surrounds all of them. Layers run from the last to the first.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/classify", post(classify))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(ready))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(app.clone(), measure))
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
        .with_state(app)
}

/// Counts and times every request, whatever became of it.
async fn measure(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let protocol = match request.uri().path() {
        path if path.starts_with("/v1/") => Protocol::Rest,
        path if path.starts_with("/v2/health/") => Protocol::Health,
        _ => Protocol::Other,
    };
    let guard = app.metrics.request(protocol);
    let mut response = next.run(request).await;
    guard.finish(response.extensions().get().copied().unwrap_or(Outcome::Ok));
    if app.is_draining() {
        // a client that keeps its connection would keep the drain waiting
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    Failure::new(Outcome::Internal, format!("a handler panicked: {}", text.unwrap_or("no message"))).into_response()
}

async fn not_found(request: Request) -> Failure {
    let path: String = request.uri().path().chars().take(200).collect();
    Failure::new(Outcome::NotFound, format!("there is no `{path}`; images are classified by POST /v1/classify"))
}

async fn method_not_allowed(request: Request) -> Failure {
    let (method, path) = (request.method(), request.uri().path());
    Failure::new(Outcome::MethodNotAllowed, format!("`{path}` does not take {method}"))
}

async fn live() -> Json<Value> {
    Json(json!({ "live": true }))
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    match app.fault() {
        None => Json(json!({ "live": true, "ready": true })).into_response(),
        Some(reason) => Failure::new(Outcome::NotReady, reason).with(json!({ "live": true, "ready": false })),
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ClassifyQuery {
    model: Option<String>,
    version: Option<u32>,
    top_k: Option<usize>,
}

/// `{"images": [{"b64": "…"}], "top_k": 5}`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ClassifyBody {
    images: Vec<EncodedImage>,
    top_k: Option<usize>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EncodedImage {
    b64: String,
}

/// `POST /v1/classify`: one image as the body, or several as multipart or JSON.
async fn classify(
    State(app): State<Arc<App>>,
    query: Result<Query<ClassifyQuery>, QueryRejection>,
    request: Request,
) -> Result<Response, Failure> {
    let Query(query) = query.map_err(|e| Failure::invalid_request(e.body_text()))?;
    let registry = app.registry().ok_or(InferError::NotReady)?;
    let model = registry.find(query.model.as_deref(), query.version)?;
    let deadline = Instant::now() + timeout(request.headers(), app.limits.request_timeout)?;
    let (images, top_k) = tokio::time::timeout_at(deadline.into(), read(request, app.limits.max_body_bytes))
        .await
        .map_err(|_| InferError::DeadlineExceeded)??;
    let k = query.top_k.or(top_k).unwrap_or(DEFAULT_TOP_K);

    let alone = images.len() == 1;
    let answers = model.classify(images, k, deadline).await?;
    let mut timings = Timings::default();
    let mut results = Vec::with_capacity(answers.len());
    for answer in answers {
        results.push(match answer {
            Ok(Classified { predictions, timings: t }) => {
                // images of one request run side by side: the slowest decides
                timings.decode = timings.decode.max(t.decode + t.preprocess);
                timings.queue = timings.queue.max(t.queue);
                timings.inference = timings.inference.max(t.inference);
                json!({ "predictions": predictions })
            }
            Err(error) if alone => return Err(error.into()),
            Err(error) => json!({ "error": Failure::from(error).entry() }),
        });
    }
    let body = json!({ "model": model.name, "version": model.version, "results": results });
    let mut response = Json(body).into_response();
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    let Timings { decode, queue, inference, .. } = timings;
    let timing =
        format!("decode;dur={:.3}, queue;dur={:.3}, inference;dur={:.3}", ms(decode), ms(queue), ms(inference));
    if let Ok(value) = HeaderValue::try_from(timing) {
        response.headers_mut().insert(SERVER_TIMING, value);
    }
    Ok(response)
}

/// The request's own deadline, never longer than the server's.
fn timeout(headers: &HeaderMap, limit: Duration) -> Result<Duration, Failure> {
    let Some(value) = headers.get(REQUEST_TIMEOUT) else { return Ok(limit) };
    let milliseconds = value.to_str().ok().and_then(|v| v.trim().parse::<u64>().ok()).filter(|ms| *ms > 0);
    let bad = || Failure::invalid_request(format!("{REQUEST_TIMEOUT} must be a whole number of milliseconds above 0"));
    milliseconds.map(|ms| Duration::from_millis(ms).min(limit)).ok_or_else(bad)
}

/// What the body holds: encoded images, and how many classes it asks for.
async fn read(request: Request, limit: usize) -> Result<(Vec<Bytes>, Option<usize>), Failure> {
    let kind = request.headers().get(header::CONTENT_TYPE).map(|v| v.to_str().unwrap_or("?").to_ascii_lowercase());
    let essence = kind.as_deref().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let (parts, stream) = request.into_parts();
    let too_large = || Failure::new(Outcome::BodyTooLarge, format!("the body is larger than {limit} bytes"));
    let announced = parts.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let body = body::to_bytes(stream, limit).await.map_err(|e| match is_too_long(&e) {
        true => too_large(),
        false => Failure::invalid_request("the body broke off"),
    })?;
    let (images, top_k) = match essence {
        "multipart/form-data" => (files(Request::from_parts(parts, Body::from(body))).await?, None),
        "application/json" => {
            let read: ClassifyBody =
                serde_json::from_slice(&body).map_err(|e| Failure::invalid_request(format!("JSON body: {e}")))?;
            (read.images.iter().enumerate().map(decode_base64).collect::<Result<_, _>>()?, read.top_k)
        }
        // what curl --data-binary says when it is not told otherwise
        "" | "application/octet-stream" | "application/x-www-form-urlencoded" => (vec![body], None),
        image if image.starts_with("image/") => (vec![body], None),
        other => {
            let other: String = other.chars().take(100).collect();
            let taken = "an image (image/*, application/octet-stream), multipart/form-data or application/json";
            let message = format!("content type `{other}` is not taken; send {taken}");
            return Err(Failure::new(Outcome::UnsupportedMediaType, message));
        }
    };
    match images.is_empty() {
        true => Err(Failure::invalid_request("the request holds no image")),
        false => Ok((images, top_k)),
    }
}

fn is_too_long(error: &axum::Error) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if error.is::<http_body_util::LengthLimitError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// The parts of a multipart body, each an image, whatever they are called.
async fn files(request: Request) -> Result<Vec<Bytes>, Failure> {
    let bad = |e: String| Failure::invalid_request(format!("multipart body: {e}"));
    let mut parts = Multipart::from_request(request, &()).await.map_err(|e| bad(e.body_text()))?;
    let mut images = Vec::new();
    while let Some(part) = parts.next_field().await.map_err(|e| bad(e.body_text()))? {
        images.push(part.bytes().await.map_err(|e| bad(e.body_text()))?);
    }
    Ok(images)
}

fn decode_base64((i, image): (usize, &EncodedImage)) -> Result<Bytes, Failure> {
    let decoded = BASE64_STANDARD.decode(image.b64.trim());
    decoded.map(Bytes::from).map_err(|e| Failure::invalid_request(format!("images[{i}].b64 is not base64: {e}")))
}
