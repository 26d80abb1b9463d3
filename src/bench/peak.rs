//! Measures the machine's single-precision peak by independent fused multiply-adds that never leave the registers: an
//! upper bound for the throughput of convolutions.

use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

use fearless_simd::prelude::*;
use fearless_simd::{Level, dispatch};
use serde::{Deserialize, Serialize};

/// Accumulators: enough to hide a latency of four or five cycles in two units.
const CHAINS: usize = 12;
/// Multiply-adds per accumulator between two clock readings.
const STEPS: usize = 20_000;
const SAMPLES: usize = 9;
const SAMPLE: Duration = Duration::from_millis(60);

/// Measured peak of several threads together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Peak {
    /// Number of threads.
    pub threads: usize,
    /// GFLOP/s; a multiply-add counts as two operations.
    pub gflops: f64,
}

/// Measures the peak of `threads` threads: the median of several short samples, without the first.
pub fn measure(threads: usize) -> Peak {
    let mut samples: Vec<f64> = (0..=SAMPLES)
        .map(|_| {
            thread::scope(|scope| {
                let all: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(rate)).collect();
                all.into_iter().map(|one| one.join().unwrap_or(0.0)).sum()
            })
        })
        .skip(1)
        .collect();
    samples.sort_by(f64::total_cmp);
    Peak { threads, gflops: samples[samples.len() / 2] }
}

/// Throughput of one thread over one sample, in GFLOP/s.
fn rate() -> f64 {
    let (start, mut flops) = (Instant::now(), 0.0);
    while start.elapsed() < SAMPLE {
        flops += dispatch!(Level::new(), simd => simd.vectorize(#[inline(always)] || multiply_add(simd)));
    }
    flops / start.elapsed().as_secs_f64() / 1e9
}

/// Runs all accumulators; returns the number of operations.
#[inline(always)]
fn multiply_add<S: Simd>(simd: S) -> f64 {
    let (factor, term) = (S::f32s::splat(simd, black_box(0.5)), S::f32s::splat(simd, black_box(1.0)));
    let mut chains = [S::f32s::splat(simd, black_box(1.0)); CHAINS];
    for _ in 0..STEPS {
        for chain in &mut chains {
            *chain = chain.mul_add(factor, term);
        }
    }
    let lanes: usize = chains.iter().map(|chain| black_box(chain.as_slice()).len()).sum();
    (STEPS * lanes * 2) as f64
}

#[cfg(test)]
mod tests {
    /// Any machine of this century has more than 0.1 and less than 10,000 GFLOP/s per core, even with unoptimised code.
    #[test]
    fn peak_is_plausible() {
        let gflops = super::rate();
        assert!((0.1..10_000.0).contains(&gflops), "{gflops}");
    }
}
