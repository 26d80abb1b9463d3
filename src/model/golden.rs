//! What a folded graph is asked, and when two answers are the same: the images that a fold is verified on and that a server
//! asks again before it serves.

use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution as _, StandardNormal};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::Precision;

/// One input and its logits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Golden {
    /// SHA-256 of the input `[channels, height, width]`, float32 little-endian: a fixed pseudo-random image.
    pub input_sha256: String,
    /// Its logits, `[classes]`.
    pub logits: Vec<f32>,
    /// Largest difference of a logit that is taken for the same answer.
    pub tolerance: f64,
}

/// How far two graphs are apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// Largest absolute difference of any logit; infinite when a logit of either graph is not finite.
    pub max_abs_diff: f64,
    /// Largest minus smallest logit of the reference.
    pub logit_span: f64,
}

/// Largest difference of a logit between two ways to compute the same network, where logits span so much and the less
/// exact way is in this precision.
pub fn tolerance(precision: Precision, logit_span: f64) -> f64 {
    match precision {
        Precision::Fp32 => 1e-4 * logit_span + 1e-6,
        Precision::Fp16 => 2e-2 * logit_span + 1e-3,
    }
}

/// Unit Gaussian images of a shape, `[channels, height, width]`: always the same ones.
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

/// Compares the answers of two graphs to the same [`images`].
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
