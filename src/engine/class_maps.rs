//! Class activation maps (Zhou et al., CVPR 2016): where an image speaks for a class. Of a classifier that reads the mean of
//! each channel the map is exact: its own mean, and the class's bias, make the logit.

use crate::graph::head::{self, Head};

/// What each class of a network makes of its last map.
#[derive(Debug, Clone, PartialEq)]
pub struct ClassMaps(Head);

impl ClassMaps {
    /// Those of a graph with the output `map`; the error says why it has none.
    pub fn of(onnx: &[u8]) -> Result<Self, &'static str> {
        head::read(onnx).map(Self)
    }

    /// The map of one class, `[height, width]`, by an image's output `map`, `[channels, height, width]`. None where that is no
    /// class, or no map of this network.
    pub fn grid(&self, class: usize, map: &[f32]) -> Option<Vec<f32>> {
        let Head { weights, channels } = &self.0;
        let row = weights.chunks_exact(*channels).nth(class)?;
        if map.is_empty() || !map.len().is_multiple_of(*channels) {
            return None;
        }
        let mut sums = vec![0.0_f64; map.len() / channels];
        for (weight, values) in row.iter().zip(map.chunks_exact(sums.len())) {
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += f64::from(*weight) * f64::from(*value);
            }
        }
        Some(sums.into_iter().map(|sum| sum as f32).collect())
    }
}
