//! Layers with weights, in the shapes that kernels know.

use super::{Lowering, uncovered};
use crate::int8::Int8Error;
use crate::int8::operators::{Kind, Operator, Window};
use crate::kernels::int8::conv_shape::ConvShape;

/// A convolution, or the classifier as one.
pub(super) struct Layer<'a> {
    pub window: Window,
    pub groups: usize,
    /// Name of its weights.
    pub weight: &'a str,
    /// Name of its biases.
    pub bias: Option<&'a str>,
    /// Channels, height and width of what it reads and of what it makes.
    pub sizes: [[usize; 3]; 2],
}

impl Layer<'_> {
    /// Its sizes, as kernels take them.
    pub(super) fn shape(&self) -> ConvShape {
        let ([[channels, height, width], [filters, out_height, out_width]], window) = (self.sizes, self.window);
        ConvShape {
            channels,
            size: [height, width],
            filters,
            out_size: [out_height, out_width],
            groups: self.groups,
            kernel: window.kernel,
            stride: window.stride,
            dilation: window.dilation,
            pads: [window.pads[0], window.pads[1]],
        }
    }
}

impl<'a> Lowering<'a> {
    /// The layer that an operator is, of a map of this size.
    pub(super) fn layer(&self, operator: &'a Operator, size: [usize; 3]) -> Result<Layer<'a>, Int8Error> {
        let sizes = [size, self.sizes[operator.output.as_str()]];
        let one = Window { kernel: [1, 1], stride: [1, 1], dilation: [1, 1], pads: [0; 4] };
        Ok(match &operator.kind {
            Kind::Conv { window, groups, weight, bias } => {
                Layer { window: *window, groups: *groups, weight, bias: Some(bias), sizes }
            }
            // a pixel's channels as a row of pixels of one channel
            Kind::ChannelConv { kernel, pad, weight } => {
                let window = Window { kernel: [1, *kernel], pads: [0, *pad, 0, *pad], ..one };
                Layer { window, groups: 1, weight, bias: None, sizes: [[1, 1, size[0]]; 2] }
            }
            Kind::Linear { weight, bias } => Layer { window: one, groups: 1, weight, bias: Some(bias), sizes },
            _ => return Err(uncovered(operator, "it has no weights")),
        })
    }
}

/// Whether weights of this shape are a layer's.
pub(super) fn fits(dims: &[usize], layer: &Layer<'_>) -> bool {
    let Layer { window: Window { kernel, .. }, groups, sizes: [[channels, height, width], [filters, ..]], .. } = layer;
    let sides = dims.get(2..).unwrap_or_default();
    dims.get(..2) == Some(&[*filters, channels / groups][..])
        && [&kernel[..], &kernel[1..], &[]].contains(&sides)
        && sides.iter().product::<usize>() == kernel[0] * kernel[1]
        && channels.is_multiple_of(*groups)
        && filters.is_multiple_of(*groups)
        && height * width > 0
}
