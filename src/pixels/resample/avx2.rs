//! The multiply-add loops of resampling for x86-64 with AVX2, where `kernels`' lanes can be arranged with fewer
//! instructions.
//!
//! Owns shuffles within 128-bit blocks, which portable vectors lack. Must not know where coefficients come from.

use std::arch::x86_64::*;

use fearless_simd::prelude::*;
use fearless_simd::{Avx2, kernel, u8x16, u8x32};

use super::fixed_point::{HALF, Pair, SPLIT_BITS, vertical_sample};
use super::{PRECISION_BITS, RGB, Taps, View};

/// Rows that the horizontal kernel processes together, one per 32-bit lane.
const ROWS: usize = 8;
/// Columns that one interleaving step loads, and outputs that are stored at once.
const STEP: usize = 4;
/// Bytes that one step loads or stores, of which `RGB * STEP` are used.
const BYTES: usize = 16;
/// Outputs per tile: the columns for them fit the L1 cache.
const TILE: usize = 64;
/// Samples of one row that the vertical kernel keeps in registers.
const BLOCK: usize = 32;
/// Shift of a finished sum.
const SHIFT: i32 = PRECISION_BITS as i32;
/// Shift of the sum of upper parts.
const SPLIT: i32 = SPLIT_BITS as i32;

/// A sum over coefficients that are split in two parts.
#[derive(Clone, Copy)]
struct Sum {
    upper: __m256i,
    lower: __m256i,
}

