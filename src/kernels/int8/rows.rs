//! Rows of a convolution's input as kernels read them, its padding around them.

use std::arch::x86_64::*;

use super::Conv;
use super::packed::{Packed, Plan};
use super::processor::Shape;

/// Where the units are that some rows of the output are made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    /// Bytes from one plane (of a group, or a block of channels) to the next.
    pub plane: usize,
    /// Bytes from one row to the next.
    pub pitch: usize,
    /// Bytes from one column to the next.
    pub pixel: usize,
    /// Rows from those of one output row to those of the next.
    pub step: usize,
    /// Rows of the kernel, as units count them.
    pub height: usize,
}

/// Bytes of a working set that is meant to stay in the second cache.
const BUDGET: usize = 192 << 10;

/// Most lanes of a vector.
const LANES: usize = 16;

/// What a convolution reads, and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    conv: &'a Conv,
    plan: Plan,
    shape: Shape,
}

impl<'a> Source<'a> {
    pub fn of(packed: &'a Packed, shape: Shape) -> Self {
        Self { conv: &packed.conv, plan: packed.plan, shape }
    }

    /// Whether a kernel can read the input where it is.
    pub fn is_there(self) -> bool {
        let conv = self.conv;
        let inside = |axis: usize| {
            (conv.shape.out_size[axis] - 1) * conv.shape.stride[axis] + conv.shape.kernel[axis] <= conv.shape.size[axis]
        };
        self.plan == Plan::Dense
            && self.shape.unit == 4
            && conv.shape.pads == [0, 0]
            && inside(0)
            && inside(1)
            && (conv.shape.groups == 1 || (conv.shape.kernel[1] == 1 && conv.shape.depth().is_multiple_of(4)))
    }

    /// Rows in the input itself.
    pub fn direct(self) -> Rows {
        let conv = self.conv;
        Rows {
            plane: conv.shape.depth(),
            pitch: conv.shape.size[1] * conv.shape.channels,
            pixel: conv.shape.channels,
            step: conv.shape.stride[0],
            height: conv.shape.kernel[0],
        }
    }

    /// Rows in memory of their own, for so many of the output.
    pub fn copied(self, rows: usize) -> Rows {
        let conv = self.conv;
        let columns = (conv.shape.out_size[1] - 1) * conv.shape.stride[1] + conv.shape.kernel[1];
        let number = self.number();
        let pixel = match self.plan {
            Plan::Depthwise => self.shape.lanes * 4,
            Plan::Merged(_) => self.shape.lanes * number,
            _ => conv.shape.depth() * number,
        };
        let pitch = columns * pixel;
        if self.plan == Plan::Depthwise {
            // each row of the output has rows of its own
            let height = conv.shape.kernel[0].div_ceil(self.shape.unit);
            return Rows { plane: rows * height * pitch, pitch, pixel, step: height, height };
        }
        let high = (rows - 1) * conv.shape.stride[0] + conv.shape.kernel[0];
        Rows { plane: high * pitch, pitch, pixel, step: conv.shape.stride[0], height: conv.shape.kernel[0] }
    }

    /// Bytes of a channel of a unit.
    fn number(self) -> usize {
        4 / self.shape.unit
    }

    /// Planes of the input.
    pub fn planes(self) -> usize {
        match self.plan {
            Plan::Merged(_) | Plan::Depthwise => self.conv.shape.channels.div_ceil(self.shape.lanes),
            _ => self.conv.shape.groups,
        }
    }

    /// Rows of the output that are worked on at a time.
    pub fn at_a_time(self) -> usize {
        let conv = self.conv;
        let row = if self.is_there() {
            conv.shape.out_size[1]
                * (conv.shape.stride[0] * conv.shape.stride[1] * conv.shape.channels + conv.shape.filters)
        } else {
            (self.copied(2).plane - self.copied(1).plane) * self.planes()
        };
        (BUDGET / row.max(1)).clamp(1, conv.shape.out_size[0].max(1))
    }

