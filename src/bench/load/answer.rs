//! Response of a server to one request, independent of the transport.

use serde::{Deserialize, Serialize};

/// Outcome of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// A successful response.
    Ok,
    /// Overloaded or unavailable, to be retried: HTTP 429 and 503, or their gRPC codes.
    Refused,
    /// The server's deadline passed: HTTP 504, or its gRPC code.
    Deadline,
    /// The server says that the request is invalid.
    ClientError,
    /// An error of the server.
    ServerError,
    /// No connection, or a broken one.
    Transport,
    /// No response within the client's timeout.
    Timeout,
}

impl Outcome {
    /// Whether the server responded.
    pub fn is_answer(self) -> bool {
        !matches!(self, Self::Transport | Self::Timeout)
    }

    /// The outcome for an HTTP status.
    pub fn of_http(status: u16) -> Self {
        match status {
            200..300 => Self::Ok,
            429 | 503 => Self::Refused,
            504 => Self::Deadline,
            400..500 => Self::ClientError,
            _ => Self::ServerError,
        }
    }
}

/// Outcome of a request, and the server's own timings.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Outcome.
    pub outcome: Outcome,
    /// Phases of the `Server-Timing` header, in milliseconds.
    pub phases: Vec<(String, f64)>,
}

impl Answer {
    /// A response without timings.
    pub fn without(outcome: Outcome) -> Self {
        Self { outcome, phases: Vec::new() }
    }
}
