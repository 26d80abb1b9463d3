//! Every metric of the process, declared once: name, help, unit, labels and buckets.
//!
//! Owns the Prometheus registry and the closed sets that labels take their values from. Knows neither requests nor
//! models: other rooms hand it numbers. Durations are seconds, sizes bytes; a field's documentation is the metric's
//! help text (a test holds the two together).

pub mod statistics;

use std::sync::Arc;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Encoder as _, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

pub use prometheus::IntGauge;

use self::statistics::Statistics;
use crate::logging;

/// Content type of [`Metrics::encode`]'s text.
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// How a request or an image ended. Closed: the outcomes of `requests_total` add up to every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Answered.
    Ok,
    /// The request itself can't be understood.
    InvalidRequest,
    /// Bytes that are no image.
    InvalidImage,
    /// An image past the pixel limits.
    ImageTooLarge,
    /// A body past the byte limit.
    BodyTooLarge,
    /// A content type or image format that is not taken.
    UnsupportedMediaType,
    /// A model or version that is not served.
    ModelNotFound,
    /// A path that does not exist.
    NotFound,
    /// An API key is asked for, and none or an unknown one came.
    Unauthenticated,
    /// A path that exists, asked with another method.
    MethodNotAllowed,
    /// A request line past the limit.
    UriTooLong,
    /// A request's headers past the limit.
    HeadTooLarge,
    /// Refused because the queue was full.
    Overloaded,
    /// The deadline passed first.
    DeadlineExceeded,
    /// Refused because the server is stopping.
    ShuttingDown,
    /// Refused because the server is not ready.
    NotReady,
    /// The caller went away before its answer was ready.
    Cancelled,
    /// A fault of the server.
    Internal,
}

impl Outcome {
    /// Every outcome, in declaration order.
    pub const ALL: [Self; 18] = [
        Self::Ok,
        Self::InvalidRequest,
        Self::InvalidImage,
        Self::ImageTooLarge,
        Self::BodyTooLarge,
        Self::UnsupportedMediaType,
        Self::ModelNotFound,
        Self::NotFound,
        Self::Unauthenticated,
        Self::MethodNotAllowed,
        Self::UriTooLong,
        Self::HeadTooLarge,
        Self::Overloaded,
        Self::DeadlineExceeded,
        Self::ShuttingDown,
        Self::NotReady,
        Self::Cancelled,
        Self::Internal,
    ];

    /// Label value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::InvalidRequest => "invalid_request",
            Self::InvalidImage => "invalid_image",
            Self::ImageTooLarge => "image_too_large",
            Self::BodyTooLarge => "body_too_large",
            Self::UnsupportedMediaType => "unsupported_media_type",
            Self::ModelNotFound => "model_not_found",
            Self::NotFound => "not_found",
            Self::Unauthenticated => "unauthenticated",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::UriTooLong => "uri_too_long",
            Self::HeadTooLarge => "head_too_large",
            Self::Overloaded => "overloaded",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::ShuttingDown => "shutting_down",
            Self::NotReady => "not_ready",
            Self::Cancelled => "cancelled",
            Self::Internal => "internal",
        }
    }
}

/// Which door a request came through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// `/v1` of the HTTP port.
    Rest,
    /// `/v2` of the HTTP port.
    OipHttp,
    /// The gRPC port.
    Grpc,
    /// A message of a stream of the gRPC port; the stream itself counts as one of `grpc`.
    GrpcStream,
    /// Health calls of the HTTP and gRPC ports, apart so that probes don't colour latency.
    Health,
    /// Any other path of the HTTP port.
    Other,
}

impl Protocol {
    /// Every protocol, in declaration order.
    pub const ALL: [Self; 6] = [Self::Rest, Self::OipHttp, Self::Grpc, Self::GrpcStream, Self::Health, Self::Other];

    /// Label value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rest => "rest",
            Self::OipHttp => "oip_http",
            Self::Grpc => "grpc",
            Self::GrpcStream => "grpc_stream",
            Self::Health => "health",
            Self::Other => "other",
        }
    }
}

