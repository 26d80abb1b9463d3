//! `POST /v1/classify`: images in, classes out. Errors go through `status`, bodies through `bodies::upload`.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::app::App;
use super::bodies::budget::ChargedBody;
use super::bodies::threads::INLINE;
use super::bodies::upload::{self, Members, Upload};
use super::deadline;
use super::served::{SERVER_TIMING, Served};
use super::status::{ApiError, Code, ErrorBody};
use crate::infer::error::InferError;
use crate::infer::registry::LiveModel;
use crate::infer::top_k::{Prediction, Selection};
use crate::model::scoring::check_threshold;

/// The content type that `curl -d` sends for any data.
const FORM: &str = "application/x-www-form-urlencoded";

/// The route and its OpenAPI description.
pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(classify))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
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
    Error { code: &'static str, message: String },
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
    let by_curl = request.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == FORM);
    // checked before the body is read, so that a wrong name costs no upload
    let model = app.registry.find(query.model.as_deref(), query.version)?;
    if let Some(threshold) = query.threshold {
        let refused = |reason| ApiError::new(Code::InvalidRequest, reason);
        check_threshold(threshold, model.scoring.activation).map_err(refused)?;
    }
    // neither does a full queue
    model.has_room(deadline)?;
    let limit = model.scheduler().queue_limit();
    // the charge is held until the request is answered
    let Upload { images: uploaded, top_k, charge: _charge, .. } =
        upload::read(&app.bodies, request, limit, deadline, Members::Classify).await?;
    let selection = Selection { top_k: top_k.or(query.top_k), threshold: query.threshold };
    if selection.top_k == Some(0) {
        return Err(ApiError::new(Code::InvalidRequest, "top_k is 0; ask for at least one prediction"));
    }
    let images = uploaded.len();
    let size = answer_size(&model, images, selection.most(&model.scoring));
    let mut charge = app.bodies.budget.charge();
    if size > INLINE {
        charge.answer(size)?;
    }
    let altered = by_curl && matches!(uploaded.as_slice(), [Ok(image)] if lacks_line_ends(image));
    let broken: Vec<Option<InferError>> =
        uploaded.iter().map(|image| image.as_ref().err().cloned().map(InferError::Image)).collect();
    let whole = uploaded.into_iter().flatten().collect();
    let mut answers = model.classify(whole, selection, deadline).await?.into_iter();
    let mut served = Served::new(&model, images);
    let mut results = Vec::with_capacity(images);
    for broken in broken {
        let answer = match broken {
            Some(error) => Err(error),
            None => answers.next().unwrap_or_else(|| Err(InferError::Internal("an image has no answer".into()))),
        };
        results.push(match answer {
            Ok(classified) => {
                served.add_timings(&classified.timings);
                ImageAnswer::Predictions(classified.predictions.into_iter().map(PredictionBody::from).collect())
            }
            // with a single image, its error is the request's
            Err(error) if images == 1 => {
                let mut error = ApiError::from(error);
                if altered && matches!(error.code, Code::InvalidImage | Code::UnsupportedMediaType) {
                    error.message.push_str("; curl's -d leaves bytes of files out: send them with --data-binary");
                }
                return Err(error);
            }
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
    let mut response = ChargedBody::respond(written.await?.into(), charge);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Ok(value) = HeaderValue::from_str(&served.server_timing()) {
        response.headers_mut().insert(SERVER_TIMING, value);
    }
    response.extensions_mut().insert(served);
    Ok(response)
}

/// Whether an image's first bytes lack those that `curl -d @FILE` leaves out (line ends and zeros).
fn lacks_line_ends(image: &[u8]) -> bool {
    image.len() > 512 && memchr::memchr3(b'\n', b'\r', 0, &image[..image.len().min(4096)]).is_none()
}

/// Estimate of a response's most bytes: each prediction has its label and some 80 bytes more.
fn answer_size(model: &LiveModel, images: usize, k: usize) -> usize {
    let k = k.min(model.manifest.classes as usize);
    let label = model.manifest.labels.iter().map(String::len).max().unwrap_or_default();
    images * k * (label + 80)
}
