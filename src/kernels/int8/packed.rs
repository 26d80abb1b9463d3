//! A convolution's weights in the order that a processor's kernel reads them.
//!
//! All kernels do the same step: four bytes of the input (two numbers of 16 bits, without VNNI), a *unit*, times a vector of
//! weights, one unit for each lane, added to sums of 32 bits. They differ in what the units of a vector are:
//!
//! - *dense*: one unit of a pixel for all lanes, which are channels of the output. A row of the kernel is a run of units,
//!   since the channels of neighbouring pixels follow one another.
//! - *merged*: where a vector holds `m` groups of channels, a unit for each group, over and over.
//! - *depthwise*: a unit for each lane, of rows below one another.

use super::processor::{Processor, Shape};
use super::scratch::Lines;
use super::{Conv, Output};

/// How a convolution is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plan {
    /// By the reference.
    Reference,
    /// See above; for each group by itself.
    Dense,
    /// See above; so many groups in a vector.
    Merged(usize),
    /// See above.
    Depthwise,
    /// Dense, by tiles of a matrix unit.
    Tiles,
}

/// A convolution that is ready to run, on one processor.
#[derive(Debug, Clone)]
pub struct Packed {
    pub(super) conv: Conv,
    pub(super) processor: Processor,
    pub(super) plan: Plan,
    pub(super) weight: Lines,
    /// By lane.
    pub(super) bias: Vec<i32>,
    /// By channel.
    pub(super) factor: Vec<f32>,
}

/// Sizes of panels: vectors of output channels that are computed together, as even as can be.
pub(super) fn panels(vectors: usize, most: usize) -> impl Iterator<Item = usize> {
    let count = vectors.div_ceil(most);
    (0..count).map(move |i| (vectors + i) / count)
}

impl Plan {
    fn of(conv: &Conv, processor: Processor) -> Self {
        let Some(Shape { lanes, unit, tiles, .. }) = processor.shape() else { return Self::Reference };
        let (depth, filters) = (conv.shape.depth(), conv.shape.filters / conv.shape.groups.max(1));
        let narrow = conv.shape.groups > 1 && depth == filters && matches!(conv.shape.stride[1], 1 | 2);
        if conv.shape.dilation != [1, 1] {
            Self::Reference
        } else if narrow && depth == 1 {
            Self::Depthwise
        } else if narrow && depth <= lanes && lanes % depth == 0 && lanes / depth <= 4 && depth % unit == 0 {
            Self::Merged(lanes / depth)
        } else if tiles
            && conv.shape.groups == 1
            && conv.shape.channels >= 16
            && conv.shape.out_size[0] * conv.shape.out_size[1] >= 8
        {
            Self::Tiles
        } else {
            Self::Dense
        }
    }
}

impl Packed {
    /// Orders the weights.
    ///
    /// # Panics
    /// If the convolution's sizes and weights don't fit together, or the processor isn't here.
    pub fn new(processor: Processor, conv: Conv) -> Self {
        assert!(processor.is_here() && conv.is_whole());
        let plan = Plan::of(&conv, processor);
        let mut packed = Self { processor, plan, weight: Lines::default(), bias: Vec::new(), factor: Vec::new(), conv };
        if let (Some(shape), true) = (processor.shape(), plan != Plan::Reference) {
            packed.arrange(shape);
            packed.conv.weight = Vec::new();
        }
        packed
    }

    /// The convolution, maybe without its weights.
    pub fn conv(&self) -> &Conv {
        &self.conv
    }

    /// Changes what its sums become.
    pub fn set_output(&mut self, output: Output) {
        self.conv.output = output;
    }

    /// Whose kernel computes it.
    pub fn processor(&self) -> Processor {
        self.processor
    }

    /// Bytes of weights, biases and factors, in the kernel's order and in the convolution's.
    pub fn bytes(&self) -> usize {
        let others =
            [self.bias.capacity(), self.factor.capacity(), self.conv.bias.capacity(), self.conv.factor.capacity()];
        self.weight.all().len() + self.conv.weight.capacity() + 4 * others.into_iter().sum::<usize>()
    }

    fn arrange(&mut self, shape: Shape) {
        let units = match self.plan {
            Plan::Reference => return,
            Plan::Dense => self.dense(shape, shape.panel),
            Plan::Tiles => self.tiles(shape),
            Plan::Merged(m) => self.merged(shape, m),
            Plan::Depthwise => self.depthwise(shape),
        };
        let bytes = units.len() * 4;
        let target = self.weight.bytes(bytes);
        for (to, unit) in target.chunks_exact_mut(4).zip(units) {
            match shape.unit {
                2 => {
                    to[..2].copy_from_slice(&i16::from(unit[0]).to_le_bytes());
                    to[2..].copy_from_slice(&i16::from(unit[1]).to_le_bytes());
                }
                _ => to.iter_mut().zip(unit).for_each(|(to, w)| *to = w.cast_unsigned()),
            }
        }
    }

