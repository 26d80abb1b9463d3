//! The server, from start to drain. Each protocol is a module of its own.
//!
//! A server is first bound (addresses are known, a port in use fails at once), then run: admin port up → models load
//! and warm up → the HTTP and gRPC ports listen → ready → … → drain → end. Until a port listens, connections are
//! refused, so that a probe that only connects is right too. Nothing here knows how a model was made or how an engine
//! runs it.

mod accept;
mod access;
mod admin;
mod app;
mod bodies;
mod choice;
mod classification;
mod classify;
mod compress;
mod control;
mod deadline;
mod descriptors;
mod doors;
mod embed;
mod explain;
#[cfg(test)]
#[path = "../../tests/fuzz/server.rs"]
mod fuzz;
mod grpc;
mod head;
mod health;
mod hosts;
mod http;
mod keys;
pub mod oip;
mod openapi;
mod pace;
mod page;
mod query;
mod readiness;
mod reload;
mod served;
pub mod status;
mod tls;
#[cfg_attr(not(feature = "otel"), path = "no_traces.rs")]
mod traces;
mod unrouted;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::net::TcpSocket;
use tokio::sync::{mpsc, oneshot};

use self::admin::Admin;
use self::app::App;
use self::bodies::Bodies;
pub use self::bodies::Limits;
use self::control::ModelControl;
pub use self::doors::{Hosts, VertexRoutes};
pub use self::keys::KeysError;
use self::pace::Pace;
use self::readiness::Readiness;
use self::reload::Reloader;
pub use self::tls::{TlsError, TlsOptions};
use self::traces::Traces;
use crate::infer::registry::{Registry, RegistryError};
use crate::metrics::{Metrics, Port};

/// Time beyond the request timeout for a run that began before the deadline.
const GRACE: Duration = Duration::from_secs(5);

/// Upper bound of the head and the write timeout on the admin port.
const ADMIN_TIMEOUT: Duration = Duration::from_secs(10);

/// How a server listens, limits requests and stops.
#[derive(Debug, Clone)]
pub struct Options {
    /// Address of the HTTP port; port 0 picks a free one.
    pub http: SocketAddr,
    /// Address of the gRPC port; port 0 picks a free one.
    pub grpc: SocketAddr,
    /// Address of the admin port; port 0 picks a free one.
    pub admin: SocketAddr,
    /// Longest a request may take, body included; a client may ask for less.
    pub request_timeout: Duration,
    /// Most bytes of a request body, decompressed.
    pub body_limit: usize,
    /// Most bytes of all request bodies in memory; at least `body_limit` is used.
    pub body_memory: usize,
    /// Most open client connections of the HTTP port, and of the gRPC port; fewer where file descriptors are few. At
    /// the limit, the connection that has been quiet the longest is evicted.
    pub connections: usize,
    /// Longest a client may take from its connection to its first complete request head, and from a response to the
    /// next head; also longest a client is waited for while it sends a body at less than 1 KiB per second.
    pub head_timeout: Duration,
    /// Longest a response may wait without its client reading any of it, beyond the time that its bytes need at 1 KiB
    /// per second; then its connection ends.
    pub write_timeout: Duration,
    /// Certificates; `None`: plain TCP. The admin port is always plain.
    pub tls: Option<TlsOptions>,
    /// File of API keys, one per line; `None`: requests need no key.
    pub api_key_file: Option<PathBuf>,
    /// Origins whose pages may send requests (CORS); `*`: all; empty: none.
    pub cors_origins: Vec<String>,
    /// OpenTelemetry collector that receives the spans of requests (OTLP over gRPC), such as `http://localhost:4317`.
    pub otlp_endpoint: Option<String>,
    /// Platforms whose contracts are answered beside the server's own.
    pub hosts: Hosts,
    /// Clients may load and unload models.
    pub model_control: bool,
    /// How often the repository is checked for new, changed and removed models; `None`: only on request.
    pub watch: Option<Duration>,
    /// How long requests are still served after a stop was requested, while readiness already fails.
    pub drain_hold: Duration,
    /// How long requests in flight may take to finish after that.
    pub drain_timeout: Duration,
    /// An engine run longer than this counts as hung: the server is not ready.
    pub hang_limit: Duration,
    /// If engines fail for longer than this, the server ends with an error, so that it is restarted.
    pub fault_limit: Duration,
    /// When the process started; for the metric of the time to ready.
    pub started: Instant,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            http: SocketAddr::from(([0, 0, 0, 0], 8000)),
            grpc: SocketAddr::from(([0, 0, 0, 0], 8001)),
            admin: SocketAddr::from(([0, 0, 0, 0], 8002)),
            request_timeout: Duration::from_secs(10),
            body_limit: 64 << 20,
            body_memory: 256 << 20,
            connections: 1024,
            head_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            tls: None,
            api_key_file: None,
            cors_origins: Vec::new(),
            otlp_endpoint: None,
            hosts: Hosts::default(),
            model_control: false,
            watch: None,
            drain_hold: Duration::ZERO,
            drain_timeout: Duration::from_secs(25),
            hang_limit: Duration::from_secs(30),
            fault_limit: Duration::from_secs(60),
            started: Instant::now(),
        }
    }
}

