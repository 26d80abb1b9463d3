//! All live models: loaded, replaced while they serve, unloaded, drained.
//!
//! **What decides which models are served.** At the start, on SIGHUP and with `--watch`: the repository. The requested
//! models that it holds are served, those removed from it are not. In between: requests that load or unload a model by
//! name. That model stays loaded or unloaded, whatever the repository holds, until its folder changes (a version is
//! added, removed, or has other files) or the server restarts. A model loaded by name counts as requested from then on,
//! until it is unloaded.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::error::InferError;
pub use super::live_model::{Classified, Engines, LiveModel, LoadError};
pub use super::source::{Look, RegistryOptions, Source};
use super::system::{Os, System, Turns};
use crate::metrics::Metrics;
use crate::model::{Listing, ModelDir, ModelError};
use crate::panics::message;

/// Why the models can't be served.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A model can't be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The repository can't be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A bug in this program or in the runtime.
    #[error("loading model `{name}` panicked: {reason}")]
    Panic {
        /// The model.
        name: String,
        /// The panic's message.
        reason: String,
    },
    /// There is no repository to load from.
    #[error("this server's models don't come from a repository; none can be loaded")]
    NoRepository,
    /// The repository holds no model.
    #[error(
        "repository `{repository}` holds no model{left_out}; fold a checkpoint into it with `nfold fold CHECKPOINT --repository {repository}`"
    )]
    Empty {
        /// The repository.
        repository: PathBuf,
        /// ` (left out: …)`, or empty.
        left_out: String,
    },
    /// The default model is not served.
    #[error("the default model `{name}` is not among the models ({available}); name one of them with --default-model")]
    NoDefault {
        /// Name of the default model.
        name: String,
        /// Names of the served models.
        available: String,
    },
    /// The source can't provide or fold a checkpoint.
    #[error(transparent)]
    Source(Box<dyn std::error::Error + Send + Sync>),
    /// Broken models are skipped, and no other is left.
    #[error("none of {0} models can be served; the log says why of each")]
    AllBroken(usize),
    /// A client unloaded the model by name while it was being loaded.
    #[error("model `{0}` was unloaded meanwhile")]
    Unloaded(String),
    /// The server is stopping.
    #[error("the server is shutting down")]
    ShuttingDown,
}

type Models = BTreeMap<String, BTreeMap<u64, Arc<LiveModel>>>;

/// The versions of a model, each with a fingerprint of its files.
type Versions = BTreeMap<u64, String>;

/// The models that are served now.
#[derive(Debug)]
pub struct Registry {
    models: RwLock<Models>,
    /// The source of models that are loaded later; `None`: no model can be.
    source: Option<Box<dyn Source>>,
    /// Requested models, each with one version or all of them; empty: all models.
    asked_for: Vec<(String, Option<u64>)>,
    repository: PathBuf,
    /// The model for requests that name none.
    default_model: Option<String>,
    system: Arc<dyn System>,
    /// Held while a model loads: one at a time.
    turns: Turns,
    notes: Mutex<Notes>,
}

/// What a registry remembers between two reloads.
#[derive(Debug, Default)]
struct Notes {
    /// Warnings that were logged and still apply.
    said: BTreeSet<String>,
    /// Versions that could not be loaded.
    failed: BTreeMap<(String, u64), Failed>,
    /// Models that a client loaded or unloaded by name, with their versions at that time.
    controlled: BTreeMap<String, Versions>,
    /// Models that a client loaded by name and that the options don't request.
    loaded: BTreeSet<String>,
    /// The server is stopping: nothing is added.
    over: bool,
}

/// A version that could not be loaded.
#[derive(Debug)]
struct Failed {
    fingerprint: String,
    /// When it is tried again even if nothing has changed, and the pause after that.
    next: Instant,
    pause: Duration,
    reason: String,
}

/// Shortest and longest pause between two attempts to load a version that has not changed.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(600));

/// Who requests a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Repository,
    Name,
}

