//! Scaled Weight Standardization → plain weights (Brock, De & Smith 2021, section 4; timm `ScaledStdConv2d`).

/// Replaces `weight` (`[out_chs, fan_in]`, row-major) by the weights that the convolution uses: `gain · γ/√fan_in · (W
/// − mean) / √(variance + eps)`, with mean and biased variance over each output channel's fan-in.
pub fn standardise(weight: &mut [f64], gain: &[f64], gamma: f64, eps: f64) {
    if gain.is_empty() {
        return;
    }
    let fan_in = weight.len() / gain.len();
    let n = fan_in as f64;
    for (row, gain) in weight.chunks_exact_mut(fan_in).zip(gain) {
        let mean = row.iter().sum::<f64>() / n;
        let variance = row.iter().map(|w| (w - mean) * (w - mean)).sum::<f64>() / n;
        let scale = gain * gamma / (n.sqrt() * (variance + eps).sqrt());
        row.iter_mut().for_each(|w| *w = (*w - mean) * scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// At eps 0, a standardised row has mean 0 and variance γ²·gain²/fan_in, whatever the weights were.
        #[test]
        fn rows_have_the_variance_that_the_analysis_asks_for(
            rows in prop::collection::vec(prop::collection::vec(-3.0f64..3.0, 12), 1..4), gain in 0.1f64..2.0,
        ) {
            prop_assume!(rows.iter().all(|r| r.iter().any(|w| (w - r[0]).abs() > 1e-3)));
            let mut weight: Vec<f64> = rows.concat();
            standardise(&mut weight, &vec![gain; rows.len()], 1.7, 0.0);
            for row in weight.chunks(12) {
                let mean = row.iter().sum::<f64>() / 12.0;
                let variance = row.iter().map(|w| w * w).sum::<f64>() / 12.0;
                prop_assert!(mean.abs() < 1e-12);
                prop_assert!((variance / (1.7f64 * 1.7 * gain * gain / 12.0) - 1.0).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn constant_rows_become_zero() {
        let mut weight = vec![0.5; 8];
        standardise(&mut weight, &[1.0, 2.0], 1.0, 1e-5);
        assert_eq!(weight, [0.0; 8]);
    }
}
