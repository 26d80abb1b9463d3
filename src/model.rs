//! The contract between the offline and the online half: what a folded model is on disk.
//!
//! Owns the repository layout (`REPOSITORY/NAME/VERSION/{model.onnx,manifest.json}`), the [`Manifest`] and the
//! [`Preprocessing`] that the manifest carries. Knows neither how a model is folded nor how it is run.

pub mod golden;
mod preprocessing;
pub mod quantisation;
pub mod regular_file;
mod repository;
pub mod scoring;
mod source;

use std::path::{Path, PathBuf};
use std::{fmt, fs};

use serde::{Deserialize, Serialize};

pub use self::golden::Golden;
pub use self::preprocessing::{Colors, CropMode, Interpolation, Preprocessing};
pub use self::quantisation::{MapRange, Quantisation, RangeMethod};
pub use self::repository::{LeftOut, Listing, check as check_repository, list};
pub use self::scoring::{ScoreFunction, Scoring};
pub use self::source::{Source, SourceSetting};
use crate::files::{self, DraftFolder};
use crate::printable::brief;

/// File name of the folded graph inside a version folder.
pub const MODEL_FILE: &str = "model.onnx";
/// File name of the manifest inside a version folder.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Most entries of a folder that are looked at to tell what it is.
const MOST_LOOKED_AT: usize = 1000;
/// Name of the folded graph's input, float32 `[batch, channels, height, width]`.
pub const INPUT: &str = "input";
/// Name of a graph's first output: logits, float32 `[N, classes]`.
pub const OUTPUT: &str = "logits";
/// Name of the output, where a graph has it, that the classifier reads: the pooled map, float32 `[N, width]`.
pub const FEATURES: &str = "features";
/// Name of the output, where a graph has it, that is pooled: the last map, float32 `[N, channels, height, width]`.
pub const MAP: &str = "map";
/// Version of the manifest's own layout; readers refuse a higher one. Written is the lowest that says everything: 2 where
/// [`scoring`](Manifest::scoring) is not the usual one, which a reader of 1 would not follow.
pub const MANIFEST_FORMAT: u32 = 2;

/// What can be wrong with a model repository or a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The repository folder itself is missing.
    #[error(
        "model repository `{0}` does not exist; fold a checkpoint into it with `nfold fold CHECKPOINT --repository {0}`"
    )]
    NoRepository(PathBuf),
    /// Something else is where the repository should be.
    #[error("`{0}` is no folder: a model repository is one, which `nfold fold CHECKPOINT --repository DIR` writes")]
    NoFolder(PathBuf),
    /// Nothing is in the repository.
    #[error("repository `{0}` holds no model; fold a checkpoint into it with `nfold fold CHECKPOINT --repository {0}`")]
    Empty(PathBuf),
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
        version: u64,
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
    #[error("`{0}` exists already; choose another --model-version, or replace it with --replace")]
    Exists(PathBuf),
    /// A name that can't be a folder and a URL segment.
    #[error(
        "`{0}` can't be a model name; use letters, digits, `_`, `-` and `.`, starting with a letter or digit (--name)"
    )]
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

/// Number format of a folded model's weights and arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit floating point.
    Fp32,
    /// 16-bit floating point weights and arithmetic; input and logits stay 32-bit.
    Fp16,
    /// 8-bit integers; input and logits stay 32-bit floating point.
    Int8,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Int8 => "int8",
        })
    }
}

/// How a squeeze-and-excitation gate multiplies its feature map in the graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// The `[N,C,1,1]` gate is resized to the map first: ONNX Runtime's CPU layout then needs no reorder.
    Resize,
    /// Plain broadcasting multiplication: for other runtimes and for dynamic sizes.
    Broadcast,
}

/// The scalars of one residual block, all of them absorbed into convolutions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BlockScalars {
    /// Module path in the checkpoint, such as `stages.2.0`.
    pub block: String,
    /// Gain of the residual branch: `x + α·f(x/β)` (Brock et al. 2021, section 3).
    pub alpha: f64,
    /// The paper's 1/β, which timm calls beta: 1/√(expected variance before the block).
    pub beta: f64,
    /// Variance that the analysis expects after the block at initialisation.
    pub expected_variance: f64,
    /// Gain after channel attention, where the block has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attn_gain: Option<f64>,
    /// Learnt SkipInit gain, where the block has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipinit_gain: Option<f64>,
    /// True when the branch's scale is exactly zero, so that the graph leaves the branch out.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dropped: bool,
}