impl Default for Registry {
    fn default() -> Self {
        Self::new(None, Vec::new(), Arc::new(Os))
    }
}

impl Registry {
    fn new(source: Option<Box<dyn Source>>, asked_for: Vec<(String, Option<u64>)>, system: Arc<dyn System>) -> Self {
        Self {
            models: RwLock::default(),
            source,
            asked_for,
            repository: PathBuf::new(),
            default_model: None,
            turns: Turns::new(system.clone()),
            system,
            notes: Mutex::default(),
        }
    }

    /// A registry without models; [`reload`](Self::reload) loads them.
    pub fn of(source: Box<dyn Source>, system: Arc<dyn System>) -> Self {
        Self::new(Some(source), Vec::new(), system)
    }

    /// Opens the requested models, or all. Blocks until they are warm. A model that does not start fails everything,
    /// unless broken models are to be skipped.
    pub fn open(options: &RegistryOptions, metrics: &Metrics) -> Result<Self, RegistryError> {
        let mut later = options.clone();
        later.scheduler.one_by_one = true;
        Self::open_from(options, Box::new(later), options, metrics)
    }

    /// Like [`open`](Self::open), with other sources than the repository: `first` opens models at the start, `later`
    /// while others serve.
    pub fn open_from(
        first: &dyn Source,
        later: Box<dyn Source>,
        options: &RegistryOptions,
        metrics: &Metrics,
    ) -> Result<Self, RegistryError> {
        let mut registry = Self::new(Some(later), options.models.clone(), Arc::new(Os));
        registry.repository = options.repository.clone();
        registry.default_model = options.default_model.clone();
        let listing = first.list()?;
        registry.say_what_is_left_out(&listing);
        let wanted = registry.wanted(&listing, &BTreeSet::new())?;
        if let Some(name) = options.default_model.as_ref().filter(|name| wanted.iter().all(|(w, _)| w != *name)) {
            let mut names: Vec<&str> = wanted.iter().map(|(name, _)| name.as_str()).collect();
            names.dedup();
            return Err(RegistryError::NoDefault { name: name.clone(), available: names.join(", ") });
        }
        let mut skipped = 0;
        for (name, version) in &wanted {
            match registry.load_version(first, name, *version, By::Repository, metrics) {
                Ok(()) => {}
                Err(error) if options.skip_broken => {
                    skipped += 1;
                    tracing::error!(model = name, version, %error, "skipped, it can't be served: {error}");
                    registry.note_failure(first, name, *version, &error);
                }
                Err(error) => return Err(error),
            }
        }
        metrics.models_skipped.set(skipped);
        if skipped as usize == wanted.len() { Err(RegistryError::AllBroken(wanted.len())) } else { Ok(registry) }
    }

    /// Adds a warm model; it replaces one of the same name and version. Requests that have found the old one are still
    /// answered by it; it ends with the last of them.
    pub fn add(&self, model: LiveModel) {
        drop(self.insert(model));
    }

    /// Returns the model that was replaced. Dropping it may wait for its threads: don't hold a lock.
    fn insert(&self, model: LiveModel) -> Option<Arc<LiveModel>> {
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        models.entry(model.name.clone()).or_default().insert(model.version, Arc::new(model))
    }

    /// Opens the named model's newest version and adds it, unless that very version is served. Blocks until it is warm.
    pub fn load(&self, name: &str, metrics: &Metrics) -> Result<(), RegistryError> {
        let _turn = self.turns.wait();
        let source = self.source.as_deref().ok_or(RegistryError::NoRepository)?;
        let listing = source.list()?;
        let Some(version) = listing.models.get(name).and_then(|versions| versions.last().copied()) else {
            let left_out = listing.left_out.iter().find(|left_out| left_out.path.starts_with(name));
            let available = left_out.map_or_else(|| listing.summary(), |left_out| format!("left out: {left_out}"));
            return Err(
                ModelError::NoModel { name: name.into(), repository: self.repository.clone(), available }.into()
            );
        };
        let loaded = if self.serves(source, name, version) {
            Ok(())
        } else {
            let loaded = self.load_version(source, name, version, By::Name, metrics);
            metrics.reloaded(name, loaded.is_ok());
            loaded
        };
        if loaded.is_ok() {
            let versions = versions(source, &listing, name);
            let mut notes = self.notes();
            notes.failed.remove(&(name.to_string(), version));
            notes.controlled.insert(name.into(), versions);
            notes.loaded.insert(name.into());
        }
        loaded
    }

