//! Reads checkpoints that may come from anywhere: a folder as the model hub lays it out, `config.json` +
//! `model.safetensors`. Everything is validated at the door; a [`Reader`] then hands out each tensor once, with the
//! shape that the network's plan expects, and names what is left over.
//!
//! `config` reads and resolves `config.json`; `init` writes fresh checkpoints. Knows nothing of graphs.

pub mod config;
pub mod init;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

pub use config::Config;

use crate::model;
use crate::nets::{NetError, Network};

/// File name of the configuration inside a checkpoint folder.
pub const CONFIG_FILE: &str = "config.json";
/// File name of the weights inside a checkpoint folder.
pub const WEIGHTS_FILE: &str = "model.safetensors";

/// What can be wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The folder or one of its files is missing or unreadable.
    #[error("can't read `{path}`: {source}; a checkpoint is a folder with `{CONFIG_FILE}` and `{WEIGHTS_FILE}`")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("can't write `{path}`: {source}")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The folder to write into exists.
    #[error("`{0}` exists already; choose another --out, or remove it first")]
    Exists(PathBuf),
    /// `config.json` is not what timm writes.
    #[error("`{path}`: {reason}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
    /// The architecture or its arguments can't be planned.
    #[error(transparent)]
    Network(#[from] NetError),
    /// `model.safetensors` is damaged or hostile.
    #[error("`{path}` is not a sound safetensors file: {reason}; download or save the checkpoint again")]
    Weights {
        /// The file.
        path: PathBuf,
        /// What the format's reader said.
        reason: String,
    },
    /// A tensor that the architecture needs is not in the file.
    #[error("tensor `{0}` is missing; do `architecture` and `model_args` in {CONFIG_FILE} describe these weights?")]
    Missing(String),
    /// A tensor has another shape than the architecture gives it.
    #[error(
        "tensor `{name}` has shape {found:?}, but {CONFIG_FILE} makes it {expected:?}; do `architecture` and `model_args` describe these weights?"
    )]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape in the file.
        found: Vec<usize>,
        /// Its shape by the plan.
        expected: Vec<usize>,
    },
    /// A tensor holds another kind of number than weights.
    #[error("tensor `{name}` has data type {dtype}, not F64, F32, F16 or BF16")]
    DataType {
        /// The tensor.
        name: String,
        /// Its type in the file.
        dtype: String,
    },
    /// A weight is NaN or infinite.
    #[error("tensor `{name}` holds {value} at element {index}; the checkpoint is damaged or its training diverged")]
    NotFinite {
        /// The tensor.
        name: String,
        /// Position of the first such element, row-major.
        index: usize,
        /// `NaN`, `inf` or `-inf`.
        value: f64,
    },
    /// Tensors that the architecture has no use for.
    #[error(
        "{count} tensors are not part of `{architecture}`, first `{first}`; does {CONFIG_FILE} describe these weights?"
    )]
    Leftover {
        /// How many.
        count: usize,
        /// The first by name.
        first: String,
        /// The architecture.
        architecture: String,
    },
}

/// A checkpoint, read and validated, its network planned. Tensors are taken through a [`Reader`].
pub struct Checkpoint {
    /// What `config.json` says.
    pub config: Config,
    /// The network that it describes.
    pub network: Network,
    /// SHA-256 of `model.safetensors`, in hexadecimal.
    pub sha256: String,
    /// The folder's own name.
    pub name: String,
    weights: Vec<u8>,
}

impl Checkpoint {
    /// Opens a checkpoint folder. The whole weights file is read and its header validated; values are checked when a
    /// [`Reader`] hands them out.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let config_path = folder.join(CONFIG_FILE);
        let text = fs::read(&config_path).map_err(read(&config_path))?;
        let config = Config::parse(&text).map_err(|reason| CheckpointError::Config { path: config_path, reason })?;
        let network = Network::plan(&config.architecture, &config.model_args)?;
        if !config.labels.is_empty() && config.labels.len() != network.classes() {
            let reason = format!("{} label_names for {} classes", config.labels.len(), network.classes());
            return Err(CheckpointError::Config { path: folder.join(CONFIG_FILE), reason });
        }
        let path = folder.join(WEIGHTS_FILE);
        let weights = fs::read(&path).map_err(read(&path))?;
        SafeTensors::deserialize(&weights)
            .map_err(|e| CheckpointError::Weights { path: path.clone(), reason: e.to_string() })?;
        let name = fs::canonicalize(folder).map_err(read(folder))?;
        let name = name.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
        Ok(Self { config, network, sha256: model::sha256(&weights), name, weights })
    }

    /// Starts taking tensors.
    pub fn reader(&self) -> Result<Reader<'_>, CheckpointError> {
        let tensors = SafeTensors::deserialize(&self.weights)
            .map_err(|e| CheckpointError::Weights { path: WEIGHTS_FILE.into(), reason: e.to_string() })?;
        let left = tensors.names().into_iter().map(String::from).collect();
        Ok(Reader { tensors, left: RefCell::new(left), architecture: &self.config.architecture })
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("config", &self.config).field("sha256", &self.sha256).finish_non_exhaustive()
    }
}

/// Hands out tensors, and remembers which are left.
#[derive(Debug)]
pub struct Reader<'a> {
    tensors: SafeTensors<'a>,
    left: RefCell<BTreeSet<String>>,
    architecture: &'a str,
}

impl Reader<'_> {
    /// Takes the tensor `name` of exactly `shape`, in double precision, every value finite.
    pub fn take(&self, name: &str, shape: &[usize]) -> Result<Vec<f64>, CheckpointError> {
        let missing = || CheckpointError::Missing(name.into());
        if !self.left.borrow_mut().remove(name) {
            return Err(missing());
        }
        let view = self.tensors.tensor(name).map_err(|_| missing())?;
        if view.shape() != shape {
            let (found, expected) = (view.shape().to_vec(), shape.to_vec());
            return Err(CheckpointError::Shape { name: name.into(), found, expected });
        }
        let bytes = view.data();
        let values: Vec<f64> = match view.dtype() {
            Dtype::F64 => bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
            Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect(),
            Dtype::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f64()).collect(),
            Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f64()).collect(),
            other => return Err(CheckpointError::DataType { name: name.into(), dtype: format!("{other:?}") }),
        };
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(index) => Err(CheckpointError::NotFinite { name: name.into(), index, value: values[index] }),
        }
    }

    /// Takes a scalar, stored with no dimension.
    pub fn take_scalar(&self, name: &str) -> Result<f64, CheckpointError> {
        let values = self.take(name, &[])?;
        values.first().copied().ok_or_else(|| CheckpointError::Missing(name.into()))
    }

    /// Passes over a training counter, if the file has it.
    pub fn skip_counter(&self, name: &str) {
        self.left.borrow_mut().remove(name);
    }

    /// Refuses a file with tensors that nobody took.
    pub fn finish(self) -> Result<(), CheckpointError> {
        let left = self.left.into_inner();
        match left.first() {
            None => Ok(()),
            Some(first) => Err(CheckpointError::Leftover {
                count: left.len(),
                first: first.clone(),
                architecture: self.architecture.into(),
            }),
        }
    }
}

fn read(path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let path = path.to_path_buf();
    move |source| CheckpointError::Read { path, source }
}