/// A stretch of an image's way through the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Encoded bytes to RGB.
    Decode,
    /// RGB to input tensor: resize, crop, normalise.
    Preprocess,
    /// Waiting: for a compute thread, then for an engine.
    Queue,
    /// One engine run, whole batch.
    Inference,
    /// Logits to predictions.
    Postprocess,
}

impl Phase {
    /// Every phase, in declaration order.
    pub const ALL: [Self; 5] = [Self::Decode, Self::Preprocess, Self::Queue, Self::Inference, Self::Postprocess];

    /// Label value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Preprocess => "preprocess",
            Self::Queue => "queue",
            Self::Inference => "inference",
            Self::Postprocess => "postprocess",
        }
    }
}

/// How an engine run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunResult {
    /// Logits came back.
    Ok,
    /// The engine reported an error.
    Error,
    /// The engine panicked; its session was reopened.
    Panic,
}

impl RunResult {
    /// Every result, in declaration order.
    pub const ALL: [Self; 3] = [Self::Ok, Self::Error, Self::Panic];

    /// Label value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Error => "error",
            Self::Panic => "panic",
        }
    }
}

/// A port of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// REST, the Open Inference Protocol and the page.
    Http,
    /// gRPC.
    Grpc,
    /// Probes and scrapes.
    Admin,
}

impl Port {
    /// Every port, in declaration order.
    pub const ALL: [Self; 3] = [Self::Http, Self::Grpc, Self::Admin];

    /// Label value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Grpc => "grpc",
            Self::Admin => "admin",
        }
    }
}

/// Why the server ended a connection, or one of its requests, before the client wanted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The first whole head of a request did not come in time, the TLS handshake included.
    HeadTimeout,
    /// No request was open for too long.
    Idle,
    /// The client did not take its answer, or too slowly.
    WriteTimeout,
    /// The client sent a body too slowly; over HTTP/2 its other requests go on.
    SlowBody,
    /// The port was full, and this connection was the one that had done nothing for the longest.
    Full,
    /// A TLS handshake failed.
    Handshake,
    /// A head that is no HTTP.
    Unreadable,
    /// The client broke HTTP/2's rules, or flooded the server with frames.
    Protocol,
    /// The system had no descriptor for it.
    Refused,
}

impl Ending {
    /// Every reason, in declaration order.
    pub const ALL: [Self; 9] = [
        Self::HeadTimeout,
        Self::Idle,
        Self::WriteTimeout,
        Self::SlowBody,
        Self::Full,
        Self::Handshake,
        Self::Unreadable,
        Self::Protocol,
        Self::Refused,
    ];

    /// Label value.
    pub fn name(self) -> &'static str {
        match self {
            Self::HeadTimeout => "head_timeout",
            Self::Idle => "idle",
            Self::WriteTimeout => "write_timeout",
            Self::SlowBody => "slow_body",
            Self::Full => "full",
            Self::Handshake => "handshake",
            Self::Unreadable => "unreadable",
            Self::Protocol => "protocol",
            Self::Refused => "refused",
        }
    }
}