/// A request to a running server, from a signal or a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Drain; the second time, stop at once.
    Stop,
    /// Read certificates, API keys and the model repository again.
    Reload,
}

/// Why a server ended without [`Control::Stop`].
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The server can't listen on an address.
    #[error("can't listen on {address} for {port}: {source}; choose another with --{port}")]
    Bind {
        /// The requested address.
        address: SocketAddr,
        /// Which port: `http`, `grpc` or `admin`.
        port: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
    /// The certificates can't be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The API keys can't be used.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The models can't be served.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Engines have failed for too long.
    #[error("{0}; giving up so that the server is restarted")]
    Fault(String),
    /// The trace exporter can't be started.
    #[error("{0}")]
    Traces(String),
    /// The system refused a thread, or a thread panicked.
    #[error("the server can't run: {0}")]
    Broken(String),
}

/// The async I/O runtime for a server that has the machine to itself. It has half as many threads as there are cores,
/// which leaves the compute threads more of them (measured in `benches/serving.rs`).
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    tokio::runtime::Builder::new_multi_thread()
        .thread_name("nfold-io")
        .worker_threads(cores.div_ceil(2))
        .max_blocking_threads(16)
        .enable_all()
        .build()
}

/// A server that is bound, but does not run yet.
#[derive(Debug)]
pub struct Server {
    options: Options,
    metrics: Arc<Metrics>,
    traces: Option<Arc<Traces>>,
    reloader: Reloader,
    http: TcpSocket,
    http_address: SocketAddr,
    grpc: TcpSocket,
    grpc_address: SocketAddr,
    admin: TcpListener,
    admin_address: SocketAddr,
}

impl Server {
    /// Reads certificates and keys and binds the addresses. The admin port listens from now on, the others once the
    /// models are warm.
    pub fn bind(options: Options) -> Result<Self, ServeError> {
        let metrics = Arc::new(Metrics::new());
        let traces = options.otlp_endpoint.as_deref().map(Traces::start).transpose().map_err(ServeError::Traces)?;
        let traces = traces.map(Arc::new);
        let reloader = Reloader::open(options.tls.clone(), options.api_key_file.clone(), metrics.clone())?;
        let refuse = |port, address| move |source| ServeError::Bind { address, port, source };
        let (http, http_address) = on_every_family(options.http, reserve).map_err(refuse("http", options.http))?;
        let (grpc, grpc_address) = on_every_family(options.grpc, reserve).map_err(refuse("grpc", options.grpc))?;
        let admin_failed = refuse("admin", options.admin);
        let bind = |address| TcpListener::bind(address).and_then(|l| l.local_addr().map(|address| (l, address)));
        let (admin, admin_address) = on_every_family(options.admin, bind).map_err(admin_failed)?;
        Ok(Self { options, metrics, traces, reloader, http, http_address, grpc, grpc_address, admin, admin_address })
    }

    /// Where the HTTP port will listen.
    pub fn http_address(&self) -> SocketAddr {
        self.http_address
    }

