//! Counts the memory that one port keeps while it waits for its clients: requests whose bodies don't arrive, responses
//! that are not read, idle streams. Each is small, but a client may open thousands.
//!
//! Request bodies and large responses are charged to the one budget for all ports instead (`bodies::budget`).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Estimated bytes of a request that waits for its client to send more: its head is freed, its tasks and buffers are
/// not.
pub(super) const REQUEST: usize = 16 * 1024;
/// Estimated bytes of a response that is not fully read, apart from its body.
pub(super) const ANSWER: usize = 8 * 1024;
/// Bytes that a port may keep per connection of its limit, on average: one connection may use what others leave.
const EACH: usize = 24 * 1024;
/// Least limit of a port, in bytes.
const LEAST: usize = 16 << 20;

/// The bytes kept for all connections of a port.
#[derive(Debug)]
pub(super) struct Port {
    bytes: AtomicUsize,
    limit: usize,
    above: Notify,
}

impl Port {
    /// A port that may have `connections` open.
    pub(super) fn new(connections: usize) -> Self {
        Self { bytes: AtomicUsize::new(0), limit: connections.saturating_mul(EACH).max(LEAST), above: Notify::new() }
    }

    /// Most bytes kept for all connections together.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Resolves once more than the limit is kept.
    pub(super) async fn above(&self) {
        while self.bytes.load(Ordering::Acquire) <= self.limit {
            self.above.notified().await;
        }
    }
}

/// The bytes kept for one connection.
#[derive(Debug)]
pub(super) struct Connection {
    bytes: AtomicUsize,
    port: Arc<Port>,
}

impl Connection {
    /// A connection of `port` for which nothing is kept yet.
    pub(super) fn new(port: Arc<Port>) -> Self {
        Self { bytes: AtomicUsize::new(0), port }
    }

    /// Bytes kept for this connection.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Acquire)
    }

    /// Adds `bytes` to the connection and its port.
    pub(super) fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::AcqRel);
        if self.port.bytes.fetch_add(bytes, Ordering::AcqRel) + bytes > self.port.limit {
            self.port.above.notify_one();
        }
    }

    /// Subtracts `bytes` that were added before.
    pub(super) fn sub(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::AcqRel);
        self.port.bytes.fetch_sub(bytes, Ordering::AcqRel);
    }
}
