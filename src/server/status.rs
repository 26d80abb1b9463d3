//! The only table from an error to what a client sees: code, HTTP status, gRPC status and metric outcome, side by side.
//!
//! An internal error has a fixed text; its detail is logged once, with the request's id.

use std::borrow::Cow;
use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tonic::metadata::MetadataValue;
use utoipa::ToSchema;

use crate::infer::error::InferError;
use crate::printable::printable;

/// Clients branch on the same code that the metrics count as outcome.
pub use crate::metrics::Outcome as Code;

impl Code {
    /// The table: HTTP status and gRPC status number.
    fn row(self) -> (StatusCode, i32) {
        match self {
            Self::Ok => (StatusCode::OK, 0),
            Self::InvalidRequest | Self::InvalidImage => (StatusCode::BAD_REQUEST, 3),
            Self::ImageTooLarge => (StatusCode::PAYLOAD_TOO_LARGE, 3),
            Self::BodyTooLarge => (StatusCode::PAYLOAD_TOO_LARGE, 11),
            Self::UnsupportedMediaType => (StatusCode::UNSUPPORTED_MEDIA_TYPE, 3),
            Self::ModelNotFound | Self::NotFound => (StatusCode::NOT_FOUND, 5),
            Self::Unauthenticated => (StatusCode::UNAUTHORIZED, 16),
            Self::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, 12),
            Self::UriTooLong => (StatusCode::URI_TOO_LONG, 3),
            Self::HeadTooLarge => (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, 3),
            Self::Overloaded => (StatusCode::TOO_MANY_REQUESTS, 8),
            Self::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, 4),
            Self::ShuttingDown | Self::NotReady => (StatusCode::SERVICE_UNAVAILABLE, 14),
            // never sent, as the client has disconnected
            Self::Cancelled => (StatusCode::REQUEST_TIMEOUT, 1),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, 13),
        }
    }

    /// HTTP status.
    pub fn http(self) -> StatusCode {
        self.row().0
    }

    /// gRPC status number.
    pub fn grpc(self) -> i32 {
        self.row().1
    }
}

/// An error on its way to a client.
#[derive(Debug, Clone)]
pub struct ApiError {
    /// The kind of error.
    pub code: Code,
    /// Text for the client: what is wrong and what to do next.
    pub message: String,
    /// When to retry.
    pub retry_after: Option<Duration>,
    /// For the log only.
    pub detail: Option<String>,
}

/// Most characters of a client's text that a response repeats.
const ECHO: usize = 200;

/// Most characters of an error's text.
const MESSAGE: usize = 1000;

/// A client's text as a response repeats it: truncated if it is long.
pub(super) fn cut(text: &str) -> Cow<'_, str> {
    shortened(text, ECHO)
}

fn shortened(text: &str, most: usize) -> Cow<'_, str> {
    match text.char_indices().nth(most) {
        None => Cow::Borrowed(text),
        Some((end, _)) => Cow::Owned(format!("{}…", &text[..end])),
    }
}

impl ApiError {
    /// An error with a text for the client. Control characters are escaped, since the text may repeat what the client
    /// sent.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if let Cow::Owned(escaped) = printable(&message) {
            message = escaped;
        }
        if let Cow::Owned(short) = shortened(&message, MESSAGE) {
            message = short;
        }
        Self { code, message, retry_after: None, detail: None }
    }

    /// An internal error: `detail` is for the log, the client gets a fixed text.
    pub fn internal(detail: impl Into<String>) -> Self {
        let message = "internal error; the server's log has the details under this x-request-id".into();
        Self { code: Code::Internal, message, retry_after: None, detail: Some(detail.into()) }
    }
}

impl From<InferError> for ApiError {
    fn from(error: InferError) -> Self {
        if let InferError::Internal(detail) = error {
            return Self::internal(detail);
        }
        let retry_after = match &error {
            InferError::Overloaded { retry_after } => Some(*retry_after),
            InferError::ShuttingDown | InferError::NotReady => Some(Duration::from_secs(1)),
            _ => None,
        };
        Self { retry_after, ..Self::new(error.outcome(), error.to_string()) }
    }
}

/// The body of every error.
#[derive(Serialize, ToSchema)]
pub(super) struct ErrorBody<'a> {
    /// What is wrong and what to do next.
    error: &'a str,
    /// The error's code, for programs to branch on.
    code: &'static str,
}

/// Metadata key of the error's code, since one gRPC status stands for several.
const ERROR_CODE: &str = "x-error-code";
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

