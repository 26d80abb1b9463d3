//! Reads the messages of a call: gRPC's length-prefixed framing, with each message limited, charged and decompressed by
//! itself.
//!
//! A message's charge is released when its owner drops it, so that a long stream uses no more memory than a short one.

use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::Request;
use axum::http::header;
use bytes::{Buf as _, Bytes};
use http_body_util::BodyExt as _;

use super::super::access::REQUEST_ID;
use super::super::bodies::Bodies;
use super::super::bodies::coding::Coding;
use super::super::bodies::intake::{Held, Intake};
use super::super::bodies::threads::too_late;
use super::super::bodies::too_large;
use super::super::status::{ApiError, Code};

/// Bytes before each message: the compressed flag and the length.
pub(super) const HEAD: usize = 5;

/// The messages of one call.
pub(super) struct Messages {
    bodies: Bodies,
    /// Longest that a message may take from its first byte to its last.
    timeout: Duration,
    coding: Coding,
    body: Body,
    /// Bytes received that belong to no message yet: at most one HTTP/2 DATA frame.
    rest: Bytes,
}

impl Messages {
    /// The messages of `request`, each of at most `bodies.limit` bytes.
    pub(super) fn new(bodies: Bodies, timeout: Duration, request: Request) -> Result<Self, ApiError> {
        let coding = Coding::of_messages(request.headers())?;
        Ok(Self { bodies, timeout, coding, body: request.into_body(), rest: Bytes::new() })
    }

    /// The request for the generated services, with its messages replaced by `with` (uncompressed). The headers that
    /// they need are copied: a slice would keep the whole head in memory until the call ends.
    pub(super) fn replace(
        bodies: Bodies,
        timeout: Duration,
        request: Request,
        with: impl FnOnce(Self) -> Body,
    ) -> Result<Request, ApiError> {
        let coding = Coding::of_messages(request.headers())?;
        let (head, body) = request.into_parts();
        let unreadable =
            |e: axum::http::Error| ApiError::new(Code::InvalidRequest, format!("the head can't be read: {e}"));
        let mut short = Request::builder().method(&head.method).version(head.version).uri(head.uri.path());
        for name in [header::CONTENT_TYPE, header::TE, REQUEST_ID] {
            if let Some(value) = head.headers.get(&name) {
                short = short.header(name, value.as_bytes());
            }
        }
        let messages = Self { bodies, timeout, coding, body, rest: Bytes::new() };
        short.body(with(messages)).map_err(unreadable)
    }

    /// Waits for the first byte of the next message, until `until` at the latest; `false` at the end of the call.
    /// Cancel safe.
    pub(super) async fn arrives(&mut self, until: Option<Instant>) -> Result<bool, ApiError> {
        while self.rest.is_empty() {
            let frame = self.body.frame();
            let frame = match until {
                Some(until) => tokio::time::timeout_at(until.into(), frame).await.map_err(|_| too_late())?,
                None => frame.await,
            };
            match frame {
                None => return Ok(false),
                Some(Err(error)) => {
                    return Err(ApiError::new(Code::InvalidRequest, format!("the call can't be read: {error}")));
                }
                Some(Ok(frame)) => self.rest = frame.into_data().unwrap_or_default(),
            }
        }
        Ok(true)
    }

    /// Reads the next message, decompressed, by `until` and within the timeout.
    pub(super) async fn read(&mut self, until: Option<Instant>) -> Result<Held, ApiError> {
        let latest = Instant::now() + self.timeout;
        let until = until.map_or(latest, |until| until.min(latest));
        let mut head = [0; HEAD];
        let mut filled = 0;
        while filled < HEAD {
            self.more(until).await?;
            let length = self.rest.len().min(HEAD - filled);
            self.rest.copy_to_slice(&mut head[filled..filled + length]);
            filled += length;
        }
        let [flag, length @ ..] = head;
        let length = u32::from_be_bytes(length) as usize;
        let coding = match (flag, self.coding) {
            (0, _) => Coding::Identity,
            (1, Coding::Identity) => {
                let text = "a message is flagged as compressed, but the call has no `grpc-encoding`";
                return Err(ApiError::new(Code::InvalidRequest, text));
            }
            (1, coding) => coding,
            (flag, _) => {
                let text = format!("a message begins with {flag}; 0 (plain) or 1 (compressed) is due");
                return Err(ApiError::new(Code::InvalidRequest, text));
            }
        };
        if length > self.bodies.limit {
            return Err(too_large());
        }
        let bodies = self.bodies.clone();
        let mut intake = Intake::new(&bodies, coding, until);
        let mut left = length;
        while left > 0 {
            self.more(until).await?;
            let piece = self.rest.split_to(left.min(self.rest.len()));
            left -= piece.len();
            intake.push(&piece).await?;
        }
        intake.finish().await
    }

    /// Waits for at least one more byte of the current message.
    async fn more(&mut self, until: Instant) -> Result<(), ApiError> {
        if self.arrives(Some(until)).await? {
            return Ok(());
        }
        Err(ApiError::new(Code::InvalidRequest, "the call ends within a message"))
    }

    /// The only message of a unary call, by `until`.
    pub(super) async fn only(&mut self, until: Instant) -> Result<Held, ApiError> {
        let due = |found| ApiError::new(Code::InvalidRequest, format!("the call holds {found}; one is due"));
        if !self.arrives(Some(until)).await? {
            return Err(due("no message"));
        }
        let message = self.read(Some(until)).await?;
        if self.arrives(Some(until)).await? { Err(due("more than one message")) } else { Ok(message) }
    }
}

/// A message with its length prefix, uncompressed.
pub(super) fn framed(message: &impl prost::Message) -> Bytes {
    let length = message.encoded_len();
    let mut frame = Vec::with_capacity(HEAD + length);
    frame.push(0);
    // responses are far smaller than 4 GiB: they are charged before they are made
    frame.extend((length as u32).to_be_bytes());
    // encoding into a vector can't run out of room
    let _ = message.encode(&mut frame);
    frame.into()
}

/// An encoded message with its length prefix, uncompressed.
pub(super) fn reframed(message: &[u8]) -> Bytes {
    let mut frame = Vec::with_capacity(HEAD + message.len());
    frame.push(0);
    frame.extend((message.len() as u32).to_be_bytes());
    frame.extend_from_slice(message);
    frame.into()
}
