//! Logits → predictions: softmax probability, a stable order, and an error for logits that are not finite.

use serde::Serialize;

/// One class and its probability.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prediction {
    /// Index of the class in the logits.
    pub index: usize,
    /// Label of the class; the index in digits if the model has no labels.
    pub label: String,
    /// Softmax probability, 0 to 1; the sigmoid for a single logit.
    pub score: f64,
}

/// The network returned NaN or infinity: a fault of the model or its input, never a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("logit {index} is not finite; the model or its input is broken")]
pub struct NotFinite {
    /// Index of the first such logit.
    pub index: usize,
}

/// Refuses logits that are not finite.
pub fn check_finite(logits: &[f32]) -> Result<(), NotFinite> {
    logits.iter().position(|l| !l.is_finite()).map_or(Ok(()), |index| Err(NotFinite { index }))
}

/// The `k` most probable classes, most probable first, ties by index. `k` is clamped to the number of classes.
/// Probabilities are computed in double precision from `logits` (`[classes]`). A single logit is a binary classifier's:
/// its probability is the sigmoid, as a softmax of one value is always 1.
pub fn top_k(logits: &[f32], k: usize, labels: &[String]) -> Result<Vec<Prediction>, NotFinite> {
    check_finite(logits)?;
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp = |l: f32| f64::from(l - largest).exp();
    let total: f64 = logits.iter().map(|&l| exp(l)).sum();
    let before = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // only the first k are sorted: sorting a thousand classes takes longer than their softmax
    if (1..order.len()).contains(&k) {
        order.select_nth_unstable_by(k - 1, before);
    }
    order.truncate(k);
    order.sort_unstable_by(before);
    let sigmoid = |l: f32| 1.0 / (1.0 + f64::from(-l).exp());
    let predict = |index: usize| Prediction {
        index,
        label: labels.get(index).cloned().unwrap_or_else(|| index.to_string()),
        score: if logits.len() == 1 { sigmoid(logits[index]) } else { exp(logits[index]) / total },
    };
    Ok(order.into_iter().map(predict).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_by_probability_then_index() {
        let top = top_k(&[1.0, 3.0, 3.0, -0.0, 0.0], 9, &[]).expect("finite");
        assert_eq!(top.iter().map(|p| p.index).collect::<Vec<_>>(), [1, 2, 0, 4, 3]);
        assert!((top.iter().map(|p| p.score).sum::<f64>() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn the_first_of_many_are_the_first_of_all() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 101) as f32 / 10.0).collect();
        let all = top_k(&logits, 1000, &[]).expect("finite");
        for k in [0, 1, 2, 5, 999, 1000, 2000] {
            assert_eq!(top_k(&logits, k, &[]).expect("finite"), all[..k.min(1000)], "{k}");
        }
        assert!(all.is_sorted_by(|a, b| a.score > b.score || (a.score == b.score && a.index < b.index)));
    }

    #[test]
    fn extreme_logits_stay_finite() {
        let top = top_k(&[3e38, -3e38], 2, &["a".into(), "b".into()]).expect("finite");
        assert_eq!((top[0].label.as_str(), top[0].score, top[1].score), ("a", 1.0, 0.0));
    }

    #[test]
    fn a_single_logit_is_a_sigmoids() {
        for (logit, score) in [(0.0, 0.5), (1.0, 0.731_058_578_630_004_9), (-800.0, 0.0), (800.0, 1.0)] {
            let top = top_k(&[logit], 5, &[]).expect("finite");
            assert!(top.len() == 1 && (top[0].score - score).abs() < 1e-12, "{top:?}");
        }
    }

    #[test]
    fn refuses_nan_and_infinity() {
        assert_eq!(top_k(&[0.0, f32::NAN], 1, &[]), Err(NotFinite { index: 1 }));
        assert_eq!(top_k(&[f32::INFINITY], 1, &[]), Err(NotFinite { index: 0 }));
    }
}
