//! Component planes of a JPEG → RGB rows, as libjpeg-turbo does for Pillow: fancy upsampling, then colour conversion,
//! and Pillow's conversion of CMYK.
//!
//! Rows are converted on demand, so that the image is never in memory twice. Must not know how planes are decoded.

use std::ops::Range;

use fearless_simd::{Level, dispatch, prelude::*};

/// Component planes of an image, and their colour space.
#[derive(Debug)]
pub(crate) struct Components {
    pub(super) planes: Vec<Plane>,
    pub(super) conversion: Conversion,
}

/// Samples of one component.
#[derive(Debug)]
pub(super) struct Plane {
    pub(super) data: Vec<u8>,
    /// Distance between rows, in samples.
    pub(super) stride: usize,
    /// Size without padding, in samples.
    pub(super) width: usize,
    pub(super) height: usize,
    /// Pixels per sample, horizontally and vertically.
    pub(super) across: usize,
    pub(super) down: usize,
}

/// Colour space of the components.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Conversion {
    Grey,
    Rgb,
    YCbCr,
    /// CMYK, stored inverted (Adobe).
    Cmyk,
    /// CMYK, not inverted.
    PlainCmyk,
    /// YCCK, stored inverted: CMYK with the first three as YCbCr.
    Ycck,
}

impl Components {
    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> u64 {
        self.planes.iter().map(|plane| plane.data.len() as u64).sum()
    }

    /// Writes the pixels of `columns` of row `y` to `out`, three bytes each.
    pub(crate) fn row(&self, y: usize, columns: Range<usize>, scratch: &mut Scratch, out: &mut [u8]) {
        let len = columns.len();
        scratch.lines.resize(4 * (len + 2 * MARGIN), 0);
        let mut ranges: [Range<usize>; 4] = std::array::from_fn(|_| 0..0);
        for ((plane, line), range) in
            self.planes.iter().zip(scratch.lines.chunks_exact_mut(len + 2 * MARGIN)).zip(&mut ranges)
        {
            let start = plane.row(y, columns.clone(), &mut scratch.sums, line);
            *range = start..start + len;
        }
        let (lines, size) = (&scratch.lines, len + 2 * MARGIN);
        let line = |i: usize| &lines[i * size..][ranges[i].clone()];
        let level = Level::new();
        match self.conversion {
            Conversion::Grey => {
                for (pixel, &grey) in out.chunks_exact_mut(3).zip(line(0)) {
                    pixel.fill(grey);
                }
            }
            Conversion::Rgb => {
                for (pixel, ((&r, &g), &b)) in out.chunks_exact_mut(3).zip(line(0).iter().zip(line(1)).zip(line(2))) {
                    pixel.copy_from_slice(&[r, g, b]);
                }
            }
            Conversion::YCbCr => {
                let (y, cb, cr) = (line(0), line(1), line(2));
                dispatch!(level, simd => simd.vectorize(#[inline(always)] || to_rgb(y, cb, cr, out)));
            }
            Conversion::Cmyk => inks([line(0), line(1), line(2)], line(3), out),
            Conversion::PlainCmyk => {
                let stored = [0, 1, 2, 3].map(|i| line(i).iter().map(|ink| 255 - ink).collect::<Vec<u8>>());
                inks([&stored[0], &stored[1], &stored[2]], &stored[3], out);
            }
            Conversion::Ycck => {
                let (y, cb, cr) = (line(0), line(1), line(2));
                scratch.rgb.resize(3 * len, 0);
                to_rgb(y, cb, cr, &mut scratch.rgb);
                let mut inked = [const { Vec::new() }; 3];
                for (channel, inked) in inked.iter_mut().enumerate() {
                    *inked = scratch.rgb.iter().skip(channel).step_by(3).map(|sample| 255 - sample).collect();
                }
                inks([&inked[0], &inked[1], &inked[2]], line(3), out);
            }
        }
    }
}

/// Buffers that are reused from row to row.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    lines: Vec<u8>,
    sums: Vec<u16>,
    rgb: Vec<u8>,
}

/// Pixels that upsampling may write before and after the requested ones.
const MARGIN: usize = 8;

impl Plane {
    fn samples(&self, y: usize) -> &[u8] {
        &self.data[y.min(self.height - 1) * self.stride..][..self.width]
    }

