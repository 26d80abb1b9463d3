//! `ModelInfer` and `ModelStreamInfer`. Both decode messages themselves (`frames`, `wire`), so that a message is
//! limited, charged and decoded off the I/O threads before anything is allocated for it.

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use futures_util::FutureExt as _;
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::super::access::REQUEST_ID;
use super::super::app::App;
use super::super::bodies::budget::ChargedBody;
use super::super::bodies::intake::Held;
use super::super::deadline;
use super::super::oip::{describe, inference};
use super::super::pace::Visits;
use super::super::served::{SERVER_TIMING, millis};
use super::super::status::{ApiError, Code};
use super::fields::Unread;
use super::frames::{Messages, framed};
use super::messages::{Reply, reply};
use super::wire;
use super::{panicked_with, refused};
use crate::infer::error::InferError;
use crate::metrics::Protocol;
use crate::pb::open_inference as pb;

const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
const STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// How long after the hold, messages that arrived before its end are still answered.
const LAST_MESSAGES: Duration = Duration::from_secs(1);

/// A unary inference.
pub(super) async fn infer(State(app): State<Arc<App>>, request: Request) -> Response {
    let answered = async {
        let until = deadline::grpc(request.headers(), app.request_timeout)?;
        // refuse before the upload where possible: with several models, only the message names the model
        if let [model] = app.registry.all().as_slice() {
            model.has_room(until)?;
        }
        let mut messages = Messages::new(app.bodies.clone(), app.request_timeout, request)?;
        let message = messages.only(until).await?;
        serve(&app, message, until, false).await.map_err(|unread| unread.error)
    };
    let Reply { frame, served, charge } = match answered.await {
        Ok(reply) => reply,
        Err(error) => return refused(error),
    };
    let trailers = HeaderMap::from_iter([(STATUS, HeaderValue::from_static("0"))]);
    let body = Full::new(frame).with_trailers(std::future::ready(Some(Ok(trailers))));
    let mut response = ChargedBody::respond(Body::new(body), charge);
    response.headers_mut().insert(header::CONTENT_TYPE, GRPC);
    if let Ok(timing) = HeaderValue::from_str(&served.server_timing()) {
        response.headers_mut().insert(SERVER_TIMING, timing);
    }
    response.extensions_mut().insert(served);
    response
}

/// Answers one message.
async fn serve(app: &App, message: Held, until: Instant, streamed: bool) -> Result<Reply, Unread> {
    let arrived = Instant::now();
    let Held { bytes, mut charge } = message;
    let wire::Envelope { model, version, inputs } = wire::envelope(&bytes)?;
    let model = describe::find(app, &model, Some(&version))?;
    let limits = inference::limits(&model);
    // raw contents are slices of the message; values in the inputs' descriptions are decoded one by one
    let read = app.bodies.threads.run(inputs, until, move || {
        let read = wire::read(&bytes, &limits, &mut |more| charge.grow(more));
        Ok(read.map(|read| (read, charge)))
    });
    // the message stays charged until it is answered
    let ((inference, typed), _charge) = read.await??;
    let answered = inference::run(&app.bodies, model, inference, arrived, until).await?;
    Ok(app.bodies.threads.run(answered.size, until, move || Ok(reply(answered, typed, streamed))).await?)
}

/// A stream of inferences: one response per message, in order.
pub(super) async fn stream(State(app): State<Arc<App>>, request: Request) -> Response {
    if app.readiness.is_closing() {
        return refused(InferError::ShuttingDown.into());
    }
    let id = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).unwrap_or_default().to_string();
    let visits = request.extensions().get::<Visits>().cloned().unwrap_or_default();
    let opened = || {
        let until = deadline::of_stream(request.headers())?;
        Ok((until, Messages::new(app.bodies.clone(), app.request_timeout, request)?))
    };
    let (until, messages) = match opened() {
        Ok(opened) => opened,
        Err(error) => return refused(error),
    };
    // capacity 1: nothing is computed for a client that does not read its responses
    let (answers, frames) = mpsc::channel(1);
    let stream = Stream { app, id, until, visits, messages, answers, count: 0 };
    tokio::spawn(stream.run());
    let mut response = Response::new(Body::new(StreamBody::new(ReceiverStream::new(frames))));
    response.headers_mut().insert(header::CONTENT_TYPE, GRPC);
    response
}

/// An open stream.
struct Stream {
    app: Arc<App>,
    /// The request id of the call.
    id: String,
    /// The client's deadline for the whole stream.
    until: Option<Instant>,
    /// The refusals of its connection.
    visits: Visits,
    messages: Messages,
    answers: mpsc::Sender<Result<Frame<Bytes>, Infallible>>,
    /// Messages so far.
    count: u64,
}

/// How a stream ends.
enum End {
    /// With this status; `None`: OK.
    Status(Option<ApiError>),
    /// Without a status: the client has disconnected, or does not read its responses.
    Left,
}

