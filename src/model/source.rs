//! A manifest's record of the checkpoint: origins of settings, unused contents, and warnings.

use serde::{Deserialize, Serialize};

/// Origins of a checkpoint's settings.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Source {
    /// Origin of every setting of preprocessing, network and labels.
    #[serde(default)]
    pub settings: Vec<SourceSetting>,
    /// Fields and tensors of the checkpoint that a folded model doesn't use.
    #[serde(default)]
    pub unused: Vec<String>,
    /// Warnings, one sentence each.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// Origin of a setting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceSetting {
    /// Name of the setting, such as `crop_pct`.
    pub setting: String,
    /// Field and file, option or table that the setting was read from.
    pub origin: String,
}

impl Source {
    /// Whether it is empty: the manifest is from a version that didn't record it.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
