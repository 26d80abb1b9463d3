//! The models of a server that was started with sources: each is fetched, folded into the cache and served under its
//! name. On request (SIGHUP) all sources are checked again; if one can't be fetched then, its model stays as it is.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::cache::{CacheError, FoldCache};
use super::{Origin, SourceError};
use crate::checkpoint::OpenOptions;
use crate::fold::FoldOptions;
use crate::hub::{Event, HubOptions};
use crate::infer::live_model::{LiveModel, LoadError};
use crate::infer::registry::{Look, RegistryOptions, Source};
use crate::metrics::Metrics;
use crate::model::{Listing, ModelDir, ModelError};

/// What is served, and how it is folded.
#[derive(Debug, Clone)]
pub struct ServedOptions {
    /// The sources, each with the name that the user gave it, if any.
    pub sources: Vec<(Option<String>, PathBuf)>,
    /// Options that override or complete the checkpoints' own settings.
    pub open: OpenOptions,
    /// How the checkpoints are folded.
    pub fold: FoldOptions,
    /// Cache folder of folded models; `None`: the user's cache.
    pub cache: Option<PathBuf>,
}

impl ServedOptions {
    /// Refuses sources that are not here or no checkpoints, without reading their weights or asking the hub.
    pub fn check(&self) -> Result<(), SourceError> {
        self.sources.iter().try_for_each(|(_, path)| Origin::parse(path)?.check(&self.open))
    }
}

/// Why a source can't be served.
#[derive(Debug, thiserror::Error)]
pub enum ServedError {
    /// There is no usable checkpoint.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The checkpoint can't be folded or cached.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// Two sources have the same name.
    #[error("two sources are called `{0}`; name one as NAME=SOURCE")]
    Twice(String),
    /// The source's name has changed.
    #[error("`{source_name}` is called `{now}` now, and was `{before}`; start again to serve it so")]
    Renamed {
        /// The source.
        source_name: String,
        /// The old name.
        before: String,
        /// The new name.
        now: String,
    },
}

/// The sources of a server, and how their models are opened.
#[derive(Debug, Clone)]
pub struct Served {
    sources: Arc<Sources>,
    engines: RegistryOptions,
}

/// The sources, and the models folded from them.
#[derive(Debug)]
struct Sources {
    options: ServedOptions,
    cache: FoldCache,
    /// Folded models by name.
    models: Mutex<BTreeMap<String, ModelDir>>,
    /// The name of each source; empty if it could not be fetched or folded.
    names: Vec<String>,
}

impl Served {
    /// Fetches and folds every source, one after the other, before any is opened. Blocks meanwhile. A source that fails
    /// is an error, unless `engines` skips broken models.
    pub fn open(options: ServedOptions, engines: RegistryOptions) -> Result<Self, ServedError> {
        let sources = Sources::bring_all(options, engines.skip_broken)?;
        Ok(Self { sources: Arc::new(sources), engines })
    }

    /// Names of the models, in the order of the sources.
    pub fn names(&self) -> Vec<String> {
        self.sources.names.iter().filter(|name| !name.is_empty()).cloned().collect()
    }

    /// The same source, for a server that serves already: engines are warmed up one by one.
    pub fn later(&self) -> Self {
        let mut later = self.clone();
        later.engines.scheduler.one_by_one = true;
        later
    }
}

impl Sources {
    fn bring_all(options: ServedOptions, skip_broken: bool) -> Result<Self, ServedError> {
        let cache = FoldCache::open(options.cache.as_deref())?;
        if cache.is_temporary() {
            let path = cache.folder().display();
            tracing::warn!(%path, "the user's cache folder can't be written: folded models go to a temporary one and are folded again at the next start; --cache names a folder that stays");
        }
        let count = options.sources.len();
        let mut served = Self { options, cache, models: Mutex::default(), names: Vec::new() };
        for at in 0..count {
            let (name, found) = match served.bring(at) {
                Ok(found) => found,
                Err(error) if skip_broken => {
                    let source = served.shown(at);
                    tracing::error!(source, %error, "skipped, it can't be served: {error}");
                    served.names.push(String::new());
                    continue;
                }
                Err(error) => return Err(error),
            };
            if served.models().insert(name.clone(), found).is_some() {
                return Err(ServedError::Twice(name));
            }
            served.names.push(name);
        }
        Ok(served)
    }

