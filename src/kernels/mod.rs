//! Operators for maps in blocks of channels: `[N, C/b, H, W, b]`.
//!
//! One file an operator, one a processor. What an operator does is written once, over the few vector functions that each
//! processor's file has; a portable version in plain Rust is what tests compare with.

#![allow(unsafe_code, reason = "loads and stores of vectors, and calls of what needs the processor's instructions")]

pub mod activation;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod grouped_conv;
pub mod int8;
pub mod operators;
mod pointwise;
pub mod pointwise_conv;
pub mod processor;
pub mod scratch;

/// The domain of [`operators`].
pub const DOMAIN: &str = "nfold";
/// A [convolution in groups](grouped_conv).
pub const GROUPED_CONV: &str = "GroupedConv";
/// A convolution of single pixels and, of what comes of it, one [in groups](grouped_conv).
pub const EXPAND_CONV: &str = "ExpandConv";
/// A [convolution of single pixels](pointwise_conv).
pub const POINTWISE_CONV: &str = "PointwiseConv";
/// A map times its gate, and an activation of that.
pub const GATED: &str = "Gated";
/// An activation.
pub const ACTIVATION: &str = "Activation";
