//! The one integration binary. Each module says what it holds the program to.
#![allow(clippy::unwrap_used)]

/// Folded graphs against timm's own answers.
mod golden;
mod gpu_check;

/// Damaged, hostile, half-precision and fresh checkpoints.
mod checkpoint;

/// Networks of other channels than RGB's.
mod channels;
/// What people have instead of a folder from the hub: dialects, files, hostile ones.
mod sources;

/// Checkpoints by their names on the model hub.
#[cfg(feature = "hub")]
mod hub;

/// Imports only point down.
mod layers;

/// The program's output, exit codes and traces.
mod cli;

/// Help, addresses, the start of a server, odd files, misspelt variables.
mod command_line;

/// What the program says about itself: reference, completions, manuals.
mod reference;

/// The same bits in any batch.
mod invariance;

/// Graphs padded to the processor's blocks.
mod channel_padding;

/// Accuracy on real photographs, beside timm's own answers.
mod eval;

/// Graphs kept for the next start.
mod graph_cache;

/// Engines that misbehave, for the tests below.
mod fakes;

/// Queue and workers, with engines that misbehave.
mod scheduler;

/// Where the parts of a graph run.
mod providers;

/// The scheduler under random arrivals.
mod arrivals;

/// Models that come and go while others serve.
mod registry;

/// The server over real sockets, with engines that misbehave.
mod serve;

/// Load beyond capacity, and memory for bodies.
mod overload;

/// The Open Inference Protocol over HTTP: framing, datatypes, errors, damage.
mod oip;

/// Any request, valid or damaged, gets a well-formed answer.
mod any_request;

/// The Open Inference Protocol over gRPC, health and reflection.
mod grpc;

/// API keys, TLS, CORS, slow clients.
mod secure;

/// Unreadable heads, clients that don't read their answers, how connections end.
mod connections;

/// The program as operators meet it: real model, real signals.
mod process;

/// The outer wall: attacks, what they cost, how they end.
mod wall;

/// Decoding, resize, crops and normalisation against Pillow and timm; hostile images.
mod preprocess;

/// Spans of requests at a collector.
#[cfg(feature = "otel")]
mod traces;

/// Memory under mixed load.
mod soak;

/// Small files of many pixels, in every format.
mod bombs;

/// JPEG against Pillow; hostile JPEG.
mod jpeg;

/// The web page in a real browser.
mod page;

/// The benchmark: timing in process, load over the network.
mod bench;
mod blocked_layout;

/// Charts in the documents.
mod figures;

/// The Dockerfile by rules.
mod dockerfile;

/// Signal propagation: the paper's facts at initialisation, timm's activations, sick checkpoints.
mod spp;

/// Manifests, dashboards and rules against the program.
mod deploy;

/// Rolling restarts behind a proxy.
mod rehearsal;