/// The process's metrics. One per server; tests make as many as they like.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Requests by protocol and outcome; the outcomes add up to every request.
    pub requests_total: IntCounterVec,
    /// Images by model, version and outcome, from admission on.
    pub images_total: IntCounterVec,
    /// Seconds from the request's head read to its answer made.
    pub request_duration_seconds: HistogramVec,
    /// Seconds an image spent in each phase; inference is one observation per engine run.
    pub phase_duration_seconds: HistogramVec,
    /// Images per engine run.
    pub batch_size: HistogramVec,
    /// Empty images that batches were padded with, to reach a size of --batch-buckets.
    pub padding_images_total: IntCounterVec,
    /// Images admitted and not yet answered.
    pub queue_depth: IntGaugeVec,
    /// Images that may be admitted and unanswered at once; more are refused.
    pub queue_limit: IntGaugeVec,
    /// Age in seconds of the longest-waiting image that no engine has taken yet; 0 when none waits.
    pub queue_oldest_age_seconds: GaugeVec,
    /// Requests being answered.
    pub inflight_requests: IntGauge,
    /// Bytes of the bodies of requests being answered.
    pub body_bytes: IntGauge,
    /// Refusals held for a moment, of clients that came straight back.
    pub held_refusals: IntGauge,
    /// Bytes claimed for images being decoded.
    pub decode_memory_bytes: IntGauge,
    /// Client connections open on the HTTP and gRPC ports.
    pub connections: IntGauge,
    /// Connections that the server ended before their clients wanted to, by port and reason.
    pub ended_connections_total: IntCounterVec,
    /// Engine runs by provider and result, warm-up included.
    pub engine_runs_total: IntCounterVec,
    /// Engine workers that hold a working session.
    pub engine_workers: IntGaugeVec,
    /// Always 1; its labels say which model is served.
    pub model_info: IntGaugeVec,
    /// Models loaded or replaced while the server runs, by result; after an error the old one stays.
    pub model_reloads_total: IntCounterVec,
    /// Versions of models in the repository that are asked for and could not be loaded.
    pub models_skipped: IntGauge,
    /// Largest difference of any logit between an image alone and the same image in a batch, measured at warm-up.
    pub invariance_max_abs_diff: GaugeVec,
    /// Operators by the execution provider that runs them, as ONNX Runtime names providers; on GPUs only.
    pub provider_nodes: IntGaugeVec,
    /// Images refused before preprocessing, by reason.
    pub decode_rejects_total: IntCounterVec,
    /// 1 when requests are welcome, 0 before warm-up, while draining and when no engine works.
    pub ready: IntGauge,
    /// Seconds from the process's start to its first readiness.
    pub start_to_ready_seconds: Gauge,
    /// Log lines that nobody read in time, or that could not be written.
    pub dropped_log_lines_total: IntCounter,
    /// Always 1; its label is the version of the program.
    pub build_info: IntGaugeVec,
}

