//! What goes on on one connection: requests whose answers are not wholly written yet, and answers that wait for their
//! client.
//!
//! Bodies and their bytes carry a mark until they are written or dropped, so that the count is exact for HTTP/2 too, where a
//! body may have ended long before the client takes its bytes.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{Request, Response, Version};
use bytes::Buf;
use hyper::body::{Frame, SizeHint};
use tokio::time::Instant;

/// Shared by a connection's bytes, its requests and the task that watches over it.
#[derive(Debug, Default)]
pub(super) struct Activity {
    /// Requests that came.
    came: AtomicU64,
    /// Requests whose answers are not wholly written.
    open: AtomicUsize,
    /// How many requests had come when everything was written last.
    settled: AtomicU64,
    /// Bytes went out and were not flushed.
    unflushed: AtomicBool,
    /// Reads and writes that moved bytes.
    moves: AtomicU64,
    /// HTTP/2: only requests count as life, since its clients ping.
    multiplexed: AtomicBool,
    /// Pieces of HTTP/2 answers that wait for room at their client, by when they last got any.
    waiting: Mutex<HashMap<u64, Instant>>,
    /// Names pieces.
    pieces: AtomicU64,
}

impl Activity {
    /// Counts a request; it is open until the mark and its copies are gone.
    pub(super) fn request<B>(self: &Arc<Self>, request: &Request<B>) -> Mark {
        self.came.fetch_add(1, Ordering::AcqRel);
        self.open.fetch_add(1, Ordering::AcqRel);
        let multiplexed = request.version() == Version::HTTP_2;
        Mark(Arc::new(Stream { activity: self.clone(), multiplexed }))
    }

    /// Bytes came in or went out.
    pub(super) fn moved(&self) {
        self.moves.fetch_add(1, Ordering::Relaxed);
    }

    /// Bytes are about to go out.
    pub(super) fn writing(&self) {
        self.unflushed.store(true, Ordering::Release);
    }

    /// All bytes handed over so far are out.
    pub(super) fn flushed(&self) {
        self.unflushed.store(false, Ordering::Release);
        let came = self.came.load(Ordering::Acquire);
        if self.open.load(Ordering::Acquire) == 0 {
            self.settled.store(came, Ordering::Release);
        }
    }

    /// The connection turned out to be HTTP/2.
    pub(super) fn is_multiplexed(&self) {
        self.multiplexed.store(true, Ordering::Relaxed);
    }

    /// Every request that came is answered and written: what is written now, no request asked for.
    pub(super) fn settled(&self) -> bool {
        !self.unflushed.load(Ordering::Acquire)
            && self.open.load(Ordering::Acquire) == 0
            && self.settled.load(Ordering::Acquire) == self.came.load(Ordering::Acquire)
    }

    /// Resolves once nothing was under way for `grace` on end.
    pub(super) async fn idle(&self, grace: Duration) {
        let life = || {
            let moves = if self.multiplexed.load(Ordering::Relaxed) { 0 } else { self.moves.load(Ordering::Relaxed) };
            (self.came.load(Ordering::Acquire), moves)
        };
        let busy = || self.open.load(Ordering::Acquire) > 0 || self.unflushed.load(Ordering::Acquire);
        let step = grace / 10;
        let (mut seen, mut since) = (life(), Instant::now());
        while since.elapsed() < grace {
            tokio::time::sleep(step).await;
            if busy() || life() != seen {
                (seen, since) = (life(), Instant::now());
            }
        }
    }

    /// Resolves once a piece of an HTTP/2 answer has waited for `limit` without any of it being taken.
    pub(super) async fn stuck(&self, limit: Duration) {
        loop {
            let oldest = self.waiting().values().min().copied();
            let due = oldest.unwrap_or_else(Instant::now) + limit;
            if due <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, Instant>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Stream {
    activity: Arc<Activity>,
    multiplexed: bool,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.activity.open.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A request that is open as long as this lives.
#[derive(Debug, Clone)]
pub(super) struct Mark(Arc<Stream>);

impl Mark {
    /// Ties an answer to its request.
    pub(super) fn answer(self, response: Response<Body>) -> Response<Answer> {
        response.map(|body| Answer { body, mark: self })
    }
}

/// An answer's body.
#[derive(Debug)]
pub(super) struct Answer {
    body: Body,
    mark: Mark,
}

impl HttpBody for Answer {
    type Data = Piece;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Piece>, axum::Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        Poll::Ready(frame.map(|frame| frame.map(|frame| frame.map_data(|bytes| Piece::new(bytes, self.mark.clone())))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Bytes of an answer on their way out.
#[derive(Debug)]
pub(super) struct Piece {
    bytes: Bytes,
    mark: Mark,
    /// Its name among those that wait; none for HTTP/1, where the connection's own bytes tell.
    name: Option<u64>,
}

impl Piece {
    fn new(bytes: Bytes, mark: Mark) -> Self {
        let Mark(stream) = &mark;
        let name = stream.multiplexed.then(|| stream.activity.pieces.fetch_add(1, Ordering::Relaxed));
        let piece = Self { bytes, mark, name };
        piece.progress();
        piece
    }

    fn progress(&self) {
        if let Some(name) = self.name {
            self.mark.0.activity.waiting().insert(name, Instant::now());
        }
    }
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        self.progress();
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if let Some(name) = self.name {
            self.mark.0.activity.waiting().remove(&name);
        }
    }
}
