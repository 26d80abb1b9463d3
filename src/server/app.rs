//! What handlers share, for as long as the server lives. Knows no handler.

use std::sync::Arc;
use std::time::Duration;

use super::bodies::Bodies;
use super::control::ModelControl;
use super::keys::Keys;
use super::pace::Pace;
use super::readiness::Readiness;
use super::traces::Traces;
use crate::infer::registry::Registry;
use crate::metrics::Metrics;

/// What handlers need; lives as long as the server.
#[derive(Debug)]
pub(super) struct App {
    pub(super) registry: Arc<Registry>,
    pub(super) readiness: Arc<Readiness>,
    pub(super) metrics: Arc<Metrics>,
    /// Longest a request may take; a client can ask for less.
    pub(super) request_timeout: Duration,
    /// Longest an answer may wait without its client taking any of it.
    pub(super) write_timeout: Duration,
    /// Limits on bodies.
    pub(super) bodies: Bodies,
    /// The pace of refusals.
    pub(super) pace: Pace,
    /// API keys; none: every client may ask.
    pub(super) keys: Option<Arc<Keys>>,
    /// Origins whose pages may ask; `*`: all.
    pub(super) cors_origins: Vec<String>,
    /// Where spans of requests go.
    pub(super) traces: Option<Arc<Traces>>,
    /// Whether clients may load and unload models.
    pub(super) control: ModelControl,
}
