//! What calibration images look like: noise, or all of one class.

use std::collections::HashMap;

/// Share of calibration images of one class from which on it is said.
const ONE_CLASS: f64 = 0.95;
/// Correlation of neighbouring pixels below which images are no photographs.
const NOISE: f64 = 0.3;

/// What the calibration images look like.
#[derive(Default)]
pub(super) struct Looked {
    images: usize,
    /// Sum of the correlations of neighbouring pixels.
    correlation: f64,
}

impl Looked {
    pub fn add(&mut self, image: &[f32], [_, height, width]: [usize; 3]) {
        let plane = &image[..(height * width).min(image.len())];
        let pairs = plane
            .chunks_exact(width.max(1))
            .flat_map(|row| row.windows(2))
            .map(|pair| [pair[0], pair[1]].map(f64::from));
        let mean = plane.iter().map(|&x| f64::from(x)).sum::<f64>() / plane.len().max(1) as f64;
        let (mut along, mut own) = (0.0, 0.0);
        for [a, b] in pairs {
            along += (a - mean) * (b - mean);
            own += ((a - mean).powi(2) + (b - mean).powi(2)) / 2.0;
        }
        self.images += 1;
        self.correlation += if own > 0.0 { along / own } else { 1.0 };
    }

    pub fn note(&self) -> Option<String> {
        let correlation = self.correlation / self.images.max(1) as f64;
        (correlation < NOISE).then(|| {
            format!(
                "warning: the calibration images look like noise (neighbouring pixels correlate by {correlation:.2}, those of \
                 photographs by 0.9): ranges may not hold for photographs"
            )
        })
    }
}

/// A warning if nearly all images are of one class.
pub(super) fn one_class(expected: &[usize], labels: &[String]) -> Option<String> {
    let mut counts: HashMap<usize, usize> = HashMap::new();
    expected.iter().for_each(|class| *counts.entry(*class).or_default() += 1);
    let (class, count) = counts.into_iter().max_by_key(|(class, count)| (*count, std::cmp::Reverse(*class)))?;
    let name = labels
        .get(class)
        .map_or_else(|| class.to_string(), |label| format!("`{}`", crate::printable::printable(label)));
    (count as f64 >= ONE_CLASS * expected.len() as f64).then(|| {
        format!(
            "warning: {count} of {} calibration images are of one class ({name}) to the network: ranges may not hold for others",
            expected.len()
        )
    })
}
