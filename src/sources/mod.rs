//! Sources that a user names (a folder, a file or a model on the hub), and how they become folded, verified models.
//!
//! `folding` folds and verifies; `quantising` makes a network of integers of that; `cache` keeps folded models by the digest of their checkpoints; `served` provides the
//! models of a server that was started with sources instead of a repository. Knows no protocol.

mod cache;
mod folding;
mod quantising;
mod served;

use std::path::{Path, PathBuf};

pub use self::cache::{CacheError, FoldCache};
pub use self::folding::{FoldingError, fold_verified};
pub use self::quantising::{
    Calibration, Gain, Guard, Keep, Quantised, QuantisingError, Stage, fold_quantised, is_below,
};
pub use self::served::{Served, ServedOptions};
use crate::checkpoint::{CONFIG_FILE, Checkpoint, CheckpointError, OpenOptions, WEIGHTS_FILE};
use crate::hub::{self, Event, HubError, HubId, HubOptions};
use crate::model;

/// Why a source has no usable checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The model can't be fetched from the hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The checkpoint can't be opened.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A checkpoint from the hub can't be used.
    #[error("`{id}`: {source}")]
    Fetched {
        /// The model.
        id: String,
        /// Why.
        source: CheckpointError,
    },
    /// The source is a model that is folded already.
    #[error("`{0}` holds folded models, not a checkpoint; serve them with `nfold serve --repository {1}`")]
    Folded(PathBuf, PathBuf),
    /// Neither a local path nor a name on the hub.
    #[error(
        "`{0}` is not here, and is no name on the model hub (ORG/NAME or ORG/NAME@REVISION); a checkpoint is a folder with `{CONFIG_FILE}` and `{WEIGHTS_FILE}`, or a file of weights"
    )]
    Missing(PathBuf),
}

/// What a source is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A folder or a file.
    Path(PathBuf),
    /// A model on the hub.
    Hub(HubId),
}

impl Origin {
    /// Parses a source: `hf://ORG/NAME` is the hub, anything that exists here is a path, and any other `ORG/NAME` is
    /// the hub.
    pub fn parse(word: &Path) -> Result<Self, SourceError> {
        let text = word.to_str().unwrap_or_default();
        if HubId::is_address(text) {
            return Ok(Self::Hub(HubId::parse(text)?));
        }
        // a path that can't be read is reported when it is opened
        if word.symlink_metadata().is_ok() {
            return Ok(Self::Path(word.into()));
        }
        if HubId::is_meant(text) {
            return Ok(Self::Hub(HubId::parse(text)?));
        }
        Err(SourceError::Missing(word.into()))
    }

    /// Refuses a path that is no checkpoint, without reading its weights. Nothing is asked about the hub.
    pub fn check(&self, options: &OpenOptions) -> Result<(), SourceError> {
        let Self::Path(path) = self else { return Ok(()) };
        if let Some(repository) = model::repository_of(path) {
            return Err(SourceError::Folded(path.clone(), repository));
        }
        Ok(Checkpoint::check(path, options)?)
    }

    /// Opens the checkpoint; one on the hub is fetched first. Blocks.
    pub fn open(
        &self,
        options: &OpenOptions,
        hub_options: impl FnOnce() -> HubOptions,
        say: &mut dyn FnMut(Event<'_>),
    ) -> Result<Checkpoint, SourceError> {
        let id = match self {
            Self::Path(path) => {
                if let Some(repository) = model::repository_of(path) {
                    return Err(SourceError::Folded(path.clone(), repository));
                }
                return Ok(Checkpoint::open_with(path, options)?);
            }
            Self::Hub(id) => id,
        };
        let check = |config: &[u8]| Checkpoint::check_config(config, options);
        let snapshot = hub::fetch(id, &hub_options(), &check, say)?;
        let opened = Checkpoint::open_with(&snapshot.folder, options);
        let mut checkpoint = opened.map_err(|source| SourceError::Fetched { id: id.to_string(), source })?;
        checkpoint.set_origin(id.name(), format!("{} at commit {}", id.repository(), snapshot.commit));
        Ok(checkpoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_here_comes_before_the_hub() {
        let folder = tempfile::tempdir().expect("folder");
        let here = folder.path().join("timm");
        std::fs::create_dir(&here).expect("made");
        assert_eq!(Origin::parse(&here).expect("here"), Origin::Path(here));
        let id = |text| Origin::Hub(HubId::parse(text).expect("an id"));
        assert_eq!(Origin::parse(Path::new("hf://timm/x")).expect("hub"), id("timm/x"));
        assert_eq!(Origin::parse(Path::new("no-such-org/x")).expect("hub"), id("no-such-org/x"));
        for bad in ["./x", "x/y/z", "/no/such", "no-such/model.pth", "no-such", "hf://x", ""] {
            assert!(Origin::parse(Path::new(bad)).is_err(), "{bad}");
        }
    }
}