    /// Where the gRPC port will listen.
    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc_address
    }

    /// Where the admin port listens.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// The server's metrics.
    pub fn metrics(&self) -> Arc<Metrics> {
        self.metrics.clone()
    }

    /// Runs the server to its end. `load` opens and warms up the models, on a thread that may block. Returns after
    /// [`Control::Stop`], when the drain is over, or with an error once engines have failed for longer than the limit.
    /// Dropping the sender of `control` requests a stop as well.
    pub async fn run<L>(self, load: L, mut control: mpsc::Receiver<Control>) -> Result<(), ServeError>
    where
        L: FnOnce(&Metrics) -> Result<Registry, RegistryError> + Send + 'static,
    {
        let Self { options, metrics, traces, reloader, http, http_address, grpc, grpc_address, admin, admin_address } =
            self;
        let broken = |e: std::io::Error| ServeError::Broken(e.to_string());
        let readiness = Arc::new(Readiness::new(options.hang_limit));
        // before the models open descriptors of their own
        let shares = descriptors::share(options.connections);
        let Options { head_timeout, write_timeout, .. } = options;
        let limits = |port, tls| accept::Limits {
            port,
            connections: shares.of(port),
            head_timeout,
            write_timeout,
            longest_work: options.request_timeout + GRACE,
            is_stream: grpc::is_stream,
            tls,
        };
        let admin_limits = accept::Limits {
            head_timeout: head_timeout.min(ADMIN_TIMEOUT),
            write_timeout: write_timeout.min(ADMIN_TIMEOUT),
            ..limits(Port::Admin, None)
        };
        let admin =
            Admin::start(admin, http_address, admin_limits, readiness.clone(), metrics.clone()).map_err(broken)?;

        let loading = {
            let metrics = metrics.clone();
            tokio::task::spawn_blocking(move || load(&metrics))
        };
        let registry = tokio::select! {
            loaded = loading => Arc::new(loaded.map_err(|e| ServeError::Broken(e.to_string()))??),
            // no request is in flight yet
            () = reloader.until_stop(&mut control) => return Ok(()),
        };

        let refuse = |port, address| move |source| ServeError::Bind { address, port, source };
        let http = http.listen(1024).map_err(refuse("http", http_address))?;
        let grpc = grpc.listen(1024).map_err(refuse("grpc", grpc_address))?;
        let app = Arc::new(App {
            registry: registry.clone(),
            readiness: readiness.clone(),
            metrics: metrics.clone(),
            request_timeout: options.request_timeout,
            write_timeout: options.write_timeout,
            bodies: Bodies::new(options.body_limit, options.body_memory, &metrics),
            pace: Pace::new(shares.of(Port::Http), metrics.held_refusals.clone()),
            keys: reloader.keys.clone(),
            cors_origins: options.cors_origins.clone(),
            traces: traces.clone(),
            hosts: options.hosts.clone(),
            admin: admin_address,
            control: ModelControl::new(options.model_control, registry.clone(), metrics.clone()),
        });
        let (stop_http, http_stopped) = oneshot::channel();
        let (stop_grpc, grpc_stopped) = oneshot::channel();
        let http_routes = http::routes(app.clone());
        let grpc_routes = grpc::routes(app).map_err(ServeError::Broken)?;
        let open = |port, listener, routes, stopped| {
            let limits = limits(port, reloader.tls.clone());
            tokio::spawn(accept::accept(listener, routes, limits, metrics.clone(), stopped))
        };
        let http = open(Port::Http, http, http_routes, http_stopped);
        let grpc = open(Port::Grpc, grpc, grpc_routes, grpc_stopped);
        readiness.release(registry.clone());
        reloader.serve(registry.clone());
        let start_to_ready = options.started.elapsed();
        metrics.start_to_ready_seconds.set(start_to_ready.as_secs_f64());
        metrics.ready.set(1);
        tracing::info!(protocol = "http", address = %http_address, "HTTP port listens on {http_address}");
        tracing::info!(protocol = "grpc", address = %grpc_address, "gRPC port listens on {grpc_address}");
        tracing::info!(duration_ms = start_to_ready.as_millis() as u64, "ready");
        let url = page_of(http_address, reloader.tls.is_some());
        tracing::info!(url, "try it in a browser: {url}");

        let outcome = tokio::select! {
            () = reloader.until_stop(&mut control) => Ok(()),
            () = reloader.run(options.watch) => Ok(()),
            fault = watch(&registry, &options) => Err(ServeError::Fault(fault)),
            port = dead(|| [("http", http.is_finished()), ("grpc", grpc.is_finished()), ("admin", admin.is_finished())]) => {
                Err(ServeError::Broken(format!("nothing accepts connections on the {port} port any more")))
            }
        };

        readiness.drain();
        metrics.ready.set(0);
        tracing::info!(
            hold_ms = options.drain_hold.as_millis() as u64,
            timeout_ms = options.drain_timeout.as_millis() as u64,
            inflight = metrics.inflight_requests.get(),
            "stopping"
        );
        let drained = async {
            if outcome.is_ok() {
                tokio::time::sleep(options.drain_hold).await;
            }
            readiness.close();
            drop((stop_http, stop_grpc));
            let (http, grpc) = tokio::join!(http, grpc);
            // a port whose task panicked has nothing left to drain
            let mut ports: Vec<accept::Open> = [http, grpc].into_iter().filter_map(Result::ok).collect();
            let finish = join_all(ports.iter_mut().map(accept::Open::finish));
            let finished = tokio::time::timeout(options.drain_timeout, finish).await.is_ok();
            let mut cut = 0;
            if !finished {
                for port in ports {
                    cut += port.cut().await;
                }
            }
            cut
        };
        let cut = tokio::select! {
            cut = drained => cut,
            () = reloader.asked_again(&mut control) => {
                tracing::warn!("asked again: stopping now");
                registry.abort();
                return outcome;
            }
        };
        if cut > 0 {
            tracing::warn!(connections = cut, "cut what was not finished by the drain timeout");
            registry.abort();
        }
        registry.close();
        let hung = tokio::task::spawn_blocking(move || {
            let hung = registry.join(Instant::now() + Duration::from_secs(2));
            traces.inspect(|traces| traces.end());
            admin.stop();
            hung
        });
        let hung = hung.await.map_err(|e| ServeError::Broken(e.to_string()))?;
        if hung > 0 {
            tracing::warn!(threads = hung, "left compute threads that did not end");
        }
        tracing::info!("stopped");
        outcome
    }
}

