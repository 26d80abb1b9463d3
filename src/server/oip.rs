//! The Open Inference Protocol over HTTP (`/v2`), with Triton's extensions: binary tensor data, classification,
//! statistics, model configuration, schedule policy, model repository.
//!
//! Handlers only: `framing` has the wire format, `inference` the request path shared with gRPC, `describe` the model
//! metadata. Health is in `http`.

pub mod datatype;
pub(super) mod describe;
pub mod framing;
pub mod inference;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{FromRequestParts, Path, Request, State};
use axum::http::request::Parts;
use axum::response::Response;
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::app::App;
use super::bodies::intake::{Held, whole};
use super::bodies::json;
use super::bodies::upload::Binary;
use super::deadline;
use super::query::Parameters;
use super::status::{ApiError, Code, ErrorBody};
use crate::pb::open_inference as pb;

/// Every route under `/v2` except health. The OpenAPI description documents routes with a version; without one they
/// mean the highest.
pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(server))
        .route("/v2/", get(server))
        .routes(routes!(models))
        .routes(routes!(all_statistics))
        .routes(routes!(model))
        .route("/v2/models/{model}", get(model))
        .routes(routes!(model_ready))
        .route("/v2/models/{model}/ready", get(model_ready))
        .routes(routes!(config))
        .route("/v2/models/{model}/config", get(config))
        .routes(routes!(statistics))
        .route("/v2/models/{model}/stats", get(statistics))
        .routes(routes!(infer))
        .route("/v2/models/{model}/infer", post(infer))
        .routes(routes!(index))
        .routes(routes!(load))
        .routes(routes!(unload))
}

/// The model in a path.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
struct ModelPath {
    /// Name in the repository.
    model: String,
    /// Version in the repository; by default the highest.
    #[param(value_type = String, required = true)]
    version: Option<String>,
}

impl<S: Send + Sync> FromRequestParts<S> for ModelPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = Path::<Self>::from_request_parts(parts, state).await;
        path.map(|Path(path)| path).map_err(|e| ApiError::new(Code::InvalidRequest, e.body_text()))
    }
}

/// Names of the served models.
#[derive(Debug, Serialize, ToSchema)]
struct Models {
    models: Vec<String>,
}

/// Whether a model is ready.
#[derive(Debug, Serialize, ToSchema)]
struct ModelReady {
    name: String,
    ready: bool,
}

/// Which models to list.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only described: it is read member by member")]
struct IndexRequest {
    /// Whether to list ready models only.
    ready: Option<bool>,
}

/// Name, version and extensions of the server.
#[utoipa::path(get, path = "/v2", tag = "Open Inference Protocol", responses(
    (status = 200, body = pb::ServerMetadataResponse), (status = "default", body = ErrorBody)))]
async fn server() -> Json<pb::ServerMetadataResponse> {
    Json(describe::server())
}

/// Names of the models.
#[utoipa::path(get, path = "/v2/models", tag = "Open Inference Protocol", responses(
    (status = 200, body = Models), (status = "default", body = ErrorBody)))]
async fn models(State(app): State<Arc<App>>) -> Json<Models> {
    Json(Models { models: describe::names(&app) })
}

/// A model's inputs, outputs and versions.
#[utoipa::path(get, path = "/v2/models/{model}/versions/{version}", tag = "Open Inference Protocol",
    params(ModelPath), responses(
    (status = 200, body = pb::ModelMetadataResponse), (status = "default", body = ErrorBody)))]
async fn model(State(app): State<Arc<App>>, path: ModelPath) -> Result<Json<pb::ModelMetadataResponse>, ApiError> {
    let model = describe::find(&app, &path.model, path.version.as_deref())?;
    Ok(Json(describe::model(&app, &model)))
}

/// Whether a model is ready.
#[utoipa::path(get, path = "/v2/models/{model}/versions/{version}/ready", tag = "Open Inference Protocol",
    params(ModelPath), responses((status = 200, body = ModelReady), (status = "default", body = ErrorBody)))]
