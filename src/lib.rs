//! nfold puts Normalizer-Free image classifiers into production: it folds timm checkpoints into plain
//! convolution graphs (offline) and serves these with ONNX Runtime (online).
//!
//! # Layout, in reading order
//! * [`model`]: what both halves agree on: the model repository, the manifest, preprocessing, labels.
//! * [`files`]: whole-or-nothing writing, for every file that the program writes.
//! * [`nets`]: what a network is: configurations, block plans, activations and their γ. Pure data and maths.
//! * [`checkpoint`]: reads untrusted checkpoints (configurations, safetensors, torch files) into validated tensors, and writes fresh ones.
//! * [`hub`]: checkpoints by their names on the model hub, fetched into its own cache.
//! * [`graph`]: writes convolution graphs as ONNX.
//! * [`fold`]: checkpoint → plain convolutions → ONNX bytes. Synchronous; knows neither tokio nor ONNX Runtime.
//! * [`pixels`]: untrusted bytes → tensor: limits, formats, resize, crop, normalise.
//! * [`kernels`]: operators of nfold's own for those graphs: convolutions in groups, gates, activations.
//! * [`int8`]: networks of integers: calibrated ranges → standard ONNX with quantised operators → what [`kernels`] run.
//! * [`relayout`]: an ONNX graph rewritten for this processor, in memory only.
//! * [`engine`]: runs graphs with ONNX Runtime: library, sessions, placement, kept graphs, comparison of two graphs.
//! * [`infer`]: encoded image → predictions: queue, batch, top-k. Knows no protocol.
//! * [`mod@bench`]: graphs timed in process, load on a server, and the report.
//! * [`eval`]: accuracy of a classifier on images whose classes are known.
//! * [`spp`]: signal propagation plots: statistics of hidden activations, block by block.
//! * [`sources`]: from what a user names (folder, file, hub) to a folded, verified model; the cache behind `serve SOURCE`.
//! * [`server`]: the edge: HTTP, health, metrics.
//! * [`metrics`]: every metric, declared once. [`chart`]: lines and points as SVG. [`pb`]: generated protobuf modules. [`logging`]: tracing set-up. [`mod@printable`]: text without control characters. [`panics`]: what a panic says.
//! * [`cli`]: the command line: arguments → typed options → one call into the rooms above.
//!
//! Imports only point down (`cli` → `sources`, `bench` | `spp` | `server` → `infer`, `fold` → `engine`, `pixels` → `relayout` →
//! `hub` → `checkpoint`, `graph` → `nets`, `model`, `metrics`, `pb`, `files`);
//! `tests/layers.rs` tests that.
// `unsafe` only in `kernels`, see there
#![deny(unsafe_code)]

pub mod files;
pub mod model;
pub mod nets;

pub mod checkpoint;
pub mod fold;
pub mod graph;
pub mod hub;

pub mod engine;
pub mod int8;
pub mod kernels;
pub mod pixels;
pub mod relayout;

pub mod bench;
pub mod eval;
pub mod infer;
pub mod server;
pub mod sources;
pub mod spp;

pub mod chart;
pub mod logging;
pub mod metrics;
pub mod panics;
pub mod pb;
pub mod printable;

pub mod cli;

#[cfg(test)]
#[path = "../tests/fuzz/mod.rs"]
mod fuzz;
#[cfg(test)]
#[path = "../tests/random.rs"]
mod random;
