//! How a network of integers was made: what a manifest says of its calibration.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How a map's range is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RangeMethod {
    /// From the smallest to the largest value seen.
    MinMax,
    /// Without the outermost 0.01 % of values at each end.
    Percentile,
    /// The share of the whole range with the least mean squared error of rounding and clipping.
    Mse,
}

impl RangeMethod {
    /// All methods.
    pub const ALL: [Self; 3] = [Self::MinMax, Self::Percentile, Self::Mse];

    /// Its name in messages and manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::MinMax => "min_max",
            Self::Percentile => "percentile",
            Self::Mse => "mse",
        }
    }
}

/// How a network became one of integers, and how far it is from single precision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Quantisation {
    /// How ranges were chosen.
    pub method: RangeMethod,
    /// Whether images were noise (`--calibrate theory`): nothing was measured then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub theory: bool,
    /// Images that ranges are from.
    pub images: u32,
    /// Share of these images that keep the class of single precision, by method: what the method was chosen by. 0 to 1. Nothing
    /// of noise.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tried: BTreeMap<String, f64>,
    /// Images that were held out: the network was measured on them. 0 of noise.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub held_out: u32,
    /// Share of the held-out images that keep the class of single precision, 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f64>,
    /// Its 95 % confidence interval (Wilson).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreement_interval: Option<[f64; 2]>,
    /// Share of right answers on held-out images in single precision and in integers, where classes were known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top1: Option<[f64; 2]>,
    /// Layers that stay in single precision, in the network's order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keep: Vec<String>,
    /// Range, scale and zero point of every u8 map.
    pub maps: BTreeMap<String, MapRange>,
}

fn is_zero(count: &u32) -> bool {
    *count == 0
}

/// The numbers that a u8 map holds: `(q - zero)·scale`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MapRange {
    /// Smallest number.
    pub low: f64,
    /// Largest number.
    pub high: f64,
    /// Scale.
    pub scale: f32,
    /// Zero point.
    pub zero: u8,
}
