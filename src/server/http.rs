//! The HTTP port: every route, the layers around them, and the `/v1` and `/v2/health` handlers.
//!
//! A handler turns a request into a call on the engine room and its answer into JSON; it decides nothing else. Errors go
//! through `status`, bodies through `upload`, `/v2` is `oip`'s.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::predicate::SizeAbove;
use tower_http::compression::{CompressionLayer, CompressionLevel};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use utoipa::{IntoParams, OpenApi as _, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::access::{self, Served};
use super::bodies::Bodies;
use super::bodies::budget::ChargedBody;
use super::bodies::coding::Coding;
use super::bodies::threads::INLINE;
use super::bodies::upload::{self, Upload};
use super::control::ModelControl;
use super::keys::{self, Keys};
use super::page;
use super::readiness::Readiness;
use super::status::{ApiError, Code, ErrorBody};
use super::traces::Traces;
use super::{deadline, head, oip, openapi};
use crate::infer::error::InferError;
use crate::infer::registry::{LiveModel, Registry};
use crate::infer::top_k::Prediction;
use crate::metrics::Metrics;

/// Predictions per image when the request names no number.
const DEFAULT_TOP_K: usize = 5;

/// Answers above this many bytes are compressed for clients that say they like it.
const COMPRESS_ABOVE: u64 = 1024;

const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// What handlers need; lives as long as the server.
#[derive(Debug)]
pub(super) struct App {
    pub(super) registry: Arc<Registry>,
    pub(super) readiness: Arc<Readiness>,
    pub(super) metrics: Arc<Metrics>,
    /// Longest a request may take; a client can ask for less.
    pub(super) request_timeout: Duration,
    /// Longest an answer may wait without its client taking any of it.
    pub(super) write_timeout: Duration,
    /// What bodies are held to.
    pub(super) bodies: Bodies,
    /// Who may ask; none: everybody.
    pub(super) keys: Option<Arc<Keys>>,
    /// Origins whose pages may ask; `*`: all.
    pub(super) cors_origins: Vec<String>,
    /// Where spans of requests go.
    pub(super) traces: Option<Arc<Traces>>,
    /// Whether clients may load and unload models.
    pub(super) control: ModelControl,
}

/// Every route, and the layers from the outside in: accounting (id, metrics, log), panics, CORS, keys, request line,
/// content coding, compression of answers. Bodies are read by handlers, through `bodies`.
pub(super) fn routes(app: Arc<App>) -> Router {
    let (routes, api) = OpenApiRouter::with_openapi(openapi::Described::openapi())
        .routes(routes!(classify))
        .routes(routes!(live))
        .routes(routes!(ready))
        .merge(oip::routes())
        .split_for_parts();
    let mut routes = openapi::serve(routes, api, app.keys.is_some())
        .merge(page::routes())
        .fallback(async || ApiError::new(Code::NotFound, "there is no such path"))
        .method_not_allowed_fallback(async || {
            ApiError::new(Code::MethodNotAllowed, "this path takes another method; see the header `allow`")
        })
        .layer(CompressionLayer::new().quality(CompressionLevel::Fastest).compress_when(SizeAbove::new(COMPRESS_ABOVE)))
        .layer(axum::middleware::from_fn(known_encoding))
        .layer(axum::middleware::from_fn(head::check));
    if let Some(keys) = &app.keys {
        routes = routes.layer(axum::middleware::from_fn_with_state(keys.clone(), keys::check));
    }
    if !app.cors_origins.is_empty() {
        routes = routes.layer(cors(&app.cors_origins));
    }
    routes
        .layer(CatchPanicLayer::custom(panicked))
        .layer(axum::middleware::from_fn_with_state(app.clone(), access::account))
        .with_state(app)
}

fn cors(origins: &[String]) -> CorsLayer {
    let origins = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        // the command line has checked them
        false => AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok())),
    };
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST])
        // `*` would leave out `authorization`
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([
            access::REQUEST_ID,
            SERVER_TIMING,
            header::RETRY_AFTER,
            HeaderName::from_static("inference-header-content-length"),
        ])
}

/// Refuses bodies that nobody here can decompress.
async fn known_encoding(request: Request, next: Next) -> Response {
    match Coding::of_body(request.headers()) {
        Ok(_) => next.run(request).await,
        Err(error) => {
            let mut response = error.into_response();
            response.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("gzip, deflate"));
            response
        }
    }
}

fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_string());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    ApiError::internal(format!("a handler panicked: {text}")).into_response()
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ClassifyQuery {
    /// Name in the repository; may be left out when only one model is served.
    model: Option<String>,
    /// Left out: the highest.
    version: Option<u64>,
    /// Predictions per image; 5 when left out.
    #[param(minimum = 1)]
    top_k: Option<usize>,
}

#[derive(Serialize, ToSchema)]
struct ClassifyAnswer<'a> {
    model: &'a str,
    version: u64,
    /// In the request's order.
    results: Vec<ImageAnswer>,
}

/// An image's answer, or, among several images, why it has none.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ImageAnswer {
    Predictions(Vec<PredictionBody>),
    Error { code: &'static str, message: String },
}

