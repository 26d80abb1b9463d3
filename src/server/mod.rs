//! The edge: connections, routes, status codes. Thin; everything about images and models is the engine room's.
//!
//! Life of the process: admin port up → models loaded and warm → HTTP port bound → ready → signal → not ready, still
//! answering for the hold → no new connections → what is in flight is answered, or the drain time is over → threads
//! joined.

mod admin;
mod connections;
mod http;
mod status;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::infer::registry::{Registry, RegistryError, RegistryOptions};
use crate::metrics::Metrics;

pub use http::router;

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Address of the HTTP port; port 0 picks a free one.
    pub http: SocketAddr,
    /// Address of the admin port: health and metrics.
    pub admin: SocketAddr,
    /// Models and engines.
    pub registry: RegistryOptions,
    /// What requests and connections may cost.
    pub limits: Limits,
    /// How long the server goes on answering, not ready any more, after the first signal: time for load balancers.
    pub drain_hold: Duration,
    /// How long requests in flight may take after that.
    pub drain_timeout: Duration,
}

/// What requests and connections may cost.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest body, in bytes.
    pub max_body_bytes: usize,
    /// Most connections at once; more wait in the system's queue.
    pub max_connections: usize,
    /// Time to send a request's head.
    pub header_timeout: Duration,
    /// Deadline of a request that brings none.
    pub request_timeout: Duration,
    /// An engine run older than this means that the engine hangs.
    pub hang_limit: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_body_bytes: 64 << 20,
            max_connections: 1024,
            header_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(30),
            hang_limit: Duration::from_secs(60),
        }
    }
}

/// Why the server could not start or had to give up.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is taken or not ours.
    #[error("can't listen on {address} for {what}: {source}; choose another address with --{what}")]
    Bind {
        /// `http` or `admin`.
        what: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The models don't load.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A thread could not be made or died.
    #[error("the {what} thread failed: {reason}")]
    Thread {
        /// Which.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// The drain time was over before everything was answered.
    #[error("{0} compute threads were still busy when the drain time was over")]
    Unfinished(usize),
}

/// What handlers share.
#[derive(Debug)]
pub struct App {
    /// Every metric.
    pub metrics: Metrics,
    /// What requests may cost.
    pub limits: Limits,
    registry: OnceLock<Registry>,
    stage: AtomicU8,
    started: Instant,
}

/// Stages of the process, in order; there is no way back.
const STARTING: u8 = 0;
const SERVING: u8 = 1;
const DRAINING: u8 = 2;

impl App {
    /// A server without models yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            metrics: Metrics::new(),
            limits,
            registry: OnceLock::new(),
            stage: AtomicU8::new(STARTING),
            started: Instant::now(),
        }
    }

    /// Warm models are there: from now on requests are answered.
    pub fn open(&self, registry: Registry) {
        if self.registry.set(registry).is_ok() && self.advance(SERVING) {
            self.metrics.start_to_ready_seconds.set(self.started.elapsed().as_secs_f64());
        }
        self.fault();
    }

    /// The models, once there are any.
    pub fn registry(&self) -> Option<&Registry> {
        self.registry.get()
    }

    /// Not ready any more, still answering.
    pub fn drain(&self) {
        self.advance(DRAINING);
        self.fault();
    }

    /// Whether the process is on its way out.
    pub fn is_draining(&self) -> bool {
        self.stage.load(Ordering::Acquire) == DRAINING
    }

    /// Why no request should be sent here, if so. Keeps the gauge in step.
    pub fn fault(&self) -> Option<String> {
        let fault = match (self.stage.load(Ordering::Acquire), self.registry()) {
            (SERVING, Some(registry)) => registry.fault(self.limits.hang_limit),
            (DRAINING, _) => Some("the server is shutting down".into()),
            _ => Some("models are loading".into()),
        };
        self.metrics.ready.set(i64::from(fault.is_none()));
        fault
    }

    fn advance(&self, stage: u8) -> bool {
        self.stage.fetch_max(stage, Ordering::AcqRel) < stage
    }
}

/// Serves until `shutdown` resolves and everything in flight is answered.
pub async fn run(options: ServeOptions, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
    let app = Arc::new(App::new(options.limits));
    // admin first and on its own thread: probes and scrapes are answered while models load and while all cores are busy
    let admin = admin::start(options.admin, app.clone())?;
    tracing::info!(address = %admin.address, "admin listens on {}", admin.address);

    let (loading, registry_options) = (app.clone(), options.registry.clone());
    let load = tokio::task::spawn_blocking(move || Registry::open(&registry_options, &loading.metrics));
    tokio::pin!(shutdown);
    let registry = tokio::select! {
        loaded = load => loaded.map_err(|e| ServeError::Thread { what: "loading", reason: e.to_string() })??,
        () = &mut shutdown => return Ok(()),
    };
    let (what, address) = ("http", options.http);
    let bind = |source| ServeError::Bind { what, address, source };
    let listener = tokio::net::TcpListener::bind(address).await.map_err(bind)?;
    let bound = listener.local_addr().map_err(bind)?;
    app.open(registry);
    tracing::info!(address = %bound, "http listens on {bound}");
    tracing::info!(start_to_ready_ms = app.started.elapsed().as_millis() as u64, "ready");

    let stop = async {
        shutdown.await;
        app.drain();
        tracing::info!(hold_ms = options.drain_hold.as_millis() as u64, "shutting down: not ready any more");
        tokio::time::sleep(options.drain_hold).await;
    };
    let routes = http::router(app.clone());
    let left = connections::serve(listener, routes, &app, stop, options.drain_timeout).await;
    if left > 0 {
        tracing::warn!(connections = left, "the drain time is over, connections are cut");
    }
    let closing = app.clone();
    let joined = tokio::task::spawn_blocking(move || {
        let Some(registry) = closing.registry() else { return 0 };
        registry.close();
        if registry.join(Instant::now() + Duration::from_secs(2)) == 0 {
            return 0;
        }
        registry.abort();
        registry.join(Instant::now() + Duration::from_secs(2))
    });
    let busy = joined.await.map_err(|e| ServeError::Thread { what: "closing", reason: e.to_string() })?;
    admin.stop();
    if busy > 0 {
        return Err(ServeError::Unfinished(busy));
    }
    tracing::info!("everything is answered, bye");
    Ok(())
}
