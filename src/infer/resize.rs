//! From decoded pixels to the network's input tensor: timm's resize, crop, padding and normalisation, to the bit.
//!
//! Owns the geometry (torchvision's and timm's rounding), the resampling (Pillow's fixed-point arithmetic, both of its
//! pass orders, only the rows and columns that the crop keeps) and the normalisation tables. Must not know how an
//! image was encoded, nor what a network, a request or a batch is.

use std::ops::Range;

use fearless_simd::prelude::*;
use fearless_simd::{Level, dispatch, i16x16, i32x8, u8x16, u16x8, u32x8};

use super::image::RgbImage;
use crate::model::{CropMode, Interpolation, Preprocessing};

/// Fixed-point precision of Pillow's coefficients: 32 bits less 8 for the sample and 2 for overshoot.
const PRECISION_BITS: u32 = 32 - 8 - 2;
/// Half a unit in the last place: the sums start here, so that the shift rounds.
const HALF: i32 = 1 << (PRECISION_BITS - 1);
/// Bytes of one RGB pixel.
const RGB: usize = 3;
/// Columns that one step of laying rows side by side takes.
const STEP: usize = 4;
/// Bytes that such a step loads, of which it uses `RGB * STEP`.
const BYTES: usize = 16;
/// Where a coefficient is split in two, so that either part fits 16 bits with its sign.
const SPLIT_BITS: u32 = 12;
/// Rows that the horizontal kernel takes side by side.
const ROWS: usize = 8;
/// Samples of one pair of columns in these rows, of one channel.
const LANES: usize = 2 * ROWS;
/// Samples of one row that the vertical kernel keeps in registers.
const BLOCK: usize = 32;

/// Turns decoded images into input tensors as one [`Preprocessing`] says; built once, shared by threads.
#[derive(Debug, Clone)]
pub struct Preprocessor {
    height: usize,
    width: usize,
    /// `floor(size / crop_pct)` of height and width.
    scale: [u64; 2],
    crop_mode: CropMode,
    filter: Interpolation,
    /// Sample → normalised value, for each channel.
    tables: [[f32; 256]; RGB],
    /// Colour of padding where the resized image is smaller than the crop.
    fill: [u8; RGB],
}

/// Where the crop lies in the resized image, which never exists as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Placement {
    /// Width and height of the resized image.
    target: [usize; 2],
    /// Left and top of the crop in it; negative where padding comes first.
    offset: [i64; 2],
}

impl Preprocessor {
    /// Tables and sizes for `p`; as timm's `create_transform(is_training=False)` derives them.
    pub fn new(p: &Preprocessing) -> Self {
        let scale = [p.height, p.width].map(|side| ((f64::from(side) / p.crop_pct).floor() as u64).max(1));
        let table = |channel: usize| {
            let (mean, std) = (p.mean[channel] as f32, p.std[channel] as f32);
            std::array::from_fn(|sample| (sample as f32 / 255.0 - mean) / std)
        };
        let fill = match p.crop_mode {
            CropMode::Border => p.mean.map(|mean| (255.0 * mean).round_ties_even() as u8),
            CropMode::Center | CropMode::Squash => [0; RGB],
        };
        Self {
            height: p.height as usize,
            width: p.width as usize,
            scale,
            crop_mode: p.crop_mode,
            filter: p.interpolation,
            tables: [table(0), table(1), table(2)],
            fill,
        }
    }

    /// Height of the tensor, in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Width of the tensor, in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of values of one image's tensor: 3 · height · width.
    pub fn tensor_len(&self) -> usize {
        RGB * self.height * self.width
    }

