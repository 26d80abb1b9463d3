//! Reads and writes the bytes of one connection (above TLS, if any): the write timeout, frame floods, and lingering on
//! close so that the last response reaches a client that is still sending.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};
use tokio_rustls::server::TlsStream;

use super::activity::{self, Activity, Ending};
use super::frames::Frames;

/// How long bytes from the client are read and discarded after its last response.
const LINGER: Duration = Duration::from_secs(1);
/// Most bytes discarded then.
const LINGER_BYTES: usize = 64 << 20;

/// The transport below: TCP or TLS.
pub(super) trait Socket: AsyncRead + AsyncWrite + Unpin {
    fn socket(&self) -> &TcpStream;
}

impl Socket for TcpStream {
    fn socket(&self) -> &TcpStream {
        self
    }
}

impl Socket for TlsStream<TcpStream> {
    fn socket(&self) -> &TcpStream {
        self.get_ref().0
    }
}

/// A connection's byte stream.
pub(super) struct Wire<S: Socket> {
    stream: S,
    activity: Arc<Activity>,
    limit: Duration,
    frames: Frames,
    /// `Some` while bytes are written that the client has not read.
    taking: Option<Taking>,
    /// Whether anything was written yet.
    begun: bool,
    /// The client has closed its sending side.
    ended: bool,
    /// After the last response: how long, and how many bytes more, are discarded.
    linger: Option<(Pin<Box<Sleep>>, usize)>,
}

/// How fast the client reads, since everything written was last flushed.
struct Taking {
    since: Instant,
    progress: Instant,
    taken: u64,
    alarm: Option<Pin<Box<Sleep>>>,
}

impl<S: Socket> Wire<S> {
    /// Cuts off a client that reads nothing for `limit`, or less than [`LEAST_RATE`](super::LEAST_RATE) after that.
    pub(super) fn new(stream: S, activity: Arc<Activity>, limit: Duration) -> Self {
        let frames = Frames::new(std::time::Instant::now());
        Self { stream, activity, limit, frames, taking: None, begun: false, ended: false, linger: None }
    }

    /// Looks at the first bytes written: they are a status line in HTTP/1 and a frame in HTTP/2.
    fn begin(&mut self, head: &[u8]) {
        if !self.begun && !head.is_empty() {
            self.begun = true;
            if !head.starts_with(b"HTTP/") {
                self.activity.is_multiplexed();
            }
        }
        self.activity.writing();
    }

    /// Records a write's progress.
    fn wrote(&mut self, cx: &mut Context<'_>, attempt: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(written @ 1..)) = attempt {
            self.activity.moved();
            self.activity.useful();
            let taking = self.taking();
            taking.progress = Instant::now();
            taking.taken += written as u64;
            self.frames.sent(written);
        }
        self.timed(cx, attempt)
    }

    fn taking(&mut self) -> &mut Taking {
        let now = Instant::now();
        self.taking.get_or_insert_with(|| Taking { since: now, progress: now, taken: 0, alarm: None })
    }

    /// Fails a write or flush that has been pending for too long.
    fn timed<T>(&mut self, cx: &mut Context<'_>, attempt: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if attempt.is_ready() {
            return attempt;
        }
        let limit = self.limit;
        let taking = self.taking();
        let due = activity::due(taking.since, taking.progress, taking.taken, limit);
        let alarm = taking.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
        if alarm.deadline() != due {
            alarm.as_mut().reset(due);
        }
        ready!(alarm.as_mut().poll(cx));
        self.activity.end_for(Ending::WriteTimeout);
        let text = "the client did not take its answer within the write timeout";
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, text)))
    }
}

impl<S: Socket> Drop for Wire<S> {
    fn drop(&mut self) {
        if self.activity.ending() == Some(Ending::WriteTimeout) {
            // reset the connection, so that the kernel drops the data that the client has not read
            let _ = self.stream.socket().set_zero_linger();
        }
    }
}

impl<S: Socket> AsyncRead for Wire<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let room = buffer.remaining() > 0;
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            self.activity.moved();
            if self.frames.flood(&buffer.filled()[before..], std::time::Instant::now()) {
                self.activity.end_for(Ending::Protocol);
                return Poll::Ready(Err(io::Error::other("the client floods the server with frames")));
            }
        } else if room {
            self.ended = true;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: Socket> AsyncWrite for Wire<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.begin(bytes);
        let attempt = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.wrote(cx, attempt)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.begin(slices.iter().find(|slice| !slice.is_empty()).map_or(&[], |slice| slice));
        let attempt = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.wrote(cx, attempt)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let attempt = Pin::new(&mut self.stream).poll_flush(cx);
        ready!(self.timed(cx, attempt))?;
        self.taking = None;
        self.activity.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wire = &mut *self;
        if wire.linger.is_none() {
            let attempt = Pin::new(&mut wire.stream).poll_shutdown(cx);
            ready!(wire.timed(cx, attempt))?;
        }
        if wire.ended || !wire.begun || !wire.activity.lingers() {
            return Poll::Ready(Ok(()));
        }
        let (end, left) = wire.linger.get_or_insert_with(|| (Box::pin(tokio::time::sleep(LINGER)), LINGER_BYTES));
        let mut scratch = [0; 16 * 1024];
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