async fn model_ready(State(app): State<Arc<App>>, path: ModelPath) -> Result<Json<ModelReady>, ApiError> {
    let model = describe::ready(&app, &path.model, path.version.as_deref())?;
    Ok(Json(ModelReady { name: model.name.clone(), ready: true }))
}

/// A model's configuration, as far as load generators read it.
#[utoipa::path(get, path = "/v2/models/{model}/versions/{version}/config", tag = "Open Inference Protocol",
    params(ModelPath), responses((status = 200, body = pb::ModelConfig), (status = "default", body = ErrorBody)))]
async fn config(State(app): State<Arc<App>>, path: ModelPath) -> Result<Json<pb::ModelConfig>, ApiError> {
    let model = describe::find(&app, &path.model, path.version.as_deref())?;
    Ok(Json(describe::config(&model)))
}

/// A model's inference statistics.
#[utoipa::path(get, path = "/v2/models/{model}/versions/{version}/stats", tag = "Open Inference Protocol",
    params(ModelPath), responses(
    (status = 200, body = pb::ModelStatisticsResponse), (status = "default", body = ErrorBody)))]
async fn statistics(
    State(app): State<Arc<App>>,
    path: ModelPath,
) -> Result<Json<pb::ModelStatisticsResponse>, ApiError> {
    Ok(Json(describe::statistics(&app, &path.model, path.version.as_deref())?))
}

/// Inference statistics of every model.
#[utoipa::path(get, path = "/v2/models/stats", tag = "Open Inference Protocol", responses(
    (status = 200, body = pb::ModelStatisticsResponse), (status = "default", body = ErrorBody)))]
async fn all_statistics(State(app): State<Arc<App>>) -> Result<Json<pb::ModelStatisticsResponse>, ApiError> {
    Ok(Json(describe::statistics(&app, "", None)?))
}

/// Runs a model on a tensor, on pixels or on encoded images.
///
/// With the header `inference-header-content-length: N` the first N bytes of the body are JSON, followed by the tensors
/// as little-endian bytes; with 0 the body is one image's tensor (FP32) or an encoded image.
#[utoipa::path(post, path = "/v2/models/{model}/versions/{version}/infer", tag = "Open Inference Protocol",
    params(ModelPath,
        ("inference-header-content-length" = Option<u64>, Header, description = "Bytes of the body that are JSON"),
        ("x-request-timeout-ms" = Option<u64>, Header, minimum = 1, description = "Longest that the client waits")),
    request_body(content(
        (framing::InferRequest = "application/json"), (inline(Binary) = "application/octet-stream"))),
    responses(
    (status = 200, content(
        (framing::InferResponse<'_> = "application/json"), (inline(Binary) = "application/octet-stream"))),
    (status = "default", body = ErrorBody)))]
async fn infer(State(app): State<Arc<App>>, path: ModelPath, request: Request) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    Parameters::read(request.uri(), &[])?;
    let deadline = deadline::http(request.headers(), app.request_timeout)?;
    // checked before the body is read, so that a wrong name costs no upload
    let model = describe::find(&app, &path.model, path.version.as_deref())?;
    let length = framing::json_length(request.headers())?;
    // neither does a full queue
    model.has_room(deadline)?;
    let Held { bytes, mut charge } = whole(&app.bodies, request, deadline).await?;
    let limits = inference::limits(&model);
    let parsed = app.bodies.threads.run(length.unwrap_or(bytes.len()), deadline, move || {
        let inference = framing::parse(length, &bytes, &limits, &mut |more| charge.grow(more))?;
        Ok((inference, charge))
    });
    let (inference, _charge) = parsed.await?;
    let answered = inference::run(&app.bodies, model, inference, arrived, deadline).await?;
    app.bodies.threads.run(answered.size, deadline, move || framing::respond(answered)).await
}

/// The models of the repository that are served.
#[utoipa::path(post, path = "/v2/repository/index", tag = "Open Inference Protocol",
    request_body(content = Option<IndexRequest>, content_type = "application/json"), responses(
    (status = 200, body = Vec<pb::repository_index_response::ModelIndex>), (status = "default", body = ErrorBody)))]
