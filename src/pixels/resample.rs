//! Pillow's resampling, bit-exact: its fixed-point coefficients, both of its pass orders, and only the rows and columns
//! inside a window.
//!
//! Owns which pixels an output needs and their coefficients; `kernels` multiplies. Must not know crops, tensors, nor
//! how an image was encoded.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod fixed_point;
mod kernels;

use std::ops::Range;

use super::formats::components::Scratch;
use super::picture::Picture;
use crate::model::{Colors, Interpolation};

/// Fractional bits of Pillow's coefficients: 32, less 8 for the sample and 2 for overshoot.
const PRECISION_BITS: u32 = 32 - 8 - 2;
/// Bytes per RGB pixel.
pub(super) const RGB: usize = 3;

/// Most bytes of RGB rows that are converted at a time, so that they fit the L2 cache.
const BAND: usize = 192 << 10;

/// A window (columns, rows) of `image` resized to `target` (width, height), as packed RGB rows.
pub(super) fn resample(
    image: &Picture,
    target: [usize; 2],
    window: [Range<usize>; 2],
    filter: Interpolation,
    colors: Colors,
) -> Vec<u8> {
    let size = [image.width as usize, image.height as usize];
    let [columns, rows] = window;
    if columns.is_empty() || rows.is_empty() || size.contains(&0) {
        return vec![0; RGB * columns.len() * rows.len()];
    }
    if filter == Interpolation::Nearest {
        return nearest(image, size, target, columns, rows, colors);
    }
    let horizontal = (size[0] != target[0]).then(|| Taps::new(filter, size[0], target[0], columns.clone()));
    let vertical = (size[1] != target[1]).then(|| Taps::new(filter, size[1], target[1], rows.clone()));
    // input that each pass needs; a pass that isn't needed copies
    let needed_columns = horizontal.as_ref().map_or(columns, Taps::span);
    let needed_rows = vertical.as_ref().map_or(rows, Taps::span);
    let mut source = Source::new(image, needed_columns.clone(), colors);
    // Pillow since 13: vertical pass first if it removes more than twice as many pixels as the horizontal one
    let shrink = [0, 1].map(|axis| size[axis] as i64 - target[axis] as i64);
    let vertical_first = shrink[1] > 0 && shrink[1] > 2 * shrink[0];
    let across = horizontal.map(|taps| kernels::Horizontal::new(&taps, needed_columns.start));
    match (&across, &vertical) {
        (None, None) => source.view(needed_rows).to_vec(),
        (Some(h), None) => source.resampled(needed_rows, h),
        (None, Some(v)) => source.reduced(v),
        (Some(h), Some(v)) if vertical_first => {
            let reduced = source.reduced(v);
            h.run(View::packed(&reduced, source.line()))
        }
        (Some(h), Some(v)) => {
            let line = RGB * h.outputs();
            let narrow = source.resampled(needed_rows.clone(), h);
            kernels::run_vertical(View::packed(&narrow, line), v, needed_rows.start)
        }
    }
}

/// The needed columns of an image, converted to RGB in bands of rows.
struct Source<'a> {
    image: &'a Picture,
    columns: Range<usize>,
    /// If grey, all three bytes of a pixel are its luma.
    colors: Colors,
    /// RGB rows of an image that isn't packed RGB.
    band: Vec<u8>,
    scratch: Scratch,
}

impl<'a> Source<'a> {
    fn new(image: &'a Picture, columns: Range<usize>, colors: Colors) -> Self {
        Source { image, columns, colors, band: Vec::new(), scratch: Scratch::default() }
    }

    /// Bytes per row.
    fn line(&self) -> usize {
        RGB * self.columns.len()
    }

