//! The operators in plain Rust: what every kernel has to equal, to the bit.

use std::ops::Range;

use super::float_conv::FloatConv;
use super::{Band, Conv, Gated, Output, Pool, Read, ToBytes};

/// `rhe(f32(acc)·factor)`. Loading a network has made sure that it is below 2³⁰.
#[inline]
pub fn scaled(acc: i32, factor: f32) -> i32 {
    (single(acc, factor)).round_ties_even() as i32
}

/// `f32(acc)·factor`.
#[inline]
pub fn single(acc: i32, factor: f32) -> f32 {
    acc as f32 * factor
}

/// An integer, scaled already, as u8.
#[inline]
pub fn to_bytes(to: &ToBytes, value: i32) -> u8 {
    let byte = (value + i32::from(to.zero)).clamp(0, 255) as u8;
    match &to.table {
        Some(table) => table[usize::from(byte)],
        None => byte,
    }
}

/// A residual sum as u8.
#[inline]
pub fn read(read: &Read, sum: i16) -> u8 {
    to_bytes(&read.to, scaled(i32::from(sum), read.factor))
}

/// A residual sum: a scaled integer and what it is added to.
#[inline]
pub fn sum(value: i32, addend: i16, relu: bool) -> i16 {
    let sum = (value + i32::from(addend)).clamp(i16::MIN.into(), i16::MAX.into()) as i16;
    if relu { sum.max(0) } else { sum }
}

/// Writes what the integer at place `i` becomes.
#[inline]
fn put(output: &Output, i: usize, acc: i32, factor: f32, band: &mut Band<'_>) {
    let byte = match output {
        Output::Singles => {
            if let Some(singles) = &mut band.singles {
                singles[i] = single(acc, factor);
            }
            return;
        }
        Output::Bytes(to) => to_bytes(to, scaled(acc, factor)),
        Output::Sum { relu, read: reading } => {
            let sum = sum(scaled(acc, factor), band.addend.map_or(0, |addend| addend[i]), *relu);
            if let Some(sums) = &mut band.sums {
                sums[i] = sum;
            }
            match reading {
                Some(reading) => read(reading, sum),
                None => return,
            }
        }
    };
    if let Some(bytes) = &mut band.bytes {
        bytes[i] = byte;
    }
}

/// Rows of a convolution.
pub fn conv(conv: &Conv, mut band: Band<'_>) {
    assert!(conv.is_whole() && conv.fits(&band));
    let ([height, width], depth) = (conv.shape.size, conv.shape.depth());
    let filters = conv.shape.filters / conv.shape.groups;
    let [kernel_height, kernel_width] = conv.shape.kernel;
    let padding = vec![conv.zero; depth];
    let mut window = vec![0_u8; kernel_height * kernel_width * depth];
    let mut at = 0;
    for row in band.rows.clone() {
        for column in 0..conv.shape.out_size[1] {
            for group in 0..conv.shape.groups {
                // the window that the filters of a group read, padding and all
                let mut parts = window.chunks_exact_mut(depth);
                for ky in 0..kernel_height {
                    let y = (row * conv.shape.stride[0] + ky * conv.shape.dilation[0]).checked_sub(conv.shape.pads[0]);
                    for kx in 0..kernel_width {
                        let x = (column * conv.shape.stride[1] + kx * conv.shape.dilation[1])
                            .checked_sub(conv.shape.pads[1]);
                        let pixel = match (y.filter(|&y| y < height), x.filter(|&x| x < width)) {
                            (Some(y), Some(x)) => {
                                let first = (y * width + x) * conv.shape.channels + group * depth;
                                &band.input[first..first + depth]
                            }
                            _ => &padding[..],
                        };
                        if let Some(part) = parts.next() {
                            part.copy_from_slice(pixel);
                        }
                    }
                }
                for filter in group * filters..(group + 1) * filters {
                    let weight = &conv.weight[filter * window.len()..(filter + 1) * window.len()];
                    let acc = conv.bias[filter] + dot(&window, weight);
                    put(&conv.output, at, acc, conv.factor[filter], &mut band);
                    at += 1;
                }
            }
        }
    }
}

/// `Σ w·x`.
pub fn dot(x: &[u8], w: &[i8]) -> i32 {
    x.iter().zip(w).map(|(&x, &w)| i32::from(x) * i32::from(w)).sum()
}

/// Pixels of a map times their gate, one value a channel. `band.rows` isn't read; `input` may be part of an image.
pub fn gated(gated: &Gated, gate: &[u8], mut band: Band<'_>) {
    let (input, channels) = (&band.input[..band.values()], gate.len());
    for (i, &x) in input.iter().enumerate() {
        let g = i32::from(gate[i % channels]) - i32::from(gated.gate_zero);
        let acc = (i32::from(x) - i32::from(gated.zero)) * g;
        put(&gated.output, i, acc, gated.factor, &mut band);
    }
}

