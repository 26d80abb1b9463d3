//! The HTTP port: every route, the layers around them, and the `/v1` and `/v2/health` handlers.
//!
//! A handler turns a request into a call on the engine room and its answer into JSON; it decides nothing else. Errors go
//! through `status`, bodies through `upload`.

use std::any::Any;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, Query, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use tower_http::catch_panic::CatchPanicLayer;

use super::readiness::Readiness;
use super::status::{ApiError, Code, Failure};
use super::upload;
use crate::infer::error::InferError;
use crate::infer::registry::Registry;
use crate::infer::scheduler::Timings;
use crate::infer::top_k::Prediction;
use crate::metrics::{Metrics, Outcome, Protocol};

/// Predictions per image when the request names no number.
const DEFAULT_TOP_K: usize = 5;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// What handlers need; lives as long as the server.
#[derive(Debug)]
pub(super) struct App {
    pub(super) registry: Arc<Registry>,
    pub(super) readiness: Arc<Readiness>,
    pub(super) metrics: Arc<Metrics>,
    /// Longest a request may take; a client can ask for less.
    pub(super) request_timeout: Duration,
    /// Most bytes of a body.
    pub(super) body_limit: usize,
}

/// Every route, and the layers from the outside in: accounting (id, metrics, log), panics, body limit.
pub(super) fn routes(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/classify", post(classify))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(ready))
        .fallback(async || ApiError::new(Code::NotFound, "there is no such path"))
        .method_not_allowed_fallback(async || {
            ApiError::new(Code::MethodNotAllowed, "this path takes another method; see the header `allow`")
        })
        .layer(DefaultBodyLimit::max(app.body_limit))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(axum::middleware::from_fn_with_state(app.clone(), account))
        .with_state(app)
}

fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_string());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    ApiError::internal(format!("a handler panicked: {text}")).into_response()
}

#[derive(Deserialize)]
struct ClassifyQuery {
    model: Option<String>,
    version: Option<u32>,
    top_k: Option<usize>,
}

