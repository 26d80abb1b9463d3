//! KServe's first protocol, which is TensorFlow Serving's: `/v1/models`, `/v1/models/M`, and `POST /v1/models/M:predict` with
//! `{"instances": […]}`.

use std::sync::Arc;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::response::Response;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::super::app::App;
use super::super::bodies::instances::read_instances;
use super::super::classification::{self, Named};
use super::super::oip::describe;
use super::super::status::{ApiError, Code, cut};

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new().route("/v1/models", get(models)).route("/v1/models/{model}", get(ready).post(predict))
}

type Called = Result<Path<String>, PathRejection>;

fn called(path: Called) -> Result<String, ApiError> {
    path.map(|Path(name)| name).map_err(|e| ApiError::new(Code::InvalidRequest, e.body_text()))
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({ "models": describe::names(&app) }))
}

async fn ready(State(app): State<Arc<App>>, path: Called) -> Result<Json<Value>, ApiError> {
    let model = describe::ready(&app, &called(path)?, None)?;
    Ok(Json(json!({ "name": model.name, "ready": true })))
}

async fn predict(State(app): State<Arc<App>>, path: Called, request: Request) -> Result<Response, ApiError> {
    let called = called(path)?;
    let (model, verb) = called.rsplit_once(':').unwrap_or((&called, ""));
    if verb != "predict" {
        let text = format!("`{}` is no call; there is /v1/models/{}:predict", cut(&called), cut(model));
        return Err(ApiError::new(Code::NotFound, text));
    }
    let named = Named::by_path(&request, Some(model.into()), None)?;
    classification::answer(&app, named, request, read_instances, super::instances).await
}