/// Terms of a residual sum, both s16 of one scale. `band.input` isn't read.
pub fn add(output: &Output, terms: &[i16], mut band: Band<'_>) {
    for (i, &term) in terms.iter().enumerate() {
        // exact: 16 bits in a number of 24
        put(output, i, term.into(), 1.0, &mut band);
    }
}

/// A u8 map as a term of a residual sum.
pub fn widen(table: &[i16; 256], bytes: &[u8], sums: &mut [i16]) {
    for (sum, &byte) in sums.iter_mut().zip(bytes) {
        *sum = table[usize::from(byte)];
    }
}

/// A table's value for each.
pub fn look_up(table: &super::Table, x: &[u8], y: &mut [u8]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = table[usize::from(x)];
    }
}

/// Sums of a map's channels over all pixels, of values less the zero point.
pub fn totals(x: &[u8], zero: u8, totals: &mut [i32]) {
    totals.fill(0);
    let mut pixels = 0;
    for pixel in x.chunks_exact(totals.len()) {
        pixels += 1;
        for (total, &x) in totals.iter_mut().zip(pixel) {
            *total += i32::from(x);
        }
    }
    totals.iter_mut().for_each(|total| *total -= pixels * i32::from(zero));
}

/// A pooling of one image.
pub fn pool(pool: &Pool, x: &[u8], y: &mut [u8]) {
    let (width, c) = (pool.size[1], pool.channels);
    let places = (0..pool.out_size[0]).flat_map(|row| (0..pool.out_size[1]).map(move |column| (row, column)));
    for (pixel, (row, column)) in y.chunks_exact_mut(c.max(1)).zip(places) {
        let (rows, columns) = (pool.inside(0, row), pool.inside(1, column));
        let inside = rows.len() * columns.len();
        let counted = if pool.counts_padding { pool.window().unwrap_or(usize::MAX) } else { inside.max(1) };
        for (channel, out) in pixel.iter_mut().enumerate() {
            let values =
                rows.clone().flat_map(|y| columns.clone().map(move |x| (y * width + x) * c + channel)).map(|i| x[i]);
            *out = if pool.largest {
                values.max().unwrap_or(pool.zero)
            } else {
                let total: i64 = values.map(|x| i64::from(x) - i64::from(pool.zero)).sum();
                // a window's average is between its values
                (halves_to_even(total, i64::try_from(counted).unwrap_or(i64::MAX)) + i64::from(pool.zero)) as u8
            };
        }
    }
}

/// `total / count` rounded to the nearest integer, halves to even, exactly.
fn halves_to_even(total: i64, count: i64) -> i64 {
    let (floor, rest) = (total.div_euclid(count), total.rem_euclid(count));
    let up = match rest.cmp(&(count - rest)) {
        std::cmp::Ordering::Less => false,
        std::cmp::Ordering::Equal => floor % 2 != 0,
        std::cmp::Ordering::Greater => true,
    };
    floor + i64::from(up)
}

/// A number in single precision as u8: `clamp(rhe(x / scale) + zero, 0, 255)`. No number is the zero point.
#[inline]
pub fn quantised(x: f32, (scale, zero): (f32, u8)) -> u8 {
    // far outside, the conversion limits
    let q = (x / scale).round_ties_even() as i32;
    q.saturating_add(zero.into()).clamp(0, 255) as u8
}

/// A number in single precision as a term of a residual sum: `sat16(rhe(x / scale))`. No number is 0.
#[inline]
pub fn term(x: f32, scale: f32) -> i16 {
    (x / scale).round_ties_even() as i16
}

/// An image `[channels, height, width]` as u8, channels last.
pub fn quantise(image: &[f32], channels: usize, scale: (f32, u8), bytes: &mut [u8]) {
    let pixels = image.len() / channels.max(1);
    for (channel, values) in image.chunks_exact(pixels.max(1)).enumerate() {
        for (byte, &x) in bytes.iter_mut().skip(channel).step_by(channels).zip(values) {
            *byte = quantised(x, scale);
        }
    }
}

/// Rows of a convolution in single precision: one product after the other.
pub fn float_conv(conv: &FloatConv, rows: Range<usize>, input: &[f32], output: &mut [f32]) {
    assert!(conv.is_whole() && conv.fits(&rows, input, output));
    let (depth, filters) = (conv.shape.depth(), conv.shape.filters / conv.shape.groups);
    let [height, width] = conv.shape.kernel;
    for (i, out) in output.iter_mut().enumerate() {
        let (pixel, filter) = (i / conv.shape.filters, i % conv.shape.filters);
        let at = [rows.start + pixel / conv.shape.out_size[1], pixel % conv.shape.out_size[1]];
        let weights = conv.weight[filter * height * width * depth..].chunks_exact(depth);
        let mut sum = conv.bias[filter];
        for (tap, weights) in weights.take(height * width).enumerate() {
            let Some(first) = conv.pixel(at, [tap / width, tap % width]) else { continue };
            for (x, w) in input[first + filter / filters * depth..].iter().zip(weights) {
                sum += x * w;
            }
        }
        *out = sum;
    }
}
