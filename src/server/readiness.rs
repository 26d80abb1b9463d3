//! Whether requests are welcome: a latch released once after warm-up, the engines' health, and the drain at the end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::watch;

use crate::infer::registry::{LiveModel, Registry};
use crate::metrics::Metrics;

/// The process's readiness, shared by every port.
#[derive(Debug)]
pub(super) struct Readiness {
    /// Set once, when every model is warm and every port listens; never unset.
    warm: OnceLock<Arc<Registry>>,
    draining: AtomicBool,
    /// True once the hold (`--drain-hold`) is over.
    closing: watch::Sender<bool>,
    hang_limit: Duration,
}

impl Readiness {
    /// Not ready at first. An engine run longer than `hang_limit` counts as hung.
    pub(super) fn new(hang_limit: Duration) -> Self {
        Self { warm: OnceLock::new(), draining: AtomicBool::new(false), closing: watch::Sender::new(false), hang_limit }
    }

    /// Releases the latch: every model is warm and every port listens.
    pub(super) fn release(&self, registry: Arc<Registry>) {
        let _ = self.warm.set(registry);
    }

    /// Marks the server as stopping, for good.
    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Whether the server is stopping.
    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Ends the hold: new requests are refused.
    pub(super) fn close(&self) {
        self.closing.send_replace(true);
    }

    /// Whether the hold is over.
    pub(super) fn is_closing(&self) -> bool {
        *self.closing.borrow()
    }

    /// Resolves once the hold is over.
    pub(super) async fn closed(&self) {
        // fails only if the sender is dropped, and `self` owns it
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

    /// Whether `model` is ready, whatever the state of the others, or the reason why not.
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
