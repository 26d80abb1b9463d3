//! The contract between the offline and the online half: what a folded model is on disk.
//!
//! Owns the repository layout (`REPOSITORY/NAME/VERSION/{model.onnx,manifest.json}`), the [`Manifest`] and the
//! [`Preprocessing`] that the manifest carries. Knows neither how a model is folded nor how it is run.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// File name of the folded graph inside a version folder.
pub const MODEL_FILE: &str = "model.onnx";
/// File name of the manifest inside a version folder.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Version of the manifest's own layout; readers refuse a higher one.
pub const MANIFEST_FORMAT: u32 = 1;

/// What can be wrong with a model repository or a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The repository folder itself is missing.
    #[error("model repository `{0}` does not exist; fold a checkpoint into it with `nfold fold CHECKPOINT --repository {0}`")]
    NoRepository(PathBuf),
    /// No such model in the repository.
    #[error("model `{name}` is not in repository `{repository}` (it has: {available})")]
    NoModel {
        /// The name asked for.
        name: String,
        /// Where it was looked for.
        repository: PathBuf,
        /// Names that are there, comma-separated, or `nothing`.
        available: String,
    },
    /// No such version of a model.
    #[error("model `{name}` has no version {version} in `{repository}`")]
    NoVersion {
        /// The model's name.
        name: String,
        /// The version asked for.
        version: u32,
        /// Where it was looked for.
        repository: PathBuf,
    },
    /// The repository holds several models and none was named.
    #[error("repository `{repository}` holds several models ({available}); name one with --model")]
    Ambiguous {
        /// The repository.
        repository: PathBuf,
        /// Names that are there, comma-separated.
        available: String,
    },
    /// The version exists already.
    #[error("`{0}` exists already; choose another --model-version, or remove it first")]
    Exists(PathBuf),
    /// A name that can't be a folder and a URL segment.
    #[error("`{0}` can't be a model name; use letters, digits, `_`, `-` and `.`, starting with a letter or digit (--name)")]
    BadName(String),
    /// A manifest that can't be read as one.
    #[error("manifest `{path}` is not valid: {reason}; fold the checkpoint again")]
    BadManifest {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file system refused.
    #[error("can't {action} `{path}`: {source}")]
    Io {
        /// What was tried: `read`, `write`, `create`.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// How the spatial size of an image becomes the network's input size (timm `crop_mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CropMode {
    /// Shortest side to `floor(size / crop_pct)`, aspect kept, centre crop: image is lost at the borders.
    Center,
    /// Each side to its `floor(size / crop_pct)`, aspect not kept, centre crop.
    Squash,
    /// Longest side to `floor(size / crop_pct)`, aspect kept, centre crop or padding with the mean colour.
    Border,
}

/// Resampling filter of the resize (timm `interpolation`), as Pillow defines it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    /// Nearest neighbour, no antialiasing.
    Nearest,
    /// Box filter (area average when shrinking).
    Box,
    /// Triangle filter, antialiased.
    Bilinear,
    /// Keys cubic with a = -0.5, antialiased.
    Bicubic,
    /// Windowed sinc with three lobes, antialiased.
    Lanczos,
}

/// Everything between a decoded RGB image and the network's input tensor, as timm resolves it from `pretrained_cfg`
/// (`resolve_data_config` + `create_transform(is_training=False)`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preprocessing {
    /// Height of the network's input, in pixels.
    pub height: u32,
    /// Width of the network's input, in pixels.
    pub width: u32,
    /// Share of the resized side that the crop keeps, in (0, 1] (timm allows more than 1 in no published config).
    pub crop_pct: f64,
    /// How the image is brought to the input's aspect ratio.
    pub crop_mode: CropMode,
    /// Resampling filter.
    pub interpolation: Interpolation,
    /// Per-channel mean (R, G, B) on the 0..1 scale.
    pub mean: [f64; 3],
    /// Per-channel standard deviation (R, G, B) on the 0..1 scale.
    pub std: [f64; 3],
    /// Turn the image upright by its EXIF orientation first. Off by default, as in timm.
    #[serde(default)]
    pub exif_orientation: bool,
}
