//! The engine room: encoded image → predictions. Knows no protocol (no axum, tonic, http) and no checkpoint.
//!
//! An image walks `image` (decode, limits first) → `resize` (crop, normalise) → a [`engine::Batch`] → `engine` (a
//! thread that owns its session) → `top_k`. `verify` compares two graphs on the same input.

pub mod engine;
pub mod image;
pub mod resize;
pub mod top_k;
pub mod verify;