    /// Biases and factors of some channels, for so many lanes.
    fn lanes(&mut self, channels: std::ops::Range<usize>, lanes: usize, order: impl Fn(usize) -> usize) {
        let count = channels.len();
        let at = |lane: usize| (lane < count).then(|| channels.start + lane);
        self.bias.extend((0..lanes).map(|lane| at(order(lane)).map_or(0, |at| self.conv.bias[at])));
        self.factor.extend((0..lanes).map(|lane| at(lane).map_or(0.0, |at| self.conv.factor[at])));
    }

    /// Some weights that follow one another, zeros after the last of them.
    fn unit(&self, filter: Option<usize>, from: usize, to: usize, unit: usize) -> [i8; 4] {
        let mut values = [0; 4];
        if let Some(filter) = filter {
            let row = self.conv.shape.kernel[0] * self.conv.shape.kernel[1] * self.conv.shape.depth();
            for (value, at) in values.iter_mut().take(unit).zip(from..to) {
                *value = self.conv.weight[filter * row + at];
            }
        }
        values
    }

    /// `[groups, panels, rows of the kernel, units, vectors of the panel, lanes]`
    fn dense(&mut self, shape: Shape, most: usize) -> Vec<[i8; 4]> {
        let filters = self.conv.shape.filters / self.conv.shape.groups;
        let run = self.conv.shape.kernel[1] * self.conv.shape.depth();
        let mut units = Vec::new();
        for group in 0..self.conv.shape.groups {
            let mut first = group * filters;
            let end = first + filters;
            for panel in panels(filters.div_ceil(shape.lanes), most) {
                let lanes = panel * shape.lanes;
                for ky in 0..self.conv.shape.kernel[0] {
                    for at in (0..run).step_by(shape.unit) {
                        for lane in first..first + lanes {
                            let filter = (lane < end).then_some(lane);
                            units.push(self.unit(filter, ky * run + at, (ky + 1) * run, shape.unit));
                        }
                    }
                }
                self.lanes(first..end.min(first + lanes), lanes, |lane| lane);
                first += lanes;
            }
        }
        units
    }

    /// `[panels, units (all of the kernel, to a multiple of 16), 2 vectors, 16 lanes]`
    fn tiles(&mut self, shape: Shape) -> Vec<[i8; 4]> {
        let all = self.conv.shape.kernel[0] * self.conv.shape.kernel[1] * self.conv.shape.channels;
        let (mut units, lanes) = (Vec::new(), 2 * shape.lanes);
        for first in (0..self.conv.shape.filters).step_by(lanes) {
            for at in (0..all.next_multiple_of(64)).step_by(4) {
                for lane in first..first + lanes {
                    let filter = (lane < self.conv.shape.filters).then_some(lane);
                    units.push(self.unit(filter, at, all, 4));
                }
            }
            self.lanes(first..self.conv.shape.filters.min(first + lanes), lanes, |lane| lane);
        }
        units
    }

    /// `[blocks, rows of the kernel, columns, units of a group, lanes]`
    fn merged(&mut self, shape: Shape, m: usize) -> Vec<[i8; 4]> {
        let (depth, [height, width]) = (self.conv.shape.depth(), self.conv.shape.kernel);
        let mut units = Vec::new();
        // lane after lane, the groups take turns
        let channel = |lane: usize| lane % m * depth + lane / m;
        for first in (0..self.conv.shape.filters).step_by(shape.lanes) {
            for at in (0..height * width * depth).step_by(shape.unit) {
                for lane in 0..shape.lanes {
                    let filter = Some(first + channel(lane)).filter(|&filter| filter < self.conv.shape.filters);
                    units.push(self.unit(filter, at, height * width * depth, shape.unit));
                }
            }
            self.lanes(first..self.conv.shape.filters.min(first + shape.lanes), shape.lanes, channel);
        }
        units
    }

    /// `[blocks, units of the kernel's height, columns, lanes]`
    fn depthwise(&mut self, shape: Shape) -> Vec<[i8; 4]> {
        let [height, width] = self.conv.shape.kernel;
        let mut units = Vec::new();
        for first in (0..self.conv.shape.filters).step_by(shape.lanes) {
            for top in (0..height).step_by(shape.unit) {
                for column in 0..width {
                    for filter in first..first + shape.lanes {
                        let mut unit = [0; 4];
                        for (value, row) in unit.iter_mut().take(shape.unit).zip(top..height) {
                            if filter < self.conv.shape.filters {
                                *value = self.conv.weight[(filter * height + row) * width + column];
                            }
                        }
                        units.push(unit);
                    }
                }
            }
            self.lanes(first..self.conv.shape.filters.min(first + shape.lanes), shape.lanes, |lane| lane);
        }
        units
    }
}
