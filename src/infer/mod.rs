//! Serving: encoded image → predictions. Knows no protocol (no axum, tonic, http) and no checkpoint.
//!
//! An image, a [`request`], walks `scheduler` (a slot in the `queue`, or refused before any work; `shared` has the lock and
//! who sleeps) → `worker` (a compute thread: `pixels` makes a tensor of untrusted bytes) → a [`Batch`](crate::engine::Batch)
//! → `lane` (the thread's own `engine`, warm) → `top_k`. The clock and all waiting are [`system`]'s. `registry` holds the
//! live models and starts a scheduler with a [`job`] for each.

pub mod error;
pub mod job;
mod lane;
mod queue;
pub mod registry;
pub mod request;
pub mod scheduler;
mod shared;
pub mod system;
pub mod top_k;
mod worker;
