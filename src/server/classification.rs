//! From encoded images to a written answer: the request path that every contract for classification shares. A contract says how
//! its body is read and how its answer is written; admission, budget, deadline and accounting are here.

use std::time::Instant;

use axum::extract::Request;
use axum::http::header;
use axum::response::Response;
use bytes::Bytes;

use super::app::App;
use super::bodies::threads::INLINE;
use super::bodies::upload::{self, Asked, Json, Kind, Upload};
use super::choice::{Choice, agree};
use super::deadline;
use super::query::Parameters;
use super::served::Served;
use super::status::{ApiError, Code};
use crate::infer::error::InferError;
use crate::infer::registry::{Classified, LiveModel};
use crate::infer::request::Input;
use crate::infer::top_k::{Prediction, Selection, select};
use crate::model::scoring::{ScoreFunction, Scoring, check_threshold};

/// What curl says that it sends, whatever that is.
const FORM: &str = "application/x-www-form-urlencoded";
/// What a query may say.
pub(super) const PARAMETERS: [&str; 4] = ["model", "version", "top_k", "threshold"];

/// What a request says about the model and the answer before its body: in the path, the query or headers.
#[derive(Debug, Default)]
pub(super) struct Named {
    pub(super) model: Option<String>,
    pub(super) version: Option<u64>,
    pub(super) top_k: Option<usize>,
    /// Predictions have this score or more.
    pub(super) threshold: Option<f64>,
}

impl Named {
    /// What the query says.
    pub(super) fn by_query(request: &Request) -> Result<Self, ApiError> {
        let query = Parameters::read(request.uri(), &PARAMETERS)?;
        Ok(Self {
            model: query.text("model").map(String::from),
            version: query.whole("version")?,
            top_k: query.whole("top_k")?,
            threshold: query.number("threshold")?,
        })
    }

    /// What the path and the query say, which may not contradict each other.
    pub(super) fn by_path(request: &Request, model: Option<String>, version: Option<u64>) -> Result<Self, ApiError> {
        let query = Self::by_query(request)?;
        agree("models", "query", model.as_deref(), query.model.as_deref())?;
        agree("versions", "query", version, query.version)?;
        Ok(Self { model: model.or(query.model), version: version.or(query.version), ..query })
    }
}

/// What became of each image, in the request's order.
pub(super) type Answers = Vec<Result<Vec<Prediction>, ApiError>>;

/// How a contract writes an answer. It may be told what the request asked for; what it returns is JSON.
pub(super) type Write = fn(&LiveModel, &Asked, Answers) -> serde_json::Result<Vec<u8>>;

/// Answers a request: `json` reads its body where that is JSON, `write` writes the answer.
pub(super) async fn answer(
    app: &App,
    named: Named,
    request: Request,
    json: Json,
    write: Write,
) -> Result<Response, ApiError> {
    let deadline = deadline::http(request.headers(), app.request_timeout)?;
    let by_curl = request.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == FORM);
    let kind = Kind::of(request.headers())?;
    let Named { model, version, top_k, threshold } = named;
    // checked before the body is read, so that a wrong name costs no upload
    let choice = Choice::before(app, model, version, &kind)?;
    if let Some(model) = choice.known() {
        check(model, threshold)?;
        // neither does a full queue
        model.has_room(deadline)?;
    }
    let (limit, early) = (choice.images(app), choice.known().is_some());
    // the charge is held until the request is answered
    let Upload { images: uploaded, asked, charge: _charge } =
        upload::read(&app.bodies, request, kind, json, limit, deadline).await?;
    let model = choice.after(app, &asked)?;
    check(&model, threshold)?;
    if !early {
        model.has_room(deadline)?;
    }
    let selection = Selection { top_k: asked.top_k.or(top_k), threshold };
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
    let mut classified = classify(&model, whole, selection, asked.scores, deadline).await?.into_iter();
    let mut served = Served::new(&model, images);
    let mut answers = Vec::with_capacity(images);
    for broken in broken {
        let answer = match broken {
            Some(error) => Err(error),
            None => classified.next().unwrap_or_else(|| Err(InferError::Internal("an image has no answer".into()))),
        };
        answers.push(match answer {
            Ok(classified) => {
                served.add_timings(&classified.timings);
                Ok(classified.predictions)
            }
            // a request of one image has no neighbours to save
            Err(error) if images == 1 => {
                let mut error = ApiError::from(error);
                if altered && matches!(error.code, Code::InvalidImage | Code::UnsupportedMediaType) {
                    error.message.push_str("; curl's -d leaves bytes of files out: send them with --data-binary");
                }
                return Err(error);
            }
            Err(error) => {
                let error = ApiError::from(error);
                served.faults.extend(error.detail.clone());
                Err(error)
            }
        });
    }
    let written = app.bodies.threads.run(size, deadline, move || {
        write(&model, &asked, answers).map_err(|e| ApiError::internal(format!("an answer has no JSON: {e}")))
    });
    Ok(served.respond("application/json", written.await?, charge))
}

/// Refuses a threshold that no score of the model can be compared with.
fn check(model: &LiveModel, threshold: Option<f64>) -> Result<(), ApiError> {
    let Some(threshold) = threshold else { return Ok(()) };
    let refused = |reason| ApiError::new(Code::InvalidRequest, reason);
    check_threshold(threshold, model.scoring.activation).map_err(refused)
}

/// The classes that are named for each image, with the scores that are asked for.
async fn classify(
    model: &LiveModel,
    images: Vec<Bytes>,
    selection: Selection,
    scores: Option<ScoreFunction>,
    deadline: Instant,
) -> Result<Vec<Result<Classified, InferError>>, InferError> {
    let Some(activation) = scores.filter(|asked| *asked != model.scoring.activation) else {
        return model.classify(images, selection, deadline).await;
    };
    // the model's thresholds and temperature belong to its own function
    let labels = &model.manifest.labels;
    let scoring = Scoring { activation, ..Scoring::usual(model.manifest.classes as usize) };
    let inputs = images.into_iter().map(Input::Encoded).collect();
    let finish = |logits: Vec<f32>| select(&logits, &scoring, selection, labels);
    let answers = model.infer(inputs, deadline, finish).await?;
    let classified = |(predictions, timings)| Classified { predictions, timings };
    Ok(answers.into_iter().map(|answer| answer.map(classified)).collect())
}

/// Whether an image's beginning has no byte of those that `curl -d @FILE` leaves out: no image of some size is so.
fn lacks_line_ends(image: &[u8]) -> bool {
    image.len() > 512 && memchr::memchr3(b'\n', b'\r', 0, &image[..image.len().min(4096)]).is_none()
}

/// Bytes of an answer, at most, about: predictions, each with its label, and their text.
fn answer_size(model: &LiveModel, images: usize, k: usize) -> usize {
    let k = k.min(model.manifest.classes as usize);
    let label = model.manifest.labels.iter().map(String::len).max().unwrap_or_default();
    images * k * (2 * label + 160)
}