async fn index(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<Vec<pb::repository_index_response::ModelIndex>>, ApiError> {
    let deadline = deadline::http(request.headers(), app.request_timeout)?;
    let asked = small(&app, request, deadline, |body| {
        let other = |e| inference::invalid(format!("the body is not {{\"ready\": true}}: {e}"));
        let mut ready = None;
        for (name, value) in json::document(body).map_err(other)? {
            if name == "ready" {
                ready = json::short::<bool>("ready", value).map_err(other)?;
            }
        }
        Ok(ready)
    });
    Ok(Json(describe::index(&app, asked.await?.flatten() == Some(true)).models))
}

/// Reads an optional body with `read`; `None` if it is empty or `null`.
async fn small<T: Send + 'static>(
    app: &App,
    request: Request,
    deadline: Instant,
    read: impl FnOnce(&[u8]) -> Result<T, ApiError> + Send + 'static,
) -> Result<Option<T>, ApiError> {
    let Held { bytes, charge } = whole(&app.bodies, request, deadline).await?;
    let parsed = app.bodies.threads.run(bytes.len(), deadline, move || {
        let _until_read = charge;
        let body = bytes.trim_ascii();
        if body.is_empty() || body == b"null" { Ok(None) } else { read(body).map(Some) }
    });
    parsed.await
}

/// Parameters of a load or an unload; a load has none.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only described: it is read member by member")]
struct ControlRequest {
    #[schema(value_type = Object)]
    parameters: BTreeMap<String, serde_json::Value>,
}

/// An empty object.
#[derive(Debug, Serialize, ToSchema)]
struct Done {}

/// Loads or reloads a model's newest version from the repository. Needs `--model-control`.
#[utoipa::path(post, path = "/v2/repository/models/{model}/load", tag = "Open Inference Protocol",
    params(("model" = String, Path, description = "Name in the repository")),
    request_body(content = Option<ControlRequest>, content_type = "application/json"),
    responses((status = 200, body = Done), (status = "default", body = ErrorBody)))]
async fn load(State(app): State<Arc<App>>, path: ModelPath, request: Request) -> Result<Json<Done>, ApiError> {
    let parameters = control_parameters(&app, request).await?;
    app.control.load(&path.model, &parameters).await?;
    Ok(Json(Done {}))
}

/// Unloads every version of a model. Needs `--model-control`.
#[utoipa::path(post, path = "/v2/repository/models/{model}/unload", tag = "Open Inference Protocol",
    params(("model" = String, Path, description = "Name in the repository")),
    request_body(content = Option<ControlRequest>, content_type = "application/json"),
    responses((status = 200, body = Done), (status = "default", body = ErrorBody)))]
async fn unload(State(app): State<Arc<App>>, path: ModelPath, request: Request) -> Result<Json<Done>, ApiError> {
    let parameters = control_parameters(&app, request).await?;
    app.control.unload(&path.model, &parameters).await?;
    Ok(Json(Done {}))
}

/// Names of the parameters of a load or an unload; an empty body has none.
async fn control_parameters(app: &App, request: Request) -> Result<Vec<String>, ApiError> {
    let deadline = deadline::http(request.headers(), app.request_timeout)?;
    let named = small(app, request, deadline, |body| {
        let other = |e| inference::invalid(format!("the body is not {{\"parameters\": {{…}}}}: {e}"));
        let mut names = Vec::new();
        for (name, value) in json::document(body).map_err(other)? {
            if name != "parameters" {
                let unknown = format!("unknown field `{}`", name.escape_debug());
                return Err(other(serde::de::Error::custom(unknown)));
            }
            let members = json::object(value.get().as_bytes()).map_err(other)?;
            names.extend(members.into_iter().map(|(name, _)| name));
        }
        Ok(names)
    });
    Ok(named.await?.unwrap_or_default())
}