/// 0.25 ms × 1.5ⁿ up to about 11 s.
fn latency_buckets() -> Vec<f64> {
    (0..27).map(|n| 0.00025 * 1.5_f64.powi(n)).collect()
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// A registry with every metric at zero. Names and labels are constants, so registration can't fail.
    pub fn new() -> Self {
        let registry = Registry::new();
        let r = &registry;
        let metrics = Self {
            requests_total: counters(
                r,
                "requests_total",
                "Requests by protocol and outcome; the outcomes add up to every request.",
                &["protocol", "outcome"],
            ),
            images_total: counters(
                r,
                "images_total",
                "Images by model, version and outcome, from admission on.",
                &["model", "version", "outcome"],
            ),
            request_duration_seconds: histograms(
                r,
                "request_duration_seconds",
                "Seconds from the request's head read to its answer made.",
                &["protocol"],
                latency_buckets(),
            ),
            phase_duration_seconds: histograms(
                r,
                "phase_duration_seconds",
                "Seconds an image spent in each phase; inference is one observation per engine run.",
                &["model", "version", "phase"],
                latency_buckets(),
            ),
            batch_size: histograms(
                r,
                "batch_size",
                "Images per engine run.",
                &["model", "version"],
                vec![1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0],
            ),
            padding_images_total: counters(
                r,
                "padding_images_total",
                "Empty images that batches were padded with, to reach a size of --batch-buckets.",
                &["model", "version"],
            ),
            queue_depth: int_gauges(r, "queue_depth", "Images admitted and not yet answered.", &["model", "version"]),
            queue_limit: int_gauges(
                r,
                "queue_limit",
                "Images that may be admitted and unanswered at once; more are refused.",
                &["model", "version"],
            ),
            queue_oldest_age_seconds: gauges(
                r,
                "queue_oldest_age_seconds",
                "Age in seconds of the longest-waiting image that no engine has taken yet; 0 when none waits.",
                &["model", "version"],
            ),
            inflight_requests: int_gauge(r, "inflight_requests", "Requests being answered."),
            body_bytes: int_gauge(r, "body_bytes", "Bytes of the bodies of requests being answered."),
            held_refusals: int_gauge(
                r,
                "held_refusals",
                "Refusals held for a moment, of clients that came straight back.",
            ),
            decode_memory_bytes: int_gauge(r, "decode_memory_bytes", "Bytes claimed for images being decoded."),
            connections: int_gauge(r, "connections", "Client connections open on the HTTP and gRPC ports."),
            ended_connections_total: counters(
                r,
                "ended_connections_total",
                "Connections that the server ended before their clients wanted to, by port and reason.",
                &["port", "reason"],
            ),
            engine_runs_total: counters(
                r,
                "engine_runs_total",
                "Engine runs by provider and result, warm-up included.",
                &["model", "version", "provider", "result"],
            ),
            engine_workers: int_gauges(
                r,
                "engine_workers",
                "Engine workers that hold a working session.",
                &["model", "version"],
            ),
            model_info: int_gauges(
                r,
                "model_info",
                "Always 1; its labels say which model is served.",
                &["model", "version", "architecture", "precision", "provider", "sha256", "source_sha256"],
            ),
            model_reloads_total: counters(
                r,
                "model_reloads_total",
                "Models loaded or replaced while the server runs, by result; after an error the old one stays.",
                &["model", "result"],
            ),
            models_skipped: int_gauge(
                r,
                "models_skipped",
                "Versions of models in the repository that are asked for and could not be loaded.",
            ),
            provider_nodes: int_gauges(
                r,
                "provider_nodes",
                "Operators by the execution provider that runs them, as ONNX Runtime names providers; on GPUs only.",
                &["model", "version", "provider"],
            ),
            invariance_max_abs_diff: gauges(
                r,
                "invariance_max_abs_diff",
                "Largest difference of any logit between an image alone and the same image in a batch, measured at warm-up.",
                &["model", "version"],
            ),
            decode_rejects_total: counters(
                r,
                "decode_rejects_total",
                "Images refused before preprocessing, by reason.",
                &["reason"],
            ),
            ready: int_gauge(
                r,
                "ready",
                "1 when requests are welcome, 0 before warm-up, while draining and when no engine works.",
            ),
            start_to_ready_seconds: gauge(
                r,
                "start_to_ready_seconds",
                "Seconds from the process's start to its first readiness.",
            ),
            dropped_log_lines_total: counter(
                r,
                "dropped_log_lines_total",
                "Log lines that nobody read in time, or that could not be written.",
            ),
            build_info: int_gauges(r, "build_info", "Always 1; its label is the version of the program.", &["version"]),
            registry,
        };
        #[cfg(target_os = "linux")]
        register(&metrics.registry, prometheus::process_collector::ProcessCollector::for_self());
        metrics.build_info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        for protocol in Protocol::ALL {
            for outcome in Outcome::ALL {
                // a counter that appears only with its first error can't be alerted on
                metrics.requests_total.with_label_values(&[protocol.name(), outcome.name()]);
            }
        }
        for port in Port::ALL {
            for ending in Ending::ALL {
                metrics.ended_connections_total.with_label_values(&[port.name(), ending.name()]);
            }
        }
        metrics
    }

    /// A request through `protocol` begins; the guard ends it.
    pub fn request(&self, protocol: Protocol) -> RequestGuard<'_> {
        self.inflight_requests.inc();
        RequestGuard { metrics: self, protocol, started: std::time::Instant::now(), outcome: Outcome::Cancelled }
    }

    /// A connection to `port` ended before its client wanted to.
    pub fn ended(&self, port: Port, ending: Ending) {
        self.ended_connections_total.with_label_values(&[port.name(), ending.name()]).inc();
    }

    /// A model was loaded or replaced while the server runs, or could not be.
    pub fn reloaded(&self, model: &str, ok: bool) {
        self.model_reloads_total.with_label_values(&[model, if ok { "ok" } else { "error" }]).inc();
    }

    /// Where the parts of a model run: operators by provider.
    pub fn placed(&self, model: &str, version: u64, operators: &std::collections::BTreeMap<String, usize>) {
        for (provider, &count) in operators {
            let labels = [model, &version.to_string(), provider.as_str()];
            self.provider_nodes.with_label_values(&labels).set(count as i64);
        }
    }

    /// The line that says which model is served; its labels as [`model_info`](Self::model_info) has them.
    pub fn model_info(&self, labels: [String; 7]) -> ModelInfo {
        let info = ModelInfo { metric: self.model_info.clone(), labels };
        info.set();
        info
    }

    /// The metrics of one version of one model, its labels resolved once.
    pub fn model(&self, name: &str, version: u64, provider: &str) -> ModelMetrics {
        let version = version.to_string();
        let model = [name, version.as_str()];
        let with = |last: &'static str| [name, version.as_str(), last];
        ModelMetrics {
            images: Outcome::ALL.map(|o| self.images_total.with_label_values(&with(o.name()))),
            phases: Phase::ALL.map(|p| self.phase_duration_seconds.with_label_values(&with(p.name()))),
            runs: RunResult::ALL
                .map(|r| self.engine_runs_total.with_label_values(&[name, version.as_str(), provider, r.name()])),
            batch_size: self.batch_size.with_label_values(&model),
            padding: self.padding_images_total.with_label_values(&model),
            queue_depth: self.queue_depth.with_label_values(&model),
            queue_limit: self.queue_limit.with_label_values(&model),
            queue_oldest_age_seconds: self.queue_oldest_age_seconds.with_label_values(&model),
            engine_workers: self.engine_workers.with_label_values(&model),
            invariance_max_abs_diff: self.invariance_max_abs_diff.with_label_values(&model),
            decode_rejects: self.decode_rejects_total.clone(),
            statistics: Arc::default(),
        }
    }

    /// Everything in Prometheus' text format.
    pub fn encode(&self) -> String {
        let dropped = &self.dropped_log_lines_total;
        dropped.inc_by(logging::dropped_lines().saturating_sub(dropped.get()));
        let mut text = Vec::new();
        match TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            Ok(()) => String::from_utf8_lossy(&text).into_owned(),
            Err(error) => format!("# {error}\n"),
        }
    }
}

