//! The only table from an error to what a client sees: code, HTTP status, gRPC status and metric outcome, side by side.
//!
//! Text of a fault on our side is fixed; its detail goes to the log, once, with the request's id.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::infer::error::InferError;
use crate::infer::image::ImageError;
use crate::metrics::Outcome;

/// What a client can tell errors apart by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The request can't be understood.
    InvalidRequest,
    /// Bytes that are no image.
    InvalidImage,
    /// An image past the pixel limits.
    ImageTooLarge,
    /// A body past the byte limit.
    BodyTooLarge,
    /// A content type or image format that is not taken.
    UnsupportedMediaType,
    /// A model or version that is not served.
    ModelNotFound,
    /// No such path.
    NotFound,
    /// The path exists, for another method.
    MethodNotAllowed,
    /// The queue is full.
    Overloaded,
    /// The deadline passed.
    DeadlineExceeded,
    /// The server is stopping.
    ShuttingDown,
    /// The server or model is not ready.
    NotReady,
    /// A fault on our side.
    Internal,
}

impl Code {
    /// Every code, in declaration order.
    pub const ALL: [Self; 13] = [
        Self::InvalidRequest,
        Self::InvalidImage,
        Self::ImageTooLarge,
        Self::BodyTooLarge,
        Self::UnsupportedMediaType,
        Self::ModelNotFound,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::Overloaded,
        Self::DeadlineExceeded,
        Self::ShuttingDown,
        Self::NotReady,
        Self::Internal,
    ];

    /// The table: HTTP status, gRPC status number, outcome in the metrics.
    fn row(self) -> (StatusCode, i32, Outcome) {
        match self {
            Self::InvalidRequest => (StatusCode::BAD_REQUEST, 3, Outcome::InvalidRequest),
            Self::InvalidImage => (StatusCode::BAD_REQUEST, 3, Outcome::InvalidImage),
            Self::ImageTooLarge => (StatusCode::PAYLOAD_TOO_LARGE, 3, Outcome::ImageTooLarge),
            Self::BodyTooLarge => (StatusCode::PAYLOAD_TOO_LARGE, 3, Outcome::BodyTooLarge),
            Self::UnsupportedMediaType => (StatusCode::UNSUPPORTED_MEDIA_TYPE, 3, Outcome::UnsupportedMediaType),
            Self::ModelNotFound => (StatusCode::NOT_FOUND, 5, Outcome::ModelNotFound),
            Self::NotFound => (StatusCode::NOT_FOUND, 5, Outcome::NotFound),
            Self::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, 12, Outcome::MethodNotAllowed),
            Self::Overloaded => (StatusCode::TOO_MANY_REQUESTS, 8, Outcome::Overloaded),
            Self::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, 4, Outcome::DeadlineExceeded),
            Self::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, 14, Outcome::ShuttingDown),
            Self::NotReady => (StatusCode::SERVICE_UNAVAILABLE, 14, Outcome::NotReady),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, 13, Outcome::Internal),
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

    /// How it counts in the metrics.
    pub fn outcome(self) -> Outcome {
        self.row().2
    }

    /// Name on the wire, the same as in the metrics.
    pub fn name(self) -> &'static str {
        self.outcome().name()
    }
}

/// An error on its way to a client.
#[derive(Debug, Clone)]
pub struct ApiError {
    /// What kind.
    pub code: Code,
    /// What the client reads: what is wrong and what to do next.
    pub message: String,
    /// When to try again.
    pub retry_after: Option<Duration>,
    /// For the log only.
    pub detail: Option<String>,
}

impl ApiError {
    /// An error whose text the client may see.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after: None, detail: None }
    }

    /// A fault on our side: `detail` is for the log, the client gets a fixed text.
    pub fn internal(detail: impl Into<String>) -> Self {
        let message = "internal error; the server's log has the details under this x-request-id".into();
        Self { code: Code::Internal, message, retry_after: None, detail: Some(detail.into()) }
    }
}

impl From<InferError> for ApiError {
    fn from(error: InferError) -> Self {
        let code = match &error {
            InferError::Image(ImageError::Unsupported { .. }) => Code::UnsupportedMediaType,
            InferError::Image(ImageError::TooLarge { .. }) => Code::ImageTooLarge,
            InferError::Image(ImageError::Empty | ImageError::Invalid { .. }) => Code::InvalidImage,
            InferError::TooManyImages { .. } | InferError::ModelNotNamed { .. } => Code::InvalidRequest,
            InferError::Overloaded { .. } => Code::Overloaded,
            InferError::DeadlineExceeded => Code::DeadlineExceeded,
            InferError::ShuttingDown => Code::ShuttingDown,
            InferError::NotReady => Code::NotReady,
            InferError::ModelNotFound { .. } => Code::ModelNotFound,
            InferError::Internal(detail) => return Self::internal(detail.clone()),
        };
        let retry_after = match &error {
            InferError::Overloaded { retry_after } => Some(*retry_after),
            InferError::ShuttingDown | InferError::NotReady => Some(Duration::from_secs(1)),
            _ => None,
        };
        Self { code, message: error.to_string(), retry_after, detail: None }
    }
}

/// The body of every error.
#[derive(Serialize)]
struct Body<'a> {
    error: &'a str,
    code: &'static str,
}

/// What middleware reads off a failed response: the code for the metrics, the detail for the log.
#[derive(Debug, Clone)]
pub struct Failure {
    /// What kind.
    pub code: Code,
    /// For the log only.
    pub detail: Option<String>,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = Body { error: &self.message, code: self.code.name() };
        let mut response = (self.code.http(), axum::Json(body)).into_response();
        if let Some(after) = self.retry_after {
            let seconds = after.as_secs_f64().ceil().max(1.0) as u64;
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(Failure { code: self.code, detail: self.detail });
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The contract's table, by hand.
    #[test]
    fn codes_map_as_the_contract_says() {
        let table = Code::ALL.map(|c| (c.name(), c.http().as_u16(), c.grpc()));
        assert_eq!(
            table,
            [
                ("invalid_request", 400, 3),
                ("invalid_image", 400, 3),
                ("image_too_large", 413, 3),
                ("body_too_large", 413, 3),
                ("unsupported_media_type", 415, 3),
                ("model_not_found", 404, 5),
                ("not_found", 404, 5),
                ("method_not_allowed", 405, 12),
                ("overloaded", 429, 8),
                ("deadline_exceeded", 504, 4),
                ("shutting_down", 503, 14),
                ("not_ready", 503, 14),
                ("internal", 500, 13),
            ]
        );
    }

    #[test]
    fn the_engine_room_and_the_edge_count_alike() {
        use crate::infer::scheduler::outcome;
        let errors = [
            InferError::Image(ImageError::Empty),
            InferError::TooManyImages { images: 2, limit: 1 },
            InferError::Overloaded { retry_after: Duration::from_millis(1500) },
            InferError::DeadlineExceeded,
            InferError::ShuttingDown,
            InferError::NotReady,
            InferError::ModelNotFound { model: "x".into(), available: "y".into() },
            InferError::Internal("secret".into()),
        ];
        for error in errors {
            let counted = outcome(&error);
            let api = ApiError::from(error);
            assert_eq!(api.code.outcome(), counted);
            assert!(!api.message.contains("secret"));
        }
    }

    #[test]
    fn retry_after_is_whole_seconds_rounded_up() {
        let error = ApiError::from(InferError::Overloaded { retry_after: Duration::from_millis(1500) });
        assert_eq!(error.into_response().headers()[header::RETRY_AFTER], "2");
    }
}
