//! The metrics of one version of a model, with its labels resolved once.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use prometheus::{Gauge, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::Metrics;
use super::labels::{Outcome, Phase, RunResult};
use super::statistics::Statistics;

impl Metrics {
    /// The `model_info` series of a served model, with the labels of [`model_info`](Self::model_info).
    pub fn model_info(&self, labels: [String; 7]) -> ModelInfo {
        let info = ModelInfo { metric: self.model_info.clone(), labels };
        info.set();
        info
    }

    /// The metrics of one version of a model, with its labels resolved once.
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
            shares: [&self.top1_score, &self.score_margin, &self.score_entropy].map(|h| h.with_label_values(&model)),
            predicted: Arc::new(Predicted {
                counters: self.predictions_total.clone(),
                model: [name.to_string(), version.clone()],
                classes: RwLock::default(),
            }),
            statistics: Arc::default(),
        }
    }
}

/// A model's `model_info` series, removed on drop.
#[derive(Debug)]
pub struct ModelInfo {
    metric: IntGaugeVec,
    labels: [String; 7],
}

impl ModelInfo {
    /// Shows the series again, in case another instance with the same labels has removed it.
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

/// Classes that have a counter of their own, at most: a time series each, for as long as the process lives.
const CLASSES: usize = 100;

/// Counters of the classes that a model has predicted.
#[derive(Debug)]
struct Predicted {
    counters: IntCounterVec,
    model: [String; 2],
    classes: RwLock<BTreeMap<usize, IntCounter>>,
}

impl Predicted {
    fn count(&self, class: usize, label: &str) {
        // the counters are whole whatever panicked beside them
        if let Some(counter) = self.classes.read().unwrap_or_else(PoisonError::into_inner).get(&class) {
            return counter.inc();
        }
        let mut classes = self.classes.write().unwrap_or_else(PoisonError::into_inner);
        let [name, version] = &self.model;
        let with = |label: &str| self.counters.with_label_values(&[name, version, label]);
        if classes.len() >= CLASSES && !classes.contains_key(&class) {
            return with("other").inc();
        }
        let short: String = label.chars().take(100).collect();
        classes.entry(class).or_insert_with(|| with(&short)).inc();
    }
}

/// The metrics of one version of a model.
#[derive(Debug, Clone)]
pub struct ModelMetrics {
    images: [IntCounter; Outcome::ALL.len()],
    phases: [Histogram; Phase::ALL.len()],
    runs: [IntCounter; RunResult::ALL.len()],
    decode_rejects: IntCounterVec,
    /// Best score, margin, entropy.
    shares: [Histogram; 3],
    predicted: Arc<Predicted>,
    /// Images per engine run.
    pub batch_size: Histogram,
    /// Zero images in engine runs.
    pub padding: IntCounter,
    /// Images admitted and not yet answered.
    pub queue_depth: IntGauge,
    /// Most images that may be admitted and not yet answered.
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
    /// An image's best score is this class's; its best score, margin and entropy where scores are shares.
    pub fn predicted(&self, class: usize, label: &str, shares: Option<[f64; 3]>) {
        self.predicted.count(class, label);
        for (histogram, share) in self.shares.iter().zip(shares.iter().flatten()) {
            histogram.observe(*share);
        }
    }

    /// Records that `count` images ended this way.
    pub fn images(&self, outcome: Outcome, count: usize) {
        self.images[outcome as usize].inc_by(count as u64);
    }

    /// Records that an image, or an engine run, spent this long in a phase.
    pub fn phase(&self, phase: Phase, duration: Duration) {
        self.phases[phase as usize].observe(duration.as_secs_f64());
    }

    /// Records that an engine run ended this way.
    pub fn run(&self, result: RunResult) {
        self.runs[result as usize].inc();
    }

    /// Records that an image was refused before preprocessing; `reason` is one of a closed set of `pixels`.
    pub fn decode_reject(&self, reason: &'static str) {
        self.decode_rejects.with_label_values(&[reason]).inc();
    }
}