/// What folding did, and how far the folded graph is from the unfolded one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FoldReport {
    /// `nf` or `resnet`.
    pub family: String,
    /// Activation function, by timm's name.
    pub activation: String,
    /// γ of the activation as the checkpoint was trained with; absent for batch-normalised networks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gamma: Option<f64>,
    /// Trainable parameters of the checkpoint.
    pub parameters: u64,
    /// Weights left in the folded graph.
    pub folded_parameters: u64,
    /// Multiply-accumulates of one image at the manifest's input size, in 10⁹.
    pub gmacs: f64,
    /// How attention gates are emitted.
    pub gate: Gate,
    /// One entry per residual block; empty for batch-normalised networks.
    pub blocks: Vec<BlockScalars>,
    /// What verification measured; absent for `--unfolded` graphs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verification: Option<Verification>,
}

/// Folded graph against unfolded graph on the same random images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verification {
    /// Images compared.
    pub images: u32,
    /// Largest absolute difference of any logit.
    pub max_abs_diff: f64,
    /// Largest minus smallest logit of the unfolded graph: the scale to read the difference on.
    pub logit_span: f64,
    /// Difference past which nothing would have been written.
    pub tolerance: f64,
    /// In half precision, how many times the largest value of any map fits into what half precision holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub headroom: Option<f64>,
}

/// What a version folder says about its graph. JSON, written once by `nfold fold`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Layout version of this file ([`MANIFEST_FORMAT`]).
    pub format: u32,
    /// Program that wrote it, such as `nfold 0.1.0`.
    pub producer: String,
    /// Architecture as the checkpoint names it, tag included.
    pub architecture: String,
    /// Number format.
    pub precision: Precision,
    /// Height the graph is fixed to, in pixels; absent when dynamic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub graph_height: Option<u32>,
    /// Width the graph is fixed to, in pixels; absent when dynamic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub graph_width: Option<u32>,
    /// Number of logits.
    pub classes: u32,
    /// Width of the output [`FEATURES`]; absent where the graph has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub features: Option<u32>,
    /// Channels, height and width of the output [`MAP`], at the size of the preprocessing; absent where the graph has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<[u32; 3]>,
    /// Class names in logit order; empty when the checkpoint has none.
    #[serde(default)]
    pub labels: Vec<String>,
    /// From decoded image to input tensor.
    pub preprocessing: Preprocessing,
    /// How logits become scores; absent: [as usual](Scoring::usual).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scoring: Option<Scoring>,
    /// SHA-256 of the checkpoint's `model.safetensors`, in hexadecimal.
    pub source_sha256: String,
    /// SHA-256 of the `model.onnx` beside this file, in hexadecimal.
    pub onnx_sha256: String,
    /// Where the checkpoint's settings come from.
    #[serde(default, skip_serializing_if = "Source::is_empty")]
    pub source: Source,
    /// What folding did.
    pub fold: FoldReport,
    /// How the network became one of integers; absent in other precisions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantisation: Option<Quantisation>,
    /// What the graph answered when it was folded; a server asks it again before it serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub golden: Option<Golden>,
}

impl Manifest {
    /// How logits become scores.
    pub fn scoring(&self) -> Scoring {
        self.scoring.clone().unwrap_or_else(|| Scoring::usual(self.classes as usize))
    }

    fn read(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join(MANIFEST_FILE);
        let text = regular_file::read(&path, MANIFEST_LIMIT).map_err(io("read", &path))?;
        let manifest: Self = match serde_json::from_slice(&text) {
            Ok(manifest) => manifest,
            Err(e) => return Err(ModelError::BadManifest { path, reason: brief(e) }),
        };
        match manifest.check() {
            Ok(()) => Ok(manifest),
            Err(reason) => Err(ModelError::BadManifest { path, reason }),
        }
    }