#[derive(Serialize)]
struct ClassifyAnswer<'a> {
    model: &'a str,
    version: u32,
    results: Vec<ImageAnswer>,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum ImageAnswer {
    Predictions(Vec<Prediction>),
    Error { code: &'static str, message: String },
}

/// What a handler tells the access log beyond its response. Faults of single images are here too: their request is ok.
#[derive(Debug, Clone)]
struct Served {
    model: String,
    version: u32,
    images: usize,
    timings: Timings,
    faults: Vec<String>,
}

async fn classify(
    State(app): State<Arc<App>>,
    query: Result<Query<ClassifyQuery>, QueryRejection>,
    request: Request,
) -> Result<Response, ApiError> {
    let Query(query) = query.map_err(|e| ApiError::new(Code::InvalidRequest, e.body_text()))?;
    let deadline = deadline(request.headers(), app.request_timeout)?;
    // before the body: a wrong name should not cost an upload
    let model = app.registry.find(query.model.as_deref(), query.version)?;
    let upload = upload::read(request, deadline).await?;
    let k = upload.top_k.or(query.top_k).unwrap_or(DEFAULT_TOP_K);
    if k == 0 {
        return Err(ApiError::new(Code::InvalidRequest, "top_k is 0; ask for at least one prediction"));
    }
    let images = upload.images.len();
    let broken: Vec<Option<InferError>> =
        upload.images.iter().map(|image| image.as_ref().err().cloned().map(InferError::Image)).collect();
    let whole = upload.images.into_iter().flatten().collect();
    let mut answers = model.classify(whole, k, deadline).await?.into_iter();
    let mut served = Served {
        model: model.name.clone(),
        version: model.version,
        images,
        timings: Timings::default(),
        faults: vec![],
    };
    let mut results = Vec::with_capacity(images);
    for broken in broken {
        let answer = match broken {
            Some(error) => Err(error),
            None => answers.next().unwrap_or_else(|| Err(InferError::Internal("an image has no answer".into()))),
        };
        results.push(match answer {
            Ok(classified) => {
                served.timings = slowest(served.timings, classified.timings);
                ImageAnswer::Predictions(classified.predictions)
            }
            // a request of one image has no neighbours to save
            Err(error) if images == 1 => return Err(error.into()),
            Err(error) => {
                let ApiError { code, message, detail, .. } = error.into();
                served.faults.extend(detail);
                ImageAnswer::Error { code: code.name(), message }
            }
        });
    }
    let mut response = Json(ClassifyAnswer { model: &model.name, version: model.version, results }).into_response();
    if let Ok(value) = HeaderValue::from_str(&server_timing(&served.timings)) {
        response.headers_mut().insert(SERVER_TIMING, value);
    }
    response.extensions_mut().insert(served);
    Ok(response)
}

/// `x-request-timeout-ms`, at most `longest`.
fn deadline(headers: &HeaderMap, longest: Duration) -> Result<Instant, ApiError> {
    let asked = headers.get(TIMEOUT).map(|value| {
        let millis = value.to_str().ok().and_then(|t| t.trim().parse::<u64>().ok()).filter(|&ms| ms > 0);
        millis.map(Duration::from_millis).ok_or_else(|| {
            ApiError::new(Code::InvalidRequest, "header `x-request-timeout-ms` is not a positive whole number")
        })
    });
    let timeout = asked.transpose()?.map_or(longest, |asked| asked.min(longest));
    Ok(Instant::now() + timeout)
}

/// Per phase the slowest image: images of one request go through the house side by side.
fn slowest(a: Timings, b: Timings) -> Timings {
    Timings {
        decode: a.decode.max(b.decode),
        preprocess: a.preprocess.max(b.preprocess),
        queue: a.queue.max(b.queue),
        inference: a.inference.max(b.inference),
        batch: a.batch.max(b.batch),
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

/// Milliseconds, as the header's specification wants them.
fn server_timing(t: &Timings) -> String {
    format!(
        "decode;dur={}, preprocess;dur={}, queue;dur={}, inference;dur={}",
        millis(t.decode),
        millis(t.preprocess),
        millis(t.queue),
        millis(t.inference)
    )
}

/// Both body styles that clients look for.
#[derive(Serialize)]
struct HealthAnswer {
    live: bool,
    ready: bool,
}

async fn live(State(app): State<Arc<App>>) -> Json<HealthAnswer> {
    Json(HealthAnswer { live: true, ready: app.readiness.check().is_ok() })
}

async fn ready(State(app): State<Arc<App>>) -> Result<Json<HealthAnswer>, ApiError> {
    let code = if app.readiness.is_draining() { Code::ShuttingDown } else { Code::NotReady };
    app.readiness.check().map_err(|reason| ApiError::new(code, format!("not ready: {reason}")))?;
    Ok(Json(HealthAnswer { live: true, ready: true }))
}

/// The outermost layer: every request gets an id, is counted once and leaves one log line.
async fn account(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let protocol = protocol(request.uri().path());
    // dropped with this future when the client goes away: that counts as cancelled
    let guard = app.metrics.request(protocol);
    let id = request_id(request.headers());
    let (method, path) = (request.method().clone(), request.uri().path().to_string());
    let http1 = request.version() <= Version::HTTP_11;
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let mut response = next.run(request).await;
    let failure = response.extensions_mut().remove::<Failure>();
    let outcome = match &failure {
        Some(failure) => failure.code,
        None if response.status().is_success() => Outcome::Ok,
        None => Outcome::InvalidRequest,
    };
    let served = response.extensions_mut().remove::<Served>();
    response.headers_mut().insert(REQUEST_ID, id.clone());
    if http1 && app.readiness.is_draining() {
        // the next request of this client should find another server
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    let duration_ms = millis(guard.finish(outcome));
    let request_id = id.to_str().unwrap_or_default();
    let faults = failure.as_ref().and_then(|f| f.detail.clone()).into_iter();
    for detail in faults.chain(served.iter().flat_map(|s| s.faults.clone())) {
        tracing::error!(request_id, detail, "request {request_id} met an internal error");
    }
    log(&Line { request_id, method: method.as_str(), path: &path, protocol, outcome, duration_ms }, served, &response);
    response
}

/// What every access log line says.
struct Line<'a> {
    request_id: &'a str,
    method: &'a str,
    path: &'a str,
    protocol: Protocol,
    outcome: Outcome,
    duration_ms: f64,
}

fn log(line: &Line<'_>, served: Option<Served>, response: &Response<Body>) {
    let Line { request_id, method, path, protocol, outcome, duration_ms } = *line;
    let (status, outcome) = (response.status().as_u16(), outcome.name());
    match served {
        Some(Served { model, version, images, timings: t, .. }) => tracing::info!(
            request_id,
            method,
            path,
            status,
            outcome,
            duration_ms,
            model,
            version,
            images,
            decode_ms = millis(t.decode),
            preprocess_ms = millis(t.preprocess),
            queue_ms = millis(t.queue),
            inference_ms = millis(t.inference),
            batch = t.batch,
            "request {request_id} {outcome}"
        ),
        None if protocol == Protocol::Health => {
            tracing::debug!(request_id, method, path, status, outcome, duration_ms, "probe {request_id} {outcome}");
        }
        None => {
            tracing::info!(request_id, method, path, status, outcome, duration_ms, "request {request_id} {outcome}")
        }
    }
}

fn protocol(path: &str) -> Protocol {
    if path.starts_with("/v1/") {
        Protocol::Rest
    } else if path.starts_with("/v2/health/") {
        Protocol::Health
    } else {
        Protocol::Other
    }
}

/// The client's own id, if it is short and printable (it goes into logs), else a fresh one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let fits = |id: &&HeaderValue| (1..=128).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic);
    headers.get(REQUEST_ID).filter(fits).cloned().unwrap_or_else(fresh_id)
}

fn fresh_id() -> HeaderValue {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    static SEED: std::sync::LazyLock<RandomState> = std::sync::LazyLock::new(RandomState::new);
    // seeded at random once per process, so that ids of restarts and replicas don't meet
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let id = format!("{:016x}", SEED.hash_one(count));
    HeaderValue::from_str(&id).unwrap_or_else(|_| HeaderValue::from_static("none"))
}
