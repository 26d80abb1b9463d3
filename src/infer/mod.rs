//! Serving: encoded image → predictions. Knows no protocol (no axum, tonic, http) and no checkpoint.
//!
//! An image, a [`request`], walks `scheduler` (a slot in the `queue`, or refused before any work; `shared` has the lock and
//! who sleeps) → `worker` (a compute thread: `pixels` makes a tensor of untrusted bytes) → a [`Batch`](crate::engine::Batch)
//! → `lane` (the thread's own `engine`, warm) → `top_k`. The clock and all waiting are [`system`]'s. A [`live_model`] starts
//! a scheduler with a [`job`]; [`registry`] holds all of them, and `source` is where they come from.

mod admission;
pub mod error;
pub mod job;
mod lane;
pub mod live_model;
mod queue;
pub mod registry;
pub mod request;
pub mod scheduler;
mod shared;
#[cfg(test)]
#[path = "../../tests/simulation/mod.rs"]
mod simulation;
mod source;
pub mod system;
pub mod top_k;
mod worker;
