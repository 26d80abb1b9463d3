//! Accepting connections: how many, TLS or not, how long a client may take to send a head, and how they end.
//!
//! Knows nothing of what the connections carry.

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

use super::tls::Tls;
use crate::metrics::{IntGauge, Metrics};

/// How long a connection that was accepted just before the stop may take to bring its first request.
const FIRST_REQUEST: Duration = Duration::from_millis(500);

/// Most bytes of a request's line and headers.
const HEAD_LIMIT: usize = 64 * 1024;
/// Most headers of a request.
const HEADERS: usize = 128;
/// Requests under way on one HTTP/2 connection.
const STREAMS: u32 = 256;

/// Limits on connections, and how they speak.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    /// Connections open at once; more wait in the system's backlog.
    pub(super) connections: usize,
    /// Longest a client may take to send a request's head, from the connection's start or the last answer.
    pub(super) head_timeout: Duration,
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
    metrics: Arc<Metrics>,
    mut stop: oneshot::Receiver<()>,
) -> Open {
    let room = Arc::new(Semaphore::new(limits.connections.max(1)));
    let (stopping, stopped) = watch::channel(false);
    let mut open = Open { stopping, tasks: JoinSet::new() };
    let serve = |stream, permit: Option<OwnedSemaphorePermit>| {
        let connection = connect(stream, routes.clone(), limits.clone(), stopped.clone());
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
async fn connect(stream: TcpStream, routes: Router, limits: Limits, stopped: watch::Receiver<bool>) {
    let _ = stream.set_nodelay(true);
    let Some(tls) = &limits.tls else { return serve(stream, routes, &limits, stopped).await };
    match tokio::time::timeout(limits.head_timeout, tls.acceptor().accept(stream)).await {
        Ok(Ok(stream)) => serve(stream, routes, &limits, stopped).await,
        Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
        Err(_) => tracing::debug!("a TLS handshake took too long"),
    }
}

async fn serve<S>(stream: S, routes: Router, limits: &Limits, mut stopped: watch::Receiver<bool>)
where
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
    http2.max_header_list_size(HEAD_LIMIT as u32).max_concurrent_streams(STREAMS).adaptive_window(true);
    let (first, mut seen) = watch::channel(false);
    let service = tower::service_fn(move |request| {
        let request: Request<_> = request;
        first.send_replace(true);
        routes.clone().oneshot(request)
    });
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service)));
    let last_call = async {
        let _ = stopped.wait_for(|stopped| *stopped).await;
        // told to shut down before its first request, a connection would drop that request unread
        let _ = tokio::time::timeout(FIRST_REQUEST, seen.wait_for(|seen| *seen)).await;
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = last_call => {
            connection.as_mut().graceful_shutdown();
            connection.await
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
