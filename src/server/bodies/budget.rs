//! The memory budget for request bodies, over all requests of both ports.
//!
//! The limit on one body can't bound their sum, as every connection may send one. Bytes are charged as they arrive, are
//! decompressed or converted, so that slow senders reserve nothing, and released when the request, or the message of a
//! stream, is answered. Knows nothing of what the bytes mean.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http_body::{Frame, SizeHint};

use super::super::accept::Accounted;
use super::super::status::{ApiError, Code};
use crate::metrics::Metrics;

/// The budget, and how much of it is left.
#[derive(Debug, Clone)]
pub(in crate::server) struct BodyBudget {
    left: Arc<AtomicUsize>,
    whole: usize,
    metrics: Arc<Metrics>,
}

impl BodyBudget {
    /// A budget of `bytes` for all bodies together.
    pub(in crate::server) fn new(bytes: usize, metrics: &Arc<Metrics>) -> Self {
        Self { left: Arc::new(AtomicUsize::new(bytes)), whole: bytes, metrics: metrics.clone() }
    }

    /// A charge of 0 bytes.
    pub(in crate::server) fn charge(&self) -> Charge {
        Charge { budget: self.clone(), bytes: 0 }
    }
}

/// Bytes charged to the budget; released on drop.
#[derive(Debug)]
pub(in crate::server) struct Charge {
    budget: BodyBudget,
    bytes: usize,
}

impl Charge {
    /// Charges `more` bytes, or returns the error that the budget is used up.
    pub(in crate::server) fn grow(&mut self, more: usize) -> Result<(), ApiError> {
        let less = |left: usize| left.checked_sub(more);
        self.budget.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, less).map_err(|_| no_room())?;
        self.bytes += more;
        self.budget.metrics.body_bytes.add(more as i64);
        Ok(())
    }

    /// A charge of 0 bytes to the same budget.
    pub(in crate::server) fn none(&self) -> Self {
        self.budget.charge()
    }

    /// Releases `less` of the charged bytes.
    pub(in crate::server) fn shrink(&mut self, less: usize) {
        let less = less.min(self.bytes);
        self.bytes -= less;
        self.budget.left.fetch_add(less, Ordering::AcqRel);
        self.budget.metrics.body_bytes.sub(less as i64);
    }

    /// Charges a response of about `bytes` bytes before it is made. A response larger than the whole budget is an
    /// invalid request, not an overload.
    pub(in crate::server) fn answer(&mut self, bytes: usize) -> Result<(), ApiError> {
        if bytes > self.budget.whole {
            let whole = self.budget.whole;
            let text = format!(
                "the answer would have some {bytes} bytes, which is more than the {whole} of --body-memory; ask for fewer classes or images"
            );
            return Err(ApiError::new(Code::InvalidRequest, text));
        }
        self.grow(bytes)
    }

    /// Whether `bytes` more could be charged now.
    pub(in crate::server) fn has_room(&self, bytes: usize) -> Result<(), ApiError> {
        if bytes <= self.budget.left.load(Ordering::Acquire) { Ok(()) } else { Err(no_room()) }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.shrink(self.bytes);
    }
}

fn no_room() -> ApiError {
    let mut error = ApiError::new(
        Code::Overloaded,
        "the bodies of all requests together take more memory than this server gives them (--body-memory), try again",
    );
    error.retry_after = Some(Duration::from_secs(1));
    error
}

/// A response body that stays charged until it is written.
pub(in crate::server) struct ChargedBody {
    body: Body,
    _charge: Charge,
}

impl ChargedBody {
    /// A response with `body`, which holds `charge`. Marked [`Accounted`] if anything is charged.
    pub(in crate::server) fn respond(body: Body, charge: Charge) -> Response {
        let is_charged = charge.bytes > 0;
        let mut response = Response::new(Body::new(Self { body, _charge: charge }));
        if is_charged {
            response.extensions_mut().insert(Accounted);
        }
        response
    }
}

impl http_body::Body for ChargedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_charged_comes_back() {
        let metrics = Arc::new(Metrics::new());
        let budget = BodyBudget::new(100, &metrics);
        let (mut a, mut b) = (budget.charge(), budget.charge());
        a.grow(60).expect("room");
        assert_eq!(b.grow(41).expect_err("no room").code, Code::Overloaded);
        assert!(b.has_room(40).is_ok() && b.has_room(41).is_err());
        b.grow(40).expect("room");
        a.shrink(1000);
        b.grow(60).expect("what a gave back");
        assert_eq!(metrics.body_bytes.get(), 100);
        drop((a, b));
        assert_eq!(metrics.body_bytes.get(), 0);
        assert!(budget.charge().grow(100).is_ok() && budget.charge().answer(100).is_ok());
        assert_eq!(budget.charge().answer(101).expect_err("never").code, Code::InvalidRequest);
    }
}
