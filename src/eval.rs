//! Evaluates a classifier on images whose classes are known: accuracy with its confidence interval, per class,
//! confusion, calibration, and two runs compared image by image. Pure functions of the predictions.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::model::{ScoreFunction, Scoring};

/// Bins of the calibration error, as in Guo et al. (ICML 2017).
const BINS: usize = 15;
/// Quantile of the normal distribution for intervals of 95 %.
const Z: f64 = 1.959_963_984_540_054;
/// Number of most probable classes that count for [`Evaluation::top5`].
pub const TOP: usize = 5;

/// The prediction for one image whose class is known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Judged {
    /// The image's class.
    pub class: usize,
    /// The most probable class.
    pub predicted: usize,
    /// Probability of `predicted`.
    pub score: f64,
    /// Whether the image's class is among the five most probable.
    pub in_top5: bool,
}

impl Judged {
    /// Whether the most probable class is the image's.
    pub fn is_right(&self) -> bool {
        self.class == self.predicted
    }
}

/// A share of images, with its 95 % confidence interval (Wilson, 1927).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Share {
    /// Number of images in the share.
    pub count: usize,
    /// Number of all images.
    pub of: usize,
    /// `count / of`, 0 to 1; 0 if there are no images.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

impl Share {
    /// `count` of `of` images.
    pub fn new(count: usize, of: usize) -> Self {
        if of == 0 {
            return Self { count, of, value: 0.0, low: 0.0, high: 1.0 };
        }
        let n = of as f64;
        let value = count as f64 / n;
        let middle = value + Z * Z / (2.0 * n);
        let reach = Z * (value * (1.0 - value) / n + Z * Z / (4.0 * n * n)).sqrt();
        let wide = 1.0 + Z * Z / n;
        // clamped against rounding: both ends are shares
        let (low, high) = (((middle - reach) / wide).max(0.0), ((middle + reach) / wide).min(1.0));
        Self { count, of, value, low: low.min(value), high: high.max(value) }
    }
}

/// One class of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Class {
    /// Index in the logits.
    pub index: usize,
    /// Share of the class's images that were predicted as it (recall).
    pub recall: Share,
    /// Share of the images predicted as this class that belong to it (precision).
    pub precision: Share,
}

/// Images of one class that were predicted as another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Confusion {
    /// Their class.
    pub class: usize,
    /// The predicted class.
    pub predicted: usize,
    /// Number of images.
    pub images: usize,
}

/// Images whose highest score lies in one range.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bin {
    /// Lower end of the range, whose width is 1/15.
    pub from: f64,
    /// Number of images.
    pub images: usize,
    /// Mean of their highest scores.
    pub score: f64,
    /// Share of correct predictions.
    pub accuracy: f64,
}

/// The results of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluation {
    /// Images whose most probable class is right.
    pub top1: Share,
    /// Images whose class is among the five most probable.
    pub top5: Share,
    /// Mean of the recalls of the classes that have images.
    pub mean_recall: f64,
    /// Expected calibration error: distance of the scores from the share of correct predictions, mean over images (Guo
    /// et al., 2017).
    pub calibration_error: f64,
    /// Mean of the highest scores.
    pub mean_score: f64,
    /// The bins of the calibration error that have images.
    pub reliability: Vec<Bin>,
    /// Classes that have images or were predicted.
    pub classes: Vec<Class>,
    /// Which class was predicted as which, most frequent first.
    pub confusions: Vec<Confusion>,
}

