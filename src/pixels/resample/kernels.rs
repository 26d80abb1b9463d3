//! The multiply-add loops of resampling, in vectors of the processor's width.
//!
//! Owns the arrangement of samples in lanes. Must not know where coefficients come from.

use fearless_simd::prelude::*;
use fearless_simd::{Level, dispatch, i16x16, i32x8, u8x16, u16x8, u32x8};

#[cfg(target_arch = "x86_64")]
use super::avx2;
use super::fixed_point::{HALF, Pair, SPLIT_BITS, vertical_sample};
use super::{PRECISION_BITS, RGB, Taps, View};

/// Columns that one interleaving step loads.
const STEP: usize = 4;
/// Bytes that one step loads, of which `RGB * STEP` are used.
const BYTES: usize = 16;
/// Rows that the horizontal kernel processes together.
pub(super) const ROWS: usize = 8;
/// Samples of a pair of columns in these rows, for one channel.
const LANES: usize = 2 * ROWS;
/// Samples of one row that the vertical kernel keeps in registers.
const BLOCK: usize = 32;

/// Sums of one vector of outputs. Products of 8-bit samples and 24-bit coefficients don't fit the instruction that
/// multiplies and adds 16-bit pairs, so coefficients are split in two parts.
#[derive(Clone, Copy)]
struct Sums<S: Simd> {
    upper: i32x8<S>,
    lower: i32x8<S>,
}

impl<S: Simd> Sums<S> {
    #[inline(always)]
    fn new(simd: S) -> Self {
        Sums { upper: i32x8::splat(simd, 0), lower: i32x8::splat(simd, HALF) }
    }

    /// Adds two adjacent samples to each output.
    #[inline(always)]
    fn add(&mut self, samples: i16x16<S>, upper: i16x16<S>, lower: i16x16<S>) {
        self.upper += samples.pairwise_dot_product(upper);
        self.lower += samples.pairwise_dot_product(lower);
    }

    /// The outputs, clipped to 0..=255.
    #[inline(always)]
    fn samples(self, simd: S) -> i32x8<S> {
        let sum = ((self.upper << SPLIT_BITS) + self.lower) >> PRECISION_BITS;
        sum.max(i32x8::splat(simd, 0)).min(i32x8::splat(simd, 255))
    }
}

/// The horizontal pass, prepared for any number of rows.
pub(super) struct Horizontal {
    /// First pair of columns of each output.
    starts: Vec<usize>,
    /// Coefficients, the same number for each output.
    pairs: Vec<Pair>,
    level: Level,
}

impl Horizontal {
    /// Prepares `taps` for rows whose first column has position `origin`.
    pub(super) fn new(taps: &Taps, origin: usize) -> Self {
        Self::on(Level::new(), taps, origin)
    }

    fn on(level: Level, taps: &Taps, origin: usize) -> Self {
        // runs start at even columns and have equal lengths: zero coefficients pad them at both ends
        let lead = |first: usize| (first - origin) % 2;
        let longest = taps.bounds.iter().map(|(first, count)| lead(*first) + count).max().unwrap_or(0);
        let run = longest.div_ceil(2).max(1);
        let mut starts = Vec::with_capacity(taps.len());
        let mut pairs = vec![Pair::new(0, 0); taps.len() * run];
        let mut padded = vec![0; 2 * run];
        let lines = taps.weights.chunks_exact(taps.stride).zip(pairs.chunks_exact_mut(run));
        for ((first, count), (weights, pairs)) in taps.bounds.iter().zip(lines) {
            starts.push((first - origin) / 2);
            padded.fill(0);
            padded[lead(*first)..][..*count].copy_from_slice(&weights[..*count]);
            for (pair, weights) in pairs.iter_mut().zip(padded.chunks_exact(2)) {
                *pair = Pair::new(weights[0], weights[1]);
            }
        }
        Horizontal { starts, pairs, level }
    }

    /// Pixels per output row.
    pub(super) fn outputs(&self) -> usize {
        self.starts.len()
    }

    /// Resamples every row of `view`.
    pub(super) fn run(&self, view: View<'_>) -> Vec<u8> {
        let Self { starts, pairs, level } = self;
        let mut out = vec![0; RGB * starts.len() * view.rows];
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = level.as_avx2() {
            avx2::horizontal(avx2, view, starts, pairs, &mut out);
            return out;
        }
        // whole steps of columns, and room for a run that starts at the last one
        let run = pairs.len() / starts.len();
        let mut columns = vec![0; ((view.len / RGB).next_multiple_of(STEP) / 2 + run) * RGB * LANES];
        dispatch!(*level, simd => simd.vectorize(
            #[inline(always)]
            || horizontal(simd, view, starts, pairs, &mut columns, &mut out),
        ));
        out
    }
}

