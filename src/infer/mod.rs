//! Serving: encoded image → predictions. Knows no protocol (no axum, tonic, http) and no checkpoint.
//!
//! The path of an image, a [`request`]: `scheduler` (a slot, or a refusal before any work) → `worker` (a compute
//! thread, where `pixels` turns untrusted bytes into a tensor) → a [`Batch`](crate::engine::Batch) → `lane` (the
//! thread's own `engine`, warm) → `top_k`. `shared` has the lock and the sleeping threads. Below it are pure decisions:
//! `queue` (what a thread does next), `line` (in which order images are dequeued), `admission` (whether one more may
//! wait), `estimate` (how long that takes), `pending` (an admitted image: slot and reply). The clock and all waiting
//! are in [`system`]. A [`live_model`] starts a scheduler with a [`job`]; [`registry`] holds all models, and `source`
//! is where they come from.

mod admission;
pub mod error;
mod estimate;
pub mod job;
mod lane;
mod line;
pub mod live_model;
mod pending;
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