impl Evaluation {
    /// Evaluates predictions.
    pub fn of(judged: &[Judged]) -> Self {
        let right = judged.iter().filter(|j| j.is_right()).count();
        let mut by_class: BTreeMap<usize, (usize, usize, usize)> = BTreeMap::new();
        let mut confused: BTreeMap<(usize, usize), usize> = BTreeMap::new();
        for j in judged {
            let own = by_class.entry(j.class).or_default();
            own.0 += 1;
            own.2 += usize::from(j.is_right());
            by_class.entry(j.predicted).or_default().1 += 1;
            if !j.is_right() {
                *confused.entry((j.class, j.predicted)).or_default() += 1;
            }
        }
        let classes: Vec<Class> = by_class
            .into_iter()
            .map(|(index, (images, answered, right))| Class {
                index,
                recall: Share::new(right, images),
                precision: Share::new(right, answered),
            })
            .collect();
        let with_images: Vec<f64> = classes.iter().filter(|c| c.recall.of > 0).map(|c| c.recall.value).collect();
        let mut confusions: Vec<_> =
            confused.into_iter().map(|((class, predicted), images)| Confusion { class, predicted, images }).collect();
        confusions.sort_by_key(|c| (std::cmp::Reverse(c.images), c.class, c.predicted));
        let reliability = reliability(judged);
        let all = judged.len() as f64;
        let apart = |bin: &Bin| bin.images as f64 / all * (bin.score - bin.accuracy).abs();
        Self {
            top1: Share::new(right, judged.len()),
            top5: Share::new(judged.iter().filter(|j| j.in_top5).count(), judged.len()),
            mean_recall: mean(&with_images),
            calibration_error: reliability.iter().map(apart).sum(),
            mean_score: mean(&judged.iter().map(|j| j.score).collect::<Vec<_>>()),
            reliability,
            classes,
            confusions,
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

fn reliability(judged: &[Judged]) -> Vec<Bin> {
    let mut sums = [(0_usize, 0.0_f64, 0_usize); BINS];
    for j in judged {
        // a score of 1 belongs to the last range
        let at = ((j.score * BINS as f64) as usize).min(BINS - 1);
        let (images, score, right) = &mut sums[at];
        *images += 1;
        *score += j.score;
        *right += usize::from(j.is_right());
    }
    let filled = sums.into_iter().enumerate().filter(|(_, (images, ..))| *images > 0);
    filled
        .map(|(i, (images, score, right))| {
            let n = images as f64;
            Bin { from: i as f64 / BINS as f64, images, score: score / n, accuracy: right as f64 / n }
        })
        .collect()
}

/// The temperature that makes scores most probable, and how much that is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Fit {
    /// What logits are to be divided by.
    pub temperature: f64,
    /// Mean negative log-likelihood of the images' classes with logits divided by what they were before.
    pub likelihood_before: f64,
    /// The same at [`temperature`](Self::temperature).
    pub likelihood_after: f64,
}

/// Range that temperatures are looked for in: what lies at its ends is no fit.
const TEMPERATURES: (f64, f64) = (0.02, 50.0);

/// The temperature with the least negative log-likelihood (Guo et al., 2017): of one class an image for softmax, of each class
/// for itself for sigmoid. `rows` are images' logits (unscaled) with their classes, `before` the temperature until now. None where no
/// temperature is best: all answers are right and any higher score is better, or they are no better than chance.
pub fn fit_temperature(rows: &[(usize, Vec<f32>)], scoring: &Scoring) -> Option<Fit> {
    let loss = |log: f64| mean_loss(rows, scoring.activation, log.exp());
    let (mut low, mut high) = (TEMPERATURES.0.ln(), TEMPERATURES.1.ln());
    let ends = (low, high);
    // convex in 1/temperature, so that it has one minimum in the logarithm: golden sections
    let golden = (5_f64.sqrt() - 1.0) / 2.0;
    let (mut a, mut b) = (high - golden * (high - low), low + golden * (high - low));
    let (mut at_a, mut at_b) = (loss(a), loss(b));
    while high - low > 1e-5 {
        if at_a < at_b {
            (high, b, at_b) = (b, a, at_a);
            a = high - golden * (high - low);
            at_a = loss(a);
        } else {
            (low, a, at_a) = (a, b, at_b);
            b = low + golden * (high - low);
            at_b = loss(b);
        }
    }
    let best = (low + high) / 2.0;
    // worse on both sides, or there is no best
    let least = loss(best) + 1e-9;
    let is_least = [best - 0.5, best + 0.5].into_iter().all(|beside| loss(beside) > least);
    if !is_least || best - ends.0 < 1e-3 || ends.1 - best < 1e-3 {
        return None;
    }
    Some(Fit {
        temperature: best.exp(),
        likelihood_before: loss(scoring.temperature.ln()),
        likelihood_after: loss(best),
    })
}

fn mean_loss(rows: &[(usize, Vec<f32>)], activation: ScoreFunction, temperature: f64) -> f64 {
    // log(1 + exp(x)) without overflow
    let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
    let loss = |(class, logits): &(usize, Vec<f32>)| {
        let scaled = logits.iter().map(|&logit| f64::from(logit) / temperature);
        let own = logits.get(*class).map_or(0.0, |&logit| f64::from(logit) / temperature);
        if activation == ScoreFunction::Sigmoid {
            return scaled.map(softplus).sum::<f64>() - own;
        }
        let largest = scaled.clone().fold(f64::NEG_INFINITY, f64::max);
        scaled.map(|logit| (logit - largest).exp()).sum::<f64>().ln() + largest - own
    };
    rows.iter().map(loss).sum::<f64>() / rows.len().max(1) as f64
}

/// Two runs over the same images, compared one by one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Comparison {
    /// Images of both runs with the same prediction.
    pub agreement: Share,
    /// Images of both runs that only this run has right.
    pub only_this: usize,
    /// Images of both runs that only the other run has right.
    pub only_other: usize,
    /// Probability of a split at least as uneven if both are right equally often: McNemar's exact test (1947),
    /// two-sided.
    pub p: f64,
}

impl Comparison {
    /// Compares pairs of this run's prediction and the class that the other run predicted.
    pub fn of(pairs: &[(Judged, usize)]) -> Self {
        let count = |of: &dyn Fn(&(Judged, usize)) -> bool| pairs.iter().filter(|pair| of(pair)).count();
        let only_this = count(&|(this, other)| this.is_right() && *other != this.class);
        let only_other = count(&|(this, other)| !this.is_right() && *other == this.class);
        Self {
            agreement: Share::new(count(&|(this, other)| this.predicted == *other), pairs.len()),
            only_this,
            only_other,
            p: mcnemar(only_this, only_other),
        }
    }
}

/// Both tails of the binomial distribution with probability 1/2.
fn mcnemar(a: usize, b: usize) -> f64 {
    let n = (a + b) as f64;
    let log_choose = |k: f64| libm::lgamma(n + 1.0) - libm::lgamma(k + 1.0) - libm::lgamma(n - k + 1.0);
    let tail: f64 = (0..=a.min(b)).map(|k| (log_choose(k as f64) - n * std::f64::consts::LN_2).exp()).sum();
    (2.0 * tail).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(class: usize, predicted: usize, score: f64) -> Judged {
        Judged { class, predicted, score, in_top5: class == predicted || class < 5 }
    }

    #[test]
    fn intervals_are_wilsons() {
        // computed from the formula in Python
        for (count, of, low, high) in [
            (0, 10, 0.0, 0.277_532_8),
            (5, 10, 0.236_593_1, 0.763_406_9),
            (81, 263, 0.255_288_5, 0.366_209_6),
            (10, 10, 0.722_467_2, 1.0),
        ] {
            let share = Share::new(count, of);
            assert!((share.low - low).abs() < 1e-6 && (share.high - high).abs() < 1e-6, "{count} of {of}: {share:?}");
            assert!(share.low <= share.value && share.value <= share.high);
        }
        assert_eq!(Share::new(0, 0).value, 0.0);
    }

    #[test]
    fn a_run_is_counted_class_by_class() {
        let run = [judged(0, 0, 0.9), judged(0, 1, 0.6), judged(1, 1, 0.8), judged(7, 1, 0.7), judged(7, 1, 0.2)];
        let found = Evaluation::of(&run);
        assert_eq!((found.top1.count, found.top5.count, found.top1.of), (2, 3, 5));
        let classes: Vec<_> = found.classes.iter().map(|c| (c.index, c.recall.value, c.precision.value)).collect();
        assert_eq!(classes, [(0, 0.5, 1.0), (1, 1.0, 0.25), (7, 0.0, 0.0)]);
        assert!((found.mean_recall - 0.5).abs() < 1e-12);
        assert_eq!(found.confusions[0], Confusion { class: 7, predicted: 1, images: 2 });
        // each prediction is in a bin of its own: |0.9 - 1|, |0.6 - 0|, |0.8 - 1|, |0.7 - 0|, |0.2 - 0|
        let due = (0.1 + 0.6 + 0.2 + 0.7 + 0.2) / 5.0;
        assert!((found.calibration_error - due).abs() < 1e-12, "{}", found.calibration_error);
        assert!((found.mean_score - 0.64).abs() < 1e-12);
        let nothing = Evaluation::of(&[]);
        assert!(nothing.calibration_error == 0.0 && nothing.top1.value == 0.0 && nothing.mean_recall == 0.0);
    }

    #[test]
    fn temperatures_are_the_likeliest() {
        // two logits, 0 and 2: three of four images are of the second. Softmax is right where 2/T = ln 3
        let rows: Vec<_> = [1, 1, 1, 0].map(|class| (class, vec![0.0, 2.0])).to_vec();
        let fit = fit_temperature(&rows, &Scoring::usual(2)).expect("a fit");
        assert!((fit.temperature - 2.0 / 3_f64.ln()).abs() < 1e-3, "{fit:?}");
        let entropy = -(0.75 * 0.75_f64.ln() + 0.25 * 0.25_f64.ln());
        assert!(
            (fit.likelihood_after - entropy).abs() < 1e-6 && fit.likelihood_before > fit.likelihood_after,
            "{fit:?}"
        );
        // sigmoid: each class for itself, both symmetric about 0
        let rows: Vec<_> = [1, 1, 1, 0].map(|class| (class, vec![-2.0, 2.0])).to_vec();
        let sigmoid = Scoring { activation: ScoreFunction::Sigmoid, ..Scoring::usual(2) };
        let fit = fit_temperature(&rows, &sigmoid).expect("a fit");
        assert!(
            (fit.temperature - 2.0 / 3_f64.ln()).abs() < 1e-3 && (fit.likelihood_after - 2.0 * entropy).abs() < 1e-6
        );
        // all right: the higher the better; by chance: the lower the better
        assert_eq!(fit_temperature(&[(1, vec![0.0, 2.0])], &Scoring::usual(2)), None);
        let chance = [(0, vec![0.0, 2.0]), (1, vec![0.0, 2.0])];
        assert_eq!(fit_temperature(&chance, &Scoring::usual(2)), None);
    }

    #[test]
    fn a_perfect_score_is_in_the_last_range() {
        let found = Evaluation::of(&[judged(0, 0, 1.0)]);
        assert_eq!((found.reliability.len(), found.calibration_error), (1, 0.0));
    }

    #[test]
    fn two_runs_are_told_apart_as_mcnemar_does() {
        // sums of binomial coefficients in integers, computed in Python
        for (a, b, p) in [(2, 10, 0.038_574_22), (59, 121, 4.434_449e-6), (0, 0, 1.0), (5, 5, 1.0), (0, 1, 1.0)] {
            let found = mcnemar(a, b);
            assert!((found - p).abs() < 1e-4 * p, "{a} {b}: {found}");
        }
        let pairs = [(judged(0, 0, 0.9), 0), (judged(0, 1, 0.9), 0), (judged(1, 1, 0.9), 2), (judged(1, 2, 0.9), 2)];
        let found = Comparison::of(&pairs);
        assert_eq!((found.agreement.count, found.only_this, found.only_other, found.p), (2, 1, 1, 1.0));
    }
}
