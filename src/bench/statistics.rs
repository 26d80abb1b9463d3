//! Quantiles and bootstrap intervals. Knows only numbers.

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Fewest samples for which a 99th percentile is reported; with fewer, it is close to the maximum.
pub const FEWEST_FOR_P99: usize = 100;
const RESAMPLES: usize = 10_000;

/// Latencies of one contender, in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Number of timed runs.
    pub runs: usize,
    /// Fastest run.
    pub min: f64,
    /// 50th percentile.
    pub median: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile; absent below [`FEWEST_FOR_P99`] runs.
    pub p99: Option<f64>,
    /// Slowest run.
    pub max: f64,
}

impl Summary {
    /// Summarises samples in any order; `None` if there are none.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let p99 = (sorted.len() >= FEWEST_FOR_P99).then(|| quantile(&sorted, 0.99));
        let (median, p90) = (quantile(&sorted, 0.5), quantile(&sorted, 0.9));
        Some(Self { runs: sorted.len(), min, median, p90, p99, max })
    }
}

/// Quantile `q` of ascending samples, interpolated linearly (Hyndman and Fan 1996, definition 7); NaN without samples.
pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let rank = q.clamp(0.0, 1.0) * last as f64;
    let (low, share) = (rank.floor() as usize, rank.fract());
    sorted[low] + share * (sorted[(low + 1).min(last)] - sorted[low])
}

/// Median of samples in any order; NaN without samples.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile(&sorted, 0.5)
}

/// A ratio and its 95 % confidence interval.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Point estimate: the ratio of the two medians over rounds.
    pub value: f64,
    /// 2.5th percentile of the bootstrap.
    pub low: f64,
    /// 97.5th percentile of the bootstrap.
    pub high: f64,
}

/// `median(above) / median(below)` of figures from the same rounds, with a percentile bootstrap over rounds (Efron and
/// Tibshirani 1993, chapter 13). Whole rounds are resampled, so that disturbances of both in one round stay paired.
pub fn ratio(above: &[f64], below: &[f64], seed: u64) -> Option<Ratio> {
    let rounds = above.len().min(below.len());
    let value = median(&above[..rounds]) / median(&below[..rounds]);
    if rounds == 0 || !value.is_finite() {
        return None;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut draws: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let picked: Vec<usize> = (0..rounds).map(|_| rng.random_range(0..rounds)).collect();
            let of = |samples: &[f64]| median(&picked.iter().map(|&i| samples[i]).collect::<Vec<_>>());
            of(above) / of(below)
        })
        .collect();
    draws.sort_by(f64::total_cmp);
    Some(Ratio { value, low: quantile(&draws, 0.025), high: quantile(&draws, 0.975) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_numpys() {
        let sorted = [1.0, 2.0, 4.0, 8.0];
        // numpy.quantile(…, [0, 0.5, 0.9, 1])
        for (q, expected) in [(0.0, 1.0), (0.5, 3.0), (0.9, 6.8), (1.0, 8.0)] {
            assert!((quantile(&sorted, q) - expected).abs() < 1e-12, "{q}");
        }
        assert!(quantile(&[], 0.5).is_nan());
    }

    #[test]
    fn few_runs_have_no_p99() {
        let summary = Summary::of(&[3.0, 1.0, 2.0]).expect("samples");
        assert_eq!((summary.median, summary.p99, summary.max), (2.0, None, 3.0));
        let many: Vec<f64> = (0..=100).map(f64::from).collect();
        assert_eq!(Summary::of(&many).expect("samples").p99, Some(99.0));
        assert_eq!(Summary::of(&[]), None);
    }

    /// The interval's coverage is near its nominal level, and samples are paired: rounds that slow both leave it
    /// narrow.
    #[test]
    fn intervals_cover_and_stay_paired() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut held = 0;
        for trial in 0..100 {
            let mut noisy = |mean: f64| -> Vec<f64> { (0..20).map(|_| mean + rng.random_range(-1.0..1.0)).collect() };
            let found = ratio(&noisy(20.0), &noisy(10.0), trial).expect("rounds");
            held += usize::from(found.low <= 2.0 && 2.0 <= found.high);
        }
        assert!((85..=100).contains(&held), "{held} of 100");

        let weather: Vec<f64> = (0..20).map(|i| 1.0 + f64::from(i % 5)).collect();
        let twice: Vec<f64> = weather.iter().map(|w| 2.0 * w).collect();
        let found = ratio(&twice, &weather, 0).expect("rounds");
        assert!((found.low - 2.0).abs() < 1e-9 && (found.high - 2.0).abs() < 1e-9, "{found:?}");
        assert_eq!(ratio(&[], &[], 0), None);
    }
}
