//! The admin port: `/livez`, `/readyz`, `/metrics`.
//!
//! It has its own OS thread and runtime, so that probes and scrapes are answered while every other thread is busy. It
//! listens before the models load and until the process ends.
//!
//! * `/livez`: 200 as long as the process can answer at all.
//! * `/readyz`: 200 when requests are welcome, else 503 with the reason as text.
//! * `/metrics`: Prometheus text format.

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Router};
use tokio::sync::oneshot;

use super::accept::{self, Accounted, Limits};
use super::head;
use super::readiness::Readiness;
use super::status::{ApiError, Code};
use super::unrouted;
use crate::metrics::{CONTENT_TYPE, Metrics};

/// The admin port, served on its thread until dropped or stopped.
#[derive(Debug)]
pub(super) struct Admin {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    readiness: Arc<Readiness>,
    metrics: Arc<Metrics>,
    /// The last scrape: when, and the text.
    scraped: Mutex<Option<(Instant, Bytes)>>,
}

impl Shared {
    /// The metrics as text, of a moment after `since`.
    fn scrape(&self, since: Instant) -> Bytes {
        let mut scraped = self.scraped.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, text)) = &*scraped
            && *at >= since
        {
            return text.clone();
        }
        let at = Instant::now();
        self.metrics.ready.set(i64::from(self.readiness.check().is_ok()));
        self.readiness.observe(&self.metrics);
        let text = Bytes::from(self.metrics.encode());
        *scraped = Some((at, text.clone()));
        text
    }
}

impl Admin {
    /// Serves on a bound listener; `http` is where the HTTP port will be.
    pub(super) fn start(
        listener: TcpListener,
        http: SocketAddr,
        limits: Limits,
        readiness: Arc<Readiness>,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<Self> {
        let address: SocketAddr = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let routes = Router::new()
            .route("/livez", get(|| async { "alive\n" }))
            .route("/readyz", get(readyz))
            .route("/metrics", get(scrape))
            .fallback(async move |uri: Uri| unrouted::on_admin(uri.path(), http))
            .method_not_allowed_fallback(async || ApiError::new(Code::MethodNotAllowed, "this path has other methods"))
            .layer(axum::middleware::from_fn(head::check))
            .with_state(Arc::new(Shared { readiness, metrics: metrics.clone(), scraped: Mutex::default() }));
        let routes = unrouted::naming_methods(routes);
        listener.set_nonblocking(true)?;
        let thread = std::thread::Builder::new().name("nfold-admin".into()).spawn(move || {
            let served = runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                // a scraper's idle connection must not delay the exit: open connections end with the runtime
                drop(accept::accept(listener, routes, limits, metrics, stopped).await);
                Ok::<_, std::io::Error>(())
            });
            if let Err(error) = served {
                tracing::error!(%error, "the admin port does not listen: {error}");
            }
        })?;
        tracing::info!(protocol = "admin", %address, "admin port listens on {address}");
        Ok(Self { stop, thread })
    }

    /// Whether the thread has ended by itself.
    pub(super) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends the thread; blocks briefly.
    pub(super) fn stop(self) {
        drop(self.stop);
        let _ = self.thread.join();
    }
}

async fn readyz(State(shared): State<Arc<Shared>>) -> Response {
    match shared.readiness.check() {
        Ok(()) => "ready\n".into_response(),
        Err(reason) => (Code::NotReady.http(), format!("not ready: {reason}\n")).into_response(),
    }
}

/// `/metrics`. Concurrent scrapes share one text: it takes a millisecond to write, and clients may ask often and not
/// read it.
async fn scrape(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let arrived = Instant::now();
    // let the other pending requests arrive before the text is written
    tokio::task::yield_now().await;
    (Extension(Accounted), [(header::CONTENT_TYPE, CONTENT_TYPE)], shared.scrape(arrived))
}