/// A class and its probability.
#[derive(Serialize, ToSchema)]
struct PredictionBody {
    /// Position in the logits.
    index: usize,
    /// Its name; its index in digits where the model has no labels.
    label: String,
    /// Softmax probability in 0..=1.
    score: f64,
}

impl From<Prediction> for PredictionBody {
    fn from(Prediction { index, label, score }: Prediction) -> Self {
        Self { index, label, score }
    }
}

/// Classifies one image or several.
#[utoipa::path(post, path = "/v1/classify", tag = "Classification",
    params(ClassifyQuery,
        ("x-request-timeout-ms" = Option<u64>, Header, minimum = 1, description = "Longest that the client waits")),
    request_body(content(
        (upload::JsonBody = "application/json"), (Vec<u8> = "application/octet-stream"), (Vec<u8> = "image/jpeg"),
        (Vec<u8> = "image/png"), (upload::Form = "multipart/form-data"))),
    responses((status = 200, body = ClassifyAnswer<'_>), (status = "default", body = ErrorBody)))]
async fn classify(
    State(app): State<Arc<App>>,
    query: Result<Query<ClassifyQuery>, QueryRejection>,
    request: Request,
) -> Result<Response, ApiError> {
    let Query(query) = query.map_err(|e| ApiError::new(Code::InvalidRequest, e.body_text()))?;
    let deadline = deadline::http(request.headers(), app.request_timeout)?;
    // before the body: a wrong name should not cost an upload
    let model = app.registry.find(query.model.as_deref(), query.version)?;
    let limit = model.scheduler().queue_limit();
    // what it takes is held until it is answered
    let Upload { images: uploaded, top_k, charge: _charge } =
        upload::read(&app.bodies, request, limit, deadline).await?;
    let k = top_k.or(query.top_k).unwrap_or(DEFAULT_TOP_K);
    if k == 0 {
        return Err(ApiError::new(Code::InvalidRequest, "top_k is 0; ask for at least one prediction"));
    }
    let images = uploaded.len();
    let size = answer_size(&model, images, k);
    let mut charge = app.bodies.budget.charge();
    if size > INLINE {
        charge.answer(size)?;
    }
    let broken: Vec<Option<InferError>> =
        uploaded.iter().map(|image| image.as_ref().err().cloned().map(InferError::Image)).collect();
    let whole = uploaded.into_iter().flatten().collect();
    let mut answers = model.classify(whole, k, deadline).await?.into_iter();
    let mut served = Served::new(&model, images);
    let mut results = Vec::with_capacity(images);
    for broken in broken {
        let answer = match broken {
            Some(error) => Err(error),
            None => answers.next().unwrap_or_else(|| Err(InferError::Internal("an image has no answer".into()))),
        };
        results.push(match answer {
            Ok(classified) => {
                served.took(&classified.timings);
                ImageAnswer::Predictions(classified.predictions.into_iter().map(PredictionBody::from).collect())
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
    let written = app.bodies.threads.run(size, deadline, move || {
        let answer = ClassifyAnswer { model: &model.name, version: model.version, results };
        serde_json::to_vec(&answer).map_err(|e| ApiError::internal(format!("an answer has no JSON: {e}")))
    });
    let body = Body::new(ChargedBody::new(written.await?.into(), charge));
    let mut response = ([(header::CONTENT_TYPE, "application/json")], body).into_response();
    if let Ok(value) = HeaderValue::from_str(&served.server_timing()) {
        response.headers_mut().insert(SERVER_TIMING, value);
    }
    response.extensions_mut().insert(served);
    Ok(response)
}

/// Bytes of an answer, at most, about: a prediction has its label and some 80 more.
fn answer_size(model: &LiveModel, images: usize, k: usize) -> usize {
    let k = k.min(model.manifest.classes as usize);
    let label = model.manifest.labels.iter().map(String::len).max().unwrap_or_default();
    images * k * (label + 80)
}

/// Both body styles that clients look for.
#[derive(Serialize, ToSchema)]
struct HealthAnswer {
    live: bool,
    ready: bool,
}

/// The process answers.
#[utoipa::path(get, path = "/v2/health/live", tag = "Health",
    responses((status = 200, body = HealthAnswer), (status = "default", body = ErrorBody)))]
async fn live(State(app): State<Arc<App>>) -> Json<HealthAnswer> {
    Json(HealthAnswer { live: true, ready: app.readiness.check().is_ok() })
}

/// Requests are welcome.
#[utoipa::path(get, path = "/v2/health/ready", tag = "Health",
    responses((status = 200, body = HealthAnswer), (status = "default", body = ErrorBody)))]
async fn ready(State(app): State<Arc<App>>) -> Result<Json<HealthAnswer>, ApiError> {
    let code = if app.readiness.is_draining() { Code::ShuttingDown } else { Code::NotReady };
    app.readiness.check().map_err(|reason| ApiError::new(code, format!("not ready: {reason}")))?;
    Ok(Json(HealthAnswer { live: true, ready: true }))
}