    fn check(&self) -> Result<(), String> {
        let p = &self.preprocessing;
        if self.format > MANIFEST_FORMAT {
            return Err(format!("format {} is newer than this nfold reads ({MANIFEST_FORMAT})", self.format));
        }
        if self.classes == 0 || (!self.labels.is_empty() && self.labels.len() != self.classes as usize) {
            return Err(format!("{} labels for {} classes", self.labels.len(), self.classes));
        }
        p.check()?;
        if self.features.is_some_and(|width| width == 0 || width > MOST_FEATURES) {
            return Err(format!("features of width {:?}, at most {MOST_FEATURES} can be", self.features));
        }
        let values = |map: [u32; 3]| map.iter().try_fold(1_u32, |all, &side| all.checked_mul(side));
        if let Some(map) = self.map.filter(|&map| values(map).is_none_or(|n| n == 0 || n > MOST_MAP_VALUES)) {
            return Err(format!("a map of {map:?}, which no network has"));
        }
        if let Some(scoring) = &self.scoring {
            scoring.check(self.classes as usize)?;
        }
        if let Some(golden) = self.golden.as_ref().filter(|g| g.logits.len() != self.classes as usize) {
            return Err(format!("{} golden logits for {} classes", golden.logits.len(), self.classes));
        }
        let differs = |graph: Option<u32>, size: u32| graph.is_some_and(|g| g != size);
        if differs(self.graph_height, p.height) || differs(self.graph_width, p.width) {
            return Err("the graph's size differs from the preprocessing's".into());
        }
        Ok(())
    }
}

/// The repository that a folder is, or is a model of: one of folded models, without a checkpoint in it.
pub fn repository_of(folder: &Path) -> Option<PathBuf> {
    let is_model = |folder: &Path| {
        let versions = fs::read_dir(folder).into_iter().flatten().flatten();
        versions.take(MOST_LOOKED_AT).any(|version| version.path().join(MANIFEST_FILE).is_file())
    };
    if is_model(folder) {
        let parent = folder.parent().unwrap_or(Path::new(""));
        return Some(if parent.as_os_str().is_empty() { ".".into() } else { parent.into() });
    }
    let models = fs::read_dir(folder).ok()?.flatten();
    models.take(MOST_LOOKED_AT).any(|model| is_model(&model.path())).then(|| folder.into())
}

/// One version of one model on disk, its manifest read and checked.
#[derive(Debug, Clone)]
pub struct ModelDir {
    /// The version folder.
    pub path: PathBuf,
    /// The model's name in the repository.
    pub name: String,
    /// The model's version.
    pub version: u64,
    /// What the folder says about itself.
    pub manifest: Manifest,
}

impl ModelDir {
    /// Opens a model of `repository`: the named one, or the only one; the given version, or the highest.
    pub fn open(repository: &Path, name: Option<&str>, version: Option<u64>) -> Result<Self, ModelError> {
        let listing = list(repository)?;
        let found = match name {
            Some(wanted) => listing.models.get_key_value(wanted),
            None if listing.models.len() > 1 => {
                return Err(ModelError::Ambiguous { repository: repository.into(), available: listing.summary() });
            }
            None => listing.models.first_key_value(),
        };
        let (name, versions) = found.ok_or_else(|| match name {
            None => ModelError::Empty(repository.into()),
            Some(name) => {
                ModelError::NoModel { name: name.into(), repository: repository.into(), available: listing.summary() }
            }
        })?;
        let version = match version {
            Some(v) if versions.contains(&v) => v,
            Some(version) => {
                return Err(ModelError::NoVersion { name: name.clone(), version, repository: repository.into() });
            }
            None => versions.last().copied().unwrap_or(1),
        };
        Self::open_version(repository, name, version)
    }

    /// Opens one version of one model, under these names wherever links lead.
    pub fn open_version(repository: &Path, name: &str, version: u64) -> Result<Self, ModelError> {
        let path = repository.join(name).join(version.to_string());
        let manifest = Manifest::read(&path)?;
        Ok(Self { path, name: name.into(), version, manifest })
    }