/// One request in flight. Dropped without an outcome, it counts as cancelled: its caller went away.
#[derive(Debug)]
pub struct RequestGuard<'a> {
    metrics: &'a Metrics,
    protocol: Protocol,
    started: std::time::Instant,
    outcome: Outcome,
}

impl RequestGuard<'_> {
    /// Ends the request; returns how long it took.
    pub fn finish(mut self, outcome: Outcome) -> Duration {
        self.outcome = outcome;
        self.started.elapsed()
    }
}

impl Drop for RequestGuard<'_> {
    fn drop(&mut self) {
        let protocol = self.protocol.name();
        self.metrics.inflight_requests.dec();
        self.metrics.requests_total.with_label_values(&[protocol, self.outcome.name()]).inc();
        let taken = self.started.elapsed().as_secs_f64();
        self.metrics.request_duration_seconds.with_label_values(&[protocol]).observe(taken);
    }
}

/// A model's line in the metrics; gone with the model.
#[derive(Debug)]
pub struct ModelInfo {
    metric: IntGaugeVec,
    labels: [String; 7],
}

impl ModelInfo {
    /// Shows the line, should a twin have taken it away.
    pub fn set(&self) {
        self.metric.with_label_values(&self.labels()).set(1);
    }

    fn labels(&self) -> [&str; 7] {
        self.labels.each_ref().map(String::as_str)
    }
}

impl Drop for ModelInfo {
    fn drop(&mut self) {
        let _ = self.metric.remove_label_values(&self.labels());
    }
}

/// The metrics of one version of one model.
#[derive(Debug, Clone)]
pub struct ModelMetrics {
    images: [IntCounter; Outcome::ALL.len()],
    phases: [Histogram; Phase::ALL.len()],
    runs: [IntCounter; RunResult::ALL.len()],
    decode_rejects: IntCounterVec,
    /// Images per engine run.
    pub batch_size: Histogram,
    /// Empty images in engine runs.
    pub padding: IntCounter,
    /// Images admitted and not yet answered.
    pub queue_depth: IntGauge,
    /// Images that may be admitted and unanswered at once.
    pub queue_limit: IntGauge,
    /// Age of the longest-waiting image.
    pub queue_oldest_age_seconds: Gauge,
    /// Workers that hold a working session.
    pub engine_workers: IntGauge,
    /// Largest difference between an image alone and in a batch.
    pub invariance_max_abs_diff: Gauge,
    /// Running totals for the protocol's statistics.
    pub statistics: Arc<Statistics>,
}

impl ModelMetrics {
    /// `count` images ended this way.
    pub fn images(&self, outcome: Outcome, count: usize) {
        self.images[outcome as usize].inc_by(count as u64);
    }

