//! Accepting connections: how many, TLS or not, how long a client may take to send a head or to take an answer, and how
//! they end.
//!
//! Knows nothing of what the connections carry. `wire` has a connection's bytes, `activity` what is under way on it.

mod activity;
mod wire;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::JoinSet;
use tower::ServiceExt as _;

use self::activity::Activity;
use self::wire::Wire;
use super::tls::Tls;
use crate::metrics::{IntGauge, Metrics};

/// How long a connection that was accepted just before the stop may take to bring its first request.
const FIRST_REQUEST: Duration = Duration::from_millis(500);

/// How long a connection without a request under way may outlive the stop: time to hear of it, and to say goodbye.
const LAST_GOODBYE: Duration = Duration::from_secs(1);

/// Most bytes of a request's line and headers. What hyper reads of HTTP/1 it may overstep, so the routes look again.
pub(super) const HEAD_LIMIT: usize = 64 * 1024;
/// Most bytes of an HTTP/2 head that are read at all: more are refused by the library, without a body.
const HEAD_LIMIT_HTTP2: u32 = 4 * HEAD_LIMIT as u32;
/// Most headers of a request.
const HEADERS: usize = 128;
/// Requests under way on one HTTP/2 connection.
const STREAMS: u32 = 256;

/// Header lines and body of the answer to a head that can't be read, by its status.
pub(super) type Unreadable = Arc<dyn Fn(u16) -> (String, String) + Send + Sync>;

/// Limits on connections, and how they speak.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    /// Connections open at once; more wait in the system's backlog.
    pub(super) connections: usize,
    /// Longest a client may take to send a request's head, from the connection's start or the last answer.
    pub(super) head_timeout: Duration,
    /// Longest an answer may wait without its client taking any of it.
    pub(super) write_timeout: Duration,
    /// None: plain TCP.
    pub(super) tls: Option<Arc<Tls>>,
}

/// Connections that are still open after accepting ended.
pub(super) struct Open {
    stopping: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Open {
    /// Lets every request in flight finish and closes idle connections.
    pub(super) async fn finish(&mut self) {
        self.stopping.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
    }

    /// Cuts what is left; returns how many.
    pub(super) async fn cut(mut self) -> usize {
        let left = self.tasks.len();
        self.tasks.shutdown().await;
        left
    }
}

/// Accepts until `stop` resolves, then hands over what is open.
pub(super) async fn accept(
    listener: TcpListener,
    routes: Router,
    limits: Limits,
    unreadable: Unreadable,
    metrics: Arc<Metrics>,
    mut stop: oneshot::Receiver<()>,
) -> Open {
    let room = Arc::new(Semaphore::new(limits.connections.max(1)));
    let (stopping, stopped) = watch::channel(false);
    let mut open = Open { stopping, tasks: JoinSet::new() };
    let serve = |stream, permit: Option<OwnedSemaphorePermit>| {
        let connection = connect(stream, routes.clone(), limits.clone(), unreadable.clone(), stopped.clone());
        let gauge = metrics.connections.clone();
        gauge.inc();
        let counted = Counted(gauge);
        async move {
            let _until_the_end = (permit, counted);
            connection.await;
        }
    };
    loop {
        let next = async {
            // never closed, so acquiring can't fail
            let permit = room.clone().acquire_owned().await.ok();
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            biased;
            _ = &mut stop => break,
            next = next => next,
            // keeps the set small
            Some(_) = open.tasks.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => drop(open.tasks.spawn(serve(stream, permit))),
            Err(error) => {
                // out of file descriptors, usually: a pause lets some come back
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    // to their clients, those in the system's queue are connected: closing the port with them in it would reset them
    for stream in queued(listener) {
        open.tasks.spawn(serve(stream, None));
    }
    open
}

/// Closes the port; returns the connections that the system had accepted already.
fn queued(listener: TcpListener) -> Vec<TcpStream> {
    // the system itself is asked: the runtime may not have heard of the latest
    let Ok(listener) = listener.into_std() else { return Vec::new() };
    let mut streams = Vec::new();
    while let Ok((stream, _)) = listener.accept() {
        streams.extend(stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream)));
    }
    streams
}

/// The whole life of a connection: a handshake, where there is one, and requests.
async fn connect(
    stream: TcpStream,
    routes: Router,
    limits: Limits,
    unreadable: Unreadable,
    stopped: watch::Receiver<bool>,
) {
    let _ = stream.set_nodelay(true);
    let Some(tls) = &limits.tls else { return serve(stream, routes, &limits, unreadable, stopped).await };
    match tokio::time::timeout(limits.head_timeout, tls.acceptor().accept(stream)).await {
        Ok(Ok(stream)) => serve(stream, routes, &limits, unreadable, stopped).await,
        Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
        Err(_) => tracing::debug!("a TLS handshake took too long"),
    }
}

async fn serve<S>(
    stream: S,
    routes: Router,
    limits: &Limits,
    unreadable: Unreadable,
    mut stopped: watch::Receiver<bool>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = Builder::new(TokioExecutor::new());
    let mut http1 = builder.http1();
    http1
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout)
        .max_buf_size(HEAD_LIMIT)
        .max_headers(HEADERS);
    let mut http2 = builder.http2();
    http2.timer(TokioTimer::new()).keep_alive_interval(limits.head_timeout);
    http2.max_header_list_size(HEAD_LIMIT_HTTP2).max_concurrent_streams(STREAMS).adaptive_window(true);
    let (first, mut seen) = watch::channel(false);
    let activity = Arc::new(Activity::default());
    let wire = Wire::new(stream, activity.clone(), unreadable, limits.write_timeout);
    let under_way = activity.clone();
    let service = tower::service_fn(move |request| {
        let request: Request<_> = request;
        first.send_replace(true);
        let mark = under_way.request(&request);
        let answer = routes.clone().oneshot(request);
        async move { answer.await.map(|response| mark.answer(response)) }
    });
    let mut connection = pin!(builder.serve_connection(TokioIo::new(wire), TowerToHyperService::new(service)));
    let last_call = async {
        let _ = stopped.wait_for(|stopped| *stopped).await;
        // told to shut down before its first request, a connection would drop that request unread
        let _ = tokio::time::timeout(FIRST_REQUEST, seen.wait_for(|seen| *seen)).await;
    };
    let mut stuck = pin!(activity.stuck(limits.write_timeout));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stuck.as_mut() => Err("the client did not take its answer within the write timeout".into()),
        () = last_call => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection => ended,
                () = stuck => Err("the client did not take its answer within the write timeout".into()),
                () = activity.idle(LAST_GOODBYE) => Err("the client did not take its leave".into()),
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error, "a connection ended early");
    }
}