    /// Copies what so many rows of the output from `first` on are made of. Blocks of channels that aren't whole end in channels
    /// of the next pixel, which weights of zero ignore.
    #[inline(always)]
    pub fn copy(self, rows: Rows, first: usize, x: &[u8], to: &mut [u8]) {
        let (conv, lanes, unit) = (self.conv, self.shape.lanes, self.shape.unit);
        let top = first * conv.shape.stride[0];
        for (i, plane) in to.chunks_exact_mut(rows.plane).take(self.planes()).enumerate() {
            for (at, to) in plane.chunks_exact_mut(rows.pitch).enumerate() {
                match self.plan {
                    Plan::Depthwise => {
                        let (y, part) = (at / rows.step, at % rows.step);
                        let from = top + y * conv.shape.stride[0] + part * unit;
                        let high = unit.min(conv.shape.kernel[0] - part * unit);
                        self.interleaved(rows, from..from + high, &x[(i * lanes).min(x.len())..], to);
                    }
                    Plan::Merged(m) => self.row(rows, m, top + at, &x[(i * lanes).min(x.len())..], to),
                    _ => self.row(rows, 1, top + at, &x[(i * conv.shape.depth()).min(x.len())..], to),
                }
            }
        }
    }

    /// Where a row of the padded input begins, if it isn't padding.
    fn start(self, row: usize) -> Option<usize> {
        let row = row.checked_sub(self.conv.shape.pads[0]).filter(|&row| row < self.conv.shape.size[0])?;
        Some(row * self.conv.shape.size[1] * self.conv.shape.channels)
    }

    /// What is left and right of the input in a row, and what is of the input.
    fn parts(self, rows: Rows, to: &mut [u8]) -> [&mut [u8]; 3] {
        let (left, rest) = to.split_at_mut((self.conv.shape.pads[1] * rows.pixel).min(to.len()));
        let (middle, right) = rest.split_at_mut((self.conv.shape.size[1] * rows.pixel).min(rest.len()));
        [left, middle, right]
    }

    fn pad(self, to: &mut [u8]) {
        match self.number() {
            1 => to.fill(self.conv.zero),
            _ => to.as_chunks_mut().0.fill([self.conv.zero, 0]),
        }
    }

    /// Row `at` of the padded input: as many channels of `x` as there is room for in a pixel, in units of `m` groups.
    #[inline(always)]
    fn row(self, rows: Rows, m: usize, at: usize, x: &[u8], to: &mut [u8]) {
        let Some(start) = self.start(at) else { return self.pad(to) };
        let [left, middle, right] = self.parts(rows, to);
        self.pad(left);
        self.pad(right);
        let (x, channels) = (&x[start..], self.conv.shape.channels);
        match (self.number(), m, rows.pixel) {
            (1, 1, pixel) if pixel == channels => middle.copy_from_slice(&x[..middle.len()]),
            (1, 1, 16) => pixels::<16, 16, 1, 4, 1>(x, channels, middle),
            (1, 2, 16) => pixels::<16, 16, 2, 4, 1>(x, channels, middle),
            (1, 4, 16) => pixels::<16, 16, 4, 4, 1>(x, channels, middle),
            (1, 1, 8) => pixels::<8, 8, 1, 4, 1>(x, channels, middle),
            (1, 2, 8) => pixels::<8, 8, 2, 4, 1>(x, channels, middle),
            (2, 1, 16) => pixels::<8, 16, 1, 2, 2>(x, channels, middle),
            (2, 2, 16) => pixels::<8, 16, 2, 2, 2>(x, channels, middle),
            (2, 4, 16) => pixels::<8, 16, 4, 2, 2>(x, channels, middle),
            (1, ..) => {
                for (to, from) in middle.chunks_exact_mut(rows.pixel).zip(x.chunks(channels)) {
                    to.copy_from_slice(&from[..rows.pixel]);
                }
            }
            _ => {
                for (to, from) in middle.chunks_exact_mut(rows.pixel).zip(x.chunks(channels)) {
                    to.as_chunks_mut().0.iter_mut().zip(from).for_each(|(to, &x)| *to = [x, 0]);
                }
            }
        }
    }

