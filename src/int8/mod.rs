//! Networks of 8-bit integers: from a folded graph and the ranges of its maps to standard ONNX with quantised operators, and
//! from that to a network that [`kernels`](crate::kernels::int8) run, the same bits everywhere. `docs/int8.md` says what is
//! computed.
//!
//! Knows neither images nor ONNX Runtime: who calibrates passes in the values of maps, and who serves runs a [`network`].

mod constants;
pub mod function;
pub mod lowering;
pub mod network;
pub mod operators;
pub mod quantise;
pub mod ranges;
pub mod scale;

/// The operator that a network of integers is, in a graph in memory.
pub const NETWORK: &str = "Int8Network";

/// Why a graph can't be one of integers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Int8Error {
    /// The bytes are no graph of ours.
    #[error("int8: the graph can't be read: {0}")]
    Unreadable(String),
    /// An operator that int8 doesn't cover.
    #[error("int8 has no operator for `{operator}` at `{name}`: {reason}; fold it anew, or with --precision fp32")]
    Uncovered {
        /// The operator, by its name in ONNX.
        operator: String,
        /// Where it is in the network.
        name: String,
        /// What of it is not covered.
        reason: &'static str,
    },
    /// Two operators, or an operator and a constant, make the same map.
    #[error("int8: `{map}` is made twice, by {makers}; fold it anew")]
    MadeTwice {
        /// The map's name.
        map: String,
        /// Who makes it, joined by `and by`: operators and where they are in the network, a constant or the input.
        makers: String,
    },
    /// A number is too large for integers.
    #[error("int8: {what} of `{name}` could leave its range; fold with --precision fp32")]
    Overflow {
        /// What number.
        what: &'static str,
        /// The layer.
        name: String,
    },
    /// A map without a range.
    #[error("int8: no range is known of `{0}`")]
    NoRange(String),
    /// A map whose values aren't finite.
    #[error("int8: `{0}` has values that aren't finite on the calibration images; nothing can be quantised")]
    NotFinite(String),
}

impl Int8Error {
    fn uncovered(operator: &str, name: &str, reason: &'static str) -> Self {
        Self::Uncovered { operator: operator.into(), name: name.into(), reason }
    }
}
