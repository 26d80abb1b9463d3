//! `POST /v1/explain`: where an image speaks for a class, as a grid of numbers or as a picture. Errors go through `status`, bodies
//! through `bodies::upload`.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::Response;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::app::App;
use super::bodies::threads::INLINE;
use super::bodies::upload::{self, Kind, Upload};
use super::choice::Choice;
use super::deadline;
use super::query::Parameters;
use super::served::Served;
use super::status::{ApiError, Code, ErrorBody, cut};
use crate::infer::error::InferError;
use crate::infer::registry::LiveModel;
use crate::infer::top_k::Prediction;
use crate::pixels::Preprocessor;
use crate::pixels::heat::overlay;

/// Least and largest value of the grid, beside its picture.
const RANGE: HeaderName = HeaderName::from_static("x-heat-range");
/// Position of the class in the logits, beside the picture.
const CLASS: HeaderName = HeaderName::from_static("x-heat-class");

/// The route and its OpenAPI description.
pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(explain))
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "only described: it is read by name")]
struct ExplainQuery {
    /// Name in the repository; optional when only one model is served.
    model: Option<String>,
    /// Version; by default the highest.
    version: Option<u64>,
    /// Label or position of the class; by default the most probable one.
    class: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct ExplainAnswer<'a> {
    model: &'a str,
    version: u64,
    /// Label of the class; its position in digits if the model has no labels.
    class: &'a str,
    /// Position of the class in the logits.
    index: usize,
    /// Its score, as `/v1/classify` gives it.
    score: f64,
    /// Rows of the class activation map. The mean of all values, and the class's bias, make the logit.
    grid: Vec<&'a [f32]>,
}

/// Says where one image speaks for a class: the class activation map of a network that averages its last map, which is exact.
///
/// With `Accept: image/png` the answer is a picture: the image as the network saw it, in grey, under the map's colours (cividis, from dark
/// blue to yellow); the headers `x-heat-range` and `x-heat-class` say what they stand for.
#[utoipa::path(post, path = "/v1/explain", tag = "Classification",
    params(ExplainQuery,
        ("x-request-timeout-ms" = Option<u64>, Header, minimum = 1, description = "Longest that the client waits")),
    request_body(content(
        (inline(upload::Binary) = "application/octet-stream"), (inline(upload::Binary) = "image/jpeg"),
        (inline(upload::Binary) = "image/png"), (upload::JsonBody = "application/json"), (upload::Form = "multipart/form-data"))),
    responses((status = 200, content((ExplainAnswer<'_> = "application/json"), (inline(upload::Binary) = "image/png"))),
        (status = "default", body = ErrorBody)))]
async fn explain(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let query = Parameters::read(request.uri(), &["model", "version", "class"])?;
    let deadline = deadline::http(request.headers(), app.request_timeout)?;
    let as_picture = wants_picture(request.headers());
    let kind = Kind::of(request.headers())?;
    let choice = Choice::before(&app, query.text("model").map(String::from), query.whole("version")?, &kind)?;
    // what can't be answered costs no upload
    if let Some(model) = choice.known() {
        model.explains()?;
        if let Some(name) = query.text("class") {
            class(&app, model, name, deadline).await?;
        }
        model.has_room(deadline)?;
    }
    // the charge is held until the request is answered
    let Upload { images, asked, charge: _charge } =
        upload::read(&app.bodies, request, kind, upload::read_json, 1, deadline).await?;
    let model = choice.after(&app, &asked)?;
    model.explains()?;
    let class = match query.text("class") {
        Some(name) => Some(class(&app, &model, name, deadline).await?),
        None => None,
    };
    let Ok([image]) = <[_; 1]>::try_from(images) else {
        return Err(InferError::TooManyImages { images: 2, limit: 1 }.into());
    };
    if asked.top_k.is_some() {
        return Err(ApiError::new(Code::InvalidRequest, "one class is explained; name it by `class` instead of top_k"));
    }
    let image = image.map_err(InferError::Image)?;
    let preprocessor = Preprocessor::new(&model.manifest.preprocessing);
    // the map and the image while it is computed, then the grid as text or the pixels of the picture
    let size = 4 * (model.map_values() + preprocessor.tensor_len()) + 16 * 1024;
    let mut charge = app.bodies.budget.charge();
    if size > INLINE {
        charge.answer(size)?;
    }
    let explained = model.explain(image, class, deadline).await?;
    let mut served = Served::new(&model, 1);
    served.add_timings(&explained.timings);
    let Prediction { index, label, score } = explained.prediction;
    let (grid, input) = (explained.grid, explained.input);
    let (least, most) = grid.range();
    let written = app.bodies.threads.run(size, deadline, move || {
        if as_picture {
            return overlay(&preprocessor, &input, &grid).map_err(|e| ApiError::internal(format!("no picture: {e}")));
        }
        let rows = grid.values.chunks(grid.width.max(1)).collect();
        let (model, version) = (&model.name, model.version);
        serde_json::to_vec(&ExplainAnswer { model, version, class: &label, index, score, grid: rows })
            .map_err(|e| ApiError::internal(format!("an answer has no JSON: {e}")))
    });
    let kind = if as_picture { "image/png" } else { "application/json" };
    let mut response = served.respond(kind, written.await?, charge);
    let headers = response.headers_mut();
    headers.insert(header::VARY, HeaderValue::from_static("accept"));
    for (name, value) in [(RANGE, format!("{least} {most}")), (CLASS, index.to_string())] {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(name, value);
        }
    }
    Ok(response)
}

/// Whether a client asks for a picture, by name.
fn wants_picture(headers: &HeaderMap) -> bool {
    let kinds = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let mut kinds = kinds.flat_map(|value| value.split(','));
    kinds.any(|kind| kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("image/png"))
}

/// Longest name that is compared with the labels.
const COMPARED: usize = 64;

/// A class of the model; the error names the nearest. Comparing with all labels takes a second where there are many: not on this thread.
async fn class(app: &App, model: &Arc<LiveModel>, name: &str, deadline: Instant) -> Result<usize, ApiError> {
    if let Some(index) = model.class(name) {
        return Ok(index);
    }
    let (model, name) = (model.clone(), name.to_string());
    let compared = name.len() * model.manifest.labels.len();
    app.bodies.threads.run(compared, deadline, move || Err(no_class(&model, &name))).await
}

fn no_class(model: &LiveModel, name: &str) -> ApiError {
    let labels = model.manifest.labels.iter().filter(|_| name.len() <= COMPARED);
    let compared = labels.map(|label| (strsim::normalized_damerau_levenshtein(name, label), label));
    let hint = match compared.max_by(|(a, _), (b, _)| a.total_cmp(b)) {
        Some((_, label)) => format!("the nearest label is `{}`", cut(label)),
        None => format!("its classes are 0 to {}", model.manifest.classes.saturating_sub(1)),
    };
    ApiError::new(Code::InvalidRequest, format!("the model has no class `{}`; {hint}", cut(name)))
}
