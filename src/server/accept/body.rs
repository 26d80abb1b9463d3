//! Request bodies: the time limits on receiving them, and draining what a handler left unread.
//!
//! A client that is still sending when its response arrives may never see it: HTTP/1 clients write first and meet a
//! closed connection, and curl, Node and httpx fail on an HTTP/2 stream that ends while they write to it. So what a
//! handler leaves unread is read and discarded, within bounds, before the response is sent.

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

/// Most bytes of an unread body that are discarded before its request is answered.
const DISCARDED: usize = 64 << 20;
/// Longest time spent on discarding.
const DISCARDING: Duration = Duration::from_secs(10);
/// Longest pause between two frames while discarding: the client may be waiting for its response.
const PAUSE: Duration = Duration::from_secs(1);
/// Longest time between two messages of a stream.
const SILENT_STREAM: Duration = Duration::from_secs(300);

/// The part of a request's body that its handler left unread.
#[derive(Debug)]
pub(super) struct Unread {
    left: Slot,
    activity: Arc<Activity>,
}

/// Receives a body that is dropped before its end.
type Slot = Arc<Mutex<Option<Incoming>>>;

/// The request with its body timed, and a handle on what the handler leaves unread; `None` if there is no body.
pub(super) fn watch(
    request: Request<Incoming>,
    activity: &Arc<Activity>,
    limits: &Limits,
) -> (Request<Body>, Option<Unread>) {
    if request.body().is_end_stream() {
        return (request.map(Body::new), None);
    }
    let left = Slot::default();
    let streams = (limits.is_stream)(&request);
    // with `Expect: 100-continue`, polling the body would have the client send it only to be discarded
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
    let timed = |body| TimedBody {
        body: Some(body),
        left: keep.then(|| left.clone()),
        unasked,
        activity: activity.clone(),
        starving: None,
        clock,
    };
    (request.map(|body| Body::new(timed(body))), Some(Unread { left, activity: activity.clone() }))
}

impl Unread {
    /// Reads and discards the rest of the body, within the bounds, so that the client reads its response.
    pub(super) async fn discard(self) {
        let Some(mut body) = self.left.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        // the request is answered only after its client has sent the rest
        let _starving = self.activity.starves();
        let deadline = Instant::now() + DISCARDING;
        let mut left = DISCARDED;
        if body.size_hint().lower() <= DISCARDED as u64 {
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

/// A request body that fails once its client sends too slowly.
#[derive(Debug)]
struct TimedBody {
    /// `None` once it was moved to `left`.
    body: Option<Incoming>,
    /// Where the body goes when it is dropped before its end; `None`: there is nothing to discard.
    left: Option<Slot>,
    /// The client sent `Expect: 100-continue`, and the body was not polled yet.
    unasked: bool,
    activity: Arc<Activity>,
    /// `Some` while the handler waits for bytes.
    starving: Option<Starving>,
    clock: Clock,
}

/// Compares the time spent waiting for the client with the bytes that it sent.
#[derive(Debug)]
struct Clock {
    patience: Duration,
    /// Message boundaries of a gRPC stream; `None` for a body that is one message.
    framing: Option<Framing>,
    spent: Duration,
    bytes: u64,
    /// Since when the handler waits.
    waiting: Option<Instant>,
    alarm: Option<Pin<Box<Sleep>>>,
}

impl Clock {
    /// Ready once the handler has waited for too long.
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

/// Follows gRPC's length-prefixed messages: a flag, a length of four bytes, the message.
#[derive(Debug, Default)]
struct Framing {
    head: [u8; 5],
    filled: usize,
    left: u64,
}

impl Framing {
    /// Whether the last message is complete and no other has begun.
    fn between(&self) -> bool {
        self.filled == 0 && self.left == 0
    }

    /// Follows `bytes`; whether a message ended in them.
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
#[error("the body came too slowly: less than {LEAST_RATE} bytes a second, --head-timeout aside")]
struct TooSlow;

impl HttpBody for TimedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let timed = &mut *self;
        timed.unasked = false;
        let Some(body) = &mut timed.body else { return Poll::Ready(None) };
        let Poll::Ready(frame) = Pin::new(body).poll_frame(cx) else {
            if timed.starving.is_none() {
                timed.starving = Some(timed.activity.starves());
            }
            std::task::ready!(timed.clock.wait(cx));
            timed.activity.end_for(Ending::SlowBody);
            // the client is too slow to wait for the rest
            timed.left = None;
            return Poll::Ready(Some(Err(axum::Error::new(TooSlow))));
        };
        timed.starving = None;
        let data = frame.as_ref().and_then(|frame| frame.as_ref().ok()).and_then(Frame::data_ref);
        timed.clock.came(data.map_or(&[], |data| data));
        timed.activity.useful();
        if frame.as_ref().is_none_or(Result::is_err) {
            timed.left = None;
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

impl Drop for TimedBody {
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
