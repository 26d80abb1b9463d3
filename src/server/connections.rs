//! Connections of the HTTP port: accepted up to a limit, closed when slow with a request's head, drained at the end.
//! Knows no routes.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::App;

/// Serves `routes` (HTTP/1.1 and HTTP/2 without TLS) until `stop` resolves, then finishes what is in flight within
/// `drain_timeout`. Returns how many connections were cut.
pub(super) async fn serve(
    listener: TcpListener,
    routes: Router,
    app: &Arc<App>,
    stop: impl Future<Output = ()>,
    drain_timeout: Duration,
) -> usize {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(app.limits.header_timeout);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(Duration::from_secs(30));
    let graceful = GracefulShutdown::new();
    let free = Arc::new(Semaphore::new(app.limits.max_connections.max(1)));
    tokio::pin!(stop);
    loop {
        let permit = tokio::select! {
            permit = free.clone().acquire_owned() => permit,
            () = &mut stop => break,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // out of file descriptors, or a client that was gone at once: neither is a reason to stop
                tracing::warn!(%error, "can't accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(routes.clone());
        let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
        let connection = graceful.watch(connection);
        let app = app.clone();
        tokio::spawn(async move {
            app.metrics.connections.inc();
            if let Err(error) = connection.await {
                tracing::debug!(error, "a connection ended badly");
            }
            app.metrics.connections.dec();
            drop(permit);
        });
    }
    drop(listener);
    let finished = tokio::time::timeout(drain_timeout, graceful.shutdown()).await;
    if finished.is_ok() { 0 } else { app.metrics.connections.get().max(0) as usize }
}