    /// Upsamples `columns` of row `y` of the image into `out`; returns the index in `out` at which they start.
    fn row(&self, y: usize, columns: Range<usize>, sums: &mut Vec<u16>, out: &mut [u8]) -> usize {
        let own = y / self.down;
        let row = self.samples(own);
        let level = Level::new();
        // the nearer neighbouring row: image rows lie between two sample rows
        let towards = || if y.is_multiple_of(2) { self.samples(own.saturating_sub(1)) } else { self.samples(own + 1) };
        let first = columns.start / self.across;
        let samples = first..columns.end.div_ceil(self.across).min(self.width);
        match (self.across, self.down) {
            (1, 1) => {
                out[..columns.len()].copy_from_slice(&row[columns]);
                return 0;
            }
            (1, 2) => {
                let (other, bias) = (towards(), 1 + (y % 2) as u16);
                let (near, far) = (&row[columns.clone()], &other[columns.clone()]);
                dispatch!(level, simd => simd.vectorize(#[inline(always)] || {
                    for (out, (&near, &far)) in out.iter_mut().zip(near.iter().zip(far)) {
                        *out = ((3 * u16::from(near) + u16::from(far) + bias) >> 2) as u8;
                    }
                }));
                return 0;
            }
            (2, 1) if self.width > 2 => {
                // a single row, at the scale that `widen` expects
                sums.clear();
                sums.extend(row.iter().map(|&sample| u16::from(sample)));
                dispatch!(level, simd => simd.vectorize(#[inline(always)] || widen(sums, samples, [1, 2], 2, out)));
            }
            (2, 2) if self.width > 2 => {
                let other = towards();
                dispatch!(level, simd => simd.vectorize(#[inline(always)] || {
                    sums.clear();
                    sums.extend(row.iter().zip(other).map(|(&near, &far)| 3 * u16::from(near) + u16::from(far)));
                    widen(sums, samples, [8, 7], 4, out);
                }));
            }
            (across, _) => {
                for (out, &sample) in out.chunks_mut(across).zip(&row[samples]) {
                    out.fill(sample);
                }
            }
        }
        columns.start - first * self.across
    }
}

/// Writes two pixels per sample: 3/4 of the sample and 1/4 of its neighbour on that side, rounded by `biases`.
#[inline(always)]
fn widen(line: &[u16], samples: Range<usize>, biases: [u16; 2], shift: u32, out: &mut [u8]) {
    let last = line.len() - 1;
    let pair = |before: u16, own: u16, after: u16| {
        [((3 * own + before + biases[0]) >> shift) as u8, ((3 * own + after + biases[1]) >> shift) as u8]
    };
    let inner = samples.start.max(1)..samples.end.min(last);
    if samples.start == 0 {
        // a sample at the border is its own neighbour
        let [_, right] = pair(line[0], line[0], line[1]);
        out[..2].copy_from_slice(&[((4 * line[0] + biases[0]) >> shift) as u8, right]);
    }
    if samples.end > last {
        let [left, _] = pair(line[last - 1], line[last], line[last]);
        let at = 2 * (last - samples.start);
        out[at..at + 2].copy_from_slice(&[left, ((4 * line[last] + biases[1]) >> shift) as u8]);
    }
    if inner.is_empty() {
        return;
    }
    let to = &mut out[2 * (inner.start - samples.start)..][..2 * inner.len()];
    let before = &line[inner.start - 1..][..inner.len()];
    let own = &line[inner.clone()];
    let after = &line[inner.start + 1..][..inner.len()];
    for (((to, &before), &own), &after) in to.as_chunks_mut().0.iter_mut().zip(before).zip(own).zip(after) {
        *to = pair(before, own, after);
    }
}

/// libjpeg's fixed-point conversion of YCbCr: 16 fractional bits, rounded.
#[inline(always)]
fn to_rgb(y: &[u8], cb: &[u8], cr: &[u8], out: &mut [u8]) {
    const fn fixed(value: f64) -> i32 {
        (value * 65536.0 + 0.5) as i32
    }
    const HALF: i32 = 1 << 15;
    for (pixel, ((&y, &cb), &cr)) in out.as_chunks_mut::<3>().0.iter_mut().zip(y.iter().zip(cb).zip(cr)) {
        let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
        let red = y + ((fixed(1.402) * cr + HALF) >> 16);
        let green = y + ((-fixed(0.34414) * cb - fixed(0.71414) * cr + HALF) >> 16);
        let blue = y + ((fixed(1.772) * cb + HALF) >> 16);
        *pixel = [red, green, blue].map(|sample| sample.clamp(0, 255) as u8);
    }
}

/// Pillow's `convert("RGB")` of CMYK, which is stored inverted: `(255 − c)(255 − k) / 255`, rounded.
fn inks(colors: [&[u8]; 3], black: &[u8], out: &mut [u8]) {
    for (x, (pixel, &light)) in out.chunks_exact_mut(3).zip(black).enumerate() {
        let light = u32::from(light);
        for (to, from) in pixel.iter_mut().zip(colors) {
            let product = u32::from(255 - from[x]) * light + 128;
            *to = (light - (((product >> 8) + product) >> 8)) as u8;
        }
    }
}

/// Converts CMYK pixels of four bytes to RGB, in the same way.
pub(super) fn packed_inks(pixels: &[u8]) -> Vec<u8> {
    let mut rgb = vec![0; pixels.len() / 4 * 3];
    for (to, from) in rgb.chunks_exact_mut(3).zip(pixels.chunks_exact(4)) {
        inks([&from[..1], &from[1..2], &from[2..3]], &from[3..], to);
    }
    rgb
}
