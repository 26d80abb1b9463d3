//! The task API of Hugging Face's inference endpoints: `POST /` takes an image, or `{"inputs": …, "parameters": …}`, and answers
//! `[{"label", "score"}]`.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::{get, post};
use serde::Serialize;
use serde_json::Value;

use super::super::app::App;
use super::super::bodies::instances::read_inputs;
use super::super::bodies::upload::Asked;
use super::super::classification::{self, Answers, Named};
use super::super::health;
use super::super::status::ApiError;
use super::broken;
use crate::infer::registry::LiveModel;
use crate::infer::top_k::Prediction;

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new().route("/", post(task)).route("/health", get(health::ready))
}

async fn task(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let named = Named::by_query(&request)?;
    classification::answer(&app, named, request, read_inputs, write).await
}

/// A class in this API's form.
#[derive(Serialize)]
struct Class {
    label: String,
    score: f64,
}

/// An image's classes, or why it has none.
#[derive(Serialize)]
#[serde(untagged)]
enum Each {
    Classes(Vec<Class>),
    Broken(Value),
}

/// Of one image its classes, of several a list of such.
fn write(_: &LiveModel, asked: &Asked, answers: Answers) -> serde_json::Result<Vec<u8>> {
    let class = |Prediction { label, score, .. }| Class { label, score };
    let one = |answer: Result<Vec<Prediction>, ApiError>| match answer {
        Ok(top) => Each::Classes(top.into_iter().map(class).collect()),
        Err(error) => Each::Broken(broken(&error)),
    };
    let mut each: Vec<Each> = answers.into_iter().map(one).collect();
    match each.pop() {
        Some(only) if each.is_empty() && !asked.is_list => serde_json::to_vec(&only),
        last => {
            each.extend(last);
            serde_json::to_vec(&each)
        }
    }
}
