//! The integration tests, one binary. Each module says what it checks.
#![allow(clippy::unwrap_used)]

/// Folded graphs compared with timm's logits.
mod golden;
mod gpu_check;

/// Damaged, hostile, half-precision and fresh checkpoints.
mod checkpoint;

/// Networks with other input channels than RGB.
mod channels;
/// Checkpoints in other forms than a folder from the hub: dialects, files, hostile ones.
mod sources;

/// Checkpoints by their names on the model hub.
#[cfg(feature = "hub")]
mod hub;

/// Imports only point down.
mod layers;

/// Our own kernels.
mod int8_kernels;
mod kernels;

/// The program's output, exit codes and traces.
mod cli;

/// Help, addresses, the start of a server, special files, misspelt variables.
mod command_line;

/// What the program says about itself: reference, completions, manual pages.
mod reference;

/// The same bits in any batch.
mod invariance;

/// Networks of integers.
mod int8;
/// Layers of theirs that stay in single precision.
mod int8_keep;

/// Graphs padded to the processor's block size.
mod channel_padding;

/// Accuracy on real photographs, compared with timm.
mod eval;

/// How logits become scores: functions, thresholds, temperature.
mod scores;

/// Features, maps and class activation maps.
mod features;

/// docs/outputs.md as a reader follows it.
mod audiences;

/// A network for sound: one channel, sigmoid scores, sizes that are no squares.
mod spectrograms;

/// Graphs kept for the next start.
mod graph_cache;

/// Controllable engines, for the tests below.
mod fakes;

/// Queue and workers, with faulty engines.
mod scheduler;

/// Places of the faults that `make mutation` and `make mutants` put into the code.
mod mutants;

/// Execution providers of the parts of a graph.
mod providers;

/// The scheduler under random arrivals.
mod arrivals;

/// Models loaded and unloaded while others serve.
mod registry;

/// The server over real sockets, with faulty engines.
mod serve;

/// Contracts of platforms, and what requests may name.
mod hosts;

/// Load beyond capacity, and memory for bodies.
mod overload;

/// The Open Inference Protocol over HTTP: framing, datatypes, errors, damage.
mod oip;

/// Any request, valid or damaged, gets a well-formed response.
mod any_request;

/// The Open Inference Protocol over gRPC, health and reflection.
mod grpc;

/// API keys, TLS, CORS, slow clients.
mod secure;

/// Unreadable heads, clients that don't read their responses, how connections end.
mod connections;

/// The program as operators see it: real model, real signals.
mod process;

/// Attacks on the real program: their cost, and how they end.
mod wall;

/// Decoding, resize, crops and normalisation against Pillow and timm; hostile images.
mod preprocess;

/// Spans of requests at a collector.
#[cfg(feature = "otel")]
mod traces;

/// Memory under mixed load.
mod soak;

/// Decompression bombs, in every image format.
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

/// The Dockerfile against rules.
mod dockerfile;

/// Signal propagation: the paper's statements at initialisation, timm's activations, faulty checkpoints.
mod spp;

/// Manifests, dashboards and rules against the program.
mod deploy;

/// Rolling restarts behind a proxy.
mod rehearsal;
