//! Runs a graph on the images of a model's golden answer ([`crate::model::golden`]).

use super::{Backend, BackendError, Batch};
use crate::model::Preprocessing;
pub use crate::model::golden::{Difference, compare, digest, images, tolerance};

/// Logits of a graph for the first `count` [`images`], run one by one.
pub fn answers(graph: &mut dyn Backend, count: usize, shape: [usize; 3]) -> Result<Vec<f32>, BackendError> {
    let mut logits = Vec::new();
    for data in images(shape).take(count) {
        logits.extend(graph.run(&Batch { images: 1, height: shape[1], width: shape[2], data })?.data);
    }
    Ok(logits)
}

/// As [`answers`], with all images in one batch.
pub fn answers_together(graph: &mut dyn Backend, count: usize, shape: [usize; 3]) -> Result<Vec<f32>, BackendError> {
    let data = images(shape).take(count).flatten().collect();
    Ok(graph.run(&Batch { images: count, height: shape[1], width: shape[2], data })?.data)
}

/// Images without noise: white, black, and a diagonal ramp between them; each `[channels, height, width]`, normalised
/// by `p`. Flat areas lead to larger activations than noise.
pub fn plain_images(p: &Preprocessing) -> [Vec<f32>; 3] {
    let [_, height, width] = p.shape();
    let steps = (height + width).saturating_sub(2).max(1) as f64;
    let shades: [&dyn Fn(usize) -> f64; 3] =
        [&|_| 1.0, &|_| 0.0, &|at: usize| (at / width.max(1) + at % width.max(1)) as f64 / steps];
    shades.map(|shade| {
        let channels = p.mean.iter().zip(&p.std);
        channels.flat_map(|(m, s)| (0..height * width).map(move |at| ((shade(at) - m) / s) as f32)).collect()
    })
}
