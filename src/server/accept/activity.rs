//! What happens on one connection: open requests, responses that wait for their client, and how long the connection has
//! been quiet.
//!
//! Response bodies and their chunks keep their request open until they are written or dropped, so that the count is
//! exact for HTTP/2 too, where a body may end long before the client reads it.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{Request, Response, Version};
use bytes::Buf;
use hyper::body::{Frame, SizeHint};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::{LEAST_RATE, held};
pub(super) use crate::metrics::Ending;

/// The state of a connection, shared by its byte stream, its requests and the task that watches it.
#[derive(Debug)]
pub(super) struct Activity {
    /// When the connection was accepted.
    since: Instant,
    /// Requests received.
    came: AtomicU64,
    /// Requests whose responses are not fully written.
    open: AtomicUsize,
    /// Open requests whose handlers wait for more of the body.
    starving: AtomicUsize,
    /// Milliseconds from `since` to the last progress: a request or part of one arrived, or part of a response was made
    /// or written.
    useful: AtomicU64,
    /// Milliseconds from `since` to when the last request was answered and written.
    idle: AtomicU64,
    /// `came` when everything was last written.
    settled: AtomicU64,
    /// Bytes were written and not flushed.
    unflushed: AtomicBool,
    /// Reads and writes that moved bytes.
    moves: AtomicU64,
    /// HTTP/2: only requests count as activity, since clients send PING frames.
    multiplexed: AtomicBool,
    /// The client may still be sending a body that will not be read.
    unread: AtomicBool,
    /// Chunks of HTTP/2 responses that wait for flow-control window.
    waiting: Mutex<HashMap<u64, Waiting>>,
    /// The id of the next chunk.
    pieces: AtomicU64,
    /// Memory kept for the connection.
    held: held::Connection,
    /// Signals that the connection is evicted to free its permit.
    evicted: Notify,
    /// Signals that the connection ends at once: it keeps the most memory on a port that is over its limit.
    cut: Notify,
    is_cut: AtomicBool,
    /// The connection was evicted or cut, and is about to end.
    leaving: AtomicBool,
    /// Why the server ends the connection, if it does.
    ending: OnceLock<Ending>,
}

/// A chunk of a response that its client has not fully read.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    since: Instant,
    /// When the client last read some of it.
    progress: Instant,
    taken: u64,
}

impl Waiting {
    fn due(&self, limit: Duration) -> Instant {
        due(self.since, self.progress, self.taken, limit)
    }
}

/// By when a client must read more of a response that has been pending since `since`.
pub(super) fn due(since: Instant, progress: Instant, taken: u64, limit: Duration) -> Instant {
    let at_least_rate = since + limit + Duration::from_millis(taken * 1000 / LEAST_RATE);
    at_least_rate.min(progress + limit)
}

impl Activity {
    /// The state of a connection just accepted on `port`.
    pub(super) fn new(port: Arc<held::Port>) -> Self {
        Self {
            since: Instant::now(),
            came: AtomicU64::new(0),
            open: AtomicUsize::new(0),
            starving: AtomicUsize::new(0),
            useful: AtomicU64::new(0),
            idle: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            unflushed: AtomicBool::new(false),
            moves: AtomicU64::new(0),
            multiplexed: AtomicBool::new(false),
            unread: AtomicBool::new(false),
            waiting: Mutex::default(),
            pieces: AtomicU64::new(0),
            held: held::Connection::new(port),
            evicted: Notify::new(),
            cut: Notify::new(),
            is_cut: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            ending: OnceLock::new(),
        }
    }

    fn now(&self) -> u64 {
        self.since.elapsed().as_millis() as u64
    }

    /// Counts a request, which is open until the mark and its copies are dropped.
    pub(super) fn request<B>(self: &Arc<Self>, request: &Request<B>) -> Mark {
        self.came.fetch_add(1, Ordering::AcqRel);
        self.open.fetch_add(1, Ordering::AcqRel);
        self.useful();
        let multiplexed = request.version() == Version::HTTP_2;
        Mark(Arc::new(Stream { activity: self.clone(), multiplexed }))
    }

    /// Records that part of a request or response made progress.
    pub(super) fn useful(&self) {
        self.useful.store(self.now(), Ordering::Relaxed);
    }

    /// Records that a handler waits for the client, until the guard is dropped.
    pub(super) fn starves(self: &Arc<Self>) -> Starving {
        self.starving.fetch_add(1, Ordering::AcqRel);
        Starving { _held: self.holds(held::REQUEST), activity: self.clone() }
    }

