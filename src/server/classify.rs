//! `POST /v1/classify` and `GET /v1/classes`: their description and how its answer is written; `classification` does the rest.

use std::borrow::Cow;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::app::App;
use super::bodies::budget::ChargedBody;
use super::bodies::threads::INLINE;
use super::bodies::upload::{self, Asked};
use super::classification::{self, Answers, Named};
use super::deadline;
use super::query::Parameters;
use super::status::{ApiError, ErrorBody};
use crate::infer::registry::LiveModel;
use crate::infer::top_k::Prediction;

/// The route and its description.
pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(classify)).routes(routes!(classes))
}

/// What [`classification::PARAMETERS`] are.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "only described: it is read by name")]
struct ClassifyQuery {
    /// Name in the repository; optional when only one model is served.
    model: Option<String>,
    /// Version; by default the highest.
    version: Option<u64>,
    /// Predictions per image; by default all that reach the model's thresholds, or 5 where it has none.
    #[param(minimum = 1)]
    top_k: Option<usize>,
    /// Predictions have this score or more; counts instead of the model's thresholds.
    threshold: Option<f64>,
}

#[derive(Serialize, ToSchema)]
struct ClassifyAnswer<'a> {
    model: &'a str,
    version: u64,
    /// In the request's order.
    results: Vec<ImageAnswer>,
}

/// An image's predictions, or, if the request has several images, the image's error.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ImageAnswer {
    Predictions(Vec<PredictionBody>),
    Error(Refused),
}

/// Why an image among several has no predictions.
#[derive(Serialize, ToSchema)]
struct Refused {
    code: &'static str,
    message: String,
}

/// A class and its probability.
#[derive(Serialize, ToSchema)]
struct PredictionBody {
    /// Index of the class in the logits.
    index: usize,
    /// Label of the class; the index in digits if the model has no labels.
    label: String,
    /// Probability in 0..=1 by softmax or sigmoid, as the model was folded; a logit if it was folded without either.
    score: f64,
}

impl From<Result<Vec<Prediction>, ApiError>> for ImageAnswer {
    fn from(answer: Result<Vec<Prediction>, ApiError>) -> Self {
        match answer {
            Ok(predictions) => Self::Predictions(predictions.into_iter().map(PredictionBody::from).collect()),
            Err(ApiError { code, message, .. }) => Self::Error(Refused { code: code.name(), message }),
        }
    }
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
        (inline(upload::Binary) = "application/octet-stream"), (inline(upload::Binary) = "image/jpeg"),
        (inline(upload::Binary) = "image/png"), (upload::JsonBody = "application/json"), (upload::Form = "multipart/form-data"))),
    responses((status = 200, body = ClassifyAnswer<'_>), (status = "default", body = ErrorBody)))]
async fn classify(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let named = Named::by_query(&request)?;
    classification::answer(&app, named, request, upload::read_json, write).await
}

/// Whose classes to list.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "only described: it is read by name")]
struct ClassesQuery {
    /// Name in the repository; optional when only one model is served.
    model: Option<String>,
    /// Version; by default the highest.
    version: Option<u64>,
}

#[derive(Serialize, ToSchema)]
struct ClassesAnswer<'a> {
    model: &'a str,
    version: u64,
    /// Labels in the order of the logits; indices in digits if the model has no labels.
    classes: Vec<Cow<'a, str>>,
}

/// Lists the classes that a model knows.
#[utoipa::path(get, path = "/v1/classes", tag = "Classification", params(ClassesQuery),
    responses((status = 200, body = ClassesAnswer<'_>), (status = "default", body = ErrorBody)))]
async fn classes(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let query = Parameters::read(request.uri(), &["model", "version"])?;
    let deadline = deadline::http(request.headers(), app.request_timeout)?;
    let model = app.registry.find(query.text("model"), query.whole("version")?)?;
    let size = model
        .manifest
        .labels
        .iter()
        .map(|label| label.len() + 4)
        .sum::<usize>()
        .max(8 * model.manifest.classes as usize);
    let mut charge = app.bodies.budget.charge();
    if size > INLINE {
        charge.answer(size)?;
    }
    let written = app.bodies.threads.run(size, deadline, move || {
        let labels = &model.manifest.labels;
        let name = |index: usize| match labels.get(index) {
            Some(label) => Cow::Borrowed(label.as_str()),
            None => Cow::Owned(index.to_string()),
        };
        let classes = (0..model.manifest.classes as usize).map(name).collect();
        let answer = ClassesAnswer { model: &model.name, version: model.version, classes };
        serde_json::to_vec(&answer).map_err(|e| ApiError::internal(format!("an answer has no JSON: {e}")))
    });
    let mut response = ChargedBody::respond(written.await?.into(), charge);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

pub(super) fn write(model: &LiveModel, _: &Asked, answers: Answers) -> serde_json::Result<Vec<u8>> {
    let results = answers.into_iter().map(ImageAnswer::from).collect();
    serde_json::to_vec(&ClassifyAnswer { model: &model.name, version: model.version, results })
}