/// The page's URL for a browser on this machine.
fn page_of(address: SocketAddr, tls: bool) -> String {
    let (scheme, port) = (if tls { "https" } else { "http" }, address.port());
    match address.ip() {
        ip if ip.is_unspecified() || ip.is_loopback() => format!("{scheme}://localhost:{port}/"),
        _ => format!("{scheme}://{address}/"),
    }
}

/// Binds `[::]` for IPv6 and IPv4; on a machine without IPv6, `0.0.0.0`.
fn on_every_family<T>(address: SocketAddr, bind: impl Fn(SocketAddr) -> std::io::Result<T>) -> std::io::Result<T> {
    match bind(address) {
        Err(error) if address.is_ipv6() && address.ip().is_unspecified() && lacks_family(&error) => {
            let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
            tracing::info!(%address, "this machine has no IPv6, so the server listens on {address}");
            bind(address)
        }
        bound => bound,
    }
}

fn lacks_family(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(libc::EAFNOSUPPORT) || error.kind() == std::io::ErrorKind::AddrNotAvailable
}

/// Binds an address without listening on it.
fn reserve(address: SocketAddr) -> std::io::Result<(TcpSocket, SocketAddr)> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // fails if the port is in use; the bind below may succeed nevertheless
    if address.port() != 0 {
        TcpListener::bind(address)?;
    }
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    let address = socket.local_addr()?;
    Ok((socket, address))
}

/// Returns the name of a port once its task has ended: its requests are refused, and no probe of another port shows it.
async fn dead<const N: usize>(ports: impl Fn() -> [(&'static str, bool); N]) -> &'static str {
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        tick.tick().await;
        if let Some((port, _)) = ports().into_iter().find(|&(_, ended)| ended) {
            return port;
        }
    }
}

/// Returns the reason once engines have failed for longer than the limit.
async fn watch(registry: &Registry, options: &Options) -> String {
    let mut since: Option<Instant> = None;
    let mut tick =
        tokio::time::interval((options.fault_limit / 10).clamp(Duration::from_millis(10), Duration::from_secs(1)));
    loop {
        tick.tick().await;
        since = match registry.fault(options.hang_limit) {
            None => None,
            Some(fault) => {
                let first = since.unwrap_or_else(Instant::now);
                if since.is_none() {
                    tracing::error!(fault, "not ready: {fault}");
                }
                if first.elapsed() > options.fault_limit {
                    return fault;
                }
                Some(first)
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_ports_task_that_panics_is_noticed() {
        let lives = tokio::spawn(std::future::pending::<()>());
        let dies = tokio::spawn(async { std::panic::resume_unwind(Box::new("told to panic")) });
        let port = dead(|| [("http", lives.is_finished()), ("grpc", dies.is_finished())]);
        assert_eq!(tokio::time::timeout(Duration::from_secs(20), port).await, Ok("grpc"));
        lives.abort();
    }

    #[test]
    fn without_ipv6_every_address_is_ipv4() {
        let no_ipv6 = |address: SocketAddr| match address {
            SocketAddr::V6(_) => Err(std::io::Error::from_raw_os_error(libc::EAFNOSUPPORT)),
            SocketAddr::V4(_) => Ok(address),
        };
        let of = |text: &str, bind: &dyn Fn(SocketAddr) -> std::io::Result<SocketAddr>| {
            on_every_family(text.parse().expect("an address"), bind).map(|a| a.to_string()).map_err(|e| e.kind())
        };
        assert_eq!(of("[::]:8000", &no_ipv6).as_deref(), Ok("0.0.0.0:8000"));
        assert_eq!(of("[::]:8000", &Ok).as_deref(), Ok("[::]:8000"));
        assert!(of("[::1]:8000", &no_ipv6).is_err(), "an address that was named");
        let taken = |_| Err(std::io::ErrorKind::AddrInUse.into());
        assert_eq!(of("[::]:8000", &taken), Err(std::io::ErrorKind::AddrInUse));
    }
}