    /// An image, or an engine run, spent this long in a phase.
    pub fn phase(&self, phase: Phase, duration: Duration) {
        self.phases[phase as usize].observe(duration.as_secs_f64());
    }

    /// An engine run ended this way.
    pub fn run(&self, result: RunResult) {
        self.runs[result as usize].inc();
    }

    /// An image was refused before preprocessing; `reason` is one of a closed set of the image room.
    pub fn decode_reject(&self, reason: &'static str) {
        self.decode_rejects.with_label_values(&[reason]).inc();
    }
}

fn options(name: &str, help: &str) -> Opts {
    Opts::new(name, help).namespace("nfold")
}

fn register(registry: &Registry, collector: impl Collector + 'static) {
    if let Err(error) = registry.register(Box::new(collector)) {
        unreachable!("metric declared twice: {error}");
    }
}

/// Unwraps what only a malformed constant in this file could break; the tests make every metric once.
fn declared<T: Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<T>) -> T {
    match metric {
        Ok(metric) => {
            register(registry, metric.clone());
            metric
        }
        Err(error) => unreachable!("malformed metric: {error}"),
    }
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    declared(registry, IntCounterVec::new(options(name, help), labels))
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    declared(registry, IntCounter::with_opts(options(name, help)))
}

fn int_gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    declared(registry, IntGaugeVec::new(options(name, help), labels))
}

fn gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
    declared(registry, GaugeVec::new(options(name, help), labels))
}

fn int_gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    declared(registry, IntGauge::with_opts(options(name, help)))
}

fn gauge(registry: &Registry, name: &str, help: &str) -> Gauge {
    declared(registry, Gauge::with_opts(options(name, help)))
}

fn histograms(registry: &Registry, name: &str, help: &str, labels: &[&str], buckets: Vec<f64>) -> HistogramVec {
    let options = HistogramOpts::new(name, help).namespace("nfold").buckets(buckets);
    declared(registry, HistogramVec::new(options, labels))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The one source of a metric's meaning is its field's documentation.
    #[test]
    fn field_documentation_is_the_help_text() {
        let source = include_str!("metrics.rs");
        let fields = source.split("pub struct Metrics {").nth(1).expect("struct").split("\n}\n").next().expect("end");
        let mut lines = fields.lines().peekable();
        let mut checked = 0;
        while let Some(line) = lines.next() {
            let Some(doc) = line.trim().strip_prefix("/// ") else { continue };
            let name = lines.peek().and_then(|l| l.trim().strip_prefix("pub ")).and_then(|l| l.split(':').next());
            let name = name.unwrap_or_else(|| panic!("a field follows `{doc}`"));
            let call = source.find(&format!("\"{name}\"")).unwrap_or_else(|| panic!("`{name}` is registered"));
            assert!(
                source[call..].trim_start_matches(|c| c != ',')[1..].trim_start().starts_with(&format!("\"{doc}\"")),
                "{name}"
            );
            checked += 1;
        }
        assert!(checked >= 15, "{checked}");
    }

    #[test]
    fn outcomes_add_up_and_a_dropped_request_is_cancelled() {
        let metrics = Metrics::new();
        metrics.request(Protocol::Rest).finish(Outcome::Ok);
        drop(metrics.request(Protocol::Rest));
        let count = |o: Outcome| metrics.requests_total.with_label_values(&["rest", o.name()]).get();
        assert_eq!((count(Outcome::Ok), count(Outcome::Cancelled)), (1, 1));
        assert_eq!(Outcome::ALL.iter().map(|&o| count(o)).sum::<u64>(), 2);
        assert_eq!(metrics.inflight_requests.get(), 0);
        assert!(metrics.encode().contains("nfold_requests_total{outcome=\"ok\",protocol=\"rest\"} 1"));
    }

    #[test]
    fn closed_sets_are_indexed_by_declaration() {
        assert!(Outcome::ALL.iter().enumerate().all(|(i, &o)| o as usize == i));
        assert!(Phase::ALL.iter().enumerate().all(|(i, &p)| p as usize == i));
        assert!(RunResult::ALL.iter().enumerate().all(|(i, &r)| r as usize == i));
        assert!(Protocol::ALL.iter().enumerate().all(|(i, &p)| p as usize == i));
    }
}
