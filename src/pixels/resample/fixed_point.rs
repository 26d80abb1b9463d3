//! Pillow's fixed-point arithmetic: exact products with 22-bit coefficients from 16-bit instructions, and rounding of
//! sums to samples. Knows no processor.

use super::{PRECISION_BITS, View};

/// Half a unit in the last place: sums start here, so that the shift rounds.
pub(super) const HALF: i32 = 1 << (PRECISION_BITS - 1);
/// Bits of a coefficient's lower part; both parts fit signed 16 bits.
pub(super) const SPLIT_BITS: u32 = 12;

/// Rounds and clips a fixed-point sum to a sample.
#[inline(always)]
pub(super) fn sample(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Coefficients of two adjacent positions, each split into two signed 16-bit parts: `coefficient = upper << SPLIT_BITS
/// + lower`. A 32-bit lane holds the same part of both, the first position in the low half.
#[derive(Clone, Copy)]
pub(super) struct Pair {
    pub(super) upper: i32,
    pub(super) lower: i32,
}

impl Pair {
    pub(super) fn new(first: i32, second: i32) -> Self {
        let join = |first: i32, second: i32| (first & 0xFFFF) | (second << 16);
        let lower = |weight: i32| weight & ((1 << SPLIT_BITS) - 1);
        Pair { upper: join(first >> SPLIT_BITS, second >> SPLIT_BITS), lower: join(lower(first), lower(second)) }
    }

    /// The rows of a vertical sum in pairs with their coefficients, starting at row `first`. An odd last row is paired
    /// with itself and a zero coefficient.
    pub(super) fn rows<'a>(
        view: View<'a>,
        first: usize,
        weights: &[i32],
    ) -> impl Iterator<Item = (Pair, [&'a [u8]; 2])> {
        let last = first + weights.len() - 1;
        weights.chunks(2).enumerate().map(move |(i, weights)| {
            let rows = [first + 2 * i, (first + 2 * i + 1).min(last)];
            (Pair::new(weights[0], weights.get(1).copied().unwrap_or(0)), rows.map(|y| view.row(y)))
        })
    }

    /// Whether both coefficients are zero.
    #[inline]
    pub(super) fn is_zero(self) -> bool {
        self.upper == 0 && self.lower == 0
    }
}

/// One sample of a vertical sum over the rows from `first` on, in scalar code for the columns after the last whole
/// block.
#[inline(always)]
pub(super) fn vertical_sample(view: View<'_>, first: usize, weights: &[i32], column: usize) -> u8 {
    let sum = weights
        .iter()
        .enumerate()
        .fold(HALF, |sum, (i, weight)| sum.wrapping_add(i32::from(view.row(first + i)[column]).wrapping_mul(*weight)));
    sample(sum)
}
