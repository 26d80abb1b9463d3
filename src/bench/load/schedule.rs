//! Arrival times of requests, drawn before the run, so that no response can delay one.

use std::time::Duration;

use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution as _, Exp1};
use serde::{Deserialize, Serialize};

/// Distribution of arrivals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arrivals {
    /// Poisson process of independent callers: exponential gaps (MLPerf's Server scenario).
    Poisson,
    /// Equal gaps.
    Constant,
}

impl Arrivals {
    /// Description.
    pub fn name(self) -> &'static str {
        match self {
            Self::Poisson => "Poisson",
            Self::Constant => "Constant",
        }
    }
}

/// Draws arrival times within `span`, ascending, at `rate` requests per second. The same seed gives the same times.
pub fn draw(arrivals: Arrivals, rate: f64, span: Duration, seed: u64) -> Vec<Duration> {
    let (mut rng, mut times, mut at) = (ChaCha8Rng::seed_from_u64(seed), Vec::new(), 0.0);
    loop {
        let gap: f64 = match arrivals {
            Arrivals::Poisson => Exp1.sample(&mut rng),
            Arrivals::Constant => 1.0,
        };
        at += gap / rate;
        // at a rate of zero, or NaN, no request arrives
        if !at.is_finite() || at >= span.as_secs_f64() {
            return times;
        }
        times.push(Duration::from_secs_f64(at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poisson_has_the_rate_and_its_spread() {
        let times = draw(Arrivals::Poisson, 200.0, Duration::from_secs(100), 7);
        assert!((times.len() as f64 - 20_000.0).abs() < 4.0 * 20_000f64.sqrt(), "{}", times.len());
        assert!(times.is_sorted());
        let gaps: Vec<f64> = times.windows(2).map(|w| (w[1] - w[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        assert!((deviation / mean - 1.0).abs() < 0.05, "{deviation} {mean}");
        assert_eq!(times, draw(Arrivals::Poisson, 200.0, Duration::from_secs(100), 7));
        assert_ne!(times, draw(Arrivals::Poisson, 200.0, Duration::from_secs(100), 8));
    }

    #[test]
    fn constant_gaps_are_equal_and_no_rate_is_no_arrival() {
        let times = draw(Arrivals::Constant, 4.0, Duration::from_secs(1), 0);
        assert_eq!(times, [250, 500, 750].map(Duration::from_millis));
        assert!(draw(Arrivals::Constant, 0.0, Duration::from_secs(1), 0).is_empty());
    }
}
