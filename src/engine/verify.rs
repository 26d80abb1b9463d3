//! Asks a graph what the model's contract asks it ([`crate::model::golden`]).

use super::{Backend, BackendError, Batch};
pub use crate::model::golden::{Difference, compare, digest, images};

/// A graph's logits on the first `count` [`images`], run one by one.
pub fn answers(graph: &mut dyn Backend, count: usize, size: (usize, usize)) -> Result<Vec<f32>, BackendError> {
    let mut logits = Vec::new();
    for data in images(size).take(count) {
        logits.extend(graph.run(&Batch { images: 1, height: size.0, width: size.1, data })?.data);
    }
    Ok(logits)
}