    /// Stops serving every version of the named model. Requests that have found it are still answered.
    pub fn unload(&self, name: &str) -> Result<(), InferError> {
        self.find(Some(name), None)?;
        let versions = match self.source.as_deref() {
            Some(source) => source.list().map(|listing| versions(source, &listing, name)).unwrap_or_default(),
            None => Versions::new(),
        };
        let mut notes = self.notes();
        notes.controlled.insert(name.into(), versions);
        notes.loaded.remove(name);
        drop(notes);
        let gone = self.models.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        drop(gone);
        tracing::info!(model = name, "model unloaded");
        Ok(())
    }

    /// Brings the served models in line with the repository. New and changed versions are opened beside the old ones,
    /// warmed up and tested, and only then replace them. What was removed from the repository is unloaded, unless
    /// nothing that replaces it can serve. Whatever fails leaves the old model serving. Blocks until all models are
    /// warm.
    pub fn reload(&self, metrics: &Metrics, look: Look) -> Result<(), RegistryError> {
        let _turn = self.turns.wait();
        let source = self.source.as_deref().ok_or(RegistryError::NoRepository)?;
        source.prepare(look);
        let listing = source.list()?;
        self.say_what_is_left_out(&listing);
        let kept = self.controlled(source, &listing);
        let mut wanted = self.wanted(&listing, &kept)?;
        let mut skipped = 0;
        for (name, version) in &wanted {
            if self.serves(source, name, *version) {
                self.notes().failed.remove(&(name.clone(), *version));
                continue;
            }
            let unserved = |registry: &Self| i64::from(registry.find(Some(name), Some(*version)).is_err());
            if look == Look::Again && !self.is_worth_a_try(source, name, *version) {
                skipped += unserved(self);
                continue;
            }
            let loaded = self.load_version(source, name, *version, By::Repository, metrics);
            if matches!(loaded, Err(RegistryError::Unloaded(_))) {
                continue;
            }
            metrics.reloaded(name, loaded.is_ok());
            match loaded {
                Ok(()) => drop(self.notes().failed.remove(&(name.clone(), *version))),
                Err(RegistryError::ShuttingDown) => return Ok(()),
                Err(error) => {
                    skipped += unserved(self);
                    if self.note_failure(source, name, *version, &error) || look == Look::Asked {
                        tracing::error!(model = name, version, %error, "not loaded, what was served stays: {error}");
                    }
                }
            }
        }
        metrics.models_skipped.set(skipped);
        let gone = |wanted: &[(String, u64)]| -> Vec<Arc<LiveModel>> {
            let stays = |model: &Arc<LiveModel>| {
                let others: Vec<u64> = wanted.iter().filter(|(n, _)| *n == model.name).map(|(_, v)| *v).collect();
                // the versions that are left may all be unable to serve
                let replaced = others.iter().any(|&version| self.find(Some(&model.name), Some(version)).is_ok());
                kept.contains(&model.name) || others.contains(&model.version) || (!others.is_empty() && !replaced)
            };
            self.all().into_iter().filter(|model| !stays(model)).collect()
        };
        if gone(&wanted).is_empty() {
            return Ok(());
        }
        // a version that is being replaced is missing for a moment
        self.system.sleep(Duration::from_secs(1));
        wanted.extend(self.wanted(&source.list()?, &kept)?);
        for model in gone(&wanted) {
            let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(versions) = models.get_mut(&model.name) {
                versions.remove(&model.version);
            }
            models.retain(|_, versions| !versions.is_empty());
            drop(models);
            tracing::info!(model = model.name, version = model.version, "gone from the repository, no longer served");
        }
        Ok(())
    }

