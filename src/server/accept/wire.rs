//! The bytes of one connection: a client that does not take its answer, and heads that nobody can read.
//!
//! hyper answers a head that it can't parse by itself, without a body and without asking anybody. Such an answer is known
//! by nothing having been asked for, not by its looks, and gets the body that every error has. TLS, if any, is below.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::Unreadable;
use super::activity::Activity;

/// How long what a refused client still sends is read and thrown away: closed before that, its system may drop the answer.
const LINGER: Duration = Duration::from_secs(1);
/// Most bytes of that.
const LINGER_BYTES: usize = 4 << 20;

/// A connection's bytes on their way.
pub(super) struct Wire<S> {
    stream: S,
    activity: Arc<Activity>,
    unreadable: Unreadable,
    limit: Duration,
    /// Runs while the client takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Whether anything was written yet.
    begun: bool,
    refusal: Option<Refusal>,
}

/// An answer in place of hyper's.
struct Refusal {
    bytes: Vec<u8>,
    written: usize,
    /// From when its end was written: until when, and how much, is thrown away.
    linger: Option<(Pin<Box<Sleep>>, usize)>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    /// A client that takes nothing for `limit` is cut off.
    pub(super) fn new(stream: S, activity: Arc<Activity>, unreadable: Unreadable, limit: Duration) -> Self {
        Self { stream, activity, unreadable, limit, stalled: None, begun: false, refusal: None }
    }

    /// Watches over an attempt to write.
    fn timed<T>(&mut self, cx: &mut Context<'_>, attempt: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if attempt.is_ready() {
            self.stalled = None;
            return attempt;
        }
        let limit = self.limit;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        ready!(stalled.as_mut().poll(cx));
        let text = "the client did not take its answer within the write timeout";
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, text)))
    }

    /// What to write in place of `head`, if nothing asked for it.
    fn replaces(&mut self, head: &[u8]) -> bool {
        if !self.begun {
            self.begun = true;
            if !head.starts_with(b"HTTP/") {
                self.activity.is_multiplexed();
            }
        }
        if !self.activity.settled() {
            return false;
        }
        let Some(bytes) = rewritten(head, &self.unreadable) else { return false };
        self.refusal = Some(Refusal { bytes, written: 0, linger: None });
        true
    }

    /// Writes what is left of the refusal.
    fn poll_refusal(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(left) = self.refusal.as_ref().and_then(|r| r.bytes.get(r.written..)).filter(|l| !l.is_empty()) {
            let attempt = Pin::new(&mut self.stream).poll_write(cx, left);
            let written = ready!(self.timed(cx, attempt))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            if let Some(refusal) = &mut self.refusal {
                refusal.written += written;
            }
        }
        Poll::Ready(Ok(()))
    }

    fn after_write(&self, attempt: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(1..)) = attempt {
            self.activity.moved();
        }
    }
}

/// hyper's answer of three lines with our body; none if it is no such answer.
fn rewritten(head: &[u8], unreadable: &Unreadable) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(head).ok()?;
    let status: u16 = text.strip_prefix("HTTP/1.")?.get(2..5)?.parse().ok()?;
    let (before, after) = text.split_once("content-length: 0\r\n")?;
    if !(400..500).contains(&status) || !after.ends_with("\r\n\r\n") && after != "\r\n" {
        return None;
    }
    let (headers, body) = unreadable(status);
    Some(format!("{before}content-length: {}\r\n{headers}{after}{body}", body.len()).into_bytes())
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Wire<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.activity.moved();
        }
        read
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.replaces(bytes) {
            return Poll::Ready(Ok(bytes.len()));
        }
        self.activity.writing();
        let attempt = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.after_write(&attempt);
        self.timed(cx, attempt)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // an answer without a body is one slice
        if let Some(first) = slices.first()
            && self.replaces(first)
        {
            return Poll::Ready(Ok(first.len()));
        }
        self.activity.writing();
        let attempt = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.after_write(&attempt);
        self.timed(cx, attempt)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_refusal(cx))?;
        let attempt = Pin::new(&mut self.stream).poll_flush(cx);
        ready!(self.timed(cx, attempt))?;
        self.activity.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_refusal(cx))?;
        let wire = &mut *self;
        let lingers = wire.refusal.as_ref().is_some_and(|refusal| refusal.linger.is_some());
        if !lingers {
            let attempt = Pin::new(&mut wire.stream).poll_shutdown(cx);
            ready!(wire.timed(cx, attempt))?;
        }
        let Some(refusal) = &mut wire.refusal else { return Poll::Ready(Ok(())) };
        let (end, left) = refusal.linger.get_or_insert_with(|| (Box::pin(tokio::time::sleep(LINGER)), LINGER_BYTES));
        let mut scratch = [0; 4096];
        loop {
            let mut buffer = ReadBuf::new(&mut scratch);
            match Pin::new(&mut wire.stream).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() && *left > 0 => {
                    *left = left.saturating_sub(buffer.filled().len());
                }
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => return end.as_mut().poll(cx).map(Ok),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unreadable() -> Unreadable {
        Arc::new(|status| ("x: y\r\n".into(), format!("no {status}")))
    }

    #[test]
    fn only_an_error_without_a_body_is_rewritten() {
        let with = |head: &str| rewritten(head.as_bytes(), &unreadable()).map(|b| String::from_utf8(b).expect("text"));
        let now = "date: Tue, 24 Nov 2026 21:00:00 GMT\r\n\r\n";
        let answer = with(&format!("HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\n{now}"));
        let expected =
            format!("HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 6\r\nx: y\r\n{now}no 431");
        assert_eq!(answer.as_deref(), Some(expected.as_str()));
        assert!(with("HTTP/1.0 400 Bad Request\r\ncontent-length: 0\r\n\r\n").is_some());
        for other in [
            "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\nmore",
            "HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\nab",
            "HTTP/1.1 100 Continue\r\n\r\n",
            "HTTP/1.1 4",
            "",
        ] {
            assert_eq!(with(other), None, "{other}");
        }
        assert!(rewritten(&[0xff; 40], &unreadable()).is_none());
    }
}
