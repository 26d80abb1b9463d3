//! What a server made of one request: data, whichever transport carried it.

use serde::{Deserialize, Serialize};

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Answered as asked.
    Ok,
    /// Overloaded or unavailable, to be tried again: 429 and 503, or their gRPC codes.
    Refused,
    /// The server gave up at its deadline: 504, or its gRPC code.
    Deadline,
    /// The server says that the request is wrong.
    ClientError,
    /// The server failed.
    ServerError,
    /// No connection, or a broken one.
    Transport,
    /// No answer within the client's timeout.
    Timeout,
}

impl Outcome {
    /// The server answered.
    pub fn is_answer(self) -> bool {
        !matches!(self, Self::Transport | Self::Timeout)
    }

    /// What an HTTP status means.
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

/// How a request ended, and what the server told of its own time.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// How it ended.
    pub outcome: Outcome,
    /// Phases of `server-timing`, milliseconds.
    pub phases: Vec<(String, f64)>,
}

impl Answer {
    /// No phases are known.
    pub fn without(outcome: Outcome) -> Self {
        Self { outcome, phases: Vec::new() }
    }
}
