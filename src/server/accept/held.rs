//! What the clients of one port make the server keep while it waits for them: requests whose bodies don't come, answers that
//! are not taken, streams that say nothing. Each is small; a client may open them by the thousand.
//!
//! Bytes of bodies and of large answers are charged elsewhere, to one budget for all.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Reckoned for a request that waits for its client to send more: its head is gone, its tasks and buffers are there.
pub(super) const REQUEST: usize = 16 * 1024;
/// Reckoned for an answer that is not wholly taken, beside its bytes.
pub(super) const ANSWER: usize = 8 * 1024;
/// Bytes that a port may keep for each connection that it may have open. One of them may use what others don't.
const EACH: usize = 24 * 1024;
/// Least bytes of a port.
const LEAST: usize = 16 << 20;

/// The bytes of a port.
#[derive(Debug)]
pub(super) struct Port {
    bytes: AtomicUsize,
    limit: usize,
    above: Notify,
}

impl Port {
    /// For so many connections.
    pub(super) fn new(connections: usize) -> Self {
        Self { bytes: AtomicUsize::new(0), limit: connections.saturating_mul(EACH).max(LEAST), above: Notify::new() }
    }

    /// Most bytes of all connections.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Resolves once more is kept than the limit.
    pub(super) async fn above(&self) {
        while self.bytes.load(Ordering::Acquire) <= self.limit {
            self.above.notified().await;
        }
    }
}

/// The bytes of a connection.
#[derive(Debug)]
pub(super) struct Connection {
    bytes: AtomicUsize,
    port: Arc<Port>,
}

impl Connection {
    /// Nothing yet.
    pub(super) fn new(port: Arc<Port>) -> Self {
        Self { bytes: AtomicUsize::new(0), port }
    }

    /// What is kept for it.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Acquire)
    }

    /// Keeps `bytes` more.
    pub(super) fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::AcqRel);
        if self.port.bytes.fetch_add(bytes, Ordering::AcqRel) + bytes > self.port.limit {
            self.port.above.notify_one();
        }
    }

    /// Keeps `bytes` less: as many as were added.
    pub(super) fn sub(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::AcqRel);
        self.port.bytes.fetch_sub(bytes, Ordering::AcqRel);
    }
}