impl Stream {
    async fn run(mut self) {
        let end = AssertUnwindSafe(self.answer_all()).catch_unwind().await;
        let end = end.unwrap_or_else(|panic| End::Status(Some(panicked_with(&*panic))));
        let Self { app, id, count, answers, .. } = self;
        let outcome = match end {
            End::Left => Code::Cancelled,
            End::Status(error) => {
                let code = error.as_ref().map_or(Code::Ok, |error| error.code);
                let mut trailers = HeaderMap::from_iter([(STATUS, HeaderValue::from_static("0"))]);
                if let Some(error) = error {
                    if let Some(detail) = &error.detail {
                        tracing::error!(request_id = id, detail, "stream {id} met an internal error");
                    }
                    // can't fail: the text is sanitised, so that it is a valid header value
                    let _ = error.into_status().add_header(&mut trailers);
                }
                send(&app, &answers, Frame::trailers(trailers)).await;
                code
            }
        };
        tracing::info!(
            request_id = id,
            messages = count,
            outcome = outcome.name(),
            "stream {id} ended: {}",
            outcome.name()
        );
    }

    async fn answer_all(&mut self) -> End {
        let mut closed = None;
        loop {
            let readiness = self.app.readiness.clone();
            if readiness.is_closing() {
                let since: &mut Instant = closed.get_or_insert_with(Instant::now);
                if since.elapsed() > LAST_MESSAGES {
                    return End::Status(Some(InferError::ShuttingDown.into()));
                }
            }
            if self.until.is_some_and(|until| until <= Instant::now()) {
                return End::Status(Some(InferError::DeadlineExceeded.into()));
            }
            let arrived = tokio::select! {
                biased;
                () = self.answers.closed() => return End::Left,
                // messages that arrived before shutdown are answered
                arrived = self.messages.arrives(self.until) => arrived,
                () = readiness.closed() => return End::Status(Some(InferError::ShuttingDown.into())),
            };
            match arrived {
                Ok(true) => {}
                Ok(false) => return End::Status(None),
                Err(error) => return End::Status(Some(error)),
            }
            self.count += 1;
            if let Some(end) = self.answer_one().await {
                return end;
            }
        }
    }

    /// Answers the next message; `Some` if that ends the stream.
    async fn answer_one(&mut self) -> Option<End> {
        let app = self.app.clone();
        // counted as cancelled if it is dropped because the client disconnected
        let guard = app.metrics.request(Protocol::GrpcStream);
        let until = self.until;
        let answered = async {
            let message = self.messages.read(until).await.map_err(|error| Unread { error, malformed: true })?;
            let latest = Instant::now() + app.request_timeout;
            serve(&app, message, until.map_or(latest, |until| until.min(latest)), true).await
        };
        let answered = tokio::select! {
            biased;
            () = self.answers.closed() => return Some(End::Left),
            answered = AssertUnwindSafe(answered).catch_unwind() => answered,
        };
        let answered = answered.unwrap_or_else(|panic| Err(Unread { error: panicked_with(&*panic), malformed: true }));
        let outcome = answered.as_ref().map_or_else(|unread| unread.error.code, |_| Code::Ok);
        let duration_ms = millis(guard.finish(outcome));
        let (request_id, message, name) = (&self.id, self.count, outcome.name());
        match &answered {
            Ok(Reply { served, .. }) => tracing::info!(
                request_id,
                message,
                outcome = name,
                duration_ms,
                model = served.model,
                version = served.version,
                images = served.images,
                "message {message} of stream {request_id} {name}"
            ),
            Err(_) => {
                tracing::info!(
                    request_id,
                    message,
                    outcome = name,
                    duration_ms,
                    "message {message} of stream {request_id} {name}"
                );
            }
        }
        let (frame, _charge) = match answered {
            Ok(Reply { frame, charge, .. }) => (frame, Some(charge)),
            Err(Unread { error, malformed: true }) => return Some(End::Status(Some(error))),
            Err(Unread { error, .. }) => {
                if let Some(detail) = &error.detail {
                    tracing::error!(
                        request_id,
                        detail,
                        "message {message} of stream {request_id} met an internal error"
                    );
                }
                (framed(&pb::ModelStreamInferResponse { error_message: error.message, infer_response: None }), None)
            }
        };
        self.wait_in_line(outcome).await;
        // the response stays charged until the channel accepts it
        if send(&app, &self.answers, Frame::data(frame)).await { None } else { Some(End::Left) }
    }

    /// Holds the response to a refused message if the client was refused just before, since it would send the next
    /// message at once.
    async fn wait_in_line(&mut self, outcome: Code) {
        match outcome {
            Code::Ok => self.visits.welcome(),
            Code::Overloaded if !self.app.readiness.is_draining() => {
                let now = Instant::now();
                let latest = now + self.app.request_timeout;
                let latest = self.until.map_or(latest, |until| until.min(latest));
                let Some(hold) = self.app.pace.hold(&self.visits, now, latest) else { return };
                tokio::select! {
                    () = tokio::time::sleep_until(hold.until.into()) => {}
                    () = self.answers.closed() => {}
                    () = self.app.readiness.closed() => {}
                }
            }
            _ => {}
        }
    }
}

/// Sends a frame; `false` if the client has disconnected or has not read within the write timeout.
async fn send(app: &App, answers: &mpsc::Sender<Result<Frame<Bytes>, Infallible>>, frame: Frame<Bytes>) -> bool {
    tokio::time::timeout(app.write_timeout, answers.send(Ok(frame))).await.is_ok_and(|sent| sent.is_ok())
}
