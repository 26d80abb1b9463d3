//! Amazon SageMaker: `POST /invocations` takes what `/v1/classify` takes and answers as it does; `/ping` is TorchServe's, too.
//!
//! SageMaker passes no query on: what there would be said may be in the header of custom attributes.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName};
use axum::response::Response;
use axum::routing::post;

use super::super::app::App;
use super::super::bodies::upload;
use super::super::classification::{self, Named};
use super::super::classify;
use super::super::query;
use super::super::status::ApiError;

/// `top_k=3,model=NAME,version=1`; whatever else is there belongs to the caller.
const ATTRIBUTES: HeaderName = HeaderName::from_static("x-amzn-sagemaker-custom-attributes");

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new().route("/invocations", post(invoke))
}

async fn invoke(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let mut named = Named::by_query(&request)?;
    attributes(&mut named, request.headers())?;
    classification::answer(&app, named, request, upload::read_json, classify::write).await
}

fn attributes(named: &mut Named, headers: &HeaderMap) -> Result<(), ApiError> {
    let text = headers.get(ATTRIBUTES).and_then(|value| value.to_str().ok()).unwrap_or_default();
    for (name, value) in text.split([',', ';']).filter_map(|attribute| attribute.split_once('=')) {
        match name.trim() {
            "model" => named.model = Some(value.trim().into()),
            "version" => named.version = Some(query::whole("version", value)?),
            "top_k" => named.top_k = Some(query::whole("top_k", value)?),
            _ => {}
        }
    }
    Ok(())
}