    /// Opens a version folder by its path. Name and version are the last two components, of where a link leads if the path
    /// itself has none.
    pub fn open_path(path: &Path) -> Result<Self, ModelError> {
        let manifest = Manifest::read(path)?;
        let named = |whole: PathBuf| {
            let part = |p: Option<&Path>| p.and_then(Path::file_name).map(|n| n.to_string_lossy().into_owned());
            let version = part(Some(&whole))?.parse().ok()?;
            Some((part(whole.parent())?, version))
        };
        let as_given = std::path::absolute(path).map_err(io("read", path))?;
        let there = fs::canonicalize(path).map_err(io("read", path))?;
        let (name, version) = named(as_given).or_else(|| named(there)).ok_or_else(|| ModelError::BadManifest {
            path: path.join(MANIFEST_FILE),
            reason: "its folder's name is not a version number, below one that names the model".into(),
        })?;
        Ok(Self { path: path.into(), name, version, manifest })
    }

    /// Path of the graph.
    pub fn onnx(&self) -> PathBuf {
        self.path.join(MODEL_FILE)
    }

    /// Reads the graph and refuses one that is not the one the manifest was written for. What is far larger than the weights
    /// that the manifest counts is not even read.
    pub fn read_onnx(&self) -> Result<Vec<u8>, ModelError> {
        let path = self.onnx();
        let bytes = regular_file::read(&path, self.most_bytes()).map_err(io("read", &path))?;
        let found = sha256(&bytes);
        if found != self.manifest.onnx_sha256 {
            let reason = format!("`{MODEL_FILE}` has sha256 {found}, not {}", self.manifest.onnx_sha256);
            return Err(ModelError::BadManifest { path: self.path.join(MANIFEST_FILE), reason });
        }
        Ok(bytes)
    }

    /// The graph, and the folder with the manifest that was written for it. Where the version was replaced since its manifest
    /// was read, both are read again, once.
    pub fn with_onnx(mut self) -> Result<(Self, Vec<u8>), ModelError> {
        let onnx = match self.read_onnx() {
            Ok(onnx) => onnx,
            Err(error) => {
                let now = Manifest::read(&self.path)?;
                if now == self.manifest {
                    return Err(error);
                }
                self.manifest = now;
                self.read_onnx()?
            }
        };
        Ok((self, onnx))
    }

    /// Most bytes of the graph: twice its weights in single precision and 64 MiB, and never more than ONNX allows.
    fn most_bytes(&self) -> u64 {
        self.manifest.fold.folded_parameters.saturating_mul(8).saturating_add(64 << 20).min((1 << 31) - 1)
    }

    /// Writes `REPOSITORY/NAME/VERSION` whole or not at all: as a draft, synced, then renamed. A version that is replaced is
    /// there until the new one is.
    ///
    /// An existing version is left alone ([`ModelError::Exists`]) unless `replace`.
    pub fn publish(at: &Target<'_>, onnx: &[u8], manifest: &Manifest) -> Result<Self, ModelError> {
        let staging = Staging::new(at.repository)?;
        staging.draft.write(MODEL_FILE, onnx).map_err(io("write", &staging.onnx()))?;
        Self::publish_staged(at, staging, manifest)
    }

    /// As [`publish`](Self::publish), with the graph that lies in `staging` already, synced.
    pub fn publish_staged(at: &Target<'_>, staging: Staging, manifest: &Manifest) -> Result<Self, ModelError> {
        let target = at.folder()?;
        let (parent, replace) = (at.repository.join(at.name), at.replace);
        let json = serde_json::to_vec_pretty(manifest).map_err(|e| e.to_string());
        let json = json.and_then(|json| match serde_json::from_slice::<Manifest>(&json) {
            // what can't be read back must not be there
            Ok(read) => read.check().map(|()| json),
            Err(e) => Err(e.to_string()),
        });
        let json = json.map_err(|reason| ModelError::BadManifest { path: target.join(MANIFEST_FILE), reason })?;
        staging.draft.write(MANIFEST_FILE, &json).map_err(io("write", &target.join(MANIFEST_FILE)))?;
        fs::create_dir_all(&parent).map_err(io("create", &parent))?;
        let action = if replace { "replace" } else { "create" };
        staging.draft.publish(&target, replace).map_err(io(action, &target))?;
        Self::open_path(&target)
    }
}