    /// Resizes, crops, pads and normalises `image` into `out`, one image's part of a batch: channels first (R, G, B),
    /// row-major, each value `(sample / 255 − mean) / std` in single precision.
    ///
    /// # Panics
    /// When `out` is not [`tensor_len`](Self::tensor_len) long: the caller's mistake, never the image's.
    pub fn apply(&self, image: &RgbImage, out: &mut [f32]) {
        assert_eq!(out.len(), self.tensor_len(), "the output must hold one image's tensor");
        let place = self.placement(image.width, image.height);
        let columns = overlap(place.offset[0], self.width, place.target[0]);
        let rows = overlap(place.offset[1], self.height, place.target[1]);
        let pixels = resample(image, place.target, [columns.clone(), rows.clone()], self.filter);
        // where the crop of the resized image lies in the output
        let left = (columns.start as i64 - place.offset[0]) as usize;
        let top = (rows.start as i64 - place.offset[1]) as usize;
        if columns.len() < self.width || rows.len() < self.height {
            for (channel, plane) in out.chunks_exact_mut(self.height * self.width).enumerate() {
                plane.fill(self.tables[channel][usize::from(self.fill[channel])]);
            }
        }
        let (red, rest) = out.split_at_mut(self.height * self.width);
        let (green, blue) = rest.split_at_mut(self.height * self.width);
        for (y, line) in pixels.chunks_exact(RGB * columns.len().max(1)).enumerate() {
            let at = (top + y) * self.width + left..(top + y) * self.width + left + columns.len();
            let (red, green, blue) = (&mut red[at.clone()], &mut green[at.clone()], &mut blue[at]);
            for (((pixel, red), green), blue) in line.chunks_exact(RGB).zip(red).zip(green).zip(blue) {
                *red = self.tables[0][usize::from(pixel[0])];
                *green = self.tables[1][usize::from(pixel[1])];
                *blue = self.tables[2][usize::from(pixel[2])];
            }
        }
    }

    /// Normalises an image that has the tensor's size already, `[height, width, 3]`: no resize, no crop. The same values
    /// that [`apply`](Self::apply) gives those pixels.
    pub fn normalise(&self, pixels: &[u8]) -> Vec<f32> {
        let mut out = Vec::with_capacity(pixels.len());
        for (channel, table) in self.tables.iter().enumerate() {
            out.extend(pixels.iter().skip(channel).step_by(RGB).map(|&sample| table[usize::from(sample)]));
        }
        out
    }

    /// timm's geometry for a `width` × `height` image: to which size it is resized and where the crop starts.
    fn placement(&self, width: u32, height: u32) -> Placement {
        let [scale_h, scale_w] = self.scale;
        let (w, h) = (f64::from(width), f64::from(height));
        let target = match self.crop_mode {
            CropMode::Squash => [scale_w, scale_h],
            // torchvision's Resize with one number: the long side is truncated
            CropMode::Center if scale_h == scale_w => {
                let long = |long: f64, short: f64| (scale_h as f64 * long / short) as u64;
                if width <= height { [scale_h, long(h, w)] } else { [long(w, h), scale_h] }
            }
            // timm's ResizeKeepRatio: both sides are rounded half to even
            CropMode::Center | CropMode::Border => {
                let (ratio_h, ratio_w) = (h / scale_h as f64, w / scale_w as f64);
                let border = self.crop_mode == CropMode::Border;
                let ratio = if border { ratio_h.max(ratio_w) } else { ratio_h.min(ratio_w) };
                [w, h].map(|side| (side / ratio).round_ties_even() as u64)
            }
        };
        // Pillow refuses to resize a side to nothing (a 1000:1 image under `border`); a service answers it
        let target = target.map(|side| side.max(1) as usize);
        Placement { target, offset: [crop_offset(target[0], self.width), crop_offset(target[1], self.height)] }
    }
}

/// Start of a centred crop of `crop` in `size` pixels: half to even as Python's `round`; negative when it must be
/// padded, with the smaller half first, as torchvision does.
fn crop_offset(size: usize, crop: usize) -> i64 {
    let spare = size as i64 - crop as i64;
    if spare < 0 { -(-spare / 2) } else { (spare as f64 / 2.0).round_ties_even() as i64 }
}

/// The part of `0..size` that a crop of `len` from `offset` covers.
fn overlap(offset: i64, len: usize, size: usize) -> Range<usize> {
    let start = offset.max(0) as usize;
    let end = (offset + len as i64).clamp(0, size as i64) as usize;
    start.min(end)..end
}

/// `image` resized to `width` × `height`: equal to Pillow 13's `Image.resize` on the same RGB pixels.
pub fn resize(image: &RgbImage, width: u32, height: u32, filter: Interpolation) -> RgbImage {
    let (w, h) = (width as usize, height as usize);
    RgbImage { width, height, data: resample(image, [w, h], [0..w, 0..h], filter) }
}