/// An open connection in the metrics.
struct Counted(IntGauge);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// What the routes answer goes out as it is, even where it looks just like what is rewritten.
    #[tokio::test]
    async fn only_what_nobody_asked_for_is_rewritten() {
        const LOOKS: &str = "HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n";
        let routes =
            Router::new().route("/empty", get(async || StatusCode::NOT_FOUND)).route("/looks", get(async || LOOKS));
        let limits = Limits {
            connections: 1,
            head_timeout: Duration::from_secs(5),
            write_timeout: Duration::from_secs(5),
            tls: None,
        };
        // room for a few bytes only, so that writes are cut anywhere
        for room in [1, 7, 64, 4096] {
            let (mut client, server) = tokio::io::duplex(room);
            let (_stopping, stopped) = watch::channel(false);
            let unreadable: Unreadable = Arc::new(|_| (String::new(), "ours".into()));
            let routes = routes.clone();
            let limits = limits.clone();
            let serving = tokio::spawn(async move { serve(server, routes, &limits, unreadable, stopped).await });
            let (mut reader, mut writer) = tokio::io::split(&mut client);
            let asking = async {
                for path in ["/empty", "/looks", "/empty"] {
                    writer.write_all(format!("GET {path} HTTP/1.1\r\nhost: t\r\n\r\n").as_bytes()).await.expect("sent");
                }
                writer.write_all(b"GARBAGE\r\n\r\n").await.expect("sent");
            };
            let mut answers = String::new();
            let (_, read) = tokio::join!(asking, reader.read_to_string(&mut answers));
            read.expect("text");
            serving.await.expect("served");
            // hyper says that it closes or just does it
            let same = |line: &&str| !line.starts_with("date: ") && *line != "connection: close";
            let lines: Vec<&str> = answers.split("\r\n").filter(same).collect();
            let empty = ["HTTP/1.1 404 Not Found", "content-length: 0", ""];
            let looks = ["HTTP/1.1 200 OK", "content-type: text/plain; charset=utf-8", "content-length: 47", ""];
            let inside = ["HTTP/1.1 400 Bad Request", "content-length: 0", ""];
            let refused = ["HTTP/1.1 400 Bad Request", "content-length: 4", "", "ours"];
            assert_eq!(lines, [&empty[..], &looks, &inside, &empty, &refused].concat(), "{room}");
        }
    }
}
