//! Whether requests are welcome: a latch released once after warm-up, the engines' health, and the drain that ends it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::infer::registry::{LiveModel, Registry};

/// One for the process; every port asks it.
#[derive(Debug)]
pub(super) struct Readiness {
    /// Set once, when every model is warm and every port listens. Nothing unsets it.
    warm: OnceLock<Arc<Registry>>,
    draining: AtomicBool,
    hang_limit: Duration,
}

impl Readiness {
    /// Not ready. An engine run longer than `hang_limit` counts as hung.
    pub(super) fn new(hang_limit: Duration) -> Self {
        Self { warm: OnceLock::new(), draining: AtomicBool::new(false), hang_limit }
    }

    /// Every model is warm and every port listens.
    pub(super) fn release(&self, registry: Arc<Registry>) {
        let _ = self.warm.set(registry);
    }

    /// The server is stopping; there is no way back.
    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// True once the server is stopping.
    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Returns once the server is stopping.
    pub(super) async fn drained(&self) {
        while !self.is_draining() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Ready, or the reason why not.
    pub(super) fn check(&self) -> Result<(), String> {
        let registry = self.open()?;
        if registry.all().is_empty() {
            return Err("no model is loaded; load one with POST /v2/repository/models/NAME/load".into());
        }
        registry.fault(self.hang_limit).map_or(Ok(()), Err)
    }

    /// Whether this one model is ready, whatever the others do, or the reason why not.
    pub(super) fn check_model(&self, model: &LiveModel) -> Result<(), String> {
        self.open()?;
        model.fault(self.hang_limit).map_or(Ok(()), Err)
    }

    fn open(&self) -> Result<&Registry, String> {
        if self.is_draining() {
            return Err("shutting down".into());
        }
        self.warm.get().map(Arc::as_ref).ok_or_else(|| "models are loading".into())
    }

    /// Sets the gauges that are measured when somebody looks.
    pub(super) fn observe(&self) {
        if let Some(registry) = self.warm.get() {
            registry.observe();
        }
    }
}
