//! Ranges of maps: from their values on calibration images, by one of three methods.

use std::collections::BTreeMap;

use super::Int8Error;
use crate::model::RangeMethod;

/// Share of values beyond a percentile's range, at each end.
const BEYOND: f64 = 1e-4;

/// Bins of a histogram.
const BINS: usize = 1 << 12;

/// The values of one map.
#[derive(Debug, Clone, PartialEq)]
struct Measured {
    low: f32,
    high: f32,
    finite: bool,
    /// Half the histogram's width, a power of two.
    reach: f32,
    bins: Vec<u64>,
    count: u64,
}

impl Measured {
    fn new() -> Self {
        Self { low: 0.0, high: 0.0, finite: true, reach: 2_f32.powi(-60), bins: vec![0; BINS], count: 0 }
    }

    fn add(&mut self, values: &[f32]) {
        let (mut low, mut high, mut finite) = (self.low, self.high, true);
        for &value in values {
            low = low.min(value);
            high = high.max(value);
            finite &= value.is_finite();
        }
        self.finite &= finite;
        if !finite {
            return;
        }
        (self.low, self.high) = (low, high);
        while self.reach < high.max(-low) {
            // twice as wide: two bins become one
            let half = |first: usize| [self.bins[first], self.bins[first + 1]].iter().sum::<u64>();
            let mut wider = vec![0; BINS];
            for i in 0..BINS / 2 {
                wider[BINS / 4 + i] = half(2 * i);
            }
            self.bins = wider;
            self.reach *= 2.0;
        }
        let scale = BINS as f32 / 2.0 / self.reach;
        for &value in values {
            let at = ((value + self.reach) * scale) as usize;
            self.bins[at.min(BINS - 1)] += 1;
        }
        self.count += values.len() as u64;
    }

    /// The middle of a bin.
    fn middle(&self, bin: usize) -> f64 {
        let width = 2.0 * f64::from(self.reach) / BINS as f64;
        (bin as f64 + 0.5) * width - f64::from(self.reach)
    }

    /// The middle of the first bin past 0.01 % of values.
    fn outermost(&self, mut bins: impl Iterator<Item = usize>) -> f32 {
        let (most, mut beyond) = ((self.count as f64 * BEYOND) as u64, 0);
        let inside = bins.find(|&bin| {
            beyond += self.bins[bin];
            beyond > most
        });
        inside.map_or(0.0, |bin| self.middle(bin) as f32)
    }

    fn range(&self, method: RangeMethod) -> (f32, f32) {
        match method {
            RangeMethod::MinMax => (self.low, self.high),
            RangeMethod::Percentile => {
                let (low, high) = (self.outermost(0..BINS), self.outermost((0..BINS).rev()));
                (low.clamp(self.low, 0.0), high.clamp(0.0, self.high))
            }
            RangeMethod::Mse => {
                let error = |share: f64| {
                    let (low, high) = (f64::from(self.low) * share, f64::from(self.high) * share);
                    let rounding = ((high - low) / 255.0).powi(2) / 12.0;
                    let of = |(bin, &count): (usize, &u64)| {
                        let x = self.middle(bin);
                        let clipped = (x - x.clamp(low, high)).powi(2);
                        count as f64 * if clipped > 0.0 { clipped } else { rounding }
                    };
                    self.bins.iter().enumerate().filter(|(_, count)| **count > 0).map(of).sum::<f64>()
                };
                let shares = (25..=100).rev().map(|percent| f64::from(percent) / 100.0);
                let best = shares.min_by(|&a, &b| error(a).total_cmp(&error(b))).unwrap_or(1.0) as f32;
                (self.low * best, self.high * best)
            }
        }
    }
}

/// The values of all maps.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Ranges(BTreeMap<String, Measured>);

impl Ranges {
    /// Of no values yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds values of a map.
    pub fn add(&mut self, map: &str, values: &[f32]) {
        match self.0.get_mut(map) {
            Some(measured) => measured.add(values),
            None => {
                let mut measured = Measured::new();
                measured.add(values);
                self.0.insert(map.into(), measured);
            }
        }
    }

    /// Every map's range.
    pub fn choose(&self, method: RangeMethod) -> Result<BTreeMap<String, (f32, f32)>, Int8Error> {
        let range = |(map, measured): (&String, &Measured)| {
            let is_finite = measured.finite;
            is_finite.then(|| (map.clone(), measured.range(method))).ok_or_else(|| Int8Error::NotFinite(map.clone()))
        };
        self.0.iter().map(range).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Evenly spaced values in -1..1, and one far outside.
    fn measured() -> Measured {
        let mut measured = Measured::new();
        let values: Vec<f32> = (0..100_000).map(|i| i as f32 / 50_000.0 - 1.0).collect();
        values.chunks(1000).for_each(|values| measured.add(values));
        measured.add(&[10.0]);
        measured
    }

    #[test]
    fn methods_differ_about_outliers() {
        let measured = measured();
        assert_eq!(measured.range(RangeMethod::MinMax), (-1.0, 10.0));
        let (low, high) = measured.range(RangeMethod::Percentile);
        assert!((low + 1.0).abs() < 0.01 && (high - 1.0).abs() < 0.01, "{low} {high}");
        // one value costs less clipped than all others rounded coarsely
        let (_, high) = measured.range(RangeMethod::Mse);
        assert!(high < 10.0, "{high}");
    }

    #[test]
    fn histograms_widen_without_loss() {
        let measured = measured();
        assert_eq!(measured.bins.iter().sum::<u64>(), 100_001);
        assert_eq!(measured.reach, 16.0);
    }

    #[test]
    fn what_is_not_finite_is_named() {
        let mut ranges = Ranges::new();
        ranges.add("a", &[1.0]);
        ranges.add("b", &[f32::NAN]);
        assert_eq!(ranges.choose(RangeMethod::MinMax), Err(Int8Error::NotFinite("b".into())));
    }
}
