//! The admin port, on its own thread: `/livez`, `/readyz`, `/metrics`. Answers while every worker is busy.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;
use tokio::sync::oneshot;

use super::status::Failure;
use super::{App, ServeError};
use crate::metrics::{self, Outcome};

/// The running admin port.
#[derive(Debug)]
pub(super) struct Admin {
    /// Where it listens.
    pub(super) address: SocketAddr,
    stop: oneshot::Sender<()>,
}

impl Admin {
    /// Closes the port; open connections are not waited for.
    pub(super) fn stop(self) {
        // an error means that the thread is gone already
        let _ = self.stop.send(());
    }
}

/// Binds the port and serves it on a thread of its own, with a runtime of its own.
pub(super) fn start(address: SocketAddr, app: Arc<App>) -> Result<Admin, ServeError> {
    let bind = |source| ServeError::Bind { what: "admin", address, source };
    let listener = std::net::TcpListener::bind(address).map_err(bind)?;
    listener.set_nonblocking(true).map_err(bind)?;
    let bound = listener.local_addr().map_err(bind)?;
    let thread = |reason: String| ServeError::Thread { what: "admin", reason };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| thread(e.to_string()))?;
    let (stop, stopped) = oneshot::channel();
    let serve = async move {
        let listener = match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => return tracing::error!(%error, "the admin port can't be served"),
        };
        let served = axum::serve(listener, router(app));
        tokio::select! {
            result = served.into_future() => if let Err(error) = result { tracing::error!(%error, "the admin port failed") },
            // also when the sender is dropped: the server is gone
            _ = stopped => {}
        }
    };
    std::thread::Builder::new()
        .name("admin".into())
        .spawn(move || runtime.block_on(serve))
        .map_err(|e| thread(e.to_string()))?;
    Ok(Admin { address: bound, stop })
}

/// The admin port's routes.
fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/livez", get(|| async { Json(json!({ "live": true })) }))
        .route("/readyz", get(ready))
        .route("/metrics", get(scrape))
        .fallback(|| async { Failure::new(Outcome::NotFound, "the admin port has /livez, /readyz and /metrics") })
        .with_state(app)
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    match app.fault() {
        None => Json(json!({ "ready": true })).into_response(),
        Some(reason) => Failure::new(Outcome::NotReady, reason).with(json!({ "ready": false })),
    }
}

async fn scrape(State(app): State<Arc<App>>) -> impl IntoResponse {
    app.fault();
    if let Some(registry) = app.registry() {
        registry.observe();
    }
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], app.metrics.encode())
}
