//! How logits become scores: function, temperature, and thresholds for naming classes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Function that turns logits into scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoreFunction {
    /// One class per image: scores sum to 1.
    Softmax,
    /// Any number of classes per image: scores are independent.
    Sigmoid,
    /// The logits themselves.
    None,
}

impl ScoreFunction {
    /// Default for this number of classes: sigmoid for one, since the softmax of a single logit is always 1.
    pub fn usual(classes: usize) -> Self {
        if classes == 1 { Self::Sigmoid } else { Self::Softmax }
    }

    /// Name in manifests and options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Softmax => "softmax",
            Self::Sigmoid => "sigmoid",
            Self::None => "none",
        }
    }
}

/// How a model's logits become scores.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scoring {
    /// Function that turns logits into scores.
    pub activation: ScoreFunction,
    /// Temperature that logits are divided by first (Guo et al., ICML 2017); 1 has no effect.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub temperature: f64,
    /// Smallest score of a named class, instead of naming the most probable classes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
    /// Thresholds of individual classes, by index in the logits.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub thresholds: BTreeMap<u32, f64>,
}

fn one() -> f64 {
    1.0
}

fn is_one(value: &f64) -> bool {
    *value == 1.0
}

impl Scoring {
    /// Default for this number of classes.
    pub fn usual(classes: usize) -> Self {
        let activation = ScoreFunction::usual(classes);
        Self { activation, temperature: 1.0, threshold: None, thresholds: BTreeMap::new() }
    }

    /// Whether classes are named by thresholds instead of by a fixed number.
    pub fn has_thresholds(&self) -> bool {
        self.threshold.is_some() || !self.thresholds.is_empty()
    }

    /// Smallest score at which this class is named; `None` if it never is, since other classes have thresholds but it
    /// has none.
    pub fn threshold_of(&self, index: usize) -> Option<f64> {
        let own = u32::try_from(index).ok().and_then(|index| self.thresholds.get(&index));
        own.copied().or(self.threshold)
    }

    /// Checks the settings for a network with this number of classes; the error says what is wrong.
    pub fn check(&self, classes: usize) -> Result<(), String> {
        let Self { activation, temperature, threshold, thresholds } = self;
        check_temperature(*temperature)?;
        if *activation == ScoreFunction::Softmax && classes == 1 {
            return Err("the softmax of a network's only output is always 1; one output is scored by sigmoid".into());
        }
        for threshold in threshold.iter().chain(thresholds.values()) {
            check_threshold(*threshold, *activation)?;
        }
        match thresholds.keys().find(|&&index| index as usize >= classes) {
            Some(index) => {
                Err(format!("there is a threshold for class {index}, and the classes are 0 to {}", classes - 1))
            }
            None => Ok(()),
        }
    }
}

/// Checks that a temperature gives usable scores.
pub fn check_temperature(temperature: f64) -> Result<(), String> {
    if temperature.is_finite() && (1e-3..=1e3).contains(&temperature) {
        Ok(())
    } else {
        Err(format!("temperature {temperature} is not between 0.001 and 1000"))
    }
}

/// Checks that a threshold is in the range of the scores.
pub fn check_threshold(threshold: f64, activation: ScoreFunction) -> Result<(), String> {
    match activation {
        ScoreFunction::None if threshold.is_finite() => Ok(()),
        ScoreFunction::None => Err(format!("threshold {threshold} is no number")),
        _ if (0.0..=1.0).contains(&threshold) => Ok(()),
        _ => Err(format!("threshold {threshold} is out of range: scores of this model are from 0 to 1")),
    }
}
