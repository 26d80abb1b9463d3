//! Finds unhealthy signals: not finite, exploding, vanishing, or different from a reference.

use serde::Serialize;

use super::{Profile, Signal};
use crate::model::OUTPUT;

/// Limits of healthy statistics.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Largest healthy second moment of a block's output and of its residual branch.
    pub explode: f64,
    /// Smallest healthy second moment of a block's output.
    pub vanish: f64,
}

impl Default for Limits {
    /// 10⁶ and 10⁻⁶: values that single precision still represents well, but that no healthy network has.
    fn default() -> Self {
        Self { explode: 1e6, vanish: 1e-6 }
    }
}

/// An unhealthy signal.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Problem {
    /// Name of the network.
    pub network: String,
    /// The first block with the problem; `logits` after the last block.
    pub block: String,
    /// `not_finite`, `exploding`, `vanishing`, `differs` or `not_representable`.
    pub kind: &'static str,
    /// The measured values.
    pub detail: String,
}

/// The first block with each kind of problem; later blocks have it as well.
pub fn examine(profile: &Profile, limits: &Limits) -> Vec<Problem> {
    let problem = |signal: &Signal, kind, detail: String| Problem {
        network: profile.network.clone(),
        block: signal.block.clone(),
        kind,
        detail,
    };
    let residual = |s: &Signal| s.residual_variance.unwrap_or_default() + s.residual_squared_mean.unwrap_or_default();
    let mut found = Vec::new();
    let lost = profile.blocks.iter().find(|s| !s.second_moment().is_finite() || !residual(s).is_finite());
    found.extend(lost.map(|s| problem(s, "not_finite", "holds NaN or infinite values".into())));
    let finite = || profile.blocks.iter().filter(|s| s.second_moment().is_finite());
    let grown = finite().find(|s| s.second_moment() > limits.explode || residual(s) > limits.explode);
    found.extend(grown.map(|s| {
        let (all, branch) = (s.second_moment(), residual(s));
        problem(s, "exploding", format!("second moment {all:.3e}, of its residual branch {branch:.3e}"))
    }));
    let faded = finite().find(|s| s.second_moment() < limits.vanish);
    found.extend(faded.map(|s| problem(s, "vanishing", format!("second moment {:.3e}", s.second_moment()))));
    if lost.is_none() && profile.finite_logits == Some(false) {
        found.push(Problem {
            network: profile.network.clone(),
            block: OUTPUT.into(),
            kind: "not_finite",
            detail: "hold NaN or infinite values, though every block is finite".into(),
        });
    }
    found
}

/// Largest relative difference of any statistic of blocks that both profiles have, and the block. Squared means are
/// compared relative to the second moment, since a mean of zero has no relative error.
pub fn largest_difference(reference: &Profile, other: &Profile) -> Option<(f64, String)> {
    let pairs = reference.blocks.iter().filter_map(|a| Some((a, other.blocks.iter().find(|b| b.block == a.block)?)));
    let of_pair = |(a, b): (&Signal, &Signal)| {
        let relative = |x: f64, y: f64, scale: f64| {
            let difference = (x - y).abs() / scale.max(f64::MIN_POSITIVE);
            if difference.is_nan() { f64::INFINITY } else { difference }
        };
        let mut worst = relative(a.squared_mean, b.squared_mean, a.second_moment());
        worst = worst.max(relative(a.variance, b.variance, a.variance));
        if let (Some(x), Some(y), Some(p), Some(q)) =
            (a.residual_variance, b.residual_variance, a.residual_squared_mean, b.residual_squared_mean)
        {
            worst = worst.max(relative(x, y, x)).max(relative(p, q, p + x));
        }
        (worst, a.block.clone())
    };
    pairs.map(of_pair).max_by(|a, b| a.0.total_cmp(&b.0))
}

/// A [`largest_difference`] above `tolerance`, as a problem of `other`.
pub fn compare(reference: &Profile, other: &Profile, tolerance: f64) -> Option<Problem> {
    let (difference, block) = largest_difference(reference, other)?;
    (difference > tolerance).then(|| Problem {
        network: other.network.clone(),
        block,
        kind: "differs",
        detail: format!(
            "statistics are {difference:.2e} from those of {}, {tolerance:.0e} is allowed",
            reference.network
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(moments: &[(f64, f64)]) -> Profile {
        let signal = |(i, &(squared_mean, variance)): (usize, &(f64, f64))| Signal {
            block: format!("stages.0.{i}"),
            ends_stage: false,
            squared_mean,
            variance,
            residual_squared_mean: Some(0.0),
            residual_variance: Some(1.0),
            expected_variance: None,
            max_abs: 1.0,
        };
        Profile {
            network: "test".into(),
            input: "noise".into(),
            images: 1,
            size: (1, 1),
            blocks: moments.iter().enumerate().map(signal).collect(),
            finite_logits: Some(true),
            seconds: 0.0,
        }
    }

    #[test]
    fn each_illness_is_named_where_it_begins() {
        let kinds = |moments: &[(f64, f64)]| -> Vec<(&'static str, String)> {
            examine(&profile(moments), &Limits::default()).into_iter().map(|p| (p.kind, p.block)).collect()
        };
        assert!(kinds(&[(0.0, 1.0), (0.5, 2.0)]).is_empty());
        assert_eq!(kinds(&[(0.0, 1.0), (f64::NAN, 1.0), (0.0, f64::NAN)]), [("not_finite", "stages.0.1".into())]);
        assert_eq!(kinds(&[(0.0, 1.0), (9e5, 2e5), (1e9, 0.0)]), [("exploding", "stages.0.1".into())]);
        assert_eq!(kinds(&[(0.0, 1e-9), (0.0, 1.0)]), [("vanishing", "stages.0.0".into())]);
        let both = kinds(&[(0.0, 1e7), (0.0, f64::INFINITY)]);
        assert_eq!(both, [("not_finite", "stages.0.1".into()), ("exploding", "stages.0.0".into())]);
        let silent = Profile { finite_logits: Some(false), ..profile(&[(0.0, 1.0)]) };
        assert_eq!(examine(&silent, &Limits::default())[0].block, "logits");
    }

    #[test]
    fn differences_are_relative_and_nan_is_one() {
        let reference = profile(&[(1.0, 4.0), (0.0, 2.0)]);
        assert_eq!(largest_difference(&reference, &reference).map(|d| d.0), Some(0.0));
        let off = profile(&[(1.0, 4.0), (0.0, 2.2)]);
        let (difference, block) = largest_difference(&reference, &off).expect("same blocks");
        assert!((difference - 0.1).abs() < 1e-12 && block == "stages.0.1");
        assert!(compare(&reference, &off, 0.2).is_none() && compare(&reference, &off, 0.05).is_some());
        let lost = profile(&[(1.0, f64::NAN), (0.0, 2.0)]);
        assert_eq!(largest_difference(&reference, &lost).map(|d| d.0), Some(f64::INFINITY));
    }
}
