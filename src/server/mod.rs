//! The edge: the server's life from start to drain. Each protocol is a module of its own.
//!
//! A server is bound first (addresses known, a taken port fails at once), then run: admin port up → models load and warm
//! up → the HTTP and gRPC ports listen → ready → … → drain → end. Until it listens, connections are refused, so that even a probe
//! that only connects tells the truth. Nothing here knows how a model was made or how an engine runs it.

mod accept;
mod access;
mod admin;
mod app;
mod bodies;
mod classify;
mod compress;
mod control;
mod deadline;
mod descriptors;
mod doors;
#[cfg(test)]
#[path = "../../tests/fuzz/server.rs"]
mod fuzz;
mod grpc;
mod head;
mod http;
mod keys;
pub mod oip;
mod openapi;
mod pace;
mod page;
mod readiness;
mod reload;
mod served;
pub mod status;
mod tls;
#[cfg_attr(not(feature = "otel"), path = "no_traces.rs")]
mod traces;

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
pub use self::keys::KeysError;
use self::pace::Pace;
use self::readiness::Readiness;
use self::reload::Reloader;
pub use self::tls::{TlsError, TlsOptions};
use self::traces::Traces;
use crate::infer::registry::{Registry, RegistryError};
use crate::metrics::{Metrics, Port};

/// How much longer than the request timeout a request may be in work: a run that began in time.
const GRACE: Duration = Duration::from_secs(5);

/// Most that the head and the write timeout are on the admin port.
const ADMIN_TIMEOUT: Duration = Duration::from_secs(10);

/// How a server listens, limits and stops.
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
    /// Most bytes of all request bodies in memory; at least `body_limit` is given.
    pub body_memory: usize,
    /// Client connections open at once, on the HTTP and on the gRPC port; fewer where descriptors are few. When there are
    /// more, the one ends that has done nothing for the longest.
    pub connections: usize,
    /// Longest a client may take from its connection to its first whole request head, and from an answer to the next; and
    /// longest it may be waited for while it sends a body at less than 1 KiB a second.
    pub head_timeout: Duration,
    /// Longest an answer may wait without its client taking any of it, beyond what it takes at 1 KiB a second; then its
    /// connection ends.
    pub write_timeout: Duration,
    /// Certificates; none: plain TCP. The admin port is always plain.
    pub tls: Option<TlsOptions>,
    /// File of API keys, one a line; none: everybody may ask.
    pub api_key_file: Option<PathBuf>,
    /// Origins whose pages may ask (CORS); `*`: all; empty: none.
    pub cors_origins: Vec<String>,
    /// OpenTelemetry collector that spans of requests are sent to (OTLP over gRPC), such as `http://localhost:4317`.
    pub otlp_endpoint: Option<String>,
    /// Clients may load and unload models.
    pub model_control: bool,
    /// How often the repository is looked at for new, changed and gone models; none: only when asked.
    pub watch: Option<Duration>,
    /// How long requests are still taken after a stop was asked for, while readiness already says no.
    pub drain_hold: Duration,
    /// How long requests in flight may take to finish after that.
    pub drain_timeout: Duration,
    /// An engine run longer than this is taken as hung: not ready.
    pub hang_limit: Duration,
    /// Engines out of order for longer than this end the server with an error, so that it is restarted.
    pub fault_limit: Duration,
    /// When the process started: for the time from start to ready.
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
    /// Stop: drain. The second time: stop at once.
    Stop,
    /// Read certificates, API keys and the model repository again.
    Reload,
}

/// Why a server ended without [`Control::Stop`].
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// An address that can't be listened on.
    #[error("can't listen on {address} for {port}: {source}; choose another with --{port}")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// Which port: `http`, `grpc` or `admin`.
        port: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// API keys.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The models.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The engines were out of order for too long.
    #[error("{0}; giving up so that the server is restarted")]
    Fault(String),
    /// The collector of traces.
    #[error("{0}")]
    Traces(String),
    /// The system refused a thread, or a thread died.
    #[error("the server can't run: {0}")]
    Broken(String),
}

/// The async runtime for a server on all of this machine. Its threads only move bytes, the compute threads need the cores:
/// half as many as those leave them more of their time (measured in `benches/serving.rs`).
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    tokio::runtime::Builder::new_multi_thread()
        .thread_name("nfold-io")
        .worker_threads(cores.div_ceil(2))
        .max_blocking_threads(16)
        .enable_all()
        .build()
}

/// A server with its addresses, not yet running.
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
    /// Reads certificates and keys and takes the addresses. The admin port listens from now on, the others once the models
    /// are warm.
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

    /// The server's whole life. `load` opens and warms the models on a thread that may block. Ends after
    /// [`Control::Stop`] with everything answered, or once the engines have failed for longer than the limit. Dropping the sender of `control`
    /// asks for a stop as well.
    pub async fn run<L>(self, load: L, mut control: mpsc::Receiver<Control>) -> Result<(), ServeError>
    where
        L: FnOnce(&Metrics) -> Result<Registry, RegistryError> + Send + 'static,
    {
        let Self { options, metrics, traces, reloader, http, http_address, grpc, grpc_address, admin, .. } = self;
        let broken = |e: std::io::Error| ServeError::Broken(e.to_string());
        let readiness = Arc::new(Readiness::new(options.hang_limit));
        // before models take descriptors of their own
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
        let admin = Admin::start(admin, admin_limits, readiness.clone(), metrics.clone()).map_err(broken)?;

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
            // a port whose task panicked has nothing left to finish; the other has
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

/// Where a browser on this machine finds the page.
fn page_of(address: SocketAddr, tls: bool) -> String {
    let (scheme, port) = (if tls { "https" } else { "http" }, address.port());
    match address.ip() {
        ip if ip.is_unspecified() || ip.is_loopback() => format!("{scheme}://localhost:{port}/"),
        _ => format!("{scheme}://{address}/"),
    }
}

/// `[::]` takes IPv4 as well as IPv6. Where a machine has no IPv6 at all, it is every address that there is.
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

/// An address of our own, not yet listening.
fn reserve(address: SocketAddr) -> std::io::Result<(TcpSocket, SocketAddr)> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // a port in use is told by the system only if nobody else asks to share it
    if address.port() != 0 {
        TcpListener::bind(address)?;
    }
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    let address = socket.local_addr()?;
    Ok((socket, address))
}

/// Ends with the name of a port once its task has ended: its requests are refused, and no other port shows it.
async fn dead<const N: usize>(ports: impl Fn() -> [(&'static str, bool); N]) -> &'static str {
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        tick.tick().await;
        if let Some((port, _)) = ports().into_iter().find(|&(_, ended)| ended) {
            return port;
        }
    }
}

/// Ends with the reason once the engines have been out of order for longer than the limit.
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
