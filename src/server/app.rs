//! The state that all handlers share. Knows no handler.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::bodies::Bodies;
use super::control::ModelControl;
use super::doors::Hosts;
use super::keys::Keys;
use super::pace::Pace;
use super::readiness::Readiness;
use super::traces::Traces;
use crate::infer::registry::Registry;
use crate::metrics::Metrics;

/// Shared state; lives as long as the server.
#[derive(Debug)]
pub(super) struct App {
    pub(super) registry: Arc<Registry>,
    pub(super) readiness: Arc<Readiness>,
    pub(super) metrics: Arc<Metrics>,
    /// Longest a request may take; a client can ask for less.
    pub(super) request_timeout: Duration,
    /// Longest a response may wait without its client reading any of it.
    pub(super) write_timeout: Duration,
    /// Limits on bodies.
    pub(super) bodies: Bodies,
    /// Delays refusals of clients that retry at once.
    pub(super) pace: Pace,
    /// API keys; `None`: requests need no key.
    pub(super) keys: Option<Arc<Keys>>,
    /// Origins whose pages may send requests (CORS); `*`: all.
    pub(super) cors_origins: Vec<String>,
    /// The exporter of spans.
    pub(super) traces: Option<Arc<Traces>>,
    /// Platforms whose contracts are answered.
    pub(super) hosts: Hosts,
    /// Where the admin port listens: for who asks here for what is there.
    pub(super) admin: SocketAddr,
    /// Whether clients may load and unload models.
    pub(super) control: ModelControl,
}
