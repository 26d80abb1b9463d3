//! How logits become scores: which function, at which temperature, and from which score on a class is named.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What makes scores of logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoreFunction {
    /// One class an image: scores sum to 1.
    Softmax,
    /// Any number of classes an image: each score for itself.
    Sigmoid,
    /// The logits themselves.
    None,
}

impl ScoreFunction {
    /// What a network of so many classes has where nothing says otherwise: the softmax of one logit would always be 1.
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
    /// What makes scores of logits.
    pub activation: ScoreFunction,
    /// Logits are divided by this first (Guo et al., ICML 2017); 1 leaves them.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub temperature: f64,
    /// Classes with this score or more are named, instead of the most probable ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
    /// Classes that have a threshold of their own, by position in the logits.
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
    /// What a network of so many classes has where nothing says otherwise.
    pub fn usual(classes: usize) -> Self {
        let activation = ScoreFunction::usual(classes);
        Self { activation, temperature: 1.0, threshold: None, thresholds: BTreeMap::new() }
    }

    /// Whether classes are named by their scores instead of by their number.
    pub fn has_thresholds(&self) -> bool {
        self.threshold.is_some() || !self.thresholds.is_empty()
    }

    /// From which score on a class is named; none: never, as the others have thresholds and it has none.
    pub fn threshold_of(&self, index: usize) -> Option<f64> {
        let own = u32::try_from(index).ok().and_then(|index| self.thresholds.get(&index));
        own.copied().or(self.threshold)
    }

    /// Says what is wrong, if anything is, for a network of so many classes.
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

/// Refuses a temperature that would make no scores.
pub fn check_temperature(temperature: f64) -> Result<(), String> {
    if temperature.is_finite() && (1e-3..=1e3).contains(&temperature) {
        Ok(())
    } else {
        Err(format!("temperature {temperature} is not between 0.001 and 1000"))
    }
}

/// Refuses a threshold that no score could be compared with.
pub fn check_threshold(threshold: f64, activation: ScoreFunction) -> Result<(), String> {
    match activation {
        ScoreFunction::None if threshold.is_finite() => Ok(()),
        ScoreFunction::None => Err(format!("threshold {threshold} is no number")),
        _ if (0.0..=1.0).contains(&threshold) => Ok(()),
        _ => Err(format!("threshold {threshold} is out of range: scores of this model are from 0 to 1")),
    }
}