    /// Counts `bytes` as kept for the connection, until the guard is dropped.
    fn holds(self: &Arc<Self>, bytes: usize) -> Holding {
        self.held.add(bytes);
        Holding { activity: self.clone(), bytes }
    }

    /// Bytes kept for the connection; `None` if it was cut already.
    pub(super) fn held(&self) -> Option<usize> {
        (!self.is_cut.load(Ordering::Acquire)).then(|| self.held.bytes())
    }

    /// Ends the connection at once.
    pub(super) fn cut(&self) {
        self.is_cut.store(true, Ordering::Release);
        self.leaving.store(true, Ordering::Relaxed);
        self.cut.notify_one();
    }

    /// Resolves once the connection is cut.
    pub(super) async fn is_cut(&self) {
        self.cut.notified().await;
    }

    /// Records that bytes were received or sent.
    pub(super) fn moved(&self) {
        self.moves.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that bytes are about to be written. Over HTTP/1, bytes that answer no request are hyper's refusal of an
    /// unreadable head.
    pub(super) fn writing(&self) {
        let unasked = !self.unflushed.swap(true, Ordering::AcqRel)
            && self.open.load(Ordering::Acquire) == 0
            && self.settled.load(Ordering::Acquire) == self.came.load(Ordering::Acquire);
        if unasked && !self.multiplexed.load(Ordering::Relaxed) {
            self.end_for(Ending::Unreadable);
            self.left_unread();
        }
    }

    /// Records that everything written so far was flushed.
    pub(super) fn flushed(&self) {
        self.unflushed.store(false, Ordering::Release);
        let came = self.came.load(Ordering::Acquire);
        if self.open.load(Ordering::Acquire) == 0 && self.settled.swap(came, Ordering::AcqRel) != came {
            self.idle.store(self.now(), Ordering::Release);
            self.useful();
        }
    }

    /// Records that the connection speaks HTTP/2.
    pub(super) fn is_multiplexed(&self) {
        self.multiplexed.store(true, Ordering::Relaxed);
    }

    /// Whether the client can be told that the connection ends: over HTTP/2, or after a request.
    pub(super) fn can_be_told(&self) -> bool {
        self.multiplexed.load(Ordering::Relaxed) || self.came.load(Ordering::Acquire) > 0
    }

    /// Records that a body was not read to its end: the client may still be sending it.
    pub(super) fn left_unread(&self) {
        self.unread.store(true, Ordering::Release);
    }

    /// Whether to keep reading briefly after the last response: closing earlier could reset the connection before the
    /// client reads it.
    pub(super) fn lingers(&self) -> bool {
        self.unread.load(Ordering::Acquire) && !self.multiplexed.load(Ordering::Relaxed)
    }

    /// Sets why the connection ends, unless that is set already.
    pub(super) fn end_for(&self, ending: Ending) {
        let _ = self.ending.set(ending);
    }

    /// Why the server ended the connection, if it did.
    pub(super) fn ending(&self) -> Option<Ending> {
        self.ending.get().copied()
    }

    /// How long nothing has made progress; `None` if the connection is about to end.
    pub(super) fn quiet_for(&self) -> Option<Duration> {
        let quiet = self.now().saturating_sub(self.useful.load(Ordering::Relaxed));
        (!self.leaving.load(Ordering::Relaxed)).then(|| Duration::from_millis(quiet))
    }

    /// Whether some request is in work, and waits neither for its client to send nor to read.
    pub(super) fn works(&self) -> bool {
        let waiting = self.starving.load(Ordering::Acquire) + usize::from(!self.waiting().is_empty());
        self.open.load(Ordering::Acquire) > waiting && !self.unflushed.load(Ordering::Acquire)
    }

    /// Evicts the connection.
    pub(super) fn evict(&self) {
        self.leaving.store(true, Ordering::Relaxed);
        self.evicted.notify_one();
    }

    /// Resolves once the connection is evicted.
    pub(super) async fn evicted(&self) {
        self.evicted.notified().await;
    }

    /// Which limit a connection without an open request has exceeded.
    pub(super) fn out_of_time(&self) -> Ending {
        if self.came.load(Ordering::Acquire) > 0 { Ending::Idle } else { Ending::HeadTimeout }
    }

    /// Resolves once no request was open for `limit`, or the first did not arrive in that time.
    pub(super) async fn overstays(&self, limit: Duration) -> Ending {
        loop {
            // over HTTP/2, a response that waits for its client counts as open; other unflushed bytes may be control
            // frames
            let writing = self.unflushed.load(Ordering::Acquire) && !self.multiplexed.load(Ordering::Relaxed);
            let open = writing || self.open.load(Ordering::Acquire) > 0;
            let idle_since = self.since + Duration::from_millis(self.idle.load(Ordering::Acquire));
            let due = if open { Instant::now() } else { idle_since } + limit;
            if due <= Instant::now() {
                return self.out_of_time();
            }
            tokio::time::sleep_until(due).await;
        }
    }

    /// Whether the connection speaks HTTP/2.
    pub(super) fn speaks_http2(&self) -> bool {
        self.multiplexed.load(Ordering::Relaxed)
    }

    /// Resolves once the connection was idle for all of `grace`.
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

    /// Resolves once a chunk of an HTTP/2 response has waited for `limit` without progress, or is read at less than the
    /// least rate.
    pub(super) async fn stuck(&self, limit: Duration) {
        loop {
            let oldest = self.waiting().values().map(|piece| piece.due(limit)).min();
            let due = oldest.unwrap_or_else(|| Instant::now() + limit);
            if due <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, Waiting>> {
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
        self.activity.idle.store(self.activity.now(), Ordering::Release);
        self.activity.useful();
    }
}

/// Guard: a handler waits for its client.
#[derive(Debug)]
pub(super) struct Starving {
    activity: Arc<Activity>,
    _held: Holding,
}

impl Drop for Starving {
    fn drop(&mut self) {
        self.activity.starving.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Guard: bytes kept for a connection.
#[derive(Debug)]
struct Holding {
    activity: Arc<Activity>,
    bytes: usize,
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.activity.held.sub(self.bytes);
    }
}

/// Marks a response whose bytes are charged to the budget or shared, so that they don't count for the connection.
#[derive(Debug, Clone, Copy)]
pub(in crate::server) struct Accounted;

/// Keeps a request open until it is dropped.
#[derive(Debug, Clone)]
pub(super) struct Mark(Arc<Stream>);

impl Mark {
    /// The response, which keeps its request open until it is written or dropped.
    pub(super) fn answer(self, response: Response<Body>) -> Response<Answer> {
        let Self(stream) = &self;
        let accounted = response.extensions().get::<Accounted>().is_some();
        // a stream may be idle for as long as the client sends nothing
        let is_stream = response.body().size_hint().exact().is_none();
        let held = (stream.multiplexed && is_stream).then(|| stream.activity.holds(held::ANSWER));
        response.map(|body| Answer { body, mark: self, accounted, _held: held })
    }
}

/// The body of a response.
#[derive(Debug)]
pub(super) struct Answer {
    body: Body,
    mark: Mark,
    accounted: bool,
    _held: Option<Holding>,
}

impl HttpBody for Answer {
    type Data = Piece;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Piece>, axum::Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        let piece = |bytes| Piece::new(bytes, self.mark.clone(), self.accounted);
        Poll::Ready(frame.map(|frame| frame.map(|frame| frame.map_data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A chunk of a response on its way out.
#[derive(Debug)]
pub(super) struct Piece {
    bytes: Bytes,
    mark: Mark,
    /// The chunk's id among those that wait; `None` for HTTP/1, where the connection's byte stream is timed instead.
    name: Option<u64>,
    _held: Option<Holding>,
}

impl Piece {
    fn new(bytes: Bytes, mark: Mark, accounted: bool) -> Self {
        let Mark(stream) = &mark;
        let name = stream.multiplexed.then(|| stream.activity.pieces.fetch_add(1, Ordering::Relaxed));
        let kept = held::ANSWER + if accounted { 0 } else { bytes.len() };
        let held = stream.multiplexed.then(|| stream.activity.holds(kept));
        let piece = Self { bytes, mark, name, _held: held };
        piece.progress(0);
        piece
    }

    fn progress(&self, taken: usize) {
        let activity = &self.mark.0.activity;
        activity.useful();
        if let Some(name) = self.name {
            let now = Instant::now();
            let mut waiting = activity.waiting();
            let piece = waiting.entry(name).or_insert(Waiting { since: now, progress: now, taken: 0 });
            piece.progress = now;
            piece.taken += taken as u64;
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
        self.progress(count);
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if let Some(name) = self.name {
            self.mark.0.activity.waiting().remove(&name);
        }
    }
}
