//! `nfold serve` and `nfold healthcheck`: flags → [`ServeOptions`], signals → shutdown.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{anyhow, bail};
use clap::{Args, ValueEnum};

use crate::infer::engine::{EngineOptions, Provider};
use crate::infer::image::ImageLimits;
use crate::infer::registry::RegistryOptions;
use crate::infer::scheduler::SchedulerOptions;
use crate::logging::{self, LogFormat};
use crate::server::{self, Limits, ServeOptions};

/// Arguments of `nfold serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Model repository: every model and version in it is served
    #[arg(long, env = "NFOLD_REPOSITORY", default_value = "repository", value_name = "DIR")]
    repository: PathBuf,
    /// Serve only this model, NAME or NAME:VERSION; may be repeated
    #[arg(long = "model", env = "NFOLD_MODEL", value_delimiter = ',', value_parser = parse_model, value_name = "NAME[:VERSION]")]
    models: Vec<(String, Option<u32>)>,
    /// Address of the HTTP port; port 0 picks a free one
    #[arg(long, env = "NFOLD_HTTP", default_value = "0.0.0.0:8000", value_name = "ADDR")]
    http: SocketAddr,
    /// Address of the admin port (/livez, /readyz, /metrics)
    #[arg(long, env = "NFOLD_ADMIN", default_value = "0.0.0.0:8002", value_name = "ADDR")]
    admin: SocketAddr,
    /// Hardware that runs the models; cuda and tensorrt need a build with `--features gpu`
    #[arg(long, env = "NFOLD_PROVIDER", default_value = "cpu")]
    provider: ProviderArg,
    /// Engine threads for each model, each with its own session [default: one per core]
    #[arg(long, env = "NFOLD_WORKERS", value_name = "N")]
    workers: Option<usize>,
    /// Threads inside one session
    #[arg(long, env = "NFOLD_INTRA_THREADS", default_value_t = 1, value_name = "N")]
    intra_threads: usize,
    /// Threads that only decode and resize; with 0 the engine threads do it themselves [default: 0 on cpu, else one per core]
    #[arg(long, env = "NFOLD_DECODERS", value_name = "N")]
    decoders: Option<usize>,
    /// Most images in one engine run
    #[arg(long, env = "NFOLD_MAX_BATCH_SIZE", default_value_t = 8, value_name = "N")]
    max_batch_size: usize,
    /// How long an image may wait for company while an engine is free, in microseconds
    #[arg(long, env = "NFOLD_MAX_QUEUE_DELAY_US", default_value_t = 0, value_name = "US")]
    max_queue_delay_us: u64,
    /// Most images admitted and not yet answered, for each model; more are refused with 429
    #[arg(long, env = "NFOLD_QUEUE_LIMIT", default_value_t = 256, value_name = "N")]
    queue_limit: usize,
    /// Deadline of a request in milliseconds; a request's own can only be shorter
    #[arg(long, env = "NFOLD_REQUEST_TIMEOUT_MS", default_value_t = 30_000, value_name = "MS")]
    request_timeout_ms: u64,
    /// Largest request body in bytes
    #[arg(long, env = "NFOLD_MAX_BODY_BYTES", default_value_t = 64 << 20, value_name = "BYTES")]
    max_body_bytes: usize,
    /// Largest encoded image in bytes
    #[arg(long, env = "NFOLD_MAX_IMAGE_BYTES", default_value_t = ImageLimits::default().max_bytes, value_name = "BYTES")]
    max_image_bytes: usize,
    /// Largest image in pixels, width times height
    #[arg(long, env = "NFOLD_MAX_IMAGE_PIXELS", default_value_t = ImageLimits::default().max_pixels, value_name = "N")]
    max_image_pixels: u64,
    /// Most client connections at once
    #[arg(long, env = "NFOLD_MAX_CONNECTIONS", default_value_t = 1024, value_name = "N")]
    max_connections: usize,
    /// Time a client has to send a request's head, in milliseconds
    #[arg(long, env = "NFOLD_HEADER_TIMEOUT_MS", default_value_t = 10_000, value_name = "MS")]
    header_timeout_ms: u64,
    /// After the first SIGTERM or SIGINT: how long to go on answering, not ready any more, in milliseconds
    #[arg(long, env = "NFOLD_DRAIN_HOLD_MS", default_value_t = 0, value_name = "MS")]
    drain_hold_ms: u64,
    /// After that: how long requests in flight may take, in milliseconds
    #[arg(long, env = "NFOLD_DRAIN_TIMEOUT_MS", default_value_t = 20_000, value_name = "MS")]
    drain_timeout_ms: u64,
    /// How log lines look
    #[arg(long, env = "NFOLD_LOG_FORMAT", default_value = "text")]
    log_format: LogFormatArg,
    /// What is logged: a level, or levels by module
    #[arg(long, env = "NFOLD_LOG", default_value = "info,ort=warn", value_name = "FILTER")]
    log: String,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ProviderArg {
    Cpu,
    Cuda,
    Tensorrt,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormatArg {
    Text,
    Json,
}

fn parse_model(text: &str) -> Result<(String, Option<u32>), String> {
    match text.split_once(':') {
        None => Ok((text.into(), None)),
        Some((name, version)) => {
            let version = version.parse().map_err(|_| format!("`{version}` is not a version number"))?;
            Ok((name.into(), Some(version)))
        }
    }
}

impl ServeArgs {
    fn options(&self) -> ServeOptions {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let provider = match self.provider {
            ProviderArg::Cpu => Provider::Cpu,
            ProviderArg::Cuda => Provider::Cuda,
            ProviderArg::Tensorrt => Provider::TensorRt,
        };
        let on_cpu = provider == Provider::Cpu;
        // a GPU runs one session at a time, and its thread mostly waits
        let workers = self.workers.unwrap_or(if on_cpu { (cores / self.intra_threads.max(1)).max(1) } else { 1 });
        let milliseconds = Duration::from_millis;
        ServeOptions {
            http: self.http,
            admin: self.admin,
            registry: RegistryOptions {
                repository: self.repository.clone(),
                models: self.models.clone(),
                engine: EngineOptions { provider, intra_threads: self.intra_threads, spinning: false },
                scheduler: SchedulerOptions {
                    workers,
                    decoders: self.decoders.unwrap_or(if on_cpu { 0 } else { cores }),
                    max_batch: self.max_batch_size,
                    max_queue_delay: Duration::from_micros(self.max_queue_delay_us),
                    queue_limit: self.queue_limit,
                    image_limits: ImageLimits {
                        max_bytes: self.max_image_bytes,
                        max_pixels: self.max_image_pixels,
                        ..ImageLimits::default()
                    },
                },
            },
            limits: Limits {
                max_body_bytes: self.max_body_bytes,
                max_connections: self.max_connections,
                header_timeout: milliseconds(self.header_timeout_ms),
                request_timeout: milliseconds(self.request_timeout_ms),
                ..Limits::default()
            },
            drain_hold: milliseconds(self.drain_hold_ms),
            drain_timeout: milliseconds(self.drain_timeout_ms),
        }
    }
}

/// Runs `nfold serve` until a signal ends it.
pub fn run(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    let format = match args.log_format {
        LogFormatArg::Text => LogFormat::Text,
        LogFormatArg::Json => LogFormat::Json,
    };
    logging::init(format, &args.log).map_err(|e| anyhow!("{e}; see --log"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let served = runtime.block_on(server::run(args.options(), signalled()));
    // a signal while models load must not wait for the loading thread
    runtime.shutdown_background();
    served?;
    Ok(ExitCode::SUCCESS)
}

/// Resolves at the first SIGTERM or SIGINT. The second one ends the process at once.
async fn signalled() {
    one_signal().await;
    tokio::spawn(async {
        one_signal().await;
        tracing::warn!("second signal: stopping at once");
        std::process::exit(1);
    });
}

async fn one_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let interrupt = tokio::signal::ctrl_c();
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt => {}
            }
        }
        // no handler to be had for SIGTERM: it then ends the process without a drain, SIGINT still drains
        Err(_) => drop(interrupt.await),
    }
}

