//! What happens on one connection: requests whose answers are not wholly written yet, answers that wait for their client,
//! and since when nothing useful happened.
//!
//! Bodies and their bytes carry a mark until they are written or dropped, so that the count is exact for HTTP/2 too, where a
//! body may have ended long before the client takes its bytes.

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

/// Shared by a connection's bytes, its requests and the task that watches over it.
#[derive(Debug)]
pub(super) struct Activity {
    /// When it was accepted.
    since: Instant,
    /// Requests that came.
    came: AtomicU64,
    /// Requests whose answers are not wholly written.
    open: AtomicUsize,
    /// Of these, those whose handlers wait for more of their bodies.
    starving: AtomicUsize,
    /// Milliseconds from the start to when something useful happened last: a request came, or a part of one, or a part of
    /// an answer was made or taken.
    useful: AtomicU64,
    /// Milliseconds from the start to when the last request was answered and written.
    idle: AtomicU64,
    /// How many requests had come when everything was written last.
    settled: AtomicU64,
    /// Bytes went out and were not flushed.
    unflushed: AtomicBool,
    /// Reads and writes that moved bytes.
    moves: AtomicU64,
    /// HTTP/2: only requests count as activity, since its clients ping.
    multiplexed: AtomicBool,
    /// The client may still be sending a body that will not be read.
    unread: AtomicBool,
    /// Pieces of HTTP/2 answers that wait for room at their client.
    waiting: Mutex<HashMap<u64, Waiting>>,
    /// Names pieces.
    pieces: AtomicU64,
    /// What is kept for it.
    held: held::Connection,
    /// The connection is evicted: another one needs the room.
    evicted: Notify,
    /// It keeps more than any other on a port that keeps too much: it ends at once.
    cut: Notify,
    is_cut: AtomicBool,
    /// It is about to end anyway.
    leaving: AtomicBool,
    /// Why it ends before its client wants to, if it does.
    ending: OnceLock<Ending>,
}

/// A piece of an answer that its client has not taken yet.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    since: Instant,
    /// When any of it was taken last.
    progress: Instant,
    taken: u64,
}

impl Waiting {
    fn due(&self, limit: Duration) -> Instant {
        due(self.since, self.progress, self.taken, limit)
    }
}

/// Until when a client must take more of its answer that has waited since `since`.
pub(super) fn due(since: Instant, progress: Instant, taken: u64, limit: Duration) -> Instant {
    let at_least_rate = since + limit + Duration::from_millis(taken * 1000 / LEAST_RATE);
    at_least_rate.min(progress + limit)
}

impl Activity {
    /// For a connection that was accepted just now on a port.
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

    /// Counts a request; it is open until the mark and its copies are gone.
    pub(super) fn request<B>(self: &Arc<Self>, request: &Request<B>) -> Mark {
        self.came.fetch_add(1, Ordering::AcqRel);
        self.open.fetch_add(1, Ordering::AcqRel);
        self.useful();
        let multiplexed = request.version() == Version::HTTP_2;
        Mark(Arc::new(Stream { activity: self.clone(), multiplexed }))
    }

    /// A part of a request or of an answer moved on.
    pub(super) fn useful(&self) {
        self.useful.store(self.now(), Ordering::Relaxed);
    }

    /// A handler waits for its client to send more, as long as what is returned lives.
    pub(super) fn starves(self: &Arc<Self>) -> Starving {
        self.starving.fetch_add(1, Ordering::AcqRel);
        Starving { _held: self.holds(held::REQUEST), activity: self.clone() }
    }

    /// `bytes` are kept for it, as long as what is returned lives.
    fn holds(self: &Arc<Self>, bytes: usize) -> Holding {
        self.held.add(bytes);
        Holding { activity: self.clone(), bytes }
    }

    /// Bytes that are kept for it; none: it is cut already.
    pub(super) fn held(&self) -> Option<usize> {
        (!self.is_cut.load(Ordering::Acquire)).then(|| self.held.bytes())
    }

    /// Ends the connection at once.
    pub(super) fn cut(&self) {
        self.is_cut.store(true, Ordering::Release);
        self.leaving.store(true, Ordering::Relaxed);
        self.cut.notify_one();
    }

    /// Resolves once the connection is to end at once.
    pub(super) async fn is_cut(&self) {
        self.cut.notified().await;
    }

    /// Bytes came in or went out.
    pub(super) fn moved(&self) {
        self.moves.fetch_add(1, Ordering::Relaxed);
    }

