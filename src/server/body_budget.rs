//! How many bytes of request bodies may be in memory at once, over all requests of both ports.
//!
//! The limit on one body can't bound their sum: every connection may send one. Bytes are counted as they arrive, so that
//! slow senders reserve nothing, and given back when the request is answered. Knows nothing of what the bytes mean.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::status::{ApiError, Code};
use crate::metrics::Metrics;

/// The bytes that are left, and the limit on one body, which is others' to enforce.
#[derive(Debug, Clone)]
pub(super) struct BodyBudget {
    left: Arc<Semaphore>,
    body_limit: usize,
    metrics: Arc<Metrics>,
}

impl BodyBudget {
    /// `bytes` for all bodies together, at least one of `body_limit`.
    pub(super) fn new(bytes: usize, body_limit: usize, metrics: &Arc<Metrics>) -> Self {
        let bytes = bytes.max(body_limit).min(Semaphore::MAX_PERMITS);
        Self { left: Arc::new(Semaphore::new(bytes)), body_limit, metrics: metrics.clone() }
    }
}

/// The layer: a body that no longer fits ends its request with `overloaded`.
pub(super) async fn hold(State(budget): State<BodyBudget>, request: Request, next: Next) -> Response {
    let grpc =
        request.headers().get(header::CONTENT_TYPE).is_some_and(|t| t.as_bytes().starts_with(b"application/grpc"));
    let least = usize::try_from(request.body().size_hint().lower()).unwrap_or(usize::MAX);
    if least <= budget.body_limit && least > budget.left.available_permits() {
        return refuse(grpc);
    }
    let share = Arc::new(Share { left: budget.left, metrics: budget.metrics, held: Mutex::default() });
    let counted = share.clone();
    let request = request.map(|body| Body::new(Counted { body, share: counted }));
    let response = next.run(request).await;
    // what was read by then makes no difference: whoever read it has seen a broken body
    if share.held().refused { refuse(grpc) } else { response }
}

fn refuse(grpc: bool) -> Response {
    let mut error = ApiError::new(
        Code::Overloaded,
        "the bodies of all requests together take more memory than this server gives them (--body-memory), try again",
    );
    error.retry_after = Some(Duration::from_secs(1));
    if grpc { error.into_status().into_http() } else { error.into_response() }
}

/// What one request has taken.
#[derive(Debug)]
struct Share {
    left: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    bytes: Option<OwnedSemaphorePermit>,
    refused: bool,
}

impl Share {
    fn held(&self) -> std::sync::MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts `bytes` more, or says that there is no room.
    fn take(&self, bytes: usize) -> bool {
        let more = u32::try_from(bytes).ok().and_then(|n| self.left.clone().try_acquire_many_owned(n).ok());
        let mut held = self.held();
        self.metrics.body_bytes.add(if more.is_some() { bytes as i64 } else { 0 });
        match (more, held.bytes.as_mut()) {
            (Some(more), Some(all)) => all.merge(more),
            (Some(more), None) => held.bytes = Some(more),
            (None, _) => held.refused = true,
        }
        !held.refused
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let bytes = self.held().bytes.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        self.metrics.body_bytes.sub(bytes as i64);
    }
}

/// A body whose bytes are counted.
struct Counted {
    body: Body,
    share: Arc<Share>,
}

#[derive(Debug, thiserror::Error)]
#[error("there is no memory for this body at the moment")]
struct NoRoom;

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let bytes = frame.as_ref().and_then(|f| f.as_ref().ok()).and_then(Frame::data_ref).map_or(0, Bytes::len);
        Poll::Ready(if self.share.take(bytes) { frame } else { Some(Err(axum::Error::new(NoRoom))) })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
