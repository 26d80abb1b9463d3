//! Ranges of maps: from their values on calibration images, by one of three methods.

use std::collections::BTreeMap;

use super::Int8Error;
use super::function::Function;
use crate::model::RangeMethod;

/// Share of values beyond a percentile's range, at each end.
const BEYOND: f64 = 1e-4;

/// Least share of an end, in per cent, that is chosen by the error.
const LEAST: u32 = 25;

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

    fn range(&self, method: RangeMethod, function: Option<Function>) -> (f32, f32) {
        match method {
            RangeMethod::MinMax => (self.low, self.high),
            RangeMethod::Percentile => {
                let (low, high) = (self.outermost(0..BINS), self.outermost((0..BINS).rev()));
                (low.clamp(self.low, 0.0), high.clamp(0.0, self.high))
            }
            RangeMethod::Mse => self.least_error(function),
        }
    }

    /// The shares of both ends with the least squared error, after the function if one is all that reads these values as u8: where
    /// it is flat, nothing is lost by clipping, and steps are finer elsewhere.
    fn least_error(&self, function: Option<Function>) -> (f32, f32) {
        let of = |x: f64| function.map_or(x, |function| function.apply(x));
        let width = 2.0 * f64::from(self.reach) / BINS as f64;
        let bins: Vec<Bin> = self
            .bins
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0)
            .map(|(bin, &count)| {
                let x = self.middle(bin);
                let slope = (of(x + width / 2.0) - of(x - width / 2.0)) / width;
                Bin { x, value: of(x), slope: slope * slope / 12.0, count: count as f64 }
            })
            .collect();
        let ends = |[low, high]: [u32; 2]| {
            let end = |end: f32, percent: u32| f64::from(end) * f64::from(percent) / 100.0;
            (end(self.low, low), end(self.high, high))
        };
        let error = |shares: &[u32; 2]| {
            let (low, high) = ends(*shares);
            let step = ((high - low) / 255.0).powi(2);
            let (at_low, at_high) = (of(low), of(high));
            let of = |bin: &Bin| {
                bin.count
                    * if bin.x < low {
                        (bin.value - at_low).powi(2)
                    } else if bin.x > high {
                        (bin.value - at_high).powi(2)
                    } else {
                        step * bin.slope
                    }
            };
            bins.iter().map(of).sum::<f64>()
        };
        // the wider of equals
        let best = |shares: &mut dyn Iterator<Item = [u32; 2]>| {
            shares.min_by(|a, b| error(a).total_cmp(&error(b))).unwrap_or([100, 100])
        };
        let coarse = || (LEAST..=100).rev().step_by(5);
        let [low, high] = best(&mut coarse().flat_map(|low| coarse().map(move |high| [low, high])));
        let near = |share: u32| (share.saturating_sub(4).max(LEAST)..=(share + 4).min(100)).rev();
        let (low, high) = ends(best(&mut near(low).flat_map(|low| near(high).map(move |high| [low, high]))));
        (low as f32, high as f32)
    }
}

/// Values of a histogram's bin.
struct Bin {
    x: f64,
    /// What becomes of them.
    value: f64,
    /// What the square of a step makes of squared error.
    slope: f64,
    count: f64,
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

    /// Every map's range. `function` says what a map is activated by, if that is all that reads it as u8.
    pub fn choose(
        &self,
        method: RangeMethod,
        function: impl Fn(&str) -> Option<Function>,
    ) -> Result<BTreeMap<String, (f32, f32)>, Int8Error> {
        let range = |(map, measured): (&String, &Measured)| {
            let is_finite = measured.finite;
            is_finite
                .then(|| (map.clone(), measured.range(method, function(map))))
                .ok_or_else(|| Int8Error::NotFinite(map.clone()))
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
        assert_eq!(measured.range(RangeMethod::MinMax, None), (-1.0, 10.0));
        let (low, high) = measured.range(RangeMethod::Percentile, None);
        assert!((low + 1.0).abs() < 0.01 && (high - 1.0).abs() < 0.01, "{low} {high}");
        // one value costs less clipped than all others rounded coarsely
        let (_, high) = measured.range(RangeMethod::Mse, None);
        assert!(high < 10.0, "{high}");
    }

    #[test]
    fn what_an_activation_makes_flat_is_clipped() {
        let mut measured = Measured::new();
        let values: Vec<f32> = (0..100_000).map(|i| i as f32 / 5000.0 - 10.0).collect();
        measured.add(&values);
        let (low, high) = measured.range(RangeMethod::Mse, None);
        assert!(low < -9.5 && high > 9.5, "{low} {high}");
        let (low, high) = measured.range(RangeMethod::Mse, Some(Function::Silu));
        assert!((-7.0..-3.0).contains(&low) && high > 9.5, "{low} {high}");
        assert!(measured.range(RangeMethod::Mse, Some(Function::Relu)).0 > -3.0);
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
        assert_eq!(ranges.choose(RangeMethod::MinMax, |_| None), Err(Int8Error::NotFinite("b".into())));
    }
}
