//! Test images and tolerances: images that a fold is verified on and that a server runs again before it serves, and the
//! largest difference between equal answers.

use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution as _, StandardNormal};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::Precision;

/// A test image, by its digest, and its logits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Golden {
    /// SHA-256 of the input, a fixed pseudo-random image `[channels, height, width]` of little-endian float32.
    pub input_sha256: String,
    /// Logits of the image, `[classes]`.
    pub logits: Vec<f32>,
    /// Largest difference of a logit that counts as equal.
    pub tolerance: f64,
}

/// Difference between the logits of two graphs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// Largest absolute difference of any logit; infinite if a logit of either graph is not finite.
    pub max_abs_diff: f64,
    /// Largest minus smallest logit of the reference.
    pub logit_span: f64,
}

/// Largest allowed difference of a logit between two computations of the same network, whose logits have this span, and
/// of which the less exact one is in this precision.
pub fn tolerance(precision: Precision, logit_span: f64) -> f64 {
    match precision {
        Precision::Fp32 => 1e-4 * logit_span + 1e-6,
        Precision::Fp16 => 2e-2 * logit_span + 1e-3,
        // integers have one sum
        Precision::Int8 => 0.0,
    }
}

/// Unit Gaussian images of shape `[channels, height, width]`, from a fixed seed.
pub fn images(shape: [usize; 3]) -> impl Iterator<Item = Vec<f32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    std::iter::repeat_with(move || (0..shape.iter().product()).map(|_| StandardNormal.sample(&mut rng)).collect())
}

/// SHA-256 of an image as little-endian bytes, in hexadecimal.
pub fn digest(image: &[f32]) -> String {
    let mut hash = Sha256::new();
    image.iter().for_each(|value| hash.update(value.to_le_bytes()));
    super::hex(&hash.finalize())
}

/// Compares the logits of two graphs for the same [`images`].
pub fn compare(reference: &[f32], candidate: &[f32]) -> Difference {
    let mut max_abs_diff = if reference.len() == candidate.len() { 0.0 } else { f64::INFINITY };
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    for (&a, &b) in reference.iter().zip(candidate) {
        let (a, b) = (f64::from(a), f64::from(b));
        let difference = (a - b).abs();
        max_abs_diff = f64::max(max_abs_diff, if difference.is_nan() { f64::INFINITY } else { difference });
        (low, high) = (low.min(a), high.max(a));
    }
    Difference { max_abs_diff, logit_span: high - low }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_show() {
        let found = compare(&[1.0, -2.0], &[1.5, -2.0]);
        assert_eq!((found.max_abs_diff, found.logit_span), (0.5, 3.0));
        assert_eq!(compare(&[1.0, f32::NAN], &[1.0, f32::NAN]).max_abs_diff, f64::INFINITY);
        assert_eq!(compare(&[1.0], &[]).max_abs_diff, f64::INFINITY);
    }
}