/// The window (columns, rows) of `image` resized to `target` (width, height), as packed RGB rows.
fn resample(image: &RgbImage, target: [usize; 2], window: [Range<usize>; 2], filter: Interpolation) -> Vec<u8> {
    let size = [image.width as usize, image.height as usize];
    let [columns, rows] = window;
    if columns.is_empty() || rows.is_empty() || size.contains(&0) {
        return vec![0; RGB * columns.len() * rows.len()];
    }
    let source = View { data: &image.data, stride: RGB * size[0], left: 0, len: RGB * size[0], top: 0, rows: size[1] };
    if filter == Interpolation::Nearest {
        return nearest(source, size, target, columns, rows);
    }
    let horizontal = (size[0] != target[0]).then(|| Taps::new(filter, size[0], target[0], columns.clone()));
    let vertical = (size[1] != target[1]).then(|| Taps::new(filter, size[1], target[1], rows.clone()));
    // what each pass needs of its input; a pass that is not needed copies
    let needed_columns = horizontal.as_ref().map_or(columns, Taps::span);
    let needed_rows = vertical.as_ref().map_or(rows, Taps::span);
    let source = source.cut(needed_columns.clone(), needed_rows.clone());
    // Pillow since 13: the vertical pass goes first where it shrinks the image by more than twice what the other does
    let shrink = [0, 1].map(|axis| size[axis] as i64 - target[axis] as i64);
    let vertical_first = shrink[1] > 0 && shrink[1] > 2 * shrink[0];
    let horizontally = |view: View<'_>, taps: &Taps| run_horizontal(view, taps, needed_columns.start);
    let vertically = |view: View<'_>, taps: &Taps| run_vertical(view, taps, needed_rows.start);
    match (&horizontal, &vertical) {
        (None, None) => source.to_vec(),
        (Some(h), None) => horizontally(source, h),
        (None, Some(v)) => vertically(source, v),
        (Some(h), Some(v)) if vertical_first => horizontally(View::packed(&vertically(source, v), source.len), h),
        (Some(h), Some(v)) => vertically(View::packed(&horizontally(source, h), RGB * h.len()), v),
    }
}

/// A rectangle of packed RGB rows in a larger image. All in bytes but `top` and `rows`.
#[derive(Clone, Copy)]
struct View<'a> {
    data: &'a [u8],
    stride: usize,
    left: usize,
    len: usize,
    top: usize,
    rows: usize,
}

impl<'a> View<'a> {
    fn packed(data: &'a [u8], len: usize) -> Self {
        View { data, stride: len, left: 0, len, top: 0, rows: data.len() / len }
    }

    fn cut(self, columns: Range<usize>, rows: Range<usize>) -> Self {
        View { left: RGB * columns.start, len: RGB * columns.len(), top: rows.start, rows: rows.len(), ..self }
    }

    #[inline(always)]
    fn row(self, y: usize) -> &'a [u8] {
        &self.data[(self.top + y) * self.stride + self.left..][..self.len]
    }

    fn to_vec(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.len * self.rows);
        (0..self.rows).for_each(|y| out.extend_from_slice(self.row(y)));
        out
    }
}

/// Pillow's nearest neighbour: positions by repeated addition, as its affine transform walks.
fn nearest(
    source: View<'_>,
    size: [usize; 2],
    target: [usize; 2],
    columns: Range<usize>,
    rows: Range<usize>,
) -> Vec<u8> {
    let positions = |axis: usize, range: Range<usize>| -> Vec<Option<usize>> {
        let step = size[axis] as f64 / target[axis] as f64;
        let mut at = step * 0.5;
        let mut found = Vec::with_capacity(range.len());
        for i in 0..range.end {
            if i >= range.start {
                found.push(Some(at as usize).filter(|&at| at < size[axis]));
            }
            at += step;
        }
        found
    };
    if size == target {
        return source.cut(columns, rows).to_vec();
    }
    let columns = positions(0, columns);
    let mut out = Vec::with_capacity(RGB * columns.len() * rows.len());
    for y in positions(1, rows) {
        for x in &columns {
            // an accumulated rounding error may step past the border: Pillow leaves black there
            match (x, y) {
                (Some(x), Some(y)) => out.extend_from_slice(&source.row(y)[RGB * x..][..RGB]),
                _ => out.extend_from_slice(&[0; RGB]),
            }
        }
    }
    out
}

