//! Records the requests of one step: outcomes, latencies, the generator's own lag. Knows no protocol.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::answer::{Answer, Outcome};

/// Fewest responses for which a percentile can be claimed with 99 % confidence (MLPerf Inference rules, early
/// stopping).
const FEWEST_FOR_P99: u64 = 459;
const FEWEST_FOR_P999: u64 = 4603;

/// Measured part of a step.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// Start.
    pub from: Instant,
    /// End.
    pub until: Instant,
}

impl Window {
    fn holds(&self, at: Instant) -> bool {
        (self.from..self.until).contains(&at)
    }

    fn seconds(&self) -> f64 {
        (self.until - self.from).as_secs_f64()
    }
}

/// Recorder of one step.
#[derive(Debug, Clone)]
pub struct Recorder {
    window: Window,
    slo_ms: f64,
    outcomes: BTreeMap<Outcome, u64>,
    /// Successful responses that came within the window, whenever they were due; and how many of them met the
    /// objective.
    finished: u64,
    good: u64,
    /// Latency in microseconds, from due to answered, of successful requests due in the window.
    latency: Histogram<u64>,
    lag: Histogram<u64>,
    phases: BTreeMap<String, (f64, u64)>,
}

/// Latency of successful responses since they were due, in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Latency {
    pub count: u64,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    /// Absent below 459 responses.
    pub p99: Option<f64>,
    /// Absent below 4603 responses.
    pub p999: Option<f64>,
    pub max: f64,
}

/// Results of one step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// `closed` or `open`.
    pub kind: String,
    /// Offered rate, in requests per second; open loop only.
    pub rate: Option<f64>,
    /// The rate as a multiple of the measured capacity; in a sweep only.
    pub multiple: Option<f64>,
    /// Number of connections; closed loop only.
    pub connections: Option<usize>,
    /// Number of requests due in the window, by outcome.
    pub outcomes: BTreeMap<Outcome, u64>,
    /// Successful responses per second, by when they came.
    pub throughput: f64,
    /// Successful responses per second that met the objective.
    pub goodput: f64,
    /// Latency of successful responses; absent if there was none.
    pub latency_ms: Option<Latency>,
    /// Latency at the percentiles 0, 1, … 100 of the successful responses, in milliseconds.
    pub percentiles_ms: Vec<f64>,
    /// Lag of the generator, in milliseconds: 50th and 99th percentile, maximum.
    pub lag_ms: [f64; 3],
    /// Whether the generator kept up, so that the step counts.
    pub valid: bool,
    /// Latency histogram of successful responses, in microseconds since due; absent if the report was read from a file.
    #[serde(skip)]
    pub latencies: Option<Histogram<u64>>,
    /// Mean duration of the phases in the server's `Server-Timing`, in milliseconds.
    pub server_ms: BTreeMap<String, f64>,
}

impl Recorder {
    /// An empty recorder; responses within `slo_ms` meet the objective.
    pub fn new(window: Window, slo_ms: f64) -> Self {
        // three significant digits from a microsecond to an hour
        let empty = || Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("sound bounds");
        let (latency, lag) = (empty(), empty());
        Self { window, slo_ms, outcomes: BTreeMap::new(), finished: 0, good: 0, latency, lag, phases: BTreeMap::new() }
    }

    /// Records a request due at `due`, sent `lag` later, whose response came at `end`.
    pub fn record(&mut self, due: Instant, lag: Duration, end: Instant, answer: &Answer) {
        let latency = end.saturating_duration_since(due);
        let ok = answer.outcome == Outcome::Ok;
        if ok && self.window.holds(end) {
            self.finished += 1;
            self.good += u64::from(latency.as_secs_f64() * 1e3 <= self.slo_ms);
        }
        if !self.window.holds(due) {
            return;
        }
        *self.outcomes.entry(answer.outcome).or_default() += 1;
        self.lag.saturating_record(micros(lag));
        if ok {
            self.latency.saturating_record(micros(latency));
            for (phase, ms) in &answer.phases {
                let (sum, count) = self.phases.entry(phase.clone()).or_default();
                *sum += ms;
                *count += 1;
            }
        }
    }