impl Sum {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new() -> Self {
        Sum { upper: _mm256_setzero_si256(), lower: _mm256_set1_epi32(HALF) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn add(&mut self, samples: __m256i, upper: __m256i, lower: __m256i) {
        self.upper = _mm256_add_epi32(self.upper, _mm256_madd_epi16(samples, upper));
        self.lower = _mm256_add_epi32(self.lower, _mm256_madd_epi16(samples, lower));
    }

    /// The shifted sum, not clipped.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn shifted(self) -> __m256i {
        _mm256_srai_epi32::<SHIFT>(_mm256_add_epi32(_mm256_slli_epi32::<SPLIT>(self.upper), self.lower))
    }
}

/// The same 16 bytes in both 128-bit blocks.
#[inline]
#[target_feature(enable = "avx2")]
fn both(avx2: Avx2, bytes: [u8; BYTES]) -> __m256i {
    _mm256_broadcastsi128_si256(u8x16::load_array(avx2, bytes).into())
}

/// 16 bytes of `row` from `at`, zero-padded beyond its end.
#[inline]
#[target_feature(enable = "avx2")]
fn load(avx2: Avx2, row: &[u8], at: usize) -> __m128i {
    match row.get(at..at + BYTES) {
        Some(bytes) => u8x16::from_slice(avx2, bytes).into(),
        None => {
            let mut last = [0; BYTES];
            let row = &row[at.min(row.len())..];
            last[..row.len()].copy_from_slice(row);
            u8x16::load_array(avx2, last).into()
        }
    }
}

/// Interleaves rows, starting at column `from`: for each pair of columns and each channel, both columns of the first
/// row, of the second row …, 16 bits each.
#[inline]
#[target_feature(enable = "avx2")]
fn lay(avx2: Avx2, rows: [&[u8]; ROWS], from: usize, columns: &mut [[[__m256i; RGB]; 2]]) {
    // by channel, with the four columns in an order that lets a mask select two and a shift the other two
    let order = both(avx2, [0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11, 15, 15, 15, 15]);
    let mask = _mm256_set1_epi16(0xFF);
    for (step, columns) in columns.iter_mut().enumerate() {
        let at = RGB * (from + STEP * step);
        let mut lines = [mask; ROWS / 2];
        for (i, line) in lines.iter_mut().enumerate() {
            let low = _mm256_castsi128_si256(load(avx2, rows[i], at));
            let pixels = _mm256_inserti128_si256::<1>(low, load(avx2, rows[i + ROWS / 2], at));
            *line = _mm256_shuffle_epi8(pixels, order);
        }
        let [a, b, c, d] = lines;
        let low = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
        let high = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
        let red = _mm256_unpacklo_epi64(low.0, low.1);
        let green = _mm256_unpackhi_epi64(low.0, low.1);
        let blue = _mm256_unpacklo_epi64(high.0, high.1);
        *columns = [
            [_mm256_and_si256(red, mask), _mm256_and_si256(green, mask), _mm256_and_si256(blue, mask)],
            [_mm256_srli_epi16::<8>(red), _mm256_srli_epi16::<8>(green), _mm256_srli_epi16::<8>(blue)],
        ];
    }
}

/// One output pixel of all rows: red, green and blue in the bytes of each row's lane.
#[inline]
#[target_feature(enable = "avx2")]
fn pixel(columns: &[[__m256i; RGB]], pairs: &[Pair], order: __m256i) -> __m256i {
    let mut sums = [Sum::new(); RGB];
    for (pair, columns) in pairs.iter().zip(columns) {
        let (upper, lower) = (_mm256_set1_epi32(pair.upper), _mm256_set1_epi32(pair.lower));
        sums[0].add(columns[0], upper, lower);
        sums[1].add(columns[1], upper, lower);
        sums[2].add(columns[2], upper, lower);
    }
    let (red, green, blue) = (sums[0].shifted(), sums[1].shifted(), sums[2].shifted());
    let words = (_mm256_packs_epi32(red, green), _mm256_packs_epi32(blue, blue));
    _mm256_shuffle_epi8(_mm256_packus_epi16(words.0, words.1), order)
}

kernel!(
    /// The horizontal kernel: `starts` is the first pair of columns of each output, `pairs` has the same number of
    /// coefficients for each.
    pub(super) fn horizontal(avx2: Avx2, view: View<'_>, starts: &[usize], pairs: &[Pair], out: &mut [u8]) {
        let run = pairs.len() / starts.len();
        let line = RGB * starts.len();
        let zero = _mm256_setzero_si256();
        // from planes of four rows to four-byte pixels, and from these to packed RGB
        let plane = both(avx2, [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]);
        let packed = both(avx2, [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15]);
        let widest = starts.chunks(TILE).map(|starts| starts[starts.len() - 1] - starts[0]).max().unwrap_or(0);
        let mut columns = vec![[[zero; RGB]; 2]; (widest + 1 + run).div_ceil(2)];
        for (block, out) in out.chunks_mut(ROWS * line).enumerate() {
            // below the last row, repeat it and don't store it
            let mut rows = [view.row(0); ROWS];
            for (n, row) in rows.iter_mut().enumerate() {
                *row = view.row((block * ROWS + n).min(view.rows - 1));
            }
            let mut at = 0;
            for (starts, pairs) in starts.chunks(TILE).zip(pairs.chunks(TILE * run)) {
                let first = starts[0] / 2 * 2;
                let steps = (starts[starts.len() - 1] - first + run).div_ceil(2);
                lay(avx2, rows, 2 * first, &mut columns[..steps]);
                let columns = columns.as_flattened();
                for (starts, pairs) in starts.chunks(STEP).zip(pairs.chunks(STEP * run)) {
                    let mut pixels = [zero; STEP];
                    for (pixels, (start, pairs)) in pixels.iter_mut().zip(starts.iter().zip(pairs.chunks_exact(run))) {
                        // most outputs need one pair less than the longest
                        let used = if pairs[run - 1].is_zero() { run - 1 } else { run };
                        *pixels = pixel(&columns[start - first..][..used], &pairs[..used], plane);
                    }
                    let [a, b, c, d] = pixels;
                    let low = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
                    let high = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
                    let lines = [
                        _mm256_unpacklo_epi64(low.0, low.1),
                        _mm256_unpackhi_epi64(low.0, low.1),
                        _mm256_unpacklo_epi64(high.0, high.1),
                        _mm256_unpackhi_epi64(high.0, high.1),
                    ];
                    let mut halves = [_mm256_castsi256_si128(zero); ROWS];
                    for (i, pixels) in lines.iter().enumerate() {
                        let pixels = _mm256_shuffle_epi8(*pixels, packed);
                        halves[i] = _mm256_castsi256_si128(pixels);
                        halves[i + ROWS / 2] = _mm256_extracti128_si256::<1>(pixels);
                    }
                    for (out, pixels) in out.chunks_exact_mut(line).zip(halves) {
                        let pixels: u8x16<Avx2> = pixels.simd_into(avx2);
                        match out.get_mut(at..at + BYTES) {
                            // the unused bytes are overwritten by the next step
                            Some(out) => pixels.store_slice(out),
                            None => {
                                let out = &mut out[at..at + RGB * starts.len()];
                                let pixels = <[u8; BYTES]>::from(pixels);
                                out.copy_from_slice(&pixels[..out.len()]);
                            }
                        }
                    }
                    at += RGB * STEP;
                }
            }
        }
    }
);

kernel!(
    /// The vertical kernel, in blocks of columns, so that the sums stay in registers.
    pub(super) fn vertical(avx2: Avx2, view: View<'_>, taps: &Taps, origin: usize, out: &mut [u8]) {
        let zero = _mm256_setzero_si256();
        let mut pairs = Vec::with_capacity(taps.stride / 2 + 1);
        let lines = taps.bounds.iter().zip(taps.weights.chunks_exact(taps.stride));
        for (((first, count), weights), out) in lines.zip(out.chunks_exact_mut(view.len)) {
            let (first, weights) = (first - origin, &weights[..*count]);
            pairs.clear();
            pairs.extend(Pair::rows(view, first, weights));
            let mut blocks = out.chunks_exact_mut(BLOCK);
            let mut x = 0;
            for block in &mut blocks {
                let mut sums = [Sum::new(); BLOCK / 8];
                for (pair, [a, b]) in &pairs {
                    let (upper, lower) = (_mm256_set1_epi32(pair.upper), _mm256_set1_epi32(pair.lower));
                    let a: __m256i = u8x32::from_slice(avx2, &a[x..x + BLOCK]).into();
                    let b: __m256i = u8x32::from_slice(avx2, &b[x..x + BLOCK]).into();
                    let (low, high) = (_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b));
                    sums[0].add(_mm256_unpacklo_epi8(low, zero), upper, lower);
                    sums[1].add(_mm256_unpackhi_epi8(low, zero), upper, lower);
                    sums[2].add(_mm256_unpacklo_epi8(high, zero), upper, lower);
                    sums[3].add(_mm256_unpackhi_epi8(high, zero), upper, lower);
                }
                // packing restores the order that unpacking changed
                let low = _mm256_packs_epi32(sums[0].shifted(), sums[1].shifted());
                let high = _mm256_packs_epi32(sums[2].shifted(), sums[3].shifted());
                let samples: u8x32<Avx2> = _mm256_packus_epi16(low, high).simd_into(avx2);
                samples.store_slice(block);
                x += BLOCK;
            }
            for (j, out) in blocks.into_remainder().iter_mut().enumerate() {
                *out = vertical_sample(view, first, weights, x + j);
            }
        }
    }
);