/// The coefficients of one axis for a range of output positions.
struct Taps {
    /// First input position and number of coefficients, for each output position.
    bounds: Vec<(usize, usize)>,
    /// Fixed-point coefficients, `stride` for each output position, zero beyond its count.
    weights: Vec<i32>,
    stride: usize,
}

impl Taps {
    /// Pillow's coefficients to resize `from` positions to `to`, for the output positions in `range` (not empty).
    fn new(filter: Interpolation, from: usize, to: usize, range: Range<usize>) -> Self {
        let scale = from as f64 / to as f64;
        let stretch = scale.max(1.0);
        let support = support(filter) * stretch;
        let inverse = 1.0 / stretch;
        let stride = 2 * support.ceil() as usize + 1;
        let mut bounds = Vec::with_capacity(range.len());
        let mut weights = vec![0; range.len() * stride];
        let mut exact = Vec::with_capacity(stride);
        for (fixed, position) in weights.chunks_exact_mut(stride).zip(range) {
            let center = (position as f64 + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(from);
            exact.clear();
            exact.extend((first..end).map(|i| weight(filter, (i as f64 - center + 0.5) * inverse)));
            let sum: f64 = exact.iter().sum();
            for (fixed, exact) in fixed.iter_mut().zip(&exact) {
                let normal = if sum == 0.0 { *exact } else { exact / sum };
                let scaled = normal * f64::from(1 << PRECISION_BITS);
                *fixed = (scaled + if normal < 0.0 { -0.5 } else { 0.5 }) as i32;
            }
            bounds.push((first, exact.len()));
        }
        Taps { bounds, weights, stride }
    }

    fn len(&self) -> usize {
        self.bounds.len()
    }

    /// The input positions that any output position uses.
    fn span(&self) -> Range<usize> {
        let (first, _) = self.bounds[0];
        let (last, count) = self.bounds[self.bounds.len() - 1];
        first..last + count
    }
}

/// Half the width of the filter in output pixels (input pixels when enlarging).
fn support(filter: Interpolation) -> f64 {
    match filter {
        Interpolation::Nearest | Interpolation::Box => 0.5,
        Interpolation::Bilinear => 1.0,
        Interpolation::Bicubic => 2.0,
        Interpolation::Lanczos => 3.0,
    }
}

/// The filter's value at `x`, operation by operation as Pillow computes it.
fn weight(filter: Interpolation, x: f64) -> f64 {
    const A: f64 = -0.5;
    let sinc = |x: f64| {
        let x = x * std::f64::consts::PI;
        if x == 0.0 { 1.0 } else { x.sin() / x }
    };
    let distance = x.abs();
    match filter {
        Interpolation::Nearest | Interpolation::Box if x > -0.5 && x <= 0.5 => 1.0,
        Interpolation::Bilinear if distance < 1.0 => 1.0 - distance,
        Interpolation::Bicubic if distance < 1.0 => ((A + 2.0) * distance - (A + 3.0)) * distance * distance + 1.0,
        Interpolation::Bicubic if distance < 2.0 => (((distance - 5.0) * distance + 8.0) * distance - 4.0) * A,
        Interpolation::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
        _ => 0.0,
    }
}

/// A fixed-point sum as a sample.
#[inline(always)]
fn sample(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// The coefficients of two neighbouring positions, each in an upper and a lower part of 16 bits with sign:
/// `coefficient = upper << SPLIT_BITS + lower`. One 32-bit lane holds the same part of both, the first one below.
#[derive(Clone, Copy)]
struct Pair {
    upper: i32,
    lower: i32,
}

impl Pair {
    fn new(first: i32, second: i32) -> Self {
        let join = |first: i32, second: i32| (first & 0xFFFF) | (second << 16);
        let lower = |weight: i32| weight & ((1 << SPLIT_BITS) - 1);
        Pair { upper: join(first >> SPLIT_BITS, second >> SPLIT_BITS), lower: join(lower(first), lower(second)) }
    }
}

/// The sums of one vector of outputs. Products of 8-bit samples and 24-bit coefficients don't fit the instruction that
/// multiplies and adds pairs of 16 bits; with the coefficients in two parts they do.
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

    /// Adds two neighbouring samples for each output.
    #[inline(always)]
    fn add(&mut self, samples: i16x16<S>, upper: i16x16<S>, lower: i16x16<S>) {
        self.upper += samples.pairwise_dot_product(upper);
        self.lower += samples.pairwise_dot_product(lower);
    }

    /// The outputs, 0 to 255.
    #[inline(always)]
    fn samples(self, simd: S) -> i32x8<S> {
        let sum = ((self.upper << SPLIT_BITS) + self.lower) >> PRECISION_BITS;
        sum.max(i32x8::splat(simd, 0)).min(i32x8::splat(simd, 255))
    }
}

/// Resamples every row of `view`, whose first column is column `origin` of the positions in `taps`.
fn run_horizontal(view: View<'_>, taps: &Taps, origin: usize) -> Vec<u8> {
    // runs start at even columns and are equally long: coefficients of zero before and after make up for it
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
    let mut out = vec![0; RGB * taps.len() * view.rows];
    // whole steps of columns, and room for a run that starts at the last one
    let mut columns = vec![0; ((view.len / RGB).next_multiple_of(STEP) / 2 + run) * RGB * LANES];
    dispatch!(Level::new(), simd => simd.vectorize(
        #[inline(always)]
        || horizontal(simd, view, &starts, &pairs, &mut columns, &mut out),
    ));
    out
}

/// The horizontal kernel: `starts` says at which pair of columns each output starts, `pairs` has equally many
/// coefficients for each.
///
/// Rows lie side by side in the lanes, so that every output has its own coefficients and no lane is idle.
#[inline(always)]
fn horizontal<S: Simd>(simd: S, view: View<'_>, starts: &[usize], pairs: &[Pair], columns: &mut [i16], out: &mut [u8]) {
    let run = pairs.len() / starts.len();
    let line = RGB * starts.len();
    let width = (view.len / RGB).next_multiple_of(STEP) / 2 * RGB * LANES;
    for (block, out) in out.chunks_mut(ROWS * line).enumerate() {
        // below the last row it is repeated, and not stored
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

/// From columns of pixels, one a 32-bit lane, to rows of RGB bytes with four idle bytes at their end.
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

/// Lays rows of RGB bytes side by side: for each pair of columns and each channel, `LANES` values, both columns of the
/// first row, of the second …
#[inline(always)]
fn transpose<S: Simd>(simd: S, rows: [&[u8]; ROWS], columns: &mut [i16]) {
    // four columns as pairs of bytes: RR GG BB and two idle, twice
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
        // three perfect shuffles transpose eight by eight
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

/// Resamples every column of `view`, whose first row is row `origin` of the positions in `taps`.
fn run_vertical(view: View<'_>, taps: &Taps, origin: usize) -> Vec<u8> {
    let mut out = vec![0; view.len * taps.len()];
    dispatch!(Level::new(), simd => simd.vectorize(#[inline(always)] || vertical(simd, view, taps, origin, &mut out)));
    out
}

/// The vertical kernel: a block of columns at a time, so that the sums stay in registers.
#[inline(always)]
fn vertical<S: Simd>(simd: S, view: View<'_>, taps: &Taps, origin: usize, out: &mut [u8]) {
    let mut pairs = Vec::with_capacity(taps.stride / 2 + 1);
    let lines = taps.bounds.iter().zip(taps.weights.chunks_exact(taps.stride));
    for (((first, count), weights), out) in lines.zip(out.chunks_exact_mut(view.len)) {
        let (first, weights) = (first - origin, &weights[..*count]);
        pairs.clear();
        pairs.extend(weights.chunks(2).enumerate().map(|(i, weights)| {
            // the odd one out is paired with itself, and a coefficient of zero
            let rows = [first + 2 * i, (first + 2 * i + 1).min(first + count - 1)];
            (Pair::new(weights[0], weights.get(1).copied().unwrap_or(0)), rows.map(|y| view.row(y)))
        }));
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
            let column = weights.iter().enumerate();
            let sum = column.fold(HALF, |sum, (i, weight)| {
                sum.wrapping_add(i32::from(view.row(first + i)[x + j]).wrapping_mul(*weight))
            });
            *out = sample(sum);
        }
    }
}