    fn shown(&self, at: usize) -> String {
        self.options.sources.get(at).map(|(_, path)| path.display().to_string()).unwrap_or_default()
    }

    /// Fetches and folds one source.
    fn bring(&self, at: usize) -> Result<(String, ModelDir), ServedError> {
        let Some((given, path)) = self.options.sources.get(at) else {
            return Err(SourceError::Missing(PathBuf::new()).into());
        };
        let started = Instant::now();
        let source = self.shown(at);
        let mut file = String::new();
        let mut say = |event: Event<'_>| match event {
            Event::Begins { file: name, size, have } => {
                file = name.into();
                tracing::info!(source, file, bytes = size, have, "fetching {file} of {source}: {size} bytes");
            }
            Event::At(_) => {}
            Event::Ends => {
                tracing::info!(source, file, seconds = started.elapsed().as_secs_f64(), "fetched {file} of {source}")
            }
            Event::Note(text) => tracing::warn!(source, "{text}"),
        };
        let hub = || HubOptions::from_environment(self.cache.folder());
        let checkpoint = Origin::parse(path)?.open(&self.options.open, hub, &mut say)?;
        let name = given.clone().unwrap_or_else(|| checkpoint.name.clone());
        let (model, was_there) = self.cache.get(&checkpoint, &name, &self.options.open, &self.options.fold)?;
        let path = model.path.display();
        if was_there {
            tracing::info!(model = name, %path, "{source} is folded already");
        } else {
            let seconds = started.elapsed().as_secs_f64();
            tracing::info!(model = name, %path, seconds, "folded and verified {source} in {seconds:.1} s");
        }
        for warning in &model.manifest.source.warnings {
            tracing::warn!(model = name, "{warning}");
        }
        Ok((name, model))
    }

    fn models(&self) -> MutexGuard<'_, BTreeMap<String, ModelDir>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn model(&self, name: &str, version: u64) -> Result<ModelDir, ModelError> {
        let models = self.models();
        let found = models.get(name).filter(|model| model.version == version).cloned();
        found.ok_or_else(|| ModelError::NoModel {
            name: name.into(),
            repository: self.cache.folder().into(),
            available: models.keys().map(String::as_str).collect::<Vec<_>>().join(", "),
        })
    }
}

impl Source for Served {
    /// Checks every source again, if it is on request.
    fn prepare(&self, look: Look) {
        if look == Look::Again {
            return;
        }
        for (at, before) in self.sources.names.iter().enumerate() {
            let source = self.sources.shown(at);
            match self.sources.bring(at) {
                Ok((now, _)) if !before.is_empty() && now != *before => {
                    let error = ServedError::Renamed { source_name: source.clone(), before: before.clone(), now };
                    tracing::error!(source, %error, "not loaded, what was served stays: {error}");
                }
                Ok((name, model)) => drop(self.sources.models().insert(name, model)),
                Err(error) => tracing::error!(source, %error, "not loaded, what was served stays: {error}"),
            }
        }
    }

    fn list(&self) -> Result<Listing, ModelError> {
        let models = self.sources.models().iter().map(|(name, model)| (name.clone(), vec![model.version])).collect();
        Ok(Listing { models, left_out: Vec::new() })
    }

    fn read(&self, name: &str, version: u64) -> Result<ModelDir, ModelError> {
        ModelDir::open_path(&self.sources.model(name, version)?.path)
    }

    fn fingerprint(&self, name: &str, version: u64) -> String {
        self.sources.model(name, version).map(|model| model.manifest.onnx_sha256).unwrap_or_default()
    }

    fn open(&self, dir: &ModelDir, metrics: &Metrics) -> Result<LiveModel, LoadError> {
        self.engines.open(dir, metrics)
    }
}
