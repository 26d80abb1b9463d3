//! Bodies and messages from clients: how many bytes of them are in memory, how they are inflated, how many things may be in
//! them, and what images they hold.
//!
//! Nothing here allocates by a number that a client wrote before a limit was checked, and nothing that takes longer than some
//! microseconds runs on the threads that move bytes. Knows no model and no route.

pub(super) mod base64;
pub(super) mod budget;
pub(super) mod coding;
mod form;
pub(super) mod inflate;
pub(super) mod intake;
pub(super) mod json;
pub(super) mod threads;
pub(super) mod upload;

use std::sync::Arc;

use self::budget::BodyBudget;
use self::threads::ParseThreads;
use super::status::{ApiError, Code};
use crate::metrics::Metrics;

/// What every body is held to.
#[derive(Debug, Clone)]
pub(super) struct Bodies {
    /// Most bytes of a body, or of a gRPC message, inflated.
    pub(super) limit: usize,
    /// Memory for all of them.
    pub(super) budget: BodyBudget,
    /// Where they are inflated and parsed.
    pub(super) threads: ParseThreads,
}

impl Bodies {
    /// Bodies of at most `limit` bytes, and `memory` bytes for all of them together, at least one of `limit`.
    pub(super) fn new(limit: usize, memory: usize, metrics: &Arc<Metrics>) -> Self {
        let budget = BodyBudget::new(memory.max(limit), metrics);
        Self { limit, budget, threads: ParseThreads::new() }
    }
}

/// What a request may hold at most, by the model that it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Images: the model's queue takes no more at once.
    pub images: usize,
    /// Numbers of one image's tensor.
    pub values: usize,
}

/// The refusal of what is above the limit.
pub(in crate::server) fn too_large() -> ApiError {
    ApiError::new(Code::BodyTooLarge, "the body is larger than this server takes (--body-limit)")
}