    /// Results of the step.
    pub fn step(&self, kind: &str, rate: Option<f64>, connections: Option<usize>, max_lag_ms: f64) -> Step {
        let at = |h: &Histogram<u64>, q: f64| h.value_at_quantile(q) as f64 / 1e3;
        let (h, lag) = (&self.latency, &self.lag);
        let count = h.len();
        let enough = |fewest: u64, q: f64| (count >= fewest).then(|| at(h, q));
        let lag_ms = if lag.is_empty() { [0.0; 3] } else { [at(lag, 0.5), at(lag, 0.99), lag.max() as f64 / 1e3] };
        Step {
            kind: kind.into(),
            rate,
            multiple: None,
            connections,
            outcomes: self.outcomes.clone(),
            throughput: self.finished as f64 / self.window.seconds(),
            goodput: self.good as f64 / self.window.seconds(),
            latency_ms: (count > 0).then(|| Latency {
                count,
                mean: h.mean() / 1e3,
                p50: at(h, 0.5),
                p90: at(h, 0.9),
                p99: enough(FEWEST_FOR_P99, 0.99),
                p999: enough(FEWEST_FOR_P999, 0.999),
                max: h.max() as f64 / 1e3,
            }),
            percentiles_ms: match count {
                0 => Vec::new(),
                _ => (0..=100).map(|p| at(h, f64::from(p) / 100.0)).collect(),
            },
            lag_ms,
            latencies: Some(h.clone()),
            valid: lag_ms[1] <= max_lag_ms,
            server_ms: self.phases.iter().map(|(k, (sum, n))| (k.clone(), sum / (*n).max(1) as f64)).collect(),
        }
    }
}

impl Step {
    /// Number of requests due in the window with this outcome.
    pub fn count(&self, outcome: Outcome) -> u64 {
        self.outcomes.get(&outcome).copied().unwrap_or(0)
    }

    /// Number of requests due in the window that were neither successful nor refused.
    pub fn failed(&self) -> u64 {
        self.outcomes.values().sum::<u64>() - self.count(Outcome::Ok) - self.count(Outcome::Refused)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(outcome: Outcome) -> Answer {
        Answer { outcome, phases: vec![("queue".into(), 2.0)] }
    }

    /// Only requests due in the window count; throughput counts when responses came, goodput also needs the objective.
    #[test]
    fn the_window_decides() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut recorder = Recorder::new(Window { from: at(1000), until: at(2000) }, 100.0);
        let lag = Duration::from_millis(1);
        recorder.record(at(500), lag, at(900), &answer(Outcome::Ok)); // warm-up
        recorder.record(at(990), lag, at(1010), &answer(Outcome::Ok)); // due before, answered within: throughput
        recorder.record(at(1100), lag, at(1150), &answer(Outcome::Ok)); // good
        recorder.record(at(1200), lag, at(1500), &answer(Outcome::Ok)); // misses the objective
        recorder.record(at(1300), lag, at(1301), &answer(Outcome::Refused));
        recorder.record(at(1900), lag, at(2500), &answer(Outcome::Ok)); // answered after the window: latency only
        recorder.record(at(2100), lag, at(2101), &answer(Outcome::Ok)); // due after the window
        let step = recorder.step("open", Some(5.0), None, 1.5);
        assert_eq!(step.outcomes, BTreeMap::from([(Outcome::Ok, 3), (Outcome::Refused, 1)]));
        assert_eq!((step.throughput, step.goodput), (3.0, 2.0));
        let latency = step.latency_ms.expect("answers");
        assert!((latency.max - 600.0).abs() < 1.0 && latency.p99.is_none(), "{latency:?}");
        assert!(step.valid && !recorder.step("open", None, None, 0.5).valid);
        assert_eq!(step.server_ms["queue"], 2.0);
    }

    #[test]
    fn statuses_are_told_apart() {
        let of = [200, 429, 503, 504, 404, 413, 500, 302].map(Outcome::of_http);
        use Outcome::{ClientError, Deadline, Ok, Refused, ServerError};
        assert_eq!(of, [Ok, Refused, Refused, Deadline, ClientError, ClientError, ServerError, ServerError]);
    }
}
