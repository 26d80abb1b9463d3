//! Every metric of the process, declared once: name, help, unit, labels and buckets.
//!
//! Owns the Prometheus registry. Knows neither requests nor models: other modules pass numbers. Durations are in
//! seconds, sizes in bytes. To add a metric, add a field to [`Metrics`]: its doc comment is the help text.

mod declared;
mod labels;
mod of_model;
pub mod statistics;

use std::time::Duration;

use prometheus::{
    Encoder as _, Gauge, GaugeVec, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, Registry, TextEncoder,
};

pub use prometheus::IntGauge;

pub use self::declared::Declaration;
use self::declared::{metrics, optional};
pub use self::labels::{Ending, Outcome, Phase, Port, Protocol, RunResult};
pub use self::of_model::{ModelInfo, ModelMetrics};
use crate::logging;

/// Content type of the text of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// 0.25 ms × 1.5ⁿ up to about 9.5 s.
const LATENCY: [f64; 27] = {
    let (mut bounds, mut power, mut n) = ([0.0; 27], 1.0, 0);
    while n < bounds.len() {
        bounds[n] = 0.00025 * power;
        power *= 1.5;
        n += 1;
    }
    bounds
};

/// Scores, margins and entropies.
const SHARES: [f64; 13] = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0];

const BATCH_SIZES: [f64; 12] = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0];

