//! The engine room: encoded image → predictions. Knows no protocol (no axum, tonic, http) and no checkpoint.
//!
//! An image, a [`request`], walks `scheduler` (a slot in the `queue`, or refused before any work) → `worker` (a compute thread: `pixels`
//! makes a tensor of untrusted bytes) → a [`engine::Batch`] → `engine` (a thread
//! that owns its session) → `top_k`. `registry` holds the live models and
//! starts a scheduler with a [`job`] for each; `verify` compares two graphs on the same input;
//! `graph_cache` keeps what the runtime made of a graph.

pub mod engine;
pub mod error;
pub mod graph_cache;
pub mod job;
mod queue;
pub mod registry;
pub mod request;
pub mod scheduler;
pub mod top_k;
pub mod verify;
mod warm_up;
mod worker;
