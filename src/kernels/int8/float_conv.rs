//! What a convolution in single precision is.

use std::ops::Range;

use super::conv_shape::ConvShape;
use super::product;

/// A convolution of one image of fixed size. Maps are `[H, W, C]`.
#[derive(Debug, Clone, PartialEq)]
pub struct FloatConv {
    /// Its sizes.
    pub shape: ConvShape,
    /// `[filters, kernel height, kernel width, channels / groups]`.
    pub weight: Vec<f32>,
    /// A filter's bias.
    pub bias: Vec<f32>,
}

impl FloatConv {
    /// Whether sizes, weights and biases fit together.
    pub fn is_whole(&self) -> bool {
        self.shape.has_weights(self.weight.len(), self.bias.len())
    }

    /// Whether the input is an image, and the output so many rows of one.
    pub fn fits(&self, rows: &Range<usize>, input: &[f32], output: &[f32]) -> bool {
        rows.end <= self.shape.out_size[0]
            && product([self.shape.size[0], self.shape.size[1], self.shape.channels])
                .is_some_and(|values| input.len() >= values)
            && product([rows.len(), self.shape.out_size[1], self.shape.filters]) == Some(output.len())
    }

    /// Where the pixel begins that the kernel's pixel `(ky, kx)` reads for an output, if that isn't padding.
    #[inline(always)]
    pub(super) fn pixel(&self, [row, column]: [usize; 2], [ky, kx]: [usize; 2]) -> Option<usize> {
        let y = (row * self.shape.stride[0] + ky * self.shape.dilation[0]).checked_sub(self.shape.pads[0])?;
        let x = (column * self.shape.stride[1] + kx * self.shape.dilation[1]).checked_sub(self.shape.pads[1])?;
        (y < self.shape.size[0] && x < self.shape.size[1]).then_some((y * self.shape.size[1] + x) * self.shape.channels)
    }
}