/// A version folder in the making, inside its repository but no model yet. Dropped, it is gone, with the folders that were
/// made for it and are empty.
#[derive(Debug)]
pub struct Staging {
    // in this order: the draft goes before the folders it lies in
    draft: DraftFolder,
    _made: MadeFolders,
}

/// Folders that did not exist, innermost first.
#[derive(Debug)]
struct MadeFolders(Vec<PathBuf>);

impl Drop for MadeFolders {
    fn drop(&mut self) {
        for folder in &self.0 {
            // one that holds something stays
            if fs::remove_dir(folder).is_err() {
                break;
            }
        }
    }
}

impl Staging {
    /// Makes the folder, and the repository when missing.
    pub fn new(repository: &Path) -> Result<Self, ModelError> {
        let missing = repository.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists());
        let made = MadeFolders(missing.map(Path::to_path_buf).collect());
        fs::create_dir_all(repository).map_err(io("create", repository))?;
        let draft = DraftFolder::create_in(repository).map_err(io("create a folder in", repository))?;
        Ok(Self { draft, _made: made })
    }

    /// Where the graph is to be written.
    pub fn onnx(&self) -> PathBuf {
        self.draft.path().join(MODEL_FILE)
    }

    /// Writes another graph over the one that is there.
    pub fn replace_onnx(&self, onnx: &[u8]) -> Result<(), ModelError> {
        self.draft.write(MODEL_FILE, onnx).map_err(io("write", &self.onnx()))
    }
}

/// Where [`ModelDir::publish`] writes.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The repository folder; made when missing.
    pub repository: &'a Path,
    /// The model's name.
    pub name: &'a str,
    /// The model's version.
    pub version: u64,
    /// Replace the version when it exists.
    pub replace: bool,
}

impl Target<'_> {
    /// The version's folder. It is an error if the name can't be a model's, or if the version exists and isn't to be replaced:
    /// known before a model is folded.
    pub fn folder(&self) -> Result<PathBuf, ModelError> {
        check_name(self.name)?;
        let parent = self.repository.join(self.name);
        files::recover(&parent);
        let folder = parent.join(self.version.to_string());
        if folder.exists() && !self.replace { Err(ModelError::Exists(folder)) } else { Ok(folder) }
    }

    /// Checks that the repository can be written, or made. Leaves nothing.
    pub fn check_repository(&self) -> Result<(), ModelError> {
        files::check_folder(self.repository).map_err(io("write into", self.repository))
    }
}

/// Widest features, and most values of a map: far more than any network has. What an answer takes is reckoned from them.
const MOST_FEATURES: u32 = 1 << 16;
const MOST_MAP_VALUES: u32 = 1 << 26;

/// Most bytes of a manifest.
const MANIFEST_LIMIT: u64 = 64 << 20;

/// What changes whenever the files of a version do: what they are, how long, and when they were written.
pub fn fingerprint(repository: &Path, name: &str, version: u64) -> String {
    let folder = repository.join(name).join(version.to_string());
    let of = |file: &str| match fs::metadata(folder.join(file)) {
        Ok(metadata) => {
            #[cfg(unix)]
            let inode = std::os::unix::fs::MetadataExt::ino(&metadata);
            #[cfg(not(unix))]
            let inode = 0;
            format!("{inode} {} {:?} {:?}", metadata.len(), metadata.file_type(), metadata.modified().ok())
        }
        Err(error) => error.kind().to_string(),
    };
    format!("{}; {}", of(MANIFEST_FILE), of(MODEL_FILE))
}

/// SHA-256 of `bytes` in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    hex(&sha2::Sha256::digest(bytes))
}

/// A digest in lower-case hexadecimal.
pub fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Refuses a name that could not be a folder of the repository and a segment of a URL.
pub fn check_name(name: &str) -> Result<(), ModelError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let ok = name.len() <= 128 && name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(plain);
    if ok { Ok(()) } else { Err(ModelError::BadName(name.into())) }
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> ModelError {
    let path = path.to_path_buf();
    move |source| ModelError::Io { action, path, source }
}
