//! Batch normalisation with running statistics → weights and bias of the preceding convolution.

/// Parameters and statistics of one layer, one value per channel.
#[derive(Debug, Clone)]
pub struct BatchNorm {
    /// γ of the layer.
    pub weight: Vec<f64>,
    /// β of the layer.
    pub bias: Vec<f64>,
    /// Running mean.
    pub mean: Vec<f64>,
    /// Running variance, not negative.
    pub variance: Vec<f64>,
    /// Added to the variance under the square root.
    pub eps: f64,
}

impl BatchNorm {
    /// Scales `weight` (`[out_chs, fan_in]`) and returns the bias that replaces the layer: `W' = W·γ/√(var + eps)`, `b'
    /// = β − mean·γ/√(var + eps)`.
    pub fn fold(&self, weight: &mut [f64]) -> Vec<f64> {
        let fan_in = weight.len() / self.weight.len().max(1);
        let scale = |c: usize| self.weight[c] / (self.variance[c] + self.eps).sqrt();
        for (c, row) in weight.chunks_exact_mut(fan_in.max(1)).enumerate() {
            row.iter_mut().for_each(|w| *w *= scale(c));
        }
        (0..self.weight.len()).map(|c| self.bias[c] - self.mean[c] * scale(c)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folds_like_normalising_afterwards() {
        let layer = BatchNorm {
            weight: vec![2.0, -1.0],
            bias: vec![0.5, 0.25],
            mean: vec![1.0, -3.0],
            variance: vec![4.0, 0.0],
            eps: 1e-5,
        };
        let (x, before) = ([0.3, -0.7], [1.0, 2.0, -0.5, 0.1]);
        let mut weight = before.to_vec();
        let bias = layer.fold(&mut weight);
        for c in 0..2 {
            let dot = |w: &[f64]| w[2 * c] * x[0] + w[2 * c + 1] * x[1];
            let normed = (dot(&before) - layer.mean[c]) / (layer.variance[c] + layer.eps).sqrt();
            assert!((dot(&weight) + bias[c] - (normed * layer.weight[c] + layer.bias[c])).abs() < 1e-9);
        }
    }
}