/// Arguments of `nfold healthcheck`.
#[derive(Debug, Args)]
pub struct HealthcheckArgs {
    /// Address of the admin port
    #[arg(long, env = "NFOLD_ADMIN", default_value = "127.0.0.1:8002", value_name = "ADDR")]
    admin: SocketAddr,
    /// How long to wait for the answer, in milliseconds
    #[arg(long, env = "NFOLD_HEALTHCHECK_TIMEOUT_MS", default_value_t = 2_000, value_name = "MS")]
    timeout_ms: u64,
}

/// Runs `nfold healthcheck`: fails unless `/readyz` says that the server is ready.
pub fn healthcheck(args: &HealthcheckArgs) -> anyhow::Result<ExitCode> {
    let mut address = args.admin;
    if address.ip().is_unspecified() {
        // the server's own setting, shared through the environment, says where it listens
        address.set_ip(IpAddr::V4(Ipv4Addr::LOCALHOST));
    }
    let timeout = Duration::from_millis(args.timeout_ms.max(1));
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        write!(stream, "GET /readyz HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.take(64 << 10).read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let answer = ask().map_err(|e| anyhow!("no server answers at {address}: {e}; is `nfold serve` running there?"))?;
    if !answer.starts_with("HTTP/1.1 200") {
        let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
        bail!("the server at {address} is not ready: {}", body.trim());
    }
    Ok(ExitCode::SUCCESS)
}