    /// Opens a version and adds it. A panic fails only this version.
    fn load_version(
        &self,
        source: &dyn Source,
        name: &str,
        version: u64,
        by: By,
        metrics: &Metrics,
    ) -> Result<(), RegistryError> {
        if self.notes().over {
            return Err(RegistryError::ShuttingDown);
        }
        let opened = catch_unwind(AssertUnwindSafe(|| source.open(&source.read(name, version)?, metrics)));
        let model =
            opened.map_err(|panic| RegistryError::Panic { name: name.into(), reason: message(panic.as_ref()) })??;
        // under the same lock as `close` and `unload`, which would not see a model that is added after them
        let notes = self.notes();
        if notes.over {
            return Err(RegistryError::ShuttingDown);
        }
        if by == By::Repository && notes.controlled.contains_key(name) {
            return Err(RegistryError::Unloaded(name.into()));
        }
        let old = self.insert(model);
        drop(notes);
        drop(old);
        Ok(())
    }

    /// Whether this very version is served, and without a fault.
    fn serves(&self, source: &dyn Source, name: &str, version: u64) -> bool {
        let Ok(model) = self.find(Some(name), Some(version)) else { return false };
        source.read(name, version).is_ok_and(|dir: ModelDir| dir.manifest == model.manifest)
    }

    fn is_worth_a_try(&self, source: &dyn Source, name: &str, version: u64) -> bool {
        let notes = self.notes();
        let Some(failed) = notes.failed.get(&(name.to_string(), version)) else { return true };
        failed.next <= self.system.now() || failed.fingerprint != source.fingerprint(name, version)
    }

    /// Records why a version could not be loaded; whether that has changed.
    fn note_failure(&self, source: &dyn Source, name: &str, version: u64, error: &RegistryError) -> bool {
        let (fingerprint, reason) = (source.fingerprint(name, version), error.to_string());
        let mut notes = self.notes();
        let before =
            notes.failed.remove(&(name.to_string(), version)).filter(|before| before.fingerprint == fingerprint);
        let news = before.as_ref().is_none_or(|before| before.reason != reason);
        let pause = before.map_or(RETRY_PAUSE.0, |before| (before.pause * 2).min(RETRY_PAUSE.1));
        let failed = Failed { fingerprint, next: self.system.now() + pause, pause, reason };
        notes.failed.insert((name.into(), version), failed);
        news
    }

    /// Names and versions that are requested, without those in `kept`.
    fn wanted(&self, listing: &Listing, kept: &BTreeSet<String>) -> Result<Vec<(String, u64)>, RegistryError> {
        let loaded = self.notes().loaded.clone();
        let mut wanted = BTreeSet::new();
        let all = |name: &String, versions: &[u64]| versions.iter().map(|&v| (name.clone(), v)).collect::<Vec<_>>();
        for (name, versions) in &listing.models {
            if self.asked_for.is_empty() || loaded.contains(name) {
                wanted.extend(all(name, versions));
            }
        }
        for (name, version) in self.asked_for.iter().filter(|(name, _)| !kept.contains(name)) {
            let versions = listing.models.get(name).ok_or_else(|| ModelError::NoModel {
                name: name.clone(),
                repository: self.repository.clone(),
                available: listing.summary(),
            })?;
            match version {
                None => wanted.extend(all(name, versions)),
                Some(version) if versions.contains(version) => drop(wanted.insert((name.clone(), *version))),
                Some(version) => {
                    let (name, repository) = (name.clone(), self.repository.clone());
                    return Err(ModelError::NoVersion { name, version: *version, repository }.into());
                }
            }
        }
        wanted.retain(|(name, _)| !kept.contains(name));
        if wanted.is_empty() && kept.is_empty() {
            let left_out = listing.left_out.first().map(|folder| format!(" (left out: {folder})")).unwrap_or_default();
            return Err(RegistryError::Empty { repository: self.repository.clone(), left_out });
        }
        Ok(wanted.into_iter().collect())
    }