/// The horizontal kernel: `starts` is the first pair of columns of each output, `pairs` has the same number of
/// coefficients for each.
///
/// Rows are interleaved in lanes, so that every output has its own coefficients and no lane is idle.
#[inline(always)]
fn horizontal<S: Simd>(simd: S, view: View<'_>, starts: &[usize], pairs: &[Pair], columns: &mut [i16], out: &mut [u8]) {
    let run = pairs.len() / starts.len();
    let line = RGB * starts.len();
    let width = (view.len / RGB).next_multiple_of(STEP) / 2 * RGB * LANES;
    for (block, out) in out.chunks_mut(ROWS * line).enumerate() {
        // below the last row, repeat it and don't store it
        let rows: [&[u8]; ROWS] = std::array::from_fn(|n| view.row((block * ROWS + n).min(view.rows - 1)));
        transpose(simd, rows, &mut columns[..width]);
        for (group, (starts, pairs)) in starts.chunks(STEP).zip(pairs.chunks(STEP * run)).enumerate() {
            let mut pixels = [i32x8::splat(simd, 0); STEP];
            for (pixels, (start, pairs)) in pixels.iter_mut().zip(starts.iter().zip(pairs.chunks_exact(run))) {
                let mut sums = [Sums::new(simd); RGB];
                let samples = &columns[start * RGB * LANES..][..run * RGB * LANES];
                for (pair, samples) in pairs.iter().zip(samples.chunks_exact(RGB * LANES)) {
                    let upper: i16x16<S> = i32x8::splat(simd, pair.upper).bitcast();
                    let lower: i16x16<S> = i32x8::splat(simd, pair.lower).bitcast();
                    for (sums, samples) in sums.iter_mut().zip(samples.chunks_exact(LANES)) {
                        sums.add(i16x16::from_slice(simd, samples), upper, lower);
                    }
                }
                let (red, green, blue) = (sums[0].samples(simd), sums[1].samples(simd), sums[2].samples(simd));
                *pixels = red | (green << 8) | (blue << 16);
            }
            let mut at = RGB * STEP * group;
            for row in transpose_pixels(simd, pixels) {
                let Some(out) = out.get_mut(at..at + RGB * starts.len()) else { break };
                match <&mut [u8; RGB * STEP]>::try_from(&mut *out) {
                    // a copy of constant length
                    Ok(out) => out.copy_from_slice(&row[..RGB * STEP]),
                    Err(_) => out.copy_from_slice(&row[..out.len()]),
                }
                at += line;
            }
        }
    }
}

/// Transposes columns of pixels, one pixel per 32-bit lane, to rows of RGB bytes with four unused bytes at the end.
#[inline(always)]
fn transpose_pixels<S: Simd>(simd: S, columns: [i32x8<S>; STEP]) -> [[u8; BYTES]; ROWS] {
    const PACKED: [u8; BYTES] = [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15];
    let order = u8x16::load_array(simd, PACKED);
    let [a, b, c, d] = columns;
    let ((a, e), (b, f), (c, g), (d, h)) = (a.split(), b.split(), c.split(), d.split());
    let mut rows = [[0; BYTES]; ROWS];
    for (rows, [a, b, c, d]) in rows.chunks_exact_mut(ROWS / 2).zip([[a, b, c, d], [e, f, g, h]]) {
        let (low, high) = ((a.zip_low(c), b.zip_low(d)), (a.zip_high(c), b.zip_high(d)));
        let lines = [low.0.zip_low(low.1), low.0.zip_high(low.1), high.0.zip_low(high.1), high.0.zip_high(high.1)];
        for (row, line) in rows.iter_mut().zip(lines) {
            *row = line.bitcast::<u8x16<S>>().swizzle_dyn_within_blocks(order).into();
        }
    }
    rows
}

/// Interleaves rows of RGB bytes: for each pair of columns and each channel, `LANES` values: both columns of the first
/// row, of the second row …
#[inline(always)]
fn transpose<S: Simd>(simd: S, rows: [&[u8]; ROWS], columns: &mut [i16]) {
    // four columns as pairs of bytes: RR GG BB and two unused, twice
    const PAIRS: [u8; BYTES] = [0, 3, 1, 4, 2, 5, 2, 5, 6, 9, 7, 10, 8, 11, 8, 11];
    let order = u8x16::load_array(simd, PAIRS);
    for (step, columns) in columns.chunks_exact_mut(STEP / 2 * RGB * LANES).enumerate() {
        let at = step * RGB * STEP;
        let mut lines = [u16x8::splat(simd, 0); ROWS];
        for (line, row) in lines.iter_mut().zip(rows) {
            let bytes = match row.get(at..at + BYTES) {
                Some(bytes) => u8x16::from_slice(simd, bytes),
                None => {
                    let mut last = [0; BYTES];
                    let row = &row[at.min(row.len())..];
                    last[..row.len()].copy_from_slice(row);
                    u8x16::load_array(simd, last)
                }
            };
            *line = bytes.swizzle_dyn_within_blocks(order).bitcast();
        }
        // three perfect shuffles transpose an 8x8 matrix
        for _ in 0..3 {
            let half = lines;
            for i in 0..ROWS / 2 {
                lines[2 * i] = half[i].zip_low(half[i + ROWS / 2]);
                lines[2 * i + 1] = half[i].zip_high(half[i + ROWS / 2]);
            }
        }
        for (pair, columns) in columns.chunks_exact_mut(RGB * LANES).enumerate() {
            for (channel, columns) in columns.chunks_exact_mut(LANES).enumerate() {
                let (low, high) = lines[pair * (RGB + 1) + channel].bitcast::<u8x16<S>>().widen();
                columns.copy_from_slice(low.combine(high).bitcast::<i16x16<S>>().as_slice());
            }
        }
    }
}

