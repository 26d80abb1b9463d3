//! The benchmark: graphs in process, and load on a server. A client: knows the engine and the protocols, not the
//! server, nor how a graph was folded.
//!
//! `engine` times `contender`s against each other in interleaved rounds; `load` asks a server; `statistics` says how sure the figures are;
//! `machine` and `peak` describe what they were measured on; `accuracy` has the published top-1 of the networks. `report`
//! writes JSON and CSV, `page` an HTML page with charts.

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

/// What can go wrong while measuring.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A graph can't be opened.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A graph fails while it runs.
    #[error("`{model}` with batch {batch}: {source}")]
    Run {
        /// Which contender.
        model: String,
        /// Images in a run.
        batch: usize,
        /// What the engine said.
        source: BackendError,
    },
    /// A graph answers NaN or infinity: its timings would mean nothing.
    #[error("`{model}` answers numbers that are not finite; check the graph, or fold it with --precision fp32")]
    NotFinite {
        /// Which contender.
        model: String,
    },
    /// The reference is not among the contenders.
    #[error("reference `{name}` is not measured; measured are: {measured}")]
    NoReference {
        /// The name asked for.
        name: String,
        /// Every contender, comma-separated.
        measured: String,
    },
    /// A report can't be written.
    #[error("can't write `{path}`: {source}; choose another --report")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}