    /// Bytes are about to go out. Over HTTP/1, bytes that no request asked for say that a head can't be read.
    pub(super) fn writing(&self) {
        let unasked = !self.unflushed.swap(true, Ordering::AcqRel)
            && self.open.load(Ordering::Acquire) == 0
            && self.settled.load(Ordering::Acquire) == self.came.load(Ordering::Acquire);
        if unasked && !self.multiplexed.load(Ordering::Relaxed) {
            self.end_for(Ending::Unreadable);
            self.left_unread();
        }
    }

    /// All bytes handed over so far are out.
    pub(super) fn flushed(&self) {
        self.unflushed.store(false, Ordering::Release);
        let came = self.came.load(Ordering::Acquire);
        if self.open.load(Ordering::Acquire) == 0 && self.settled.swap(came, Ordering::AcqRel) != came {
            self.idle.store(self.now(), Ordering::Release);
            self.useful();
        }
    }

    /// The connection turned out to be HTTP/2.
    pub(super) fn is_multiplexed(&self) {
        self.multiplexed.store(true, Ordering::Relaxed);
    }

    /// Whether the client can be told that the connection ends: over HTTP/2, or between two requests.
    pub(super) fn can_be_told(&self) -> bool {
        self.multiplexed.load(Ordering::Relaxed) || self.came.load(Ordering::Acquire) > 0
    }

    /// A body was not read to its end: the client may still be sending it.
    pub(super) fn left_unread(&self) {
        self.unread.store(true, Ordering::Release);
    }

    /// Whether to read on for a moment after the last answer: closed before that, the client's system may drop it.
    pub(super) fn lingers(&self) -> bool {
        self.unread.load(Ordering::Acquire) && !self.multiplexed.load(Ordering::Relaxed)
    }

    /// Sets why the connection ends, unless that is known already.
    pub(super) fn end_for(&self, ending: Ending) {
        let _ = self.ending.set(ending);
    }

    /// Why the server ended it, if it did.
    pub(super) fn ending(&self) -> Option<Ending> {
        self.ending.get().copied()
    }

    /// How long nothing useful has happened; none: it is about to end.
    pub(super) fn quiet_for(&self) -> Option<Duration> {
        let quiet = self.now().saturating_sub(self.useful.load(Ordering::Relaxed));
        (!self.leaving.load(Ordering::Relaxed)).then(|| Duration::from_millis(quiet))
    }

    /// Whether a request is being answered and has all that it waits for from its client.
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

    /// Which limit a connection without an open request has passed.
    pub(super) fn out_of_time(&self) -> Ending {
        if self.came.load(Ordering::Acquire) > 0 { Ending::Idle } else { Ending::HeadTimeout }
    }

    /// Resolves once no request was open for `limit`, or the first has not come for that long.
    pub(super) async fn overstays(&self, limit: Duration) -> Ending {
        loop {
            // over HTTP/2, an answer that waits for its client is open, and what else is written says nothing
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

    /// Whether it speaks HTTP/2.
    pub(super) fn speaks_http2(&self) -> bool {
        self.multiplexed.load(Ordering::Relaxed)
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

    /// Resolves once a piece of an HTTP/2 answer has waited for `limit` without any of it being taken, or is taken at less
    /// than the least rate.
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

/// A handler that waits for its client.
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

/// Bytes that are kept for a connection.
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

/// Of an answer: its bytes are charged or shared, so that the connection does not keep them.
#[derive(Debug, Clone, Copy)]
pub(in crate::server) struct Accounted;

/// A request that is open as long as this lives.
#[derive(Debug, Clone)]
pub(super) struct Mark(Arc<Stream>);

impl Mark {
    /// Ties an answer to its request.
    pub(super) fn answer(self, response: Response<Body>) -> Response<Answer> {
        let Self(stream) = &self;
        let accounted = response.extensions().get::<Accounted>().is_some();
        // one without an end in sight waits for what the server or the client has to say
        let is_stream = response.body().size_hint().exact().is_none();
        let held = (stream.multiplexed && is_stream).then(|| stream.activity.holds(held::ANSWER));
        response.map(|body| Answer { body, mark: self, accounted, _held: held })
    }
}

/// An answer's body.
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

/// Bytes of an answer on their way out.
#[derive(Debug)]
pub(super) struct Piece {
    bytes: Bytes,
    mark: Mark,
    /// Its name among those that wait; none for HTTP/1, where the connection's own bytes tell.
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
