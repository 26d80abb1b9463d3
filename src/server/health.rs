//! Health over HTTP, for clients and load balancers: `/v2/health`, and what platforms call it.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::app::App;
use super::status::{ApiError, Code, ErrorBody};

/// The routes and their descriptions.
pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(live)).routes(routes!(ready))
}

/// Has both of the fields that different clients read.
#[derive(Serialize, ToSchema)]
pub(super) struct HealthAnswer {
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
pub(super) async fn ready(State(app): State<Arc<App>>) -> Result<Json<HealthAnswer>, ApiError> {
    let code = if app.readiness.is_draining() { Code::ShuttingDown } else { Code::NotReady };
    app.readiness.check().map_err(|reason| ApiError::new(code, format!("not ready: {reason}")))?;
    Ok(Json(HealthAnswer { live: true, ready: true }))
}
