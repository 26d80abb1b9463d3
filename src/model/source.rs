//! A manifest's record of the checkpoint: where settings come from, what was not used, and warnings.

use serde::{Deserialize, Serialize};

/// Where a checkpoint's settings come from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Source {
    /// Origin of every setting of preprocessing, of the network and of the labels.
    #[serde(default)]
    pub settings: Vec<SourceSetting>,
    /// Fields and tensors that were read and have no use in a folded model.
    #[serde(default)]
    pub unused: Vec<String>,
    /// Warnings, one sentence each.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// One setting's origin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceSetting {
    /// Which setting, such as `crop_pct`.
    pub setting: String,
    /// Field and file, option or table that it was read from.
    pub origin: String,
}

impl Source {
    /// Whether nothing is said: the manifest is from a version that did not tell.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