/// Resamples every column of `view`, whose first row has position `origin` in `taps`.
pub(super) fn run_vertical(view: View<'_>, taps: &Taps, origin: usize) -> Vec<u8> {
    vertical_on(Level::new(), view, taps, origin)
}

fn vertical_on(level: Level, view: View<'_>, taps: &Taps, origin: usize) -> Vec<u8> {
    let mut out = vec![0; view.len * taps.len()];
    #[cfg(target_arch = "x86_64")]
    if let Some(avx2) = level.as_avx2() {
        avx2::vertical(avx2, view, taps, origin, &mut out);
        return out;
    }
    dispatch!(level, simd => simd.vectorize(#[inline(always)] || vertical(simd, view, taps, origin, &mut out)));
    out
}

/// The vertical kernel, in blocks of columns, so that the sums stay in registers.
#[inline(always)]
fn vertical<S: Simd>(simd: S, view: View<'_>, taps: &Taps, origin: usize, out: &mut [u8]) {
    let mut pairs = Vec::with_capacity(taps.stride / 2 + 1);
    let lines = taps.bounds.iter().zip(taps.weights.chunks_exact(taps.stride));
    for (((first, count), weights), out) in lines.zip(out.chunks_exact_mut(view.len)) {
        let (first, weights) = (first - origin, &weights[..*count]);
        pairs.clear();
        pairs.extend(Pair::rows(view, first, weights));
        let mut blocks = out.chunks_exact_mut(BLOCK);
        let mut x = 0;
        for block in &mut blocks {
            let mut sums = [Sums::new(simd); BLOCK / 8];
            for (pair, [a, b]) in &pairs {
                let upper: i16x16<S> = i32x8::splat(simd, pair.upper).bitcast();
                let lower: i16x16<S> = i32x8::splat(simd, pair.lower).bitcast();
                let (a, b) = (&a[x..][..BLOCK], &b[x..][..BLOCK]);
                for (i, sums) in sums.chunks_exact_mut(2).enumerate() {
                    let (a, b) = (&a[16 * i..][..16], &b[16 * i..][..16]);
                    let (a, b) = (u8x16::from_slice(simd, a), u8x16::from_slice(simd, b));
                    let (low, high) = (a.zip_low(b).widen(), a.zip_high(b).widen());
                    sums[0].add(low.0.combine(low.1).bitcast(), upper, lower);
                    sums[1].add(high.0.combine(high.1).bitcast(), upper, lower);
                }
            }
            for (sums, out) in sums.chunks_exact(2).zip(block.chunks_exact_mut(16)) {
                let (low, high) = (sums[0].samples(simd), sums[1].samples(simd));
                let (low, high): (u32x8<S>, u32x8<S>) = (low.bitcast(), high.bitcast());
                let (a, b) = low.narrow(high).split();
                out.copy_from_slice(a.narrow(b).as_slice());
            }
            x += BLOCK;
        }
        for (j, out) in blocks.into_remainder().iter_mut().enumerate() {
            *out = vertical_sample(view, first, weights, x + j);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Interpolation;

    /// Machines with AVX2 would otherwise never run the other kernels.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn all_kernels_give_the_same_bits() {
        let Some(older) = Level::new().as_sse4_2() else { return };
        let older = Level::Sse4_2(older);
        let mut seed = 1_u32;
        let mut byte = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // extreme values overshoot, which has to be clipped
            [0, 255, (seed >> 24) as u8][(seed >> 20) as usize % 3]
        };
        for (from, to) in [(1, 1), (1, 9), (7, 3), (33, 64), (500, 131), (131, 500), (67, 66), (1000, 7)] {
            for filter in [Interpolation::Bilinear, Interpolation::Bicubic] {
                let taps = Taps::new(filter, from, to, 0..to);
                for others in [1, 3, 8, 21] {
                    let data: Vec<u8> = (0..RGB * from * others).map(|_| byte()).collect();
                    let view = View::packed(&data, RGB * from);
                    let here = Horizontal::new(&taps, 0).run(view);
                    assert_eq!(here, Horizontal::on(older, &taps, 0).run(view), "{from} to {to}, {others} rows");
                    let view = View::packed(&data, RGB * others);
                    let here = run_vertical(view, &taps, 0);
                    assert_eq!(here, vertical_on(older, view, &taps, 0), "{from} to {to}, {others} columns");
                }
            }
        }
    }
}