impl ApiError {
    /// The error as a gRPC status.
    pub(super) fn into_status(self) -> tonic::Status {
        let mut status = tonic::Status::new(tonic::Code::from_i32(self.code.grpc()), self.message);
        let metadata = status.metadata_mut();
        metadata.insert(ERROR_CODE, MetadataValue::from_static(self.code.name()));
        if let Some(after) = self.retry_after.and_then(|after| MetadataValue::try_from(seconds(after).to_string()).ok())
        {
            metadata.insert("retry-after", after);
        }
        status
    }
}

/// The code of a gRPC call that failed before its first message; `None` if it did not, or was no gRPC call.
pub(super) fn grpc_outcome(headers: &HeaderMap) -> Option<Code> {
    let number: i32 = headers.get(GRPC_STATUS)?.to_str().ok()?.parse().ok()?;
    let named = headers.get(ERROR_CODE).and_then(|name| Code::ALL.into_iter().find(|code| name == code.name()));
    match (named, number) {
        (_, 0) => None,
        (Some(code), _) => Some(code),
        // a status that tonic made itself
        (None, 11) => Some(Code::BodyTooLarge),
        (None, 5 | 12) => Some(Code::NotFound),
        (None, _) => Some(Code::InvalidRequest),
    }
}

/// Whole seconds, rounded up: `retry-after` has no fractions.
fn seconds(after: Duration) -> u64 {
    after.as_secs_f64().ceil().max(1.0) as u64
}

/// What middleware reads from a failed response: the code for the metrics, the detail for the log.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The kind of error.
    pub code: Code,
    /// What the client reads.
    pub message: String,
    /// For the log only.
    pub detail: Option<String>,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = ErrorBody { error: &self.message, code: self.code.name() };
        let mut response = (self.code.http(), axum::Json(body)).into_response();
        if let Some(after) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds(after)));
        }
        response.extensions_mut().insert(Failure { code: self.code, message: self.message, detail: self.detail });
        response
    }
}

/// A refusal with another text, in the form that every error has.
pub(super) fn retold(mut response: Response, message: String) -> Response {
    let Some(failure) = response.extensions_mut().get_mut::<Failure>() else { return response };
    failure.message = message;
    let (code, message) = (failure.code.name(), failure.message.clone());
    let body = serde_json::to_string(&ErrorBody { error: &message, code }).unwrap_or_default();
    reworded(response, body)
}

/// The same response with another text for a body, which is JSON.
pub(super) fn reworded(mut response: Response, body: String) -> Response {
    *response.body_mut() = body.into();
    for header in [header::CONTENT_LENGTH, header::CONTENT_ENCODING] {
        response.headers_mut().remove(header);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The contract's table, written out by hand.
    #[test]
    fn codes_map_as_the_contract_says() {
        let table = Code::ALL.map(|c| (c.name(), c.http().as_u16(), c.grpc()));
        assert_eq!(
            table,
            [
                ("ok", 200, 0),
                ("invalid_request", 400, 3),
                ("invalid_image", 400, 3),
                ("image_too_large", 413, 3),
                ("body_too_large", 413, 11),
                ("unsupported_media_type", 415, 3),
                ("model_not_found", 404, 5),
                ("not_found", 404, 5),
                ("unauthenticated", 401, 16),
                ("method_not_allowed", 405, 12),
                ("uri_too_long", 414, 3),
                ("head_too_large", 431, 3),
                ("overloaded", 429, 8),
                ("deadline_exceeded", 504, 4),
                ("shutting_down", 503, 14),
                ("not_ready", 503, 14),
                ("cancelled", 408, 1),
                ("internal", 500, 13),
            ]
        );
    }

    /// Clients print messages on terminals and write them into logs.
    #[test]
    fn a_message_has_no_control_characters() {
        let name = "\x1b]0;evil\x07\r\n\u{202e}".to_string();
        let unknown = InferError::ModelNotFound { model: name.clone(), available: "m".into() };
        for error in [ApiError::from(unknown), ApiError::new(Code::InvalidRequest, name)] {
            assert!(error.message.contains("\\u{1b}]0;evil\\u{7}\\r\\n\\u{202e}"), "{}", error.message);
        }
    }

    #[test]
    fn faults_of_this_side_keep_their_detail() {
        let error = ApiError::from(InferError::Internal("secret".into()));
        assert_eq!((error.code, error.detail.as_deref()), (Code::Internal, Some("secret")));
        assert!(!error.message.contains("secret"));
    }

    #[test]
    fn retry_after_is_whole_seconds_rounded_up() {
        let error = ApiError::from(InferError::Overloaded { retry_after: Duration::from_millis(1500) });
        assert_eq!(error.into_response().headers()[header::RETRY_AFTER], "2");
    }
}
