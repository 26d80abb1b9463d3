//! Scales and zero points, and what functions become in them: tables.

use super::function::Function;
use crate::kernels::int8::Table;

/// How a u8 map's numbers are meant: `x = (q - zero)·scale`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    /// Positive.
    pub scale: f32,
    /// Zero point.
    pub zero: u8,
}

impl Scale {
    /// That of numbers between these two, and 0.
    pub fn of_range(low: f32, high: f32) -> Self {
        let (low, high) = (f64::from(low.min(0.0)), f64::from(high.max(0.0)));
        let scale = ((high - low) / 255.0) as f32;
        // a map that is always 0, or as good as that
        if scale < f32::MIN_POSITIVE {
            return Self { scale: 1.0, zero: 0 };
        }
        Self { scale, zero: (-low / f64::from(scale)).round_ties_even().clamp(0.0, 255.0) as u8 }
    }

    /// Of a number in double precision.
    pub fn quantise(self, x: f64) -> u8 {
        ((x / self.step()).round_ties_even() + f64::from(self.zero)).clamp(0.0, 255.0) as u8
    }

    /// The number that a u8 means.
    pub fn value(self, q: u8) -> f64 {
        f64::from(i32::from(q) - i32::from(self.zero)) * self.step()
    }

    /// The scale in double precision.
    pub fn step(self) -> f64 {
        f64::from(self.scale)
    }
}

/// A function as a table.
pub fn table(function: Function, from: Scale, to: Scale) -> Table {
    std::array::from_fn(|q| to.quantise(function.apply(from.value(q as u8))))
}

/// What u8 numbers are as terms of a residual sum of this scale.
pub fn widening(from: Scale, sum: f32) -> [i16; 256] {
    let term = |q: usize| (from.value(q as u8) / f64::from(sum)).round_ties_even();
    std::array::from_fn(|q| term(q).clamp(i16::MIN.into(), i16::MAX.into()) as i16)
}
