//! Receives a body or a message: its bytes are limited, charged and decompressed as they arrive.

use std::time::Instant;

use axum::body::HttpBody as _;
use axum::extract::Request;
use bytes::Bytes;
use http_body_util::BodyExt as _;

use super::super::status::{ApiError, Code};
use super::budget::Charge;
use super::coding::Coding;
use super::inflate::Inflater;
use super::threads::too_late;
use super::{Bodies, too_large};

/// Compressed bytes that are gathered before they are decompressed.
const GATHER: usize = 256 * 1024;

/// A complete body, and the charge for it while it is held.
#[derive(Debug)]
pub(in crate::server) struct Held {
    pub(in crate::server) bytes: Bytes,
    pub(in crate::server) charge: Charge,
}

/// A body that is being received.
pub(in crate::server) struct Intake<'a> {
    bodies: &'a Bodies,
    deadline: Instant,
    /// Bytes received: plain, or compressed and not decompressed yet.
    gathered: Vec<u8>,
    charge: Charge,
    /// `None` if the body is not compressed, or while a thread decompresses.
    inflater: Option<Inflater>,
}

impl<'a> Intake<'a> {
    /// Nothing received yet.
    pub(in crate::server) fn new(bodies: &'a Bodies, coding: Coding, deadline: Instant) -> Self {
        let charge = || bodies.budget.charge();
        let inflater = match coding {
            Coding::Identity => None,
            Coding::Gzip => Some(Inflater::gzip(bodies.limit, charge())),
            Coding::Deflate => Some(Inflater::zlib(bodies.limit, charge())),
        };
        Self { bodies, deadline, gathered: Vec::new(), charge: charge(), inflater }
    }

    /// Adds the next bytes.
    pub(in crate::server) async fn push(&mut self, bytes: &[u8]) -> Result<(), ApiError> {
        if bytes.len() > self.bodies.limit.saturating_sub(self.gathered.len()) {
            return Err(too_large());
        }
        self.charge.grow(bytes.len())?;
        self.gathered.extend_from_slice(bytes);
        if self.inflater.is_some() && self.gathered.len() >= GATHER { self.inflate().await } else { Ok(()) }
    }

    async fn inflate(&mut self) -> Result<(), ApiError> {
        let Some(mut inflater) = self.inflater.take() else { return Ok(()) };
        let gathered = std::mem::take(&mut self.gathered);
        let work = move || inflater.push(&gathered).map(|()| inflater);
        // always on a thread: a few compressed bytes may become many
        self.inflater = Some(self.bodies.threads.run(usize::MAX, self.deadline, work).await?);
        self.charge.shrink(usize::MAX);
        Ok(())
    }

    /// The complete body, decompressed.
    pub(in crate::server) async fn finish(mut self) -> Result<Held, ApiError> {
        if !self.gathered.is_empty() {
            self.inflate().await?;
        }
        match self.inflater {
            Some(inflater) => {
                let (bytes, charge) = inflater.finish()?;
                Ok(Held { bytes: bytes.into(), charge })
            }
            None => Ok(Held { bytes: self.gathered.into(), charge: self.charge }),
        }
    }
}

/// Receives a request's body, decompressed, by `deadline`.
pub(in crate::server) async fn whole(bodies: &Bodies, request: Request, deadline: Instant) -> Result<Held, ApiError> {
    let coding = Coding::of_body(request.headers())?;
    let mut body = request.into_body();
    let mut intake = Intake::new(bodies, coding, deadline);
    // refuse a body that is known to be too large before it is sent
    let least = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    if least > bodies.limit {
        return Err(too_large());
    }
    intake.charge.has_room(least)?;
    loop {
        let frame = tokio::time::timeout_at(deadline.into(), body.frame()).await;
        let Some(frame) = frame.map_err(|_| too_late())? else { break };
        let frame = frame.map_err(|e| ApiError::new(Code::InvalidRequest, format!("the body can't be read: {e}")))?;
        if let Some(bytes) = frame.data_ref() {
            intake.push(bytes).await?;
        }
    }
    intake.finish().await
}
