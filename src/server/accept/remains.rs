//! Bodies of requests: how fast they come, and what becomes of a body that was not read to its end.
//!
//! A client that is still sending when its answer comes may never see it: HTTP/1 clients write first and meet a closed
//! connection, and curl, Node and httpx trip over the end of an HTTP/2 stream that they still write to. So what a handler
//! leaves unread is read and thrown away, within bounds, before the answer goes out.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{Request, header};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep};

use super::activity::{Activity, Ending, Starving};
use super::{LEAST_RATE, Limits};

/// Most bytes of an unread body that are thrown away before its request is answered.
const THROWN_AWAY: usize = 64 << 20;
/// Longest that takes.
const THROWING_AWAY: Duration = Duration::from_secs(10);
/// Longest of that without a byte: the client may be waiting for its answer.
const PAUSE: Duration = Duration::from_secs(1);
/// Longest a stream may be without a message under way.
const SILENT_STREAM: Duration = Duration::from_secs(300);

/// What a handler left of a request's body.
#[derive(Debug)]
pub(super) struct Remains {
    left: Slot,
    activity: Arc<Activity>,
}

/// Where a body goes that was dropped before its end.
type Slot = Arc<Mutex<Option<Incoming>>>;

/// The request with a body that is watched over, and what will be left of it.
pub(super) fn watch(
    request: Request<Incoming>,
    activity: &Arc<Activity>,
    limits: &Limits,
) -> (Request<Body>, Option<Remains>) {
    if request.body().is_end_stream() {
        return (request.map(Body::new), None);
    }
    let left = Slot::default();
    let streams = (limits.is_stream)(&request);
    // asked for the first time, such a body would be sent only to be thrown away
    let unasked = request.headers().contains_key(header::EXPECT);
    let clock = Clock {
        patience: limits.head_timeout,
        framing: streams.then(Framing::default),
        spent: Duration::ZERO,
        bytes: 0,
        waiting: None,
        alarm: None,
    };
    let keep = !streams;
    let watched = |body| Watched {
        body: Some(body),
        left: keep.then(|| left.clone()),
        unasked,
        activity: activity.clone(),
        starving: None,
        clock,
    };
    (request.map(|body| Body::new(watched(body))), Some(Remains { left, activity: activity.clone() }))
}

impl Remains {
    /// Reads to the body's end, within the bounds.
    pub(super) async fn throw_away(self) {
        let Some(mut body) = self.left.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        // its answer waits for the client
        let _starving = self.activity.starves();
        let deadline = Instant::now() + THROWING_AWAY;
        let mut left = THROWN_AWAY;
        if body.size_hint().lower() <= THROWN_AWAY as u64 {
            while left > 0 {
                let pause = deadline.min(Instant::now() + PAUSE);
                let next = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx));
                match tokio::time::timeout_at(pause, next).await {
                    Ok(Some(Ok(frame))) => left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len)),
                    Ok(None) => return,
                    Ok(Some(Err(_))) | Err(_) => break,
                }
                self.activity.useful();
            }
        }
        self.activity.left_unread();
    }
}

/// A body on its way to a handler.
#[derive(Debug)]
struct Watched {
    /// Until dropped.
    body: Option<Incoming>,
    /// Nowhere, once there is nothing left to throw away.
    left: Option<Slot>,
    /// The client waits to be told that it may send.
    unasked: bool,
    activity: Arc<Activity>,
    /// While the handler waits.
    starving: Option<Starving>,
    clock: Clock,
}

/// How long the client let itself be waited for, against what it sent.
#[derive(Debug)]
struct Clock {
    patience: Duration,
    /// Of messages in a stream; none: the body is one.
    framing: Option<Framing>,
    spent: Duration,
    bytes: u64,
    /// From when on the handler waits.
    waiting: Option<Instant>,
    alarm: Option<Pin<Box<Sleep>>>,
}

