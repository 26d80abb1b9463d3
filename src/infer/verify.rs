//! Compares two graphs on the same random images: what a fold is held to before anything is written.

use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution as _, StandardNormal};

use super::engine::{Backend, BackendError, Batch};

/// How far two graphs are apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// Images compared.
    pub images: usize,
    /// Largest absolute difference of any logit; infinite when a logit of either graph is not finite.
    pub max_abs_diff: f64,
    /// Largest minus smallest logit of the reference.
    pub logit_span: f64,
}

/// Runs `reference` and `candidate` on `images` unit Gaussian images of `height` x `width`, one by one.
pub fn compare(
    reference: &mut dyn Backend,
    candidate: &mut dyn Backend,
    images: usize,
    (height, width): (usize, usize),
) -> Result<Difference, BackendError> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let (mut max_abs_diff, mut low, mut high) = (0.0f64, f64::INFINITY, f64::NEG_INFINITY);
    for _ in 0..images {
        let mut batch = Batch::zeros(1, height, width);
        batch.data.iter_mut().for_each(|v| *v = StandardNormal.sample(&mut rng));
        let (a, b) = (reference.run(&batch)?, candidate.run(&batch)?);
        for (&a, &b) in a.data.iter().zip(&b.data) {
            let (a, b) = (f64::from(a), f64::from(b));
            let difference = (a - b).abs();
            max_abs_diff = max_abs_diff.max(if difference.is_nan() { f64::INFINITY } else { difference });
            (low, high) = (low.min(a), high.max(a));
        }
    }
    Ok(Difference { images, max_abs_diff, logit_span: high - low })
}
