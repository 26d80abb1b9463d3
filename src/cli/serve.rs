//! `nfold serve`: arguments, their defaults, and the start of the server.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use clap::{Args, ValueEnum};
use tokio::sync::mpsc;

use super::addresses;
use super::hosts::HostArgs;
use super::images::ImageArgs;
use super::signals::Signals;
use super::source::{FoldingArgs, SourceArgs};
use crate::checkpoint::{self, OpenOptions};
use crate::engine::graph_cache::GraphCache;
use crate::engine::{EngineOptions, GpuOptions, Kernels, Provider};
use crate::fold::FoldOptions;
use crate::infer::job::{Invariance, SchedulerOptions};
use crate::infer::registry::{Registry, RegistryError, RegistryOptions};
use crate::logging::{self, LogFormat};
use crate::metrics::Metrics;
use crate::model::check_repository;
use crate::server::{self, Hosts, Options, Server, TlsOptions};
use crate::sources::{Served, ServedOptions};

/// The HTTP port, where nobody says another.
const HTTP_PORT: u16 = 8000;

/// Durations are a number and a unit: `500ms`, `10s`, `2m`. Every flag can be set by the variable beside it.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Checkpoint to fold and serve, optionally with a name as NAME=SOURCE: a folder, a file of weights, or a model on
    /// the hub (ORG/NAME[@REVISION]); repeat for several. Checked again on SIGHUP [default: the models of the
    /// repository]
    #[arg(value_name = "SOURCE", value_parser = source)]
    sources: Vec<(Option<String>, PathBuf)>,
    /// Folder of folded models, NAME/VERSION/{model.onnx,manifest.json}; if it is a checkpoint itself, it is folded and
    /// served like a SOURCE. Ignored if there is a SOURCE
    #[arg(help_heading = "Models", long, value_name = "DIR", env = "NFOLD_REPOSITORY", default_value = "repository")]
    repository: PathBuf,
    /// Model to serve, all versions or one; repeat for several [default: everything in the repository]
    #[arg(help_heading = "Models", long = "model", value_name = "NAME[:VERSION]", env = "NFOLD_MODEL", value_delimiter = ',', value_parser = model)]
    models: Vec<(String, Option<u64>)>,
    /// Model for requests that name none [default: the only one, and the model of a single SOURCE]
    #[arg(help_heading = "Models", long, value_name = "NAME", env = "NFOLD_DEFAULT_MODEL", value_parser = name)]
    default_model: Option<String>,
    /// Cache folder for folded SOURCEs, by digest and options [default: nfold in the user's cache folder, or a
    /// temporary folder if that can't be written]
    #[arg(help_heading = "Models", long, value_name = "DIR", env = "NFOLD_CACHE")]
    cache: Option<PathBuf>,
    #[command(flatten, next_help_heading = "Sources")]
    checkpoint: SourceArgs,
    #[command(flatten, next_help_heading = "Sources")]
    folding: FoldingArgs,
    /// Serve the other models if one does not start (metric nfold_models_skipped); otherwise the start fails, so that
    /// no rollout succeeds with a broken model
    #[arg(help_heading = "Models", long, env = "NFOLD_SKIP_BROKEN_MODELS", value_parser = clap::builder::FalseyValueParser::new())]
    skip_broken_models: bool,
    /// Open, verify and warm up every model like a real start, fill --graph-cache, and exit without listening: exit
    /// code 0 if all of them would be served
    #[arg(help_heading = "Models", long, env = "NFOLD_CHECK", value_parser = clap::builder::FalseyValueParser::new())]
    check: bool,
    /// Most pixels of a model's input, height times width: the warm-up runs a batch of such images, which needs memory
    /// for their feature maps; a model with a larger input does not start
    #[arg(help_heading = "Models", long, value_name = "PIXELS", env = "NFOLD_MAX_INPUT_PIXELS", default_value_t = 1024 * 1024, value_parser = clap::value_parser!(u64).range(1..=4096 * 4096))]
    max_input_pixels: u64,
    /// Address of the HTTP port, such as 127.0.0.1:8000, localhost:8000 or :8000; port 0 picks a free one;
    /// on a platform its port (--hosts) [default: 0.0.0.0:8000]
    #[arg(help_heading = "Addresses", long, value_name = "ADDR", env = "NFOLD_HTTP", value_parser = addresses::listen)]
    http: Option<SocketAddr>,
    /// Number of the HTTP port, in place of the one in --http
    #[arg(help_heading = "Addresses", long, value_name = "N", env = "NFOLD_PORT")]
    port: Option<u16>,
    #[command(flatten)]
    platforms: HostArgs,
    /// Address of the gRPC port
    #[arg(help_heading = "Addresses", long, value_name = "ADDR", env = "NFOLD_GRPC", default_value = "0.0.0.0:8001", value_parser = addresses::listen)]
    grpc: SocketAddr,
    /// Address of the admin port: /livez, /readyz, /metrics
    #[arg(help_heading = "Addresses", long, value_name = "ADDR", env = "NFOLD_ADMIN", default_value = "0.0.0.0:8002", value_parser = addresses::listen)]
    admin: SocketAddr,
    /// Hardware that runs the graphs
    #[arg(help_heading = "Engines", long, value_enum, env = "NFOLD_PROVIDER", default_value = "cpu")]
    provider: ProviderArg,
    /// Index of the GPU
    #[arg(help_heading = "Engines", long, value_name = "N", env = "NFOLD_DEVICE", default_value_t = 0)]
    device: u16,
    /// Serve a model even if a part of it runs on another provider than requested (metric nfold_provider_nodes)
    #[arg(help_heading = "Engines", long, env = "NFOLD_ALLOW_FALLBACK", value_parser = clap::builder::FalseyValueParser::new())]
    allow_fallback: bool,
    /// Let TensorRT compute in half precision; CUDA does so for models folded with --precision fp16
    #[arg(help_heading = "Engines", long, env = "NFOLD_TENSORRT_FP16", value_parser = clap::builder::FalseyValueParser::new())]
    tensorrt_fp16: bool,
    /// Cache folder for the engines that TensorRT builds, by the model's digest [default: built at every start]
    #[arg(help_heading = "Engines", long, value_name = "DIR", env = "NFOLD_TENSORRT_CACHE")]
    tensorrt_cache: Option<PathBuf>,
    /// Let CUDA compute single-precision models with the 10-bit mantissa of half precision (TensorFloat-32); the golden
    /// answer is then compared with half precision's tolerance
    #[arg(help_heading = "Engines", long, env = "NFOLD_CUDA_TF32", value_parser = clap::builder::FalseyValueParser::new())]
    cuda_tf32: bool,
    /// Lay out feature maps with channels last (NHWC) on CUDA
    #[arg(help_heading = "Engines", long, env = "NFOLD_CUDA_NHWC", value_parser = clap::builder::FalseyValueParser::new())]
    cuda_nhwc: bool,
    /// Add biases in cuDNN's own kernels on CUDA, not in kernels after them: for TensorFloat-32 with channels last
    #[arg(help_heading = "Engines", long, env = "NFOLD_CUDA_FUSE_CONV_BIAS", value_parser = clap::builder::FalseyValueParser::new())]
    cuda_fuse_conv_bias: bool,
    /// Record the kernels of each batch size as a CUDA graph and replay it
    #[arg(help_heading = "Engines", long, env = "NFOLD_CUDA_GRAPH", value_parser = clap::builder::FalseyValueParser::new())]
    cuda_graph: bool,
    /// Most bytes of GPU memory for the feature maps of one engine; a model that needs more is not loaded [default: the
    /// free memory]
    #[arg(help_heading = "Engines", long, value_name = "BYTES", env = "NFOLD_DEVICE_MEMORY", value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    device_memory: Option<u64>,
    /// Threads with an engine each, per model; each has a copy of the weights (all share one with AVX2,
    /// AVX-512 or --graph-cache) [default: number of cores; 3 on a GPU: one computes while the others move images]
    #[arg(help_heading = "Engines", long, value_name = "N", env = "NFOLD_WORKERS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
    /// Threads inside one engine run
    #[arg(help_heading = "Engines", long, value_name = "N", env = "NFOLD_INTRA_THREADS", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    intra_threads: u16,
    /// Threads of one further engine that runs an image when nothing else is in work: an idle machine uses all its
    /// cores for an image, a busy one a core per image; 0 disables it [default: number of cores; 0 on a GPU]
    #[arg(help_heading = "Engines", long, value_name = "N", env = "NFOLD_ELASTIC_THREADS", value_parser = clap::value_parser!(u16).range(0..=1024))]
    elastic_threads: Option<u16>,
    /// Run graphs with the channels they were folded with; otherwise, channels are padded to multiples of 16 (with
    /// AVX-512) or 8 (with AVX2), the block size of the kernels, and laid out in blocks
    #[arg(help_heading = "Engines", long, env = "NFOLD_NO_CHANNEL_PADDING", value_parser = clap::builder::FalseyValueParser::new())]
    no_channel_padding: bool,
    /// Kernels for operators that nfold and ONNX Runtime both have, in graphs that nfold lays out (with AVX2 or
    /// AVX-512)
    #[arg(help_heading = "Engines", long, value_name = "WHOSE", default_value = "own", env = "NFOLD_KERNELS")]
    kernels: KernelsOf,
    /// Cache folder for graphs as ONNX Runtime optimises them for this machine: later starts load those. Created if
    /// missing; only the server should be able to write to it [default: none]
    #[arg(help_heading = "Engines", long, value_name = "DIR", env = "NFOLD_GRAPH_CACHE")]
    graph_cache: Option<PathBuf>,
    /// Further threads that only decode images; with 0 the workers decode [default: 0; number of cores on a GPU]
    #[arg(help_heading = "Engines", long, value_name = "N", env = "NFOLD_DECODERS", value_parser = clap::value_parser!(u16).range(0..=1024))]
    decoders: Option<u16>,
    /// Most images per engine run [default: 8; 32 on a GPU]
    #[arg(help_heading = "Queue", long, value_name = "N", env = "NFOLD_MAX_BATCH_SIZE", value_parser = clap::value_parser!(u16).range(1..=1024))]
    max_batch_size: Option<u16>,
    /// Sizes that batches are padded to, such as 1,4,8: on a GPU, each has a session of its own, and logits may depend
    /// on the batch size [default: none; powers of two up to --max-batch-size on a GPU]
    #[arg(help_heading = "Queue", long, value_name = "N,…", env = "NFOLD_BATCH_BUCKETS", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch_buckets: Vec<u16>,
    /// Test at the start whether an image's logits depend on its batch, for every batch size: `require` refuses to
    /// serve such a model, `report` logs and exports the difference (on a CPU while the first images are answered),
    /// `off` skips the test
    #[arg(help_heading = "Engines", long, value_enum, env = "NFOLD_INVARIANCE", default_value = "report")]
    invariance: InvarianceArg,
    /// How long an image may wait for others to share its batch although an engine is free; under load, batches form
    /// without it
    #[arg(help_heading = "Queue", long, value_name = "TIME", env = "NFOLD_MAX_QUEUE_DELAY", default_value = "0ms", value_parser = duration)]
    max_queue_delay: Duration,
    /// Most images admitted and not yet answered, per model; more are refused with 429 and Retry-After
    #[arg(help_heading = "Queue", long, value_name = "N", env = "NFOLD_QUEUE_LIMIT", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    queue_limit: u32,
    /// Longest estimated wait at which an image of a burst is admitted, by the measured speed; otherwise it is refused
    /// as above. Two images per worker are always admitted
    #[arg(help_heading = "Queue", long, value_name = "TIME", env = "NFOLD_MAX_QUEUE_WAIT", default_value = "1s", value_parser = positive)]
    max_queue_wait: Duration,
    /// Longest estimated wait in a standing queue: once waits stay above it, the admitted wait shrinks from
    /// --max-queue-wait to this within half a second; with the value of --max-queue-wait it never shrinks
    #[arg(help_heading = "Queue", long, value_name = "TIME", env = "NFOLD_STANDING_WAIT", default_value = "100ms", value_parser = positive)]
    standing_wait: Duration,
    /// Longest a request may take, body included; a client may ask for less (x-request-timeout-ms)
    #[arg(help_heading = "Limits", long, value_name = "TIME", env = "NFOLD_REQUEST_TIMEOUT", default_value = "10s", value_parser = positive)]
    request_timeout: Duration,
    #[command(flatten)]
    images: ImageArgs,
    /// Most bytes of a request body, decompressed
    #[arg(help_heading = "Limits", long, value_name = "BYTES", env = "NFOLD_BODY_LIMIT", default_value_t = 64 << 20, value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    body_limit: u64,
    /// Most bytes that requests hold at once, on both ports: bodies, decompressed and decoded data, and responses until
    /// they are written; more are refused with 429
    #[arg(help_heading = "Limits", long, value_name = "BYTES", env = "NFOLD_BODY_MEMORY", default_value_t = 256 << 20, value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    body_memory: u64,
    /// Most open client connections, on each port; beyond that, the connection that has been quiet the longest is
    /// closed
    #[arg(help_heading = "Limits", long, value_name = "N", env = "NFOLD_CONNECTIONS", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    connections: u32,
    /// Longest a client may take from its connection to its first complete request head; also ends idle connections,
    /// and bodies that arrive at less than 1 KiB per second
    #[arg(help_heading = "Limits", long, value_name = "TIME", env = "NFOLD_HEAD_TIMEOUT", default_value = "30s", value_parser = positive)]
    head_timeout: Duration,
    /// Longest a response may wait without its client reading any of it, or at less than 1 KiB per second; then its
    /// connection ends
    #[arg(help_heading = "Limits", long, value_name = "TIME", env = "NFOLD_WRITE_TIMEOUT", default_value = "30s", value_parser = positive)]
    write_timeout: Duration,
    /// Certificate of the HTTP and gRPC ports, PEM; read again on SIGHUP
    #[arg(help_heading = "Security", long, value_name = "FILE", env = "NFOLD_TLS_CERT", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key of the certificate, PEM
    #[arg(help_heading = "Security", long, value_name = "FILE", env = "NFOLD_TLS_KEY", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Authorities of client certificates, PEM; clients without a certificate from one of them are refused
    #[arg(help_heading = "Security", long, value_name = "FILE", env = "NFOLD_TLS_CLIENT_CA", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
    /// File of API keys, one per line; requests need `authorization: Bearer KEY`. Read again on SIGHUP
    #[arg(help_heading = "Security", long, value_name = "FILE", env = "NFOLD_API_KEY_FILE")]
    api_key_file: Option<PathBuf>,
    /// Origin whose pages may call this server (CORS), such as https://example.org, or `*`; repeat for several
    #[arg(help_heading = "Security", long = "cors-origin", value_name = "ORIGIN", env = "NFOLD_CORS_ORIGIN", value_delimiter = ',', value_parser = origin)]
    cors_origins: Vec<String>,
    /// OpenTelemetry collector (OTLP over gRPC) for a span per request, such as http://localhost:4317; needs a build
    /// with `--features otel`
    #[arg(help_heading = "Logs", long, value_name = "URL", env = "NFOLD_OTLP_ENDPOINT")]
    otlp_endpoint: Option<String>,
    /// Let clients load and unload models of the repository
    #[arg(help_heading = "Models", long, env = "NFOLD_MODEL_CONTROL", value_parser = clap::builder::FalseyValueParser::new())]
    model_control: bool,
    /// How often to check the repository for new, changed and removed models; sources are not checked [default: only on
    /// SIGHUP]
    #[arg(help_heading = "Models", long, value_name = "TIME", env = "NFOLD_WATCH", value_parser = positive)]
    watch: Option<Duration>,
    /// After SIGTERM: how long requests are still served while readiness fails (5s suits Kubernetes without a preStop
    /// hook)
    #[arg(help_heading = "Limits", long, value_name = "TIME", env = "NFOLD_DRAIN_HOLD", default_value = "0s", value_parser = duration)]
    drain_hold: Duration,
    /// After that: how long requests in flight may take to finish
    #[arg(help_heading = "Limits", long, value_name = "TIME", env = "NFOLD_DRAIN_TIMEOUT", default_value = "25s", value_parser = duration)]
    drain_timeout: Duration,
    /// An engine run longer than this counts as hung, and the server as not ready
    #[arg(help_heading = "Engines", long, value_name = "TIME", env = "NFOLD_HANG_LIMIT", default_value = "30s", value_parser = positive)]
    hang_limit: Duration,
    /// If engines fail for longer than this, the server ends with exit code 1
    #[arg(help_heading = "Engines", long, value_name = "TIME", env = "NFOLD_FAULT_LIMIT", default_value = "60s", value_parser = positive)]
    fault_limit: Duration,
    /// Format of log lines; they go to stderr, and are dropped and counted if nobody reads them
    #[arg(help_heading = "Logs", long, value_enum, env = "NFOLD_LOG_FORMAT", default_value = "text")]
    log_format: LogFormatArg,
    /// Log filter, in the syntax of RUST_LOG
    #[arg(
        help_heading = "Logs",
        long,
        value_name = "FILTER",
        env = "NFOLD_LOG",
        default_value = "info,ort=warn,h2=error"
    )]
    log: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KernelsOf {
    /// nfold's where they are faster, else ONNX Runtime's.
    Own,
    /// ONNX Runtime's.
    Runtime,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum ProviderArg {
    Cpu,
    Cuda,
    #[value(name = "tensorrt")]
    TensorRt,
}

impl ProviderArg {
    pub(super) fn provider(self) -> Provider {
        match self {
            Self::Cpu => Provider::Cpu,
            Self::Cuda => Provider::Cuda,
            Self::TensorRt => Provider::TensorRt,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum InvarianceArg {
    Require,
    Report,
    Off,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormatArg {
    Text,
    Json,
}

impl ServeArgs {
    /// Typed options. Defaults depend on the provider and on the number of cores.
    fn resolve(mut self) -> anyhow::Result<(Options, RegistryOptions, Option<ServedOptions>)> {
        let hosts = self.on_platforms()?;
        let served = self.served();
        let mut http = self.http.unwrap_or(SocketAddr::from(([0, 0, 0, 0], HTTP_PORT)));
        if let Some(port) = self.port {
            http.set_port(port);
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let provider = self.provider.provider();
        let on_cpu = provider == Provider::Cpu;
        let (decoder, decode_memory) = self.images.resolve();
        let intra_threads = usize::from(self.intra_threads);
        let fitting = if on_cpu { (cores / intra_threads).max(1) } else { 3 };
        let max_batch = self.max_batch_size.map_or(if on_cpu { 8 } else { 32 }, usize::from);
        let buckets = match self.batch_buckets.as_slice() {
            [] if on_cpu => Vec::new(),
            [] => (0..).map(|power| 1 << power).take_while(|&size| size < max_batch).chain([max_batch]).collect(),
            given => given.iter().map(|&b| b.into()).collect(),
        };
        let registry = RegistryOptions {
            repository: self.repository,
            models: self.models,
            engine: EngineOptions {
                provider,
                intra_threads,
                spinning: false,
                gpu: GpuOptions {
                    device: self.device,
                    allow_fallback: self.allow_fallback,
                    tf32: self.cuda_tf32,
                    prefer_nhwc: self.cuda_nhwc,
                    fuse_conv_bias: self.cuda_fuse_conv_bias,
                    cuda_graph: self.cuda_graph,
                    memory_limit: self.device_memory.map(|b| usize::try_from(b).unwrap_or(usize::MAX)),
                    tensorrt_fp16: self.tensorrt_fp16,
                    tensorrt_cache: self.tensorrt_cache,
                    ..GpuOptions::default()
                },
            },
            max_input_pixels: self.max_input_pixels,
            skip_broken: self.skip_broken_models,
            default_model: self.default_model,
            pad_channels: !self.no_channel_padding,
            kernels: if self.kernels == KernelsOf::Runtime { Kernels::Runtime } else { Kernels::Own },
            graph_cache: self.graph_cache.map(GraphCache::new),
            elastic_threads: self.elastic_threads.map_or(if on_cpu { cores } else { 0 }, usize::from),
            scheduler: SchedulerOptions {
                workers: self.workers.map_or(fitting, usize::from),
                decoders: self.decoders.map_or(if on_cpu { 0 } else { cores }, usize::from),
                max_batch,
                max_queue_delay: self.max_queue_delay,
                queue_limit: self.queue_limit as usize,
                max_queue_wait: self.max_queue_wait,
                standing_wait: self.standing_wait,
                decoder,
                decode_memory,
                buckets,
                invariance: match self.invariance {
                    InvarianceArg::Require => Invariance::Require,
                    InvarianceArg::Report => Invariance::Report,
                    InvarianceArg::Off => Invariance::Off,
                },
                one_by_one: false,
                // a GPU's sessions of every size are opened at once
                ready_at_one: on_cpu && !self.check,
            },
        };
        let options = Options {
            http,
            grpc: self.grpc,
            admin: self.admin,
            request_timeout: self.request_timeout,
            body_limit: usize::try_from(self.body_limit).unwrap_or(usize::MAX),
            body_memory: usize::try_from(self.body_memory).unwrap_or(usize::MAX),
            connections: self.connections as usize,
            head_timeout: self.head_timeout,
            write_timeout: self.write_timeout,
            tls: self.tls_cert.zip(self.tls_key).map(|(cert, key)| TlsOptions {
                cert,
                key,
                client_ca: self.tls_client_ca,
            }),
            api_key_file: self.api_key_file,
            cors_origins: self.cors_origins,
            otlp_endpoint: self.otlp_endpoint,
            hosts,
            model_control: self.model_control,
            watch: self.watch,
            drain_hold: self.drain_hold,
            drain_timeout: self.drain_timeout,
            hang_limit: self.hang_limit,
            fault_limit: self.fault_limit,
            started: Instant::now(),
        };
        Ok((options, registry, served))
    }

    /// What platforms ask for, where the user has asked for nothing else; it is logged.
    fn on_platforms(&mut self) -> anyhow::Result<Hosts> {
        let platforms = self.platforms.resolve()?;
        let names = platforms.names();
        if names.is_empty() {
            return Ok(platforms.hosts);
        }
        if self.http.is_none() && self.port.is_none() {
            self.port = platforms.port;
        }
        let is_empty = |folder: &Path| folder.read_dir().map_or(true, |mut entries| entries.next().is_none());
        if let Some(models) = platforms.models.filter(|_| self.sources.is_empty() && is_empty(&self.repository)) {
            let (from, repository) = (models.display().to_string(), self.repository.display().to_string());
            tracing::info!(from, repository, "models come from {from}: there are none in {repository}");
            self.repository = models;
        }
        let hosts = names.join(", ");
        tracing::info!(hosts, "contracts of {hosts} are answered, too (--hosts none: they are not)");
        if std::env::var_os("AIP_STORAGE_URI").is_some_and(|uri| !uri.is_empty()) {
            tracing::warn!("AIP_STORAGE_URI is not read: put the models into the image, or mount them");
        }
        Ok(platforms.hosts)
    }

    /// The sources, where models come from such: those that were typed, or a repository that is a checkpoint itself.
    fn served(&mut self) -> Option<ServedOptions> {
        let mut sources = std::mem::take(&mut self.sources);
        let repository = self.repository.display();
        if !sources.is_empty() {
            if self.repository.is_dir() {
                tracing::info!(%repository, "the sources are served; the repository is not looked at");
            }
        } else if checkpoint::is_folder(&self.repository) {
            tracing::info!(%repository, "the repository is a checkpoint itself: it is folded and served");
            sources.push((self.default_model.clone(), self.repository.clone()));
        }
        let (open, fold) = (self.checkpoint.options(), self.folding.options());
        if sources.is_empty() {
            if open != OpenOptions::default() || fold != FoldOptions::default() {
                tracing::warn!(
                    "options of checkpoints (--labels, --size and others) mean nothing to models that are folded already"
                );
            }
            return None;
        }
        if self.watch.is_some() {
            tracing::warn!("--watch does not look at sources: SIGHUP does");
        }
        Some(ServedOptions { sources, open, fold, cache: self.cache.clone() })
    }
}

/// Opens the models; sources are fetched and folded first, while no engine uses memory.
fn open(
    mut registry: RegistryOptions,
    served: Option<ServedOptions>,
    metrics: &Metrics,
) -> Result<Registry, RegistryError> {
    let Some(served) = served else { return Registry::open(&registry, metrics) };
    let count = served.sources.len();
    let served = Served::open(served, registry.clone()).map_err(|e| RegistryError::Source(Box::new(e)))?;
    let names = served.names();
    if names.is_empty() {
        return Err(RegistryError::AllBroken(count));
    }
    if count == 1 && registry.default_model.is_none() {
        registry.default_model = names.first().cloned();
    }
    Registry::open_from(&served, Box::new(served.later()), &registry, metrics)
}

/// Serves until SIGTERM or SIGINT; a second one stops at once. Threads that load models, or hang in an engine, may
/// still run when it returns: [end](super::signals::end) the process instead of returning from `main`.
pub fn run(args: ServeArgs) -> anyhow::Result<ExitCode> {
    let format = match args.log_format {
        LogFormatArg::Text => LogFormat::Text,
        LogFormatArg::Json => LogFormat::Json,
    };
    logging::init(format, &args.log).map_err(anyhow::Error::msg)?;
    let for_tensorrt = args.tensorrt_fp16 || args.tensorrt_cache.is_some();
    if for_tensorrt && !matches!(args.provider, ProviderArg::TensorRt) {
        return Err(anyhow!("--tensorrt-fp16 and --tensorrt-cache mean something to --provider tensorrt only"));
    }
    let for_cuda = args.cuda_tf32 || args.cuda_nhwc || args.cuda_fuse_conv_bias || args.cuda_graph;
    if (for_cuda || args.device_memory.is_some()) && matches!(args.provider, ProviderArg::Cpu) {
        return Err(anyhow!("--cuda-… and --device-memory mean something to --provider cuda or tensorrt only"));
    }
    let check = args.check;
    let (options, registry, served) = args.resolve()?;
    // before a port listens
    match &served {
        None => check_repository(&registry.repository)?,
        // one that is broken is told when the others are loaded
        Some(_) if registry.skip_broken => {}
        Some(served) => served.check()?,
    }
    if check {
        return check_models(registry, served);
    }
    let runtime = server::runtime().map_err(|e| anyhow!("can't start the async runtime: {e}"))?;
    let served = runtime.block_on(async {
        let (sender, control) = mpsc::channel(2);
        let server = Server::bind(options)?;
        Signals::tell(sender);
        server.run(move |metrics| open(registry, served, metrics), control).await
    });
    // a model that is still loading, or a hung engine, must not delay the exit
    runtime.shutdown_background();
    Ok(served.map(|()| ExitCode::SUCCESS)?)
}

/// Starts every model and stops it again.
fn check_models(options: RegistryOptions, served: Option<ServedOptions>) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let registry = open(options, served, &Metrics::new())?;
    for model in registry.all() {
        tracing::info!(model = model.name, version = model.version, "checked");
    }
    tracing::info!(duration_ms = started.elapsed().as_millis() as u64, "every model starts");
    Ok(ExitCode::SUCCESS)
}

/// Parses `SOURCE` or `NAME=SOURCE`. If a file of the whole name exists, that is the source.
fn source(text: &str) -> Result<(Option<String>, PathBuf), String> {
    match text.split_once('=') {
        Some((name, source)) if !Path::new(text).exists() && crate::model::check_name(name).is_ok() => {
            if source.is_empty() {
                Err("there is nothing after `=`".into())
            } else {
                Ok((Some(name.into()), source.into()))
            }
        }
        _ => Ok((None, text.into())),
    }
}

fn name(text: &str) -> Result<String, String> {
    crate::model::check_name(text).map(|()| text.into()).map_err(|e| e.to_string())
}

/// `NAME` or `NAME:VERSION`.
fn model(text: &str) -> Result<(String, Option<u64>), String> {
    let (name, version) = match text.split_once(':') {
        None => (text, None),
        Some((name, version)) => {
            (name, Some(version.parse().map_err(|_| format!("version `{version}` is not a whole number"))?))
        }
    };
    crate::model::check_name(name).map_err(|e| e.to_string())?;
    Ok((name.into(), version))
}

/// Parses `*`, or an origin as browsers send it in the header `origin`.
fn origin(text: &str) -> Result<String, String> {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let plain = |host: &str| !host.is_empty() && host.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
    if text == "*" || host.is_some_and(plain) {
        Ok(text.into())
    } else {
        Err("not an origin, such as https://example.org or http://localhost:3000".into())
    }
}

/// Parses an integer and one of the units `us`, `ms`, `s`, `m`, `h`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 =
        text[..digits].parse().map_err(|_| "not a number and a unit, such as 500ms or 10s".to_string())?;
    let micros = match &text[digits..] {
        "us" => 1,
        "ms" => 1_000,
        "s" => 1_000_000,
        "m" => 60_000_000,
        "h" => 3_600_000_000,
        "" if number == 0 => 0,
        "" => return Err("a unit is missing: us, ms, s, m or h".into()),
        unit => return Err(format!("`{unit}` is no unit; take us, ms, s, m or h")),
    };
    let longest = Duration::from_secs(7 * 24 * 3600);
    let duration = number.checked_mul(micros).map(Duration::from_micros).filter(|d| *d <= longest);
    duration.ok_or_else(|| "longer than a week".into())
}

pub(super) fn positive(text: &str) -> Result<Duration, String> {
    duration(text).and_then(|d| if d.is_zero() { Err("must be longer than zero".into()) } else { Ok(d) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        for bad in ["", "5", "s", "-1s", "1.5s", "1 s", "99999999999999999999s", "10000h", "1d"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert!(positive("0s").is_err());
    }

    #[test]
    fn models_may_name_a_version() {
        assert_eq!(model("b0"), Ok(("b0".into(), None)));
        assert_eq!(model("b0:3"), Ok(("b0".into(), Some(3))));
        for bad in ["", ":1", "b0:", "b0:x", "../b0", "b0:-1"] {
            assert!(model(bad).is_err(), "{bad}");
        }
    }
}
