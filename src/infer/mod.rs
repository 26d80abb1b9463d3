//! Serving: encoded image → predictions. Knows no protocol (no axum, tonic, http) and no checkpoint.
//!
//! An image, a [`request`], walks `scheduler` (a slot in the `queue`, or refused before any work) → `worker` (a compute thread: `pixels`
//! makes a tensor of untrusted bytes) → a [`Batch`](crate::engine::Batch) → `engine` (a thread
//! that owns its session) → `top_k`. `registry` holds the live models and starts a scheduler with a [`job`] for each.

pub mod error;
pub mod job;
mod queue;
pub mod registry;
pub mod request;
pub mod scheduler;
pub mod top_k;
mod warm_up;
mod worker;
