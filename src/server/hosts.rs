//! Contracts of the platforms that models are run on: their addresses, bodies, answers and errors, over the request path of
//! `/v1/classify`. Each is switched on by name; a contract is a file.

mod huggingface;
mod kserve_v1;
mod sagemaker;
mod torchserve;
mod vertex;

use std::sync::Arc;

use axum::Router;
use serde::Serialize;
use serde_json::{Value, json};

use super::app::App;
use super::bodies::upload::Asked;
use super::classification::Answers;
use super::doors::Hosts;
use super::status::ApiError;
use crate::infer::registry::LiveModel;
use crate::infer::top_k::Prediction;

/// The routes of those that are answered, but for Vertex AI's.
pub(super) fn routes(hosts: &Hosts) -> Router<Arc<App>> {
    let on = [
        (hosts.sagemaker, sagemaker::routes as fn() -> Router<Arc<App>>),
        (hosts.sagemaker || hosts.torchserve, torchserve::ping),
        (hosts.torchserve, torchserve::routes),
        (hosts.huggingface, huggingface::routes),
        (hosts.kserve_v1, kserve_v1::routes),
    ];
    on.into_iter().filter(|(on, _)| *on).fold(Router::new(), |all, (_, routes)| all.merge(routes()))
}

/// The addresses that Vertex AI names, over every route: they may be any.
pub(super) fn over(routes: Router<Arc<App>>, app: &Arc<App>) -> Router<Arc<App>> {
    match &app.hosts.vertex {
        None => routes,
        Some(named) => vertex::over(routes, app, named),
    }
}

/// Errors in the form of the contract that was asked by, whatever layer they come from.
pub(super) fn errors(routes: Router, hosts: &Hosts) -> Router {
    if hosts.torchserve { routes.layer(axum::middleware::from_fn(torchserve::errors)) } else { routes }
}

/// `{"predictions": […]}`: for each image its classes, or why it has none.
#[derive(Serialize)]
struct Instances {
    predictions: Vec<Each>,
}

/// An image's classes, or why it has none. Written as they are: a tree of JSON values would take ten times their text.
#[derive(Serialize)]
#[serde(untagged)]
enum Each {
    Classes(Vec<Prediction>),
    Broken(Value),
}

/// The answer to `{"instances": […]}`.
fn instances(_: &LiveModel, _: &Asked, answers: Answers) -> serde_json::Result<Vec<u8>> {
    let each = |answer: Result<Vec<Prediction>, ApiError>| match answer {
        Ok(classes) => Each::Classes(classes),
        Err(error) => Each::Broken(broken(&error)),
    };
    serde_json::to_vec(&Instances { predictions: answers.into_iter().map(each).collect() })
}

/// Why an image among several has no classes.
fn broken(error: &ApiError) -> Value {
    json!({ "error": error.message, "code": error.code.name() })
}
