//! Convolutions in single precision: of layers that stay as they are in a network of integers.
//!
//! Every output is summed in one order, `((bias + x·w) + x·w) + …` over rows of the kernel, its columns and the channels of the
//! input, each product rounded and padding left out. Vectors are of output channels, whose sums don't meet: the bits are
//! [`mod@reference`]'s whatever a vector's length.

use std::ops::Range;

use super::float_conv::FloatConv;
use super::processor::Processor;
use super::reference;

/// Output channels of a block, where a group has as many, and where it hasn't.
const BLOCK: usize = 16;
const SMALL_BLOCK: usize = 8;

/// Pixels that are worked on together.
const PIXELS: usize = 4;

/// A convolution with its weights in the order that they are read in.
#[derive(Debug, Clone)]
pub struct PackedFloats {
    /// Without weights, but on a processor that the reference runs on.
    conv: FloatConv,
    processor: Processor,
    plan: Plan,
    weight: Vec<f32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    /// By the reference.
    Reference,
    /// Blocks of output channels: `[groups, blocks, kernel height, kernel width, channels / groups, block]`.
    Blocks(usize),
    /// A channel by itself: `[kernel height, kernel width, channels]`.
    Depthwise,
}

impl PackedFloats {
    /// Orders the weights.
    ///
    /// # Panics
    /// If the convolution's sizes and weights don't fit together, or the processor isn't here.
    pub fn new(processor: Processor, mut conv: FloatConv) -> Self {
        assert!(processor.is_here() && conv.is_whole());
        let (depth, filters) = (conv.shape.depth(), conv.shape.filters / conv.shape.groups);
        let plan = match processor {
            Processor::Portable => Plan::Reference,
            _ if depth == 1 && filters == 1 => Plan::Depthwise,
            _ if filters >= BLOCK => Plan::Blocks(BLOCK),
            _ => Plan::Blocks(SMALL_BLOCK),
        };
        let taps = conv.shape.kernel[0] * conv.shape.kernel[1] * depth;
        let mut weight = Vec::new();
        match plan {
            Plan::Reference => {}
            Plan::Depthwise => {
                let of = |tap: usize| conv.weight.iter().skip(tap).step_by(taps);
                weight.extend((0..taps).flat_map(of));
            }
            Plan::Blocks(block) => {
                for first in
                    (0..conv.shape.groups).flat_map(|group| (0..filters).step_by(block).map(move |f| [group, f]))
                {
                    let [group, from] = first;
                    for tap in 0..taps {
                        let of = |lane: usize| conv.weight[(group * filters + from + lane) * taps + tap];
                        let there = block.min(filters - from);
                        weight.extend((0..block).map(|lane| if lane < there { of(lane) } else { 0.0 }));
                    }
                }
            }
        }
        if plan != Plan::Reference {
            conv.weight = Vec::new();
        }
        Self { conv, processor, plan, weight }
    }

    /// Bytes of weights and biases.
    pub fn bytes(&self) -> usize {
        size_of::<f32>() * (self.weight.len() + self.conv.weight.len() + self.conv.bias.len())
    }

