//! TorchServe's inference API: `/ping`, and `/predictions/M[/V]`, which answers an image with `{class: probability}`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Serialize;
use serde::ser::{SerializeMap as _, Serializer};
use serde_json::json;

use super::super::app::App;
use super::super::bodies::upload::{self, Asked};
use super::super::classification::{self, Answers, Named};
use super::super::query;
use super::super::status::{ApiError, Code, Failure, reworded};
use super::broken;
use crate::infer::registry::LiveModel;
use crate::infer::top_k::Prediction;

/// `curl -T FILE` sends PUT.
pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/predictions/{model}", post(predict).put(predict))
        .route("/predictions/{model}/{version}", post(predict).put(predict))
}

pub(super) fn ping() -> Router<Arc<App>> {
    Router::new().route("/ping", get(pong))
}

async fn pong(State(app): State<Arc<App>>) -> Response {
    match app.readiness.check() {
        Ok(()) => Json(json!({ "status": "Healthy" })).into_response(),
        Err(reason) => {
            let code = if app.readiness.is_draining() { Code::ShuttingDown } else { Code::NotReady };
            let error = ApiError::new(code, format!("not ready: {reason}"));
            let said = json!({ "status": "Unhealthy", "error": error.message, "code": code.name() });
            reworded(error.into_response(), said.to_string())
        }
    }
}

type Called = Result<Path<BTreeMap<String, String>>, PathRejection>;

async fn predict(State(app): State<Arc<App>>, path: Called, request: Request) -> Result<Response, ApiError> {
    let Path(mut path) = path.map_err(|e| ApiError::new(Code::InvalidRequest, e.body_text()))?;
    // what TorchServe calls its first version is 1.0
    let whole = |version: String| query::whole("version", version.strip_suffix(".0").unwrap_or(&version));
    let version = path.remove("version").map(whole).transpose()?;
    let named = Named::by_path(&request, path.remove("model"), version)?;
    classification::answer(&app, named, request, upload::read_json, write).await
}

/// Of one image its classes, of several a list of such.
fn write(_: &LiveModel, _: &Asked, answers: Answers) -> serde_json::Result<Vec<u8>> {
    match answers.as_slice() {
        [Ok(classes)] => serde_json::to_vec(&ByName(classes)),
        several => {
            let each = |answer: &Result<Vec<Prediction>, ApiError>| match answer {
                Ok(classes) => serde_json::value::to_raw_value(&ByName(classes)),
                Err(error) => serde_json::value::to_raw_value(&broken(error)),
            };
            serde_json::to_vec(&several.iter().map(each).collect::<serde_json::Result<Vec<_>>>()?)
        }
    }
}

/// Classes as members, in their order. A name that is there already (ImageNet has two cranes) gets its index behind it.
struct ByName<'a>(&'a [Prediction]);

impl Serialize for ByName<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut names = std::collections::HashSet::new();
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for Prediction { index, label, score } in self.0 {
            if names.insert(label.as_str()) {
                map.serialize_entry(label, score)?;
            } else {
                map.serialize_entry(&format!("{label} ({index})"), score)?;
            }
        }
        map.end()
    }
}

/// The layer: errors of `/predictions` in TorchServe's form, `{"code": 404, "type": …, "message": …}`, with `error` beside, which
/// every error of this server has.
pub(super) async fn errors(request: Request, next: Next) -> Response {
    let ours = request.uri().path().starts_with("/predictions/");
    let response = next.run(request).await;
    match response.extensions().get::<Failure>() {
        Some(failure) if ours => {
            let (code, name, message) = (response.status().as_u16(), failure.code.name(), &failure.message);
            let said = json!({ "code": code, "type": name, "message": message, "error": message });
            reworded(response, said.to_string())
        }
        _ => response,
    }
}
