//! Accepting connections: how many, how long a client may take to send a head, and how they end.
//!
//! Knows nothing of what the connections carry.

use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;

use std::sync::Arc;

use crate::metrics::Metrics;

/// How long accepting goes on after the stop, for clients that the system let in already: closing would reset them.
const BACKLOG: Duration = Duration::from_millis(20);

/// Limits on connections.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Connections open at once; more wait in the system's backlog.
    pub(super) connections: usize,
    /// Longest a client may take to send a request's head, from the connection's start or the last answer.
    pub(super) head_timeout: Duration,
}

/// Connections that are still open after accepting ended.
pub(super) struct Open {
    graceful: GracefulShutdown,
    tasks: JoinSet<()>,
}

impl Open {
    /// Lets every request in flight finish and closes idle connections.
    pub(super) async fn finish(&mut self) {
        std::mem::take(&mut self.graceful).shutdown().await;
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
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(limits.head_timeout);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(limits.head_timeout);
    let room = Arc::new(Semaphore::new(limits.connections.max(1)));
    let mut open = Open { graceful: GracefulShutdown::new(), tasks: JoinSet::new() };
    let mut end = None;
    loop {
        let next = async {
            // never closed, so acquiring can't fail
            let permit = room.clone().acquire_owned().await.ok();
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            biased;
            _ = &mut stop, if end.is_none() => {
                end = Some(tokio::time::Instant::now() + BACKLOG);
                continue;
            }
            () = until(end) => return open,
            next = next => next,
            // keeps the set small
            Some(_) = open.tasks.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // out of file descriptors, usually: a pause lets some come back
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(routes.clone());
        let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
        let connection = open.graceful.watch(connection);
        let gauge = metrics.connections.clone();
        gauge.inc();
        open.tasks.spawn(async move {
            let _permit = permit;
            let _counted = Counted(gauge);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended early");
            }
        });
    }
}

/// Resolves at `end`; never without one.
async fn until(end: Option<tokio::time::Instant>) {
    match end {
        Some(end) => tokio::time::sleep_until(end).await,
        None => std::future::pending().await,
    }
}

struct Counted(crate::metrics::IntGauge);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