metrics! {
    /// The process's metrics. One per server; tests create as many as they like.
    pub struct Metrics {
        /// Requests by protocol and outcome; the outcomes add up to all requests.
        pub requests_total: IntCounterVec["protocol", "outcome"],
        /// Images by model, version and outcome, from admission on.
        pub images_total: IntCounterVec["model", "version", "outcome"],
        /// Seconds from the end of the request's head until the response is made.
        pub request_duration_seconds: HistogramVec["protocol"] in &LATENCY,
        /// Seconds an image spent in each phase; inference is one observation per engine run.
        pub phase_duration_seconds: HistogramVec["model", "version", "phase"] in &LATENCY,
        /// Images per engine run.
        pub batch_size: HistogramVec["model", "version"] in &BATCH_SIZES,
        /// Zero images that batches were padded with, to reach a size of --batch-buckets.
        pub padding_images_total: IntCounterVec["model", "version"],
        /// Images admitted and not yet answered.
        pub queue_depth: IntGaugeVec["model", "version"],
        /// Most images that may be admitted and not yet answered; more are refused.
        pub queue_limit: IntGaugeVec["model", "version"],
        /// Age in seconds of the longest-waiting image that no engine has started; 0 if none waits.
        pub queue_oldest_age_seconds: GaugeVec["model", "version"],
        /// Requests in flight.
        pub inflight_requests: IntGauge,
        /// Bytes of the bodies of requests in flight.
        pub body_bytes: IntGauge,
        /// Refusals (429) held for a moment, because their clients retried at once.
        pub held_refusals: IntGauge,
        /// Bytes claimed for images being decoded.
        pub decode_memory_bytes: IntGauge,
        /// Client connections open on the HTTP and gRPC ports.
        pub connections: IntGauge,
        /// Connections that the server ended before their clients did, by port and reason.
        pub ended_connections_total: IntCounterVec["port", "reason"],
        /// Engine runs by provider and result, warm-up included.
        pub engine_runs_total: IntCounterVec["model", "version", "provider", "result"],
        /// Engine workers that hold a working session.
        pub engine_workers: IntGaugeVec["model", "version"],
        /// Always 1; the labels say which model is served.
        pub model_info: IntGaugeVec["model", "version", "architecture", "precision", "provider", "sha256", "source_sha256"],
        /// Models loaded or replaced while the server runs, by result; after an error the old one stays.
        pub model_reloads_total: IntCounterVec["model", "result"],
        /// Requested model versions of the repository that could not be loaded.
        pub models_skipped: IntGauge,
        /// Largest difference of any logit between an image alone and the same image in a batch, measured at warm-up.
        pub invariance_max_abs_diff: GaugeVec["model", "version"],
        /// Operators by the execution provider that runs them, as ONNX Runtime names providers; on GPUs only.
        pub provider_nodes: IntGaugeVec["model", "version", "provider"],
        /// Images refused before preprocessing, by reason.
        pub decode_rejects_total: IntCounterVec["reason"],
        /// Images by the class with the best score: the first 100 classes that a model predicts, the rest as `other`.
        pub predictions_total: IntCounterVec["model", "version", "class"],
        /// Best score of each image.
        pub top1_score: HistogramVec["model", "version"] in &SHARES,
        /// Best score of each image less the second best.
        pub score_margin: HistogramVec["model", "version"] in &SHARES,
        /// Entropy of each image's scores, as a share of the largest that there can be: 0 is sure, 1 knows nothing.
        pub score_entropy: HistogramVec["model", "version"] in &SHARES,
        /// 1 when requests are welcome, 0 before warm-up, while draining and when no engine works.
        pub ready: IntGauge,
        /// Seconds from the process's start until it was first ready.
        pub start_to_ready_seconds: Gauge,
        /// Log lines dropped because they were not read in time or could not be written.
        pub dropped_log_lines_total: IntCounter,
        /// Always 1; the label is the version of the program.
        pub build_info: IntGaugeVec["version"],
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// A registry with every metric at zero.
    pub fn new() -> Self {
        let metrics = Self::register();
        #[cfg(target_os = "linux")]
        declared::register(&metrics.registry, prometheus::process_collector::ProcessCollector::for_self());
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

    /// Counts a request through `protocol`, until the guard ends it.
    pub fn request(&self, protocol: Protocol) -> RequestGuard<'_> {
        self.inflight_requests.inc();
        RequestGuard { metrics: self, protocol, started: std::time::Instant::now(), outcome: Outcome::Cancelled }
    }

    /// Records that the server ended a connection to `port`.
    pub fn ended(&self, port: Port, ending: Ending) {
        self.ended_connections_total.with_label_values(&[port.name(), ending.name()]).inc();
    }

    /// Records that a model was loaded or replaced while the server runs, or could not be.
    pub fn reloaded(&self, model: &str, ok: bool) {
        self.model_reloads_total.with_label_values(&[model, if ok { "ok" } else { "error" }]).inc();
    }

    /// Records which providers run a model: number of operators by provider.
    pub fn placed(&self, model: &str, version: u64, operators: &std::collections::BTreeMap<String, usize>) {
        for (provider, &count) in operators {
            let labels = [model, &version.to_string(), provider.as_str()];
            self.provider_nodes.with_label_values(&labels).set(count as i64);
        }
    }

    /// All metrics in Prometheus' text format.
    pub fn encode(&self) -> String {
        let dropped = &self.dropped_log_lines_total;
        dropped.inc_by(logging::dropped_lines().saturating_sub(dropped.get()));
        let mut text = Vec::new();
        let mut families = self.registry.gather();
        // the collector has whole seconds, and a rate over a minute would be a staircase
        let of_process = families.iter_mut().filter(|family| family.name() == "process_cpu_seconds_total");
        for (family, seconds) in of_process.zip(cpu_seconds()) {
            for metric in family.mut_metric() {
                let mut counter = prometheus::proto::Counter::default();
                counter.set_value(seconds);
                metric.set_counter(counter);
            }
        }
        match TextEncoder::new().encode(&families, &mut text) {
            Ok(()) => String::from_utf8_lossy(&text).into_owned(),
            Err(error) => format!("# {error}\n"),
        }
    }
}

/// Seconds of processor time that the process has used, of all threads, to the hundredth.
#[cfg(target_os = "linux")]
fn cpu_seconds() -> Option<f64> {
    // the kernel's unit for this file, whatever its own clock is
    const TICKS_A_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // the name before them may hold spaces
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ').skip(11).map(|field| field.parse::<u64>().ok());
    let (user, system) = (fields.next()??, fields.next()??);
    Some((user + system) as f64 / TICKS_A_SECOND)
}

#[cfg(not(target_os = "linux"))]
fn cpu_seconds() -> Option<f64> {
    None
}

/// One request in flight. Dropped without an outcome, it counts as cancelled by its client.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_a_metric_and_its_documentation_the_help_text() {
        let text = Metrics::new().encode();
        assert!(text.contains("# HELP nfold_inflight_requests Requests in flight.\n"), "{text}");
        for Declaration { name, help, labels, .. } in Metrics::DECLARATIONS {
            assert!(help.ends_with('.') && help.trim() == *help, "{name}: {help}");
            // a metric with labels is listed once it has a value
            assert!(!labels.is_empty() || text.contains(&format!("# HELP nfold_{name} {help}\n")), "{name}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn processor_time_is_told_in_fractions() {
        let metrics = Metrics::new();
        let told = || -> f64 {
            let text = metrics.encode();
            let line = text.lines().find_map(|line| line.strip_prefix("process_cpu_seconds_total ")).expect("told");
            line.parse().expect("a number")
        };
        let (before, started) = (told(), std::time::Instant::now());
        while told() < before + 0.05 {
            assert!(started.elapsed() < Duration::from_secs(60), "busy, and no time is told");
        }
        assert!(told() < before + 60.0);
    }

    #[test]
    fn predicted_classes_are_counted_up_to_a_cap() {
        let metrics = Metrics::new();
        let model = metrics.model("m", 1, "cpu");
        let shares = Some([0.9, 0.8, 0.1]);
        for class in 0..150 {
            model.predicted(class, &format!("class {class}"), shares);
            model.predicted(class, &format!("class {class}"), None);
        }
        let text = metrics.encode();
        assert_eq!(text.matches("nfold_predictions_total{").count(), 101);
        assert!(text.contains("nfold_predictions_total{class=\"class 99\",model=\"m\",version=\"1\"} 2"), "{text}");
        assert!(text.contains("nfold_predictions_total{class=\"other\",model=\"m\",version=\"1\"} 100"), "{text}");
        assert!(text.contains("nfold_top1_score_bucket{model=\"m\",version=\"1\",le=\"0.9\"} 150"), "{text}");
        assert!(text.contains("nfold_score_entropy_count{model=\"m\",version=\"1\"} 150"), "{text}");
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
}