    /// Models that were loaded or unloaded by name and stay so: those whose folders have not changed since.
    fn controlled(&self, source: &dyn Source, listing: &Listing) -> BTreeSet<String> {
        let mut notes = self.notes();
        notes.controlled.retain(|name, then| {
            let kept = *then == versions(source, listing, name);
            if !kept {
                tracing::info!(
                    model = name,
                    "its folder has changed: the repository decides again what is served of it"
                );
            }
            kept
        });
        notes.controlled.keys().cloned().collect()
    }

    /// Logs why folders are no models, once per folder and reason.
    fn say_what_is_left_out(&self, listing: &Listing) {
        let left_out: BTreeSet<String> = listing.left_out.iter().map(ToString::to_string).collect();
        let said = std::mem::replace(&mut self.notes().said, left_out);
        for folder in listing.left_out.iter().filter(|folder| !said.contains(&folder.to_string())) {
            tracing::warn!(path = %folder.path.display(), "left out of what is served: {folder}");
        }
    }

    /// The model for a request: the named one, else the default one, else the only one; the given version, or the
    /// highest.
    pub fn find(&self, name: Option<&str>, version: Option<u64>) -> Result<Arc<LiveModel>, InferError> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let available = || models.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let (name, versions) = match name.or(self.default_model.as_deref()) {
            Some(wanted) => models
                .get_key_value(wanted)
                .ok_or_else(|| InferError::ModelNotFound { model: wanted.into(), available: available() })?,
            None if models.len() > 1 => return Err(InferError::ModelNotNamed { available: available() }),
            None => models.iter().next().ok_or(InferError::NotReady)?,
        };
        let found = match version {
            Some(v) => versions.get(&v),
            None => versions.values().next_back(),
        };
        found.cloned().ok_or_else(|| InferError::ModelNotFound {
            model: version.map_or_else(|| name.clone(), |v| format!("{name} version {v}")),
            available: versions.keys().map(|v| format!("{name} version {v}")).collect::<Vec<_>>().join(", "),
        })
    }

    /// Every live model, by name and version.
    pub fn all(&self) -> Vec<Arc<LiveModel>> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        models.values().flat_map(BTreeMap::values).cloned().collect()
    }

    /// Why the server is not ready; `None` if it is. A model has no working engine, or one that hangs or keeps failing.
    pub fn fault(&self, hang_limit: Duration) -> Option<String> {
        self.all().iter().find_map(|model| model.fault(hang_limit))
    }

    /// Updates the gauges that are measured at each scrape.
    pub fn observe(&self, metrics: &Metrics) {
        let models = self.all();
        models.iter().for_each(|model| model.observe());
        // all models share the same memory
        let claimed = models.iter().map(|model| model.decode_memory()).max().unwrap_or(0);
        metrics.decode_memory_bytes.set(i64::try_from(claimed).unwrap_or(i64::MAX));
    }

    /// Refuses new images and new models; queued images are still answered.
    pub fn close(&self) {
        self.notes().over = true;
        self.all().iter().for_each(|model| model.scheduler().close());
    }

    /// Refuses everything that is queued.
    pub fn abort(&self) {
        self.notes().over = true;
        self.all().iter().for_each(|model| model.scheduler().abort());
    }

    /// Waits for all compute threads until `deadline`; returns how many still run. Blocks.
    pub fn join(&self, deadline: Instant) -> usize {
        self.all().iter().map(|model| model.scheduler().join(deadline)).sum()
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn versions(source: &dyn Source, listing: &Listing, name: &str) -> Versions {
    let versions = listing.models.get(name).map(Vec::as_slice).unwrap_or_default();
    versions.iter().map(|&version| (version, source.fingerprint(name, version))).collect()
}
