//! The sizes of a convolution of one image, of integers or in single precision.

use super::product;

/// Sizes of a convolution. Maps are `[H, W, C]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvShape {
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
}

impl ConvShape {
    /// Channels of a group.
    pub fn depth(&self) -> usize {
        self.channels / self.groups.max(1)
    }

    /// Whether the sizes make sense, and so many weights and biases fit them.
    pub(super) fn has_weights(&self, weights: usize, biases: usize) -> bool {
        let sides = [self.stride, self.dilation, self.kernel, self.out_size].into_iter().flatten();
        self.groups > 0
            && self.channels > 0
            && self.channels.is_multiple_of(self.groups)
            && self.filters.is_multiple_of(self.groups)
            && sides.into_iter().all(|side| side > 0)
            && product([self.filters, self.kernel[0], self.kernel[1], self.depth()]) == Some(weights)
            && biases == self.filters
    }
}
