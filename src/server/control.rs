//! Loads and unloads models at a client's request; off unless the operator enables it.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::Mutex;

use super::status::{ApiError, Code};
use crate::infer::registry::{LoadError, Registry, RegistryError};
use crate::metrics::Metrics;
use crate::model::ModelError;

/// Whether clients may load and unload models, and the lock for it.
#[derive(Debug)]
pub(super) struct ModelControl {
    allowed: bool,
    registry: Arc<Registry>,
    metrics: Arc<Metrics>,
    /// Held while a model loads: waiting requests hold no blocking thread meanwhile.
    one: Arc<Mutex<()>>,
}

impl ModelControl {
    pub(super) fn new(allowed: bool, registry: Arc<Registry>, metrics: Arc<Metrics>) -> Self {
        Self { allowed, registry, metrics, one: Arc::default() }
    }

    fn check(&self) -> Result<(), ApiError> {
        if self.allowed {
            return Ok(());
        }
        let text = "loading and unloading of models is switched off; start the server with --model-control";
        Err(ApiError::new(Code::InvalidRequest, text))
    }

    /// Opens the named model's newest version and serves it.
    pub(super) async fn load<'a>(
        &self,
        name: &str,
        parameters: impl IntoIterator<Item = &'a String>,
    ) -> Result<(), ApiError> {
        self.check()?;
        known(parameters, &LOAD_PARAMETERS)?;
        let turn = self.one.clone().lock_owned().await;
        let (registry, metrics, name) = (self.registry.clone(), self.metrics.clone(), name.to_string());
        let loaded = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            registry.load(&name, &metrics).map_err(|error| refused(&name, error))
        });
        loaded.await.map_err(|e| ApiError::internal(format!("loading a model panicked: {e}")))?
    }

    /// Stops serving every version of the named model; queued requests are still answered.
    pub(super) async fn unload<'a>(
        &self,
        name: &str,
        parameters: impl IntoIterator<Item = &'a String>,
    ) -> Result<(), ApiError> {
        self.check()?;
        known(parameters, &UNLOAD_PARAMETERS)?;
        let (registry, name) = (self.registry.clone(), name.to_string());
        let unloaded = tokio::task::spawn_blocking(move || registry.unload(&name));
        Ok(unloaded.await.map_err(|e| ApiError::internal(format!("unloading a model panicked: {e}")))??)
    }
}

/// Parameters that a load knows: none. Triton's own (`config`, `file:…`) would change the model, and are refused.
pub(super) const LOAD_PARAMETERS: [&str; 0] = [];

/// Parameters that an unload knows; no model depends on another.
pub(super) const UNLOAD_PARAMETERS: [&str; 1] = ["unload_dependents"];

/// Refuses unknown parameters.
fn known<'a>(parameters: impl IntoIterator<Item = &'a String>, known: &[&str]) -> Result<(), ApiError> {
    let unknown: BTreeSet<&String> = parameters.into_iter().filter(|name| !known.contains(&name.as_str())).collect();
    let Some(name) = unknown.first() else { return Ok(()) };
    let name: String = name.chars().take(100).collect();
    let text = format!(
        "parameter `{}` is not taken: a model is served as the repository has it; change it there",
        name.escape_debug()
    );
    Err(ApiError::new(Code::InvalidRequest, text))
}

/// A failed load as the client sees it: which model and why, without paths of this machine. The log has the full error.
fn refused(name: &str, error: RegistryError) -> ApiError {
    tracing::error!(model = name, %error, "not loaded: {error}");
    let (code, why) = match &error {
        RegistryError::Model(ModelError::NoModel { available, .. }) => {
            (Code::ModelNotFound, format!("it is not in the repository ({available})"))
        }
        RegistryError::NoRepository => (Code::InvalidRequest, error.to_string()),
        RegistryError::ShuttingDown => (Code::ShuttingDown, error.to_string()),
        RegistryError::Load(LoadError::Model(_)) | RegistryError::Model(_) => {
            (Code::InvalidRequest, "its folder can't be read as a model; the server's log says why".into())
        }
        RegistryError::Panic { .. } => return ApiError::internal(error.to_string()),
        _ => (Code::InvalidRequest, error.to_string()),
    };
    let name: String = name.chars().take(100).collect();
    ApiError::new(code, format!("model `{}` can't be loaded: {why}", name.escape_debug()))
}
