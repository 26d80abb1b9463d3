//! How a network of integers answers held-out images: the guard.

use std::fmt::Write as _;

use super::{Guard, QuantisingError};
use crate::eval::Share;

/// The class that logits decide for; whether it is likely, where there is one. `None` if they aren't finite.
pub(super) fn decided(logits: &[f32]) -> Option<usize> {
    if !logits.iter().all(|logit| logit.is_finite()) {
        return None;
    }
    match logits {
        [only] => Some(usize::from(*only > 0.0)),
        // the first of equals
        _ => logits.iter().enumerate().rev().max_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(class, _)| class),
    }
}

/// How a network of integers answers held-out images.
pub(super) struct Judged {
    /// Keep the class of single precision.
    pub same: Share,
    /// Right answers in single precision and in integers.
    pub right: Option<[Share; 2]>,
    /// Images whose answers were right only in single precision, and only in integers.
    moved: [usize; 2],
}

impl Judged {
    pub fn new(single: &[Vec<f32>], integers: &[Vec<f32>], labels: Option<&[usize]>) -> Result<Self, QuantisingError> {
        let decide = |logits: &Vec<f32>| decided(logits).ok_or(QuantisingError::NotFinite);
        let single: Vec<usize> = single.iter().map(decide).collect::<Result<_, _>>()?;
        let integers: Vec<usize> = integers.iter().map(decide).collect::<Result<_, _>>()?;
        let of = single.len();
        let same = Share::new(single.iter().zip(&integers).filter(|(a, b)| a == b).count(), of);
        let Some(labels) = labels else { return Ok(Self { same, right: None, moved: [0, 0] }) };
        let right = |decided: &[usize]| -> Vec<bool> { decided.iter().zip(labels).map(|(a, b)| a == b).collect() };
        let (single, integers) = (right(&single), right(&integers));
        let share = |right: &[bool]| Share::new(right.iter().filter(|right| **right).count(), of);
        let only = |a: &[bool], b: &[bool]| a.iter().zip(b).filter(|(a, b)| **a && !**b).count();
        let moved = [only(&single, &integers), only(&integers, &single)];
        Ok(Self { same, right: Some([share(&single), share(&integers)]), moved })
    }

    /// Why the network isn't good enough, if it isn't.
    pub fn refusal(&self, guard: Guard) -> Option<String> {
        let Guard { min_agreement, max_drop } = guard;
        let Share { value, of, low, high, .. } = self.same;
        if value < min_agreement {
            return Some(format!(
                "int8 keeps the class of single precision for {:.2} % of {of} held-out images (95 % interval {:.2} to {:.2}), and \
                 --min-agreement asks for {:.2}",
                100.0 * value,
                100.0 * low,
                100.0 * high,
                100.0 * min_agreement
            ));
        }
        let [single, integers] = self.right?;
        let (lost, gained) = (self.moved[0] as f64, self.moved[1] as f64);
        let (drop, n) = (single.value - integers.value, of as f64);
        // of paired answers: images that moved neither way say nothing
        let reach = 1.96 * (lost + gained - (lost - gained).powi(2) / n).max(0.0).sqrt() / n;
        (drop > max_drop && drop - reach > 0.0).then(|| {
            format!(
                "int8 loses {:.2} points of top-1 on {of} held-out images (95 % interval {:.2} to {:.2}), and --max-drop allows {:.2}",
                100.0 * drop,
                100.0 * (drop - reach),
                100.0 * (drop + reach),
                100.0 * max_drop
            )
        })
    }

    pub fn line(&self) -> String {
        let Share { value, of, low, high, .. } = self.same;
        let mut line = format!(
            "int8: {:.1} % of {of} held-out images keep their class (95 % interval {:.1} to {:.1})",
            100.0 * value,
            100.0 * low,
            100.0 * high
        );
        if let Some([single, integers]) = self.right {
            let _ = write!(
                line,
                "; top-1 {:.2} % in single precision, {:.2} % in integers",
                100.0 * single.value,
                100.0 * integers.value
            );
        }
        line
    }

    pub fn doubt(&self, min_agreement: f64) -> Option<String> {
        (self.same.low < min_agreement).then(|| {
            format!(
                "note: with {} held-out images the agreement could be as low as {:.1} %; more calibration images would tell",
                self.same.of,
                100.0 * self.same.low
            )
        })
    }
}
