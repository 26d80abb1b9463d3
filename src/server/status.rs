//! The only table from errors to status codes: what went wrong → code, HTTP status, outcome counted, text the caller
//! may see. Faults of this side get a fixed text; their detail goes to the log, once, here.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::infer::error::InferError;
use crate::infer::scheduler;
use crate::metrics::Outcome;

/// An answer that is an error. Its body is `{"error": message, "code": code}`.
#[derive(Debug, Clone)]
pub struct Failure {
    outcome: Outcome,
    message: String,
    retry_after: Option<Duration>,
}

impl Failure {
    /// A request that can't be understood; `message` says why.
    pub fn invalid_request(message: impl Into<String>) -> Self {
        Self::new(Outcome::InvalidRequest, message)
    }

    /// A failure of this kind. For [`Outcome::Internal`] the message goes to the log instead of to the caller.
    pub fn new(outcome: Outcome, message: impl Into<String>) -> Self {
        let message = message.into();
        if outcome == Outcome::Internal {
            tracing::error!(detail = message, "internal error");
            return Self {
                outcome,
                message: "internal error; the server's log has the detail".into(),
                retry_after: None,
            };
        }
        Self { outcome, message, retry_after: None }
    }

    /// `{"code", "message"}`, for an image of several.
    pub fn entry(&self) -> Value {
        json!({ "code": self.outcome.name(), "message": self.message })
    }

    fn status(&self) -> StatusCode {
        match self.outcome {
            Outcome::Ok => StatusCode::OK,
            Outcome::InvalidRequest | Outcome::InvalidImage | Outcome::Cancelled => StatusCode::BAD_REQUEST,
            Outcome::ImageTooLarge | Outcome::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Outcome::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Outcome::ModelNotFound | Outcome::NotFound => StatusCode::NOT_FOUND,
            Outcome::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Outcome::Overloaded => StatusCode::TOO_MANY_REQUESTS,
            Outcome::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            Outcome::ShuttingDown | Outcome::NotReady => StatusCode::SERVICE_UNAVAILABLE,
            Outcome::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The answer with further members in its body.
    pub fn with(self, more: Value) -> Response {
        let mut body = json!({ "error": self.message, "code": self.outcome.name() });
        if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
            body.extend(more);
        }
        let mut response = (self.status(), Json(body)).into_response();
        if let Some(wait) = self.retry_after {
            // whole seconds, never 0: a client that waits 0 s does not wait
            let seconds = HeaderValue::from(wait.as_secs_f64().ceil().max(1.0) as u64);
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        response.extensions_mut().insert(self.outcome);
        response
    }
}

impl From<InferError> for Failure {
    fn from(error: InferError) -> Self {
        let retry_after = match &error {
            InferError::Overloaded { retry_after } => Some(*retry_after),
            _ => None,
        };
        Self { retry_after, ..Self::new(scheduler::outcome(&error), error.to_string()) }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        self.with(Value::Null)
    }
}
