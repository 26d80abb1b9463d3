//! Reads certificates, API keys and the model repository again while the server runs.
//!
//! If a file or a model can't be used, the old one stays in force.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};

use super::keys::Keys;
use super::tls::{Tls, TlsOptions};
use super::{Control, ServeError};
use crate::infer::registry::{Look, Registry};
use crate::metrics::Metrics;

#[derive(Debug)]
pub(super) struct Reloader {
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) keys: Option<Arc<Keys>>,
    metrics: Arc<Metrics>,
    /// Set once the models are warm.
    registry: OnceLock<Arc<Registry>>,
    secrets_asked: Notify,
    models_asked: Notify,
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
            secrets_asked: Notify::new(),
            models_asked: Notify::new(),
        })
    }

    /// Allows models to be reloaded from now on.
    pub(super) fn serve(&self, registry: Arc<Registry>) {
        let _ = self.registry.set(registry);
    }

    /// Resolves when a stop is requested or the sender is dropped. Reload requests before that are passed on to
    /// [`run`](Self::run).
    pub(super) async fn until_stop(&self, control: &mut mpsc::Receiver<Control>) {
        while let Some(Control::Reload) = control.recv().await {
            self.secrets_asked.notify_one();
            self.models_asked.notify_one();
        }
    }

    /// Resolves at a second request to stop; a dropped sender does not count.
    pub(super) async fn asked_again(&self, control: &mut mpsc::Receiver<Control>) {
        self.until_stop(control).await;
        if control.is_closed() && control.is_empty() {
            std::future::pending::<()>().await;
        }
    }

    /// Reloads on request and checks the repository at intervals; never returns. Reloads run one at a time on a thread
    /// of their own: all requests that arrive meanwhile cause one more. A reload that hangs blocks nothing else.
    pub(super) async fn run(&self, every: Option<Duration>) {
        let secrets = async {
            loop {
                self.secrets_asked.notified().await;
                let (tls, keys) = (self.tls.clone(), self.keys.clone());
                one("certificates and keys", move || secrets(tls.as_deref(), keys.as_deref())).await;
            }
        };
        let models = async {
            let said = Arc::default();
            loop {
                let look = tokio::select! {
                    () = self.models_asked.notified() => Look::Asked,
                    () = tick(every) => Look::Again,
                };
                let Some(registry) = self.registry.get().cloned() else { continue };
                let (metrics, said) = (self.metrics.clone(), Arc::clone(&said));
                one("models", move || models(&registry, &metrics, look, &said)).await;
            }
        };
        tokio::join!(secrets, models);
    }
}

async fn tick(every: Option<Duration>) {
    match every {
        Some(every) => tokio::time::sleep(every).await,
        None => std::future::pending().await,
    }
}

/// Runs one reload to its end, and logs a warning if it takes long.
async fn one(what: &str, reload: impl FnOnce() + Send + 'static) {
    const LONG: Duration = Duration::from_secs(60);
    let started = Instant::now();
    let mut reload = tokio::task::spawn_blocking(reload);
    loop {
        match tokio::time::timeout(LONG, &mut reload).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => return tracing::error!(%error, "a reload of {what} panicked; what was served stays"),
            Err(_) => tracing::warn!(
                duration_ms = started.elapsed().as_millis() as u64,
                "a reload of {what} is still under way; what was served stays meanwhile"
            ),
        }
    }
}

fn secrets(tls: Option<&Tls>, keys: Option<&Keys>) {
    match tls.map(Tls::reload) {
        Some(Err(error)) => tracing::error!(%error, "the old certificates stay: {error}"),
        Some(Ok(())) => tracing::info!("certificates read again"),
        None => {}
    }
    match keys.map(Keys::reload) {
        Some(Err(error)) => tracing::error!(%error, "the old API keys stay: {error}"),
        Some(Ok(keys)) => tracing::info!(keys, "API keys read again"),
        None => {}
    }
}

/// Reloads the models. `said` is the last logged failure: a periodic check does not log the same one again.
fn models(registry: &Registry, metrics: &Metrics, look: Look, said: &Mutex<Option<String>>) {
    let failure = registry.reload(metrics, look).err().map(|error| error.to_string());
    let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = failure.as_ref().filter(|&error| look == Look::Asked || said.as_ref() != Some(error)) {
        tracing::error!(error, "the models stay as they are: {error}");
    }
    *said = failure;
}