    /// Computes rows of the output, `[rows, W', filters]`, of an image.
    ///
    /// # Panics
    /// If slices aren't as large as they have to be.
    pub fn convolve(&self, rows: Range<usize>, input: &[f32], output: &mut [f32]) {
        if self.plan == Plan::Reference {
            return reference::float_conv(&self.conv, rows, input, output);
        }
        assert!(self.conv.fits(&rows, input, output));
        match self.processor {
            // SAFETY (of both): the processor is here
            #[cfg(target_arch = "x86_64")]
            Processor::Avx2 | Processor::AvxVnni => unsafe { self.by_avx2(rows, input, output) },
            #[cfg(target_arch = "x86_64")]
            Processor::Avx512Vnni | Processor::Amx => unsafe { self.by_avx512(rows, input, output) },
            _ => self.rows(rows, input, output),
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn by_avx2(&self, rows: Range<usize>, input: &[f32], output: &mut [f32]) {
        self.rows(rows, input, output);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vl")]
    fn by_avx512(&self, rows: Range<usize>, input: &[f32], output: &mut [f32]) {
        self.rows(rows, input, output);
    }

    #[inline(always)]
    fn rows(&self, rows: Range<usize>, input: &[f32], output: &mut [f32]) {
        let line = (self.conv.shape.out_size[1] * self.conv.shape.filters).max(1);
        for (row, line) in rows.zip(output.chunks_exact_mut(line)) {
            match self.plan {
                Plan::Depthwise => self.depthwise(row, input, line),
                Plan::Blocks(BLOCK) => self.blocks::<BLOCK>(row, input, line),
                _ => self.blocks::<SMALL_BLOCK>(row, input, line),
            }
        }
    }

    #[inline(always)]
    fn depthwise(&self, row: usize, input: &[f32], line: &mut [f32]) {
        let conv = &self.conv;
        for (column, pixel) in line.chunks_exact_mut(conv.shape.filters).enumerate() {
            pixel.copy_from_slice(&conv.bias);
            let mut weights = self.weight.chunks_exact(conv.shape.filters);
            for ky in 0..conv.shape.kernel[0] {
                for kx in 0..conv.shape.kernel[1] {
                    let Some(weights) = weights.next() else { return };
                    let Some(at) = conv.pixel([row, column], [ky, kx]) else { continue };
                    for ((sum, x), w) in pixel.iter_mut().zip(&input[at..]).zip(weights) {
                        *sum += x * w;
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn blocks<const B: usize>(&self, row: usize, input: &[f32], line: &mut [f32]) {
        let conv = &self.conv;
        let (depth, filters) = (conv.shape.depth(), conv.shape.filters / conv.shape.groups);
        let taps = conv.shape.kernel[0] * conv.shape.kernel[1] * depth;
        let (weights, _) = self.weight.as_chunks::<B>();
        let mut blocks = weights.chunks_exact(taps);
        for group in 0..conv.shape.groups {
            for from in (0..filters).step_by(B) {
                let Some(weights) = blocks.next() else { return };
                let (first, count) = (group * filters + from, B.min(filters - from));
                let mut bias = [0.0; B];
                bias[..count].copy_from_slice(&conv.bias[first..first + count]);
                for (i, pixels) in line.chunks_mut(PIXELS * conv.shape.filters).enumerate() {
                    let mut sums = [bias; PIXELS];
                    let there = pixels.len() / conv.shape.filters;
                    for (tap, weights) in weights.chunks_exact(depth).enumerate() {
                        let tap = [tap / conv.shape.kernel[1], tap % conv.shape.kernel[1]];
                        // pixels that aren't there are the row's last once more
                        let at: [Option<usize>; PIXELS] =
                            std::array::from_fn(|p| conv.pixel([row, i * PIXELS + p.min(there - 1)], tap));
                        let from = |at: usize| &input[at + group * depth..][..depth];
                        match at {
                            [Some(a), Some(b), Some(c), Some(d)] => {
                                add::<B, PIXELS>(&mut sums, [from(a), from(b), from(c), from(d)], weights);
                            }
                            _ => {
                                for (sums, at) in sums.iter_mut().zip(at) {
                                    if let Some(at) = at {
                                        add::<B, 1>(std::array::from_mut(sums), [from(at)], weights);
                                    }
                                }
                            }
                        }
                    }
                    for (pixel, sums) in pixels.chunks_exact_mut(conv.shape.filters).zip(sums) {
                        pixel[first..first + count].copy_from_slice(&sums[..count]);
                    }
                }
            }
        }
    }
}

/// Adds products of pixels' channels, one channel after the other.
#[inline(always)]
fn add<const B: usize, const P: usize>(sums: &mut [[f32; B]; P], x: [&[f32]; P], weights: &[[f32; B]]) {
    let mut all = *sums;
    for (i, weights) in weights.iter().enumerate() {
        for (sums, x) in all.iter_mut().zip(x) {
            let Some(&x) = x.get(i) else { return };
            for (sum, w) in sums.iter_mut().zip(weights) {
                *sum += x * w;
            }
        }
    }
    *sums = all;
}
