//! `POST /v1/embed`: images in, feature vectors out; in the shape of OpenAI's embeddings for bodies in that form, which
//! `/v1/embeddings` takes too. Errors go through `status`, bodies through `bodies::upload`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::post;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::app::App;
use super::bodies::threads::INLINE;
use super::bodies::upload::{self, Embeddings, Kind, Upload};
use super::choice::Choice;
use super::deadline;
use super::query::Parameters;
use super::served::Served;
use super::status::{ApiError, Code, ErrorBody};
use crate::infer::error::InferError;
use crate::infer::registry::LiveModel;
use crate::infer::request::{Extras, Input, Output};
use crate::infer::top_k::check_finite;

/// Bytes of a number in an answer, at most, its comma included.
const NUMBER: usize = 16;

/// The routes; OpenAI's own path is no other route, and not described twice.
pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(embed)).route("/v1/embeddings", post(embed))
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "only described: it is read by name")]
struct EmbedQuery {
    /// Name in the repository; optional when only one model is served.
    model: Option<String>,
    /// Version; by default the highest.
    version: Option<u64>,
    /// Vectors of length 1.
    #[param(required = false)]
    l2: bool,
}

#[derive(Serialize, ToSchema)]
struct EmbedAnswer<'a> {
    model: &'a str,
    version: u64,
    /// In the request's order; `null` for an image among several that has none.
    features: Vec<Option<Vec<f32>>>,
    /// Why images among several have none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<Missing>,
}

/// Why an image has no features.
#[derive(Serialize, ToSchema)]
struct Missing {
    /// Its number in the request, from 0.
    index: usize,
    code: &'static str,
    message: String,
}

/// In the shape that the body asks for.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Answer<'a> {
    Own(EmbedAnswer<'a>),
    OpenAi(OpenAiAnswer<'a>),
}

/// The shape of OpenAI's embeddings.
#[derive(Serialize, ToSchema)]
struct OpenAiAnswer<'a> {
    object: &'static str,
    data: Vec<Embedding>,
    model: &'a str,
    usage: Usage,
}

#[derive(Serialize, ToSchema)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

/// Numbers, or base64 of them in little-endian single precision.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Vector {
    Numbers(Vec<f32>),
    Base64(String),
}

/// Images have no tokens.
#[derive(Serialize, ToSchema)]
struct Usage {
    prompt_tokens: u32,
    total_tokens: u32,
}

/// Returns the feature vectors of images: what the classifier reads, as timm's `forward_head(pre_logits=True)`.
#[utoipa::path(post, path = "/v1/embed", tag = "Classification",
    params(EmbedQuery,
        ("x-request-timeout-ms" = Option<u64>, Header, minimum = 1, description = "Longest that the client waits")),
    request_body(content(
        (inline(upload::Binary) = "application/octet-stream"), (inline(upload::Binary) = "image/jpeg"),
        (inline(upload::Binary) = "image/png"), (upload::EmbedBody = "application/json"), (upload::Form = "multipart/form-data"))),
    responses((status = 200, body = Answer<'_>, description = "In OpenAI's shape for bodies with `input`"),
        (status = "default", body = ErrorBody)))]
async fn embed(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let query = Parameters::read(request.uri(), &["model", "version", "l2"])?;
    let l2 = query.flag("l2")?.unwrap_or(false);
    let deadline = deadline::http(request.headers(), app.request_timeout)?;
    let wanted = Extras { features: true, map: false };
    let kind = Kind::of(request.headers())?;
    let choice = Choice::before(&app, query.text("model").map(String::from), query.whole("version")?, &kind)?;
    if let Some(model) = choice.known() {
        // what can't be answered costs no upload
        model.gives(wanted)?;
        model.has_room(deadline)?;
    }
    let limit = choice.images(&app);
    // the charge is held until the request is answered
    let Upload { images: uploaded, asked, charge: _charge } =
        upload::read(&app.bodies, request, kind, upload::read_embed_json, limit, deadline).await?;
    if asked.top_k.is_some() {
        return Err(ApiError::new(Code::InvalidRequest, "features have no top_k; /v1/classify names classes"));
    }
    let model = choice.after(&app, &asked)?;
    let embeddings = asked.embeddings;
    let images = uploaded.len();
    let size = images * model.manifest.features.unwrap_or_default() as usize * NUMBER;
    let mut charge = app.bodies.budget.charge();
    if size > INLINE {
        charge.answer(size)?;
    }
    let broken: Vec<Option<InferError>> =
        uploaded.iter().map(|image| image.as_ref().err().cloned().map(InferError::Image)).collect();
    let whole = uploaded.into_iter().flatten().map(Input::Encoded).collect();
    let finish = |output: Output| {
        check_finite(&output.features)?;
        let mut features = output.features;
        if l2 {
            crate::infer::request::normalise(&mut features);
        }
        Ok(features)
    };
    let mut answers = model.infer_with(whole, deadline, wanted, finish).await?.into_iter();
    let mut served = Served::new(&model, images);
    let (mut features, mut errors) = (Vec::with_capacity(images), Vec::new());
    for (index, broken) in broken.into_iter().enumerate() {
        let answer = match broken {
            Some(error) => Err(error),
            None => answers.next().unwrap_or_else(|| Err(InferError::Internal("an image has no answer".into()))),
        };
        match answer {
            Ok((vector, timings)) => {
                served.add_timings(&timings);
                features.push(Some(vector));
            }
            // OpenAI's shape has no place for an error of one of several
            Err(error) if images == 1 || embeddings.is_some() => {
                let mut error = ApiError::from(error);
                if images > 1 && error.code != Code::Internal {
                    error.message = format!("image {index}: {}", error.message);
                }
                return Err(error);
            }
            Err(error) => {
                let ApiError { code, message, detail, .. } = error.into();
                served.faults.extend(detail);
                errors.push(Missing { index, code: code.name(), message });
                features.push(None);
            }
        }
    }
    let written = app.bodies.threads.run(size, deadline, move || write(&model, features, errors, embeddings));
    Ok(served.respond("application/json", written.await?, charge))
}

fn write(
    model: &LiveModel,
    features: Vec<Option<Vec<f32>>>,
    errors: Vec<Missing>,
    embeddings: Option<Embeddings>,
) -> Result<Vec<u8>, ApiError> {
    let answer = match embeddings {
        None => Answer::Own(EmbedAnswer { model: &model.name, version: model.version, features, errors }),
        Some(Embeddings { base64 }) => {
            let vector = |values: Vec<f32>| {
                if !base64 {
                    return Vector::Numbers(values);
                }
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                Vector::Base64(BASE64_STANDARD.encode(bytes))
            };
            let data = features.into_iter().flatten().enumerate();
            let data = data.map(|(index, values)| Embedding { object: "embedding", index, embedding: vector(values) });
            Answer::OpenAi(OpenAiAnswer {
                object: "list",
                data: data.collect(),
                model: &model.name,
                usage: Usage { prompt_tokens: 0, total_tokens: 0 },
            })
        }
    };
    serde_json::to_vec(&answer).map_err(|e| ApiError::internal(format!("an answer has no JSON: {e}")))
}
