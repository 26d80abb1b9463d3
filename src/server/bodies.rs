//! Bodies and messages from clients: the memory they use, how they are decompressed, how many elements they may hold,
//! and which images they contain.
//!
//! Nothing here allocates by a number that a client sent before a limit was checked, and nothing that takes longer than
//! some microseconds runs on the async I/O threads. Knows no model and no route.

pub(super) mod base64;
pub(super) mod budget;
pub(super) mod coding;
mod form;
pub(super) mod inflate;
pub(super) mod instances;
pub(super) mod intake;
pub(super) mod json;
pub(super) mod numbers;
pub(super) mod threads;
pub(super) mod upload;

use std::sync::Arc;

use self::budget::BodyBudget;
use self::threads::ParseThreads;
use super::status::{ApiError, Code};
use crate::metrics::Metrics;

/// Limits and resources that all bodies share.
#[derive(Debug, Clone)]
pub(super) struct Bodies {
    /// Most bytes of a body, or of a gRPC message, decompressed.
    pub(super) limit: usize,
    /// The memory that all bodies share.
    pub(super) budget: BodyBudget,
    /// The threads that decompress and parse bodies.
    pub(super) threads: ParseThreads,
}

impl Bodies {
    /// Allows `limit` bytes per body and `memory` bytes for all bodies together (at least `limit`).
    pub(super) fn new(limit: usize, memory: usize, metrics: &Arc<Metrics>) -> Self {
        let budget = BodyBudget::new(memory.max(limit), metrics);
        Self { limit, budget, threads: ParseThreads::new() }
    }
}

/// What a request may hold at most, for the model that it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most images: the capacity of the model's queue.
    pub images: usize,
    /// Elements of one image's tensor.
    pub values: usize,
}

/// The error for a body above the limit.
pub(in crate::server) fn too_large() -> ApiError {
    ApiError::new(Code::BodyTooLarge, "the body is larger than this server takes (--body-limit)")
}