    /// Some rows of the padded input, the numbers of a column and channel side by side.
    #[inline(always)]
    fn interleaved(self, rows: Rows, from: std::ops::Range<usize>, x: &[u8], to: &mut [u8]) {
        let (channels, unit) = (self.conv.shape.channels, self.shape.unit);
        let padding = [self.conv.zero; LANES];
        // rows that aren't there are the same pixel over and over
        let sources: [(&[u8], usize); 4] = std::array::from_fn(|i| {
            let start = from.clone().nth(i).and_then(|row| self.start(row));
            start.map_or((&padding[..], 0), |start| (&x[start..], channels))
        });
        let [left, middle, right] = self.parts(rows, to);
        for to in [left, right] {
            // SAFETY: all processors of this architecture have SSE2
            to.chunks_exact_mut(rows.pixel).for_each(|to| unsafe { beside(unit, [&padding; 4], to) });
        }
        for (column, to) in middle.chunks_exact_mut(rows.pixel).enumerate() {
            let pixel = sources.map(|(row, step)| row[column * step..].first_chunk().unwrap_or(&padding));
            // SAFETY: as above
            unsafe { beside(unit, pixel, to) };
        }
    }
}

/// Units of so many of these rows, one number of each, for as many channels as there is room for.
#[target_feature(enable = "sse2")]
#[inline]
fn beside(unit: usize, rows: [&[u8; LANES]; 4], to: &mut [u8]) {
    let zero = _mm_setzero_si128();
    // SAFETY: 16 bytes are there
    let [a, b, c, d] = rows.map(|row| unsafe { _mm_loadu_si128(row.as_ptr().cast()) });
    let (low, high) = match unit {
        4 => {
            let ([ab, more_ab], [cd, more_cd]) = (pairs(a, b), pairs(c, d));
            (wide_pairs(ab, cd), wide_pairs(more_ab, more_cd))
        }
        _ => (wide_pairs(_mm_unpacklo_epi8(a, zero), _mm_unpacklo_epi8(b, zero)), [zero; 2]),
    };
    for (to, v) in to.as_chunks_mut::<16>().0.iter_mut().zip(low.into_iter().chain(high)) {
        // SAFETY: 16 bytes are there
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), v) };
    }
}

/// Bytes of two in turn.
#[target_feature(enable = "sse2")]
#[inline]
fn pairs(a: __m128i, b: __m128i) -> [__m128i; 2] {
    [_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)]
}

/// Numbers of 16 bits of two in turn.
#[target_feature(enable = "sse2")]
#[inline]
fn wide_pairs(a: __m128i, b: __m128i) -> [__m128i; 2] {
    [_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b)]
}

/// A block of `FROM` channels of each pixel of `x` as `TO` bytes: the units of `M` groups take turns, numbers have `NUMBER` bytes.
#[inline(always)]
fn pixels<const FROM: usize, const TO: usize, const M: usize, const UNIT: usize, const NUMBER: usize>(
    x: &[u8],
    channels: usize,
    to: &mut [u8],
) {
    for (i, to) in to.as_chunks_mut::<TO>().0.iter_mut().enumerate() {
        let Some(from) = x[i * channels..].first_chunk::<FROM>() else { return };
        let units = FROM / UNIT;
        for i in 0..FROM {
            let (at, part) = (i / UNIT, i % UNIT);
            to[i * NUMBER] = from[(at % M * (units / M) + at / M) * UNIT + part];
            if NUMBER == 2 {
                to[i * NUMBER + 1] = 0;
            }
        }
    }
}
