//! How a folded model's logits become scores, resolved from options, checkpoint and defaults.

use std::collections::BTreeMap;

use crate::checkpoint::Checkpoint;
use crate::model::scoring::Scoring;
use crate::model::{ScoreFunction, Source, SourceSetting};
use crate::printable::brief;

/// Options for scores.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ScoreOptions {
    /// Function that turns logits into scores.
    pub activation: Option<ScoreFunction>,
    /// Temperature: logits are divided by it first.
    pub temperature: Option<f64>,
    /// Score thresholds for naming a class: for all classes (`None`), or for one by label or index.
    pub thresholds: Vec<(Option<String>, f64)>,
}

impl ScoreOptions {
    /// Scoring for the manifest; `None` for the default. Records the origin of another function in `source`.
    pub(super) fn resolve(&self, checkpoint: &Checkpoint, source: &mut Source) -> Result<Option<Scoring>, String> {
        let classes = checkpoint.network.classes();
        let usual = Scoring::usual(classes);
        let mut scoring = Scoring { temperature: self.temperature.unwrap_or(1.0), ..usual.clone() };
        let said = match (self.activation, &checkpoint.scores) {
            (Some(activation), _) => Some((activation, "--activation".to_string())),
            (None, Some((activation, from))) => Some((*activation, from.clone())),
            (None, None) => None,
        };
        if let Some((activation, origin)) = said {
            scoring.activation = activation;
            source.settings.push(SourceSetting { setting: "scores".into(), origin });
        }
        let mut thresholds = BTreeMap::new();
        for (label, threshold) in &self.thresholds {
            let twice = match label {
                None => scoring.threshold.replace(*threshold).is_some(),
                Some(label) => thresholds.insert(class(label, &checkpoint.labels, classes)?, *threshold).is_some(),
            };
            if twice {
                let of = label.as_deref().map_or("all classes".into(), |label| format!("`{}`", brief(label)));
                return Err(format!("--threshold is given twice for {of}; give it once"));
            }
        }
        scoring.thresholds = thresholds;
        scoring
            .check(classes)
            .map_err(|reason| format!("{reason}; check --activation, --threshold and --temperature"))?;
        Ok(if scoring == usual { None } else { Some(scoring) })
    }
}

/// Index of a class, by its label, or by the index as text if no label matches.
fn class(label: &str, labels: &[String], classes: usize) -> Result<u32, String> {
    let by_label = labels.iter().position(|known| known == label);
    let by_position = || label.parse::<usize>().ok().filter(|&index| index < classes);
    if let Some(index) = by_label.or_else(by_position) {
        return u32::try_from(index).map_err(|e| e.to_string());
    }
    let likeness = |known: &String| strsim::normalized_damerau_levenshtein(label, known);
    let nearest = labels.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    let hint = match nearest {
        Some(nearest) => format!("the nearest label is `{}`", brief(nearest)),
        None => format!("it has no labels, and positions 0 to {}", classes - 1),
    };
    Err(format!("--threshold: the network has no class `{}`; {hint}", brief(label)))
}
