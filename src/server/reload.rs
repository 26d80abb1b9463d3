//! What is read again while the server runs: certificates, API keys, and the models of the repository.
//!
//! A file or a model that can't be used leaves the old one in force.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::mpsc;

use super::keys::Keys;
use super::tls::{Tls, TlsOptions};
use super::{Control, ServeError};
use crate::infer::registry::Registry;
use crate::metrics::Metrics;

#[derive(Debug)]
pub(super) struct Reloader {
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) keys: Option<Arc<Keys>>,
    metrics: Arc<Metrics>,
    /// Set once the models are warm.
    registry: OnceLock<Arc<Registry>>,
}

impl Reloader {
    /// Reads certificates and keys.
    pub(super) fn open(
        tls: Option<TlsOptions>,
        keys: Option<PathBuf>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, ServeError> {
        Ok(Self {
            tls: tls.map(Tls::open).transpose()?.map(Arc::new),
            keys: keys.map(Keys::open).transpose()?.map(Arc::new),
            metrics,
            registry: OnceLock::new(),
        })
    }

    /// From now on models can be reloaded.
    pub(super) fn serve(&self, registry: Arc<Registry>) {
        let _ = self.registry.set(registry);
    }

    /// A request to stop, or its sender gone. Does meanwhile what else is asked.
    pub(super) async fn until_stop(&self, control: &mut mpsc::Receiver<Control>) {
        while let Some(Control::Reload) = control.recv().await {
            self.secrets();
            // on its own: a stop must not wait for a model that warms up
            drop(self.models());
        }
    }

    /// A second request to stop; a dropped sender is none.
    pub(super) async fn asked_again(&self, control: &mut mpsc::Receiver<Control>) {
        self.until_stop(control).await;
        if control.is_closed() && control.is_empty() {
            std::future::pending::<()>().await;
        }
    }

    /// Looks at the repository every so often, for ever.
    pub(super) async fn watch(&self, every: Option<Duration>) {
        let Some(every) = every else { return std::future::pending().await };
        loop {
            tokio::time::sleep(every).await;
            if let Some(reload) = self.models() {
                let _ = reload.await;
            }
        }
    }

    fn secrets(&self) {
        match self.tls.as_ref().map(|tls| tls.reload()) {
            Some(Err(error)) => tracing::error!(%error, "the old certificates stay: {error}"),
            Some(Ok(())) => tracing::info!("certificates read again"),
            None => {}
        }
        match self.keys.as_ref().map(|keys| keys.reload()) {
            Some(Err(error)) => tracing::error!(%error, "the old API keys stay: {error}"),
            Some(Ok(keys)) => tracing::info!(keys, "API keys read again"),
            None => {}
        }
    }

    fn models(&self) -> Option<tokio::task::JoinHandle<()>> {
        let (registry, metrics) = (self.registry.get()?.clone(), self.metrics.clone());
        Some(tokio::task::spawn_blocking(move || {
            if let Err(error) = registry.reload(&metrics) {
                tracing::error!(%error, "the models stay as they are: {error}");
            }
        }))
    }
}
