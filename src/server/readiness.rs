//! Whether requests are welcome: a latch released once after warm-up, the engines' health, and the drain that ends it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::watch;

use crate::infer::registry::{LiveModel, Registry};
use crate::metrics::Metrics;

/// The process's readiness, shared by every port.
#[derive(Debug)]
pub(super) struct Readiness {
    /// Set once, when every model is warm and every port listens. Nothing unsets it.
    warm: OnceLock<Arc<Registry>>,
    draining: AtomicBool,
    /// Set once the hold is over.
    closing: watch::Sender<bool>,
    hang_limit: Duration,
}

impl Readiness {
    /// Starts as not ready. An engine run longer than `hang_limit` counts as hung.
    pub(super) fn new(hang_limit: Duration) -> Self {
        Self { warm: OnceLock::new(), draining: AtomicBool::new(false), closing: watch::Sender::new(false), hang_limit }
    }

    /// Every model is warm and every port listens.
    pub(super) fn release(&self, registry: Arc<Registry>) {
        let _ = self.warm.set(registry);
    }

    /// The server is stopping. This is final.
    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// True once the server is stopping.
    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// The hold is over: new requests are refused.
    pub(super) fn close(&self) {
        self.closing.send_replace(true);
    }

    /// True once the hold is over.
    pub(super) fn is_closing(&self) -> bool {
        *self.closing.borrow()
    }

    /// Returns once the hold is over.
    pub(super) async fn closed(&self) {
        // an error would mean that the sender, which is here, is gone
        let _ = self.closing.subscribe().wait_for(|closing| *closing).await;
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

    /// Updates the gauges that are measured at each scrape.
    pub(super) fn observe(&self, metrics: &Metrics) {
        if let Some(registry) = self.warm.get() {
            registry.observe(metrics);
        }
    }
}
