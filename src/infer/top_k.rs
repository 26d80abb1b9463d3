//! Logits → predictions: scores, a stable order, which classes are named, and an error for logits that are not finite.

use serde::Serialize;

use crate::model::{ScoreFunction, Scoring};

/// One class and its score.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prediction {
    /// Index of the class in the logits.
    pub index: usize,
    /// Label of the class; the index in digits if the model has no labels.
    pub label: String,
    /// Probability in 0..=1, as the model's [`Scoring`] makes it; a logit where that has no function.
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

/// Classes that are named where nothing says how many.
pub const USUAL: usize = 5;

/// Which classes of an image are named.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Selection {
    /// At most so many, those of the best scores.
    pub top_k: Option<usize>,
    /// Those with this score or more, instead of the model's thresholds.
    pub threshold: Option<f64>,
}

impl Selection {
    /// The most probable classes, so many.
    pub fn top(k: usize) -> Self {
        Self { top_k: Some(k), threshold: None }
    }

    /// Most classes that can be named.
    pub fn most(&self, scoring: &Scoring) -> usize {
        let all = self.threshold.is_some() || scoring.has_thresholds();
        self.top_k.unwrap_or(if all { usize::MAX } else { USUAL })
    }
}

/// The classes that are named for logits (`[classes]`), best score first, ties by index. A threshold that is asked for counts
/// instead of the model's; a number that is asked for alone counts instead of thresholds; without both, the model's
/// thresholds count, or [`USUAL`] classes where it has none. Scores are computed in double precision.
pub fn select(
    logits: &[f32],
    scoring: &Scoring,
    selection: Selection,
    labels: &[String],
) -> Result<Vec<Prediction>, NotFinite> {
    let mut named = ordered(logits, selection.most(scoring), scoring, labels)?;
    match selection {
        Selection { threshold: Some(threshold), .. } => named.retain(|p| p.score >= threshold),
        Selection { top_k: None, .. } if scoring.has_thresholds() => {
            named.retain(|p| scoring.threshold_of(p.index).is_some_and(|threshold| p.score >= threshold));
        }
        _ => {}
    }
    Ok(named)
}

/// The `k` most probable classes, most probable first, ties by index. `k` is clamped to the number of classes.
/// Probabilities are computed in double precision from `logits` (`[classes]`), as is [usual](Scoring::usual): a single logit
/// is the one of a binary classifier.
pub fn top_k(logits: &[f32], k: usize, labels: &[String]) -> Result<Vec<Prediction>, NotFinite> {
    ordered(logits, k, &Scoring::usual(logits.len()), labels)
}

fn ordered(logits: &[f32], k: usize, scoring: &Scoring, labels: &[String]) -> Result<Vec<Prediction>, NotFinite> {
    check_finite(logits)?;
    let before = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // only the first k are sorted: sorting a thousand classes takes longer than their softmax
    if (1..order.len()).contains(&k) {
        order.select_nth_unstable_by(k - 1, before);
    }
    order.truncate(k);
    order.sort_unstable_by(before);
    let scores = Scores::of(logits, scoring);
    let predict = |index: usize| Prediction {
        index,
        label: labels.get(index).cloned().unwrap_or_else(|| index.to_string()),
        score: scores.score(logits[index]),
    };
    Ok(order.into_iter().map(predict).collect())
}

/// What an image's scores look like as a whole.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// The class with the best score.
    pub class: usize,
    /// The best score, what it is better by than the second best, and the entropy as a share of the largest that there can be; none where
    /// scores are logits.
    pub shares: Option<[f64; 3]>,
}

/// Sums up the scores of finite logits; none where there are no logits, or some are not finite.
pub fn summarise(logits: &[f32], scoring: &Scoring) -> Option<Summary> {
    check_finite(logits).ok()?;
    let (mut class, mut second) = (0, None::<f32>);
    for (i, &logit) in logits.iter().enumerate().skip(1) {
        if logit > logits[class] {
            (class, second) = (i, Some(logits[class]));
        } else if second.is_none_or(|second| logit > second) {
            second = Some(logit);
        }
    }
    let best = *logits.get(class)?;
    let scores = Scores::of(logits, scoring);
    let top = scores.score(best);
    let xlogx = |p: f64| if p > 0.0 { p * p.ln() } else { 0.0 };
    let entropy = match scoring.activation {
        ScoreFunction::None => return Some(Summary { class, shares: None }),
        ScoreFunction::Softmax if logits.len() == 1 => 0.0,
        ScoreFunction::Softmax => {
            -logits.iter().map(|&logit| xlogx(scores.score(logit))).sum::<f64>() / (logits.len() as f64).ln()
        }
        ScoreFunction::Sigmoid => {
            let binary = |p: f64| -(xlogx(p) + xlogx(1.0 - p)) / std::f64::consts::LN_2;
            logits.iter().map(|&logit| binary(scores.score(logit))).sum::<f64>() / logits.len() as f64
        }
    };
    // of one output the other class has the rest
    let margin = second.map_or((2.0 * top - 1.0).abs(), |second| top - scores.score(second));
    Some(Summary { class, shares: Some([top, margin, entropy.clamp(0.0, 1.0)]) })
}

/// What makes scores of one image's logits.
#[derive(Debug, Clone, Copy)]
struct Scores {
    activation: ScoreFunction,
    temperature: f64,
    largest: f32,
    total: f64,
}

