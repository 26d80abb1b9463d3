//! The engine room: encoded image → predictions. Knows no protocol (no axum, tonic, http) and no checkpoint.

pub mod image;
pub mod resize;
