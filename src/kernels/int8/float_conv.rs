//! What a convolution in single precision is.

use std::ops::Range;

use super::product;

/// A convolution of one image of fixed size. Maps are `[H, W, C]`.
#[derive(Debug, Clone, PartialEq)]
pub struct FloatConv {
    /// Channels of the input.
    pub channels: usize,
    /// Height and width of the input.
    pub size: [usize; 2],
    /// Channels of the output.
    pub filters: usize,
    /// Height and width of the output.
    pub out_size: [usize; 2],
    /// Groups of channels.
    pub groups: usize,
    /// Height and width of the kernel.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride.
    pub stride: [usize; 2],
    /// Vertical and horizontal dilation.
    pub dilation: [usize; 2],
    /// Pixels of padding above and to the left; what is missing below and to the right is padding too.
    pub pads: [usize; 2],
    /// `[filters, kernel height, kernel width, channels / groups]`.
    pub weight: Vec<f32>,
    /// A filter's bias.
    pub bias: Vec<f32>,
}

impl FloatConv {
    /// Channels of a group.
    pub fn depth(&self) -> usize {
        self.channels / self.groups.max(1)
    }

    /// Whether sizes, weights and biases fit together.
    pub fn is_whole(&self) -> bool {
        let sides = [self.stride, self.dilation, self.kernel, self.out_size].into_iter().flatten();
        self.groups > 0
            && self.channels > 0
            && self.channels.is_multiple_of(self.groups)
            && self.filters.is_multiple_of(self.groups)
            && sides.into_iter().all(|side| side > 0)
            && product([self.filters, self.kernel[0], self.kernel[1], self.depth()]) == Some(self.weight.len())
            && self.bias.len() == self.filters
    }

    /// Whether the input is an image, and the output so many rows of one.
    pub fn fits(&self, rows: &Range<usize>, input: &[f32], output: &[f32]) -> bool {
        rows.end <= self.out_size[0]
            && product([self.size[0], self.size[1], self.channels]).is_some_and(|values| input.len() >= values)
            && product([rows.len(), self.out_size[1], self.filters]) == Some(output.len())
    }

    /// Where the pixel begins that the kernel's pixel `(ky, kx)` reads for an output, if that isn't padding.
    #[inline(always)]
    pub(super) fn pixel(&self, [row, column]: [usize; 2], [ky, kx]: [usize; 2]) -> Option<usize> {
        let y = (row * self.stride[0] + ky * self.dilation[0]).checked_sub(self.pads[0])?;
        let x = (column * self.stride[1] + kx * self.dilation[1]).checked_sub(self.pads[1])?;
        (y < self.size[0] && x < self.size[1]).then_some((y * self.size[1] + x) * self.channels)
    }
}