impl Scores {
    fn of(logits: &[f32], scoring: &Scoring) -> Self {
        let Scoring { activation, temperature, .. } = *scoring;
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut scores = Self { activation, temperature, largest, total: 1.0 };
        if activation == ScoreFunction::Softmax {
            scores.total = logits.iter().map(|&logit| scores.exp(logit)).sum();
        }
        scores
    }

    fn exp(&self, logit: f32) -> f64 {
        (f64::from(logit - self.largest) / self.temperature).exp()
    }

    fn score(&self, logit: f32) -> f64 {
        match self.activation {
            ScoreFunction::Softmax => self.exp(logit) / self.total,
            ScoreFunction::Sigmoid => 1.0 / (1.0 + (-f64::from(logit) / self.temperature).exp()),
            ScoreFunction::None => f64::from(logit) / self.temperature,
        }
    }
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

    fn scoring(activation: ScoreFunction) -> Scoring {
        Scoring { activation, ..Scoring::usual(3) }
    }

    /// Names of classes in the order they are named.
    fn named(scoring: &Scoring, selection: Selection) -> Vec<(usize, f64)> {
        let named = select(&[2.0, -1.0, 0.5], scoring, selection, &[]).expect("finite");
        named.into_iter().map(|p| (p.index, (p.score * 1e4).round() / 1e4)).collect()
    }

    #[test]
    fn scores_are_what_the_model_says() {
        let nothing = Selection::top(2);
        assert_eq!(named(&scoring(ScoreFunction::Softmax), nothing), [(0, 0.7856), (2, 0.1753)]);
        assert_eq!(named(&scoring(ScoreFunction::Sigmoid), nothing), [(0, 0.8808), (2, 0.6225)]);
        assert_eq!(named(&scoring(ScoreFunction::None), nothing), [(0, 2.0), (2, 0.5)]);
        // at a temperature of 2 logits count half
        let warm = |activation| Scoring { temperature: 2.0, ..scoring(activation) };
        assert_eq!(named(&warm(ScoreFunction::Softmax), nothing), [(0, 0.5898), (2, 0.2786)]);
        assert_eq!(named(&warm(ScoreFunction::Sigmoid), nothing), [(0, 0.7311), (2, 0.5622)]);
        let one = select(&[2.0], &Scoring { temperature: 2.0, ..Scoring::usual(1) }, nothing, &[]).expect("finite");
        assert!((one[0].score - 0.731_058_578_6).abs() < 1e-9);
    }

    #[test]
    fn summaries_say_how_sure_scores_are() {
        let of = |logits: &[f32], activation| summarise(logits, &scoring(activation)).expect("finite");
        let near = |summary: Summary, class: usize, due: [f64; 3]| {
            let found = summary.shares.expect("shares");
            let same = found.iter().zip(due).all(|(a, b)| (a - b).abs() < 1e-4);
            assert!(summary.class == class && same, "{summary:?} instead of {due:?}");
        };
        near(of(&[2.0, -1.0, 0.5], ScoreFunction::Softmax), 0, [0.7856, 0.6103, 0.5658]);
        near(of(&[0.0; 4], ScoreFunction::Softmax), 0, [0.25, 0.0, 1.0]);
        near(of(&[-800.0, 800.0], ScoreFunction::Softmax), 1, [1.0, 1.0, 0.0]);
        near(of(&[0.0, 0.0], ScoreFunction::Sigmoid), 0, [0.5, 0.0, 1.0]);
        near(of(&[-2.0, 3.0, 1.0], ScoreFunction::Sigmoid), 1, [0.9526, 0.2215, 0.5475]);
        near(of(&[2.0], ScoreFunction::Sigmoid), 0, [0.8808, 0.7616, 0.5271]);
        assert_eq!(of(&[-1.0, 5.0], ScoreFunction::None), Summary { class: 1, shares: None });
        assert_eq!(summarise(&[f32::NAN], &Scoring::usual(1)), None);
        assert_eq!(summarise(&[], &Scoring::usual(0)), None);
    }

    #[test]
    fn thresholds_name_all_that_reach_them() {
        let all = Scoring { threshold: Some(0.25), ..scoring(ScoreFunction::Sigmoid) };
        let asked = |top_k, threshold| Selection { top_k, threshold };
        assert_eq!(named(&all, asked(None, None)), [(0, 0.8808), (2, 0.6225), (1, 0.2689)]);
        assert_eq!(named(&all, asked(None, Some(0.7))), [(0, 0.8808)], "the request's threshold instead");
        assert_eq!(named(&all, asked(Some(1), None)), [(0, 0.8808)], "a number that is asked for");
        assert_eq!(named(&all, asked(Some(2), Some(0.0))), [(0, 0.8808), (2, 0.6225)], "both");
        assert_eq!(named(&scoring(ScoreFunction::Sigmoid), asked(None, Some(0.99))), [], "none reaches it");
        let own = Scoring { thresholds: [(0, 0.9), (1, 0.2)].into(), ..all.clone() };
        assert_eq!(named(&own, asked(None, None)), [(2, 0.6225), (1, 0.2689)], "each class has its own");
        let alone = Scoring { threshold: None, ..own };
        assert_eq!(named(&alone, asked(None, None)), [(1, 0.2689)], "the others have none");
        // a score that is the threshold reaches it
        let exact = Scoring { threshold: Some(0.5), ..scoring(ScoreFunction::None) };
        assert_eq!(named(&exact, asked(None, None)), [(0, 2.0), (2, 0.5)]);
    }
}
