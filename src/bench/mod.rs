//! The benchmark: graphs in process, and load on a server. A client: knows the engine and the protocols, not the
//! server, nor how a graph was folded.
//!
//! `engine` times `contender`s against each other in interleaved rounds; `load` sends requests to a server;
//! `statistics` computes medians and confidence intervals; `machine` and `peak` describe the hardware; `accuracy` has
//! the published top-1 of the networks. `report` writes JSON and CSV, `page` an HTML page with charts.

pub mod accuracy;
pub mod contender;
pub mod engine;
pub mod load;
pub mod machine;
pub mod page;
pub mod peak;
pub mod report;
pub mod statistics;

use std::path::PathBuf;

use crate::engine::{BackendError, EngineError};

/// Why a measurement fails.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A graph can't be opened.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A graph fails to run.
    #[error("`{model}` with batch {batch}: {source}")]
    Run {
        /// Label of the contender.
        model: String,
        /// Images per run.
        batch: usize,
        /// Error of the engine.
        source: BackendError,
    },
    /// A graph returns NaN or infinity, which makes its timings meaningless.
    #[error("`{model}` answers numbers that are not finite; check the graph, or fold it with --precision fp32")]
    NotFinite {
        /// Label of the contender.
        model: String,
    },
    /// The reference is not among the contenders.
    #[error("reference `{name}` is not measured; measured are: {measured}")]
    NoReference {
        /// Name of the reference.
        name: String,
        /// Labels of all contenders, comma-separated.
        measured: String,
    },
    /// A report can't be written.
    #[error("can't write `{path}`: {source}; choose another --report")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
}