    fn view(&mut self, rows: Range<usize>) -> View<'_> {
        let line = self.line();
        if let Some(data) = self.plain() {
            let stride = RGB * self.image.width as usize;
            return View { data, stride, left: RGB * self.columns.start, len: line, top: rows.start, rows: rows.len() };
        }
        self.band.resize(line * rows.len(), 0);
        for (out, y) in self.band.chunks_exact_mut(line).zip(rows) {
            self.image.row(y, self.columns.clone(), &mut self.scratch, out);
            if self.colors == Colors::Grey {
                grey(out);
            }
        }
        View::packed(&self.band, line)
    }

    /// The image's own bytes, if no conversion is needed.
    fn plain(&self) -> Option<&'a [u8]> {
        self.image.rgb().filter(|_| self.colors == Colors::Rgb)
    }

    /// Rows per band.
    fn band_rows(&self) -> usize {
        match self.plain() {
            Some(_) => usize::MAX,
            None => (BAND / self.line().max(1)).next_multiple_of(kernels::ROWS),
        }
    }

    /// Resamples `rows` horizontally.
    fn resampled(&mut self, rows: Range<usize>, across: &kernels::Horizontal) -> Vec<u8> {
        let mut out = Vec::with_capacity(RGB * across.outputs() * rows.len());
        let (mut from, most) = (rows.start, self.band_rows());
        while from < rows.end {
            let to = from.saturating_add(most).min(rows.end);
            out.extend_from_slice(&across.run(self.view(from..to)));
            from = to;
        }
        out
    }

    /// Resamples the image vertically.
    fn reduced(&mut self, down: &Taps) -> Vec<u8> {
        let most = self.band_rows();
        if most == usize::MAX {
            let span = down.span();
            return kernels::run_vertical(self.view(span.clone()), down, span.start);
        }
        let mut out = Vec::with_capacity(self.line() * down.len());
        let mut from = 0;
        while from < down.len() {
            // outputs that one band suffices for, at least one
            let first = down.bounds[from].0;
            let fed = down.bounds[from..].iter().take_while(|(start, count)| start + count <= first + most).count();
            let part = down.part(from..from + fed.max(1));
            let span = part.span();
            out.extend_from_slice(&kernels::run_vertical(self.view(span.clone()), &part, span.start));
            from += part.len();
        }
        out
    }
}

/// Pillow's `convert("L")` of RGB pixels, in place: ITU-R 601 luma in 16-bit fixed point, written to all three bytes.
fn grey(pixels: &mut [u8]) {
    for pixel in pixels.as_chunks_mut::<RGB>().0 {
        let [red, green, blue] = pixel.map(u32::from);
        *pixel = [((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16) as u8; RGB];
    }
}

/// A rectangle of packed RGB rows in a larger image. All fields are in bytes except `top` and `rows`.
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

/// Pillow's nearest neighbour: positions by repeated addition, as in its affine transform.
fn nearest(
    image: &Picture,
    size: [usize; 2],
    target: [usize; 2],
    columns: Range<usize>,
    rows: Range<usize>,
    colors: Colors,
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
        return Source::new(image, columns, colors).view(rows).to_vec();
    }
    let columns = positions(0, columns);
    let mut source = Source::new(image, 0..size[0], colors);
    let mut out = Vec::with_capacity(RGB * columns.len() * rows.len());
    for y in positions(1, rows) {
        let row = y.map(|y| source.view(y..y + 1));
        for x in &columns {
            // a position may step past the border by accumulated rounding errors: Pillow leaves black there
            match (x, row) {
                (Some(x), Some(row)) => out.extend_from_slice(&row.row(0)[RGB * x..][..RGB]),
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
    /// Fixed-point coefficients: `stride` per output position, zero-padded.
    weights: Vec<i32>,
    stride: usize,
}

impl Taps {
    /// Pillow's coefficients for resizing `from` positions to `to`, for the output positions in `range` (not empty).
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

    /// The coefficients of a range of the output positions.
    fn part(&self, range: Range<usize>) -> Taps {
        let weights = self.weights[range.start * self.stride..range.end * self.stride].to_vec();
        Taps { bounds: self.bounds[range].to_vec(), weights, stride: self.stride }
    }

    /// The input positions that the output positions use.
    fn span(&self) -> Range<usize> {
        let (first, _) = self.bounds[0];
        let (last, count) = self.bounds[self.bounds.len() - 1];
        first..last + count
    }
}

/// Half the filter's width, in output pixels when shrinking, in input pixels when enlarging.
fn support(filter: Interpolation) -> f64 {
    match filter {
        Interpolation::Nearest | Interpolation::Box => 0.5,
        Interpolation::Bilinear => 1.0,
        Interpolation::Bicubic => 2.0,
        Interpolation::Lanczos => 3.0,
    }
}

/// The filter's value at `x`, computed with Pillow's operations in the same order.
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