impl Clock {
    /// The handler waits: whether for too long.
    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let since = *self.waiting.get_or_insert_with(Instant::now);
        let rate = Duration::from_millis(self.bytes * 1000 / LEAST_RATE);
        let between = self.framing.as_ref().is_some_and(|framing| framing.between());
        let due = since + if between { SILENT_STREAM } else { (self.patience + rate).saturating_sub(self.spent) };
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
        if alarm.deadline() != due {
            alarm.as_mut().reset(due);
        }
        alarm.as_mut().poll(cx)
    }

    fn came(&mut self, bytes: &[u8]) {
        if let Some(since) = self.waiting.take() {
            self.spent += since.elapsed();
        }
        self.bytes += bytes.len() as u64;
        if self.framing.as_mut().is_some_and(|framing| framing.follow(bytes)) {
            (self.spent, self.bytes) = (Duration::ZERO, 0);
        }
    }
}

/// gRPC's messages: a flag, four bytes of length, and as many bytes.
#[derive(Debug, Default)]
struct Framing {
    head: [u8; 5],
    filled: usize,
    left: u64,
}

impl Framing {
    /// No message is under way.
    fn between(&self) -> bool {
        self.filled == 0 && self.left == 0
    }

    /// Whether a message ended in these bytes.
    fn follow(&mut self, mut bytes: &[u8]) -> bool {
        let mut ended = false;
        while !bytes.is_empty() {
            if self.left > 0 {
                let taken = bytes.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
                self.left -= taken as u64;
                bytes = &bytes[taken..];
                ended |= self.left == 0;
                continue;
            }
            self.head[self.filled] = bytes[0];
            self.filled += 1;
            bytes = &bytes[1..];
            if self.filled == self.head.len() {
                let [_, length @ ..] = self.head;
                (self.filled, self.left) = (0, u32::from_be_bytes(length).into());
                ended |= self.left == 0;
            }
        }
        ended
    }
}

#[derive(Debug, thiserror::Error)]
#[error("it came too slowly: less than {LEAST_RATE} bytes a second, --head-timeout aside")]
struct TooSlow;

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let watched = &mut *self;
        watched.unasked = false;
        let Some(body) = &mut watched.body else { return Poll::Ready(None) };
        let Poll::Ready(frame) = Pin::new(body).poll_frame(cx) else {
            if watched.starving.is_none() {
                watched.starving = Some(watched.activity.starves());
            }
            std::task::ready!(watched.clock.wait(cx));
            watched.activity.end_for(Ending::SlowBody);
            // not worth waiting for
            watched.left = None;
            return Poll::Ready(Some(Err(axum::Error::new(TooSlow))));
        };
        watched.starving = None;
        let data = frame.as_ref().and_then(|frame| frame.as_ref().ok()).and_then(Frame::data_ref);
        watched.clock.came(data.map_or(&[], |data| data));
        watched.activity.useful();
        if frame.as_ref().is_none_or(Result::is_err) {
            watched.left = None;
        }
        Poll::Ready(frame.map(|frame| frame.map_err(axum::Error::new)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let unread = self.body.take().filter(|body| !body.is_end_stream());
        if let (Some(body), Some(left), false) = (unread, &self.left, self.unasked) {
            *left.lock().unwrap_or_else(PoisonError::into_inner) = Some(body);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_end_where_their_lengths_say_however_they_are_cut() {
        let stream = [&[0, 0, 0, 0, 3][..], b"abc", &[0, 0, 0, 0, 0], &[1, 0, 0, 1, 0], &[7; 256]].concat();
        for size in [1, 2, 5, 7, stream.len()] {
            let mut framing = Framing::default();
            let mut ends = Vec::new();
            for (i, piece) in stream.chunks(size).enumerate() {
                if framing.follow(piece) {
                    ends.push(i * size + piece.len());
                }
            }
            assert!(framing.between(), "{size}");
            assert_eq!(ends.last(), Some(&stream.len()), "{size}");
            if size == 1 {
                assert_eq!(ends, [8, 13, stream.len()]);
            }
            assert!(!framing.follow(&[0, 0]) && !framing.between());
        }
    }
}
