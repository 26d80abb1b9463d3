//! A cache of folded models, keyed by the checkpoint's digest, the options and this version of nfold: a second start
//! with the same source folds nothing.

use std::path::{Path, PathBuf};

use super::folding::{FoldingError, fold_verified};
use crate::checkpoint::{Checkpoint, OpenOptions};
use crate::files::DraftFolder;
use crate::fold::FoldOptions;
use crate::hub::can_write;
use crate::model::{self, ModelDir, ModelError, Staging, Target};

/// Why a folded model can't be cached.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// No folder is writable.
    #[error("no folder for folded models can be written ({0}); name one with --cache")]
    NoFolder(String),
    /// The model can't be folded.
    #[error(transparent)]
    Folding(#[from] FoldingError),
    /// The model can't be written, or not be read again.
    #[error("{0}; name another folder with --cache")]
    Model(#[from] ModelError),
}

/// A folder of folded models.
#[derive(Debug)]
pub struct FoldCache {
    folder: PathBuf,
    /// Deletes the folder on drop, if it is temporary.
    _scratch: Option<DraftFolder>,
}

impl FoldCache {
    /// Opens the named folder; else the user's cache; else, if that can't be written, a temporary folder.
    pub fn open(named: Option<&Path>) -> Result<Self, CacheError> {
        let users = || {
            let absolute = |folder: &PathBuf| folder.is_absolute();
            // an empty variable counts as not set
            let variable = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(absolute);
            let caches = variable.or_else(|| Some(std::env::home_dir()?.join(".cache"))).filter(absolute);
            caches.map(|folder| folder.join("nfold"))
        };
        match named {
            Some(folder) if can_write(folder) => return Ok(Self { folder: folder.into(), _scratch: None }),
            Some(folder) => return Err(CacheError::NoFolder(format!("`{}`", folder.display()))),
            None => {}
        }
        if let Some(folder) = users().filter(|folder| can_write(folder)) {
            return Ok(Self { folder, _scratch: None });
        }
        let scratch = DraftFolder::scratch().map_err(|e| CacheError::NoFolder(e.to_string()))?;
        Ok(Self { folder: scratch.path().into(), _scratch: Some(scratch) })
    }

    /// The cache folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether the folder is temporary, and removed at the end of the process.
    pub fn is_temporary(&self) -> bool {
        self._scratch.is_some()
    }

    /// The folded model of a checkpoint, under `name`, and whether it was cached. Blocks for seconds if it was not.
    pub fn get(
        &self,
        checkpoint: &Checkpoint,
        name: &str,
        opened: &OpenOptions,
        options: &FoldOptions,
    ) -> Result<(ModelDir, bool), CacheError> {
        model::check_name(name)?;
        let repository = self.folder.join("folded").join(key(checkpoint, opened, options));
        let path = repository.join(name).join("1");
        // a damaged one is folded again
        let kept = ModelDir::open_path(&path).and_then(ModelDir::with_onnx);
        if let Ok((model, _)) = kept {
            return Ok((model, true));
        }
        let staging = Staging::new(&repository)?;
        let folded = fold_verified(checkpoint, options, &staging)?;
        let target = Target { repository: &repository, name, version: 1, replace: true };
        Ok((ModelDir::publish_staged(&target, staging, &folded.manifest)?, false))
    }
}

/// The key of a folded model, as a folder's name.
fn key(checkpoint: &Checkpoint, opened: &OpenOptions, options: &FoldOptions) -> String {
    let made_of = format!(
        "{} {} {opened:?} {options:?} {}",
        checkpoint.sha256,
        checkpoint.told_sha256,
        env!("CARGO_PKG_VERSION")
    );
    model::sha256(made_of.as_bytes())[..32].to_string()
}
