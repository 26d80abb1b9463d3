//! The [convolution in groups](crate::kernels::grouped_conv) as an operator of ONNX Runtime.

use std::cell::RefCell;
use std::sync::Mutex;

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::TensorElementType;

use super::arguments::{UNITS, activation, float, input, number, processor, refused, shape, shape_like_first, values};
use crate::kernels::activation::Activation;
use crate::kernels::grouped_conv::{Block, GroupedConv};
use crate::kernels::processor::Processor;
use crate::kernels::scratch::Scratch;

/// Fewest rows of a map that are a unit: what is above and below is read twice.
const ROWS: usize = 8;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `GroupedConv(X, W, B) -> Y, means of Y's channels`.
pub(super) struct GroupedOperator;

pub(super) struct GroupedKernel {
    pub(super) processor: Processor,
    group: usize,
    kernel: usize,
    stride: usize,
    pads: [usize; 4],
    before: Activation,
    after: Activation,
}

impl Operator for GroupedOperator {
    type Kernel<'a> = GroupedKernel;

    fn name(&self) -> &str {
        crate::kernels::GROUPED_CONV
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [float(), float(), float()]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32), OperatorOutput::optional(TensorElementType::Float32)]
    }

    fn create_kernel<'a>(&self, context: &KernelContext<'a>) -> ort::Result<GroupedKernel> {
        GroupedKernel::read(context)
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        let sides = Sides::read(context);
        shape_like_first(context, 0, |[channels, height, width]| sides.as_ref()?.of(channels, height, width))
    }
}

/// What an output's sides follow from.
pub(super) struct Sides {
    kernel: i64,
    stride: i64,
    pads: Vec<i64>,
}

impl Sides {
    pub(super) fn read(context: &ShapeInferenceContext) -> Option<Self> {
        let (kernel, stride) = (context.attr("kernel").ok()?, context.attr("stride").ok()?);
        Some(Self { kernel, stride, pads: context.attr("pads").ok()? })
    }

    pub(super) fn of(&self, channels: i64, height: i64, width: i64) -> Option<[i64; 3]> {
        let &[top, left, bottom, right] = self.pads.as_slice() else { return None };
        let out = |side: i64, before: i64, after: i64| {
            let padded = side.checked_add(before)?.checked_add(after)?.checked_sub(self.kernel)?;
            (padded >= 0).then_some(padded.checked_div(self.stride)? + 1)
        };
        Some([channels, out(height, top, bottom)?, out(width, left, right)?])
    }
}

impl GroupedKernel {
    /// As the operator's attributes have it.
    pub(super) fn read(context: &KernelContext<'_>) -> ort::Result<Self> {
        let pads: Option<Vec<i64>> = context.get("pads");
        let mut sides = [0; 4];
        for (side, pad) in sides.iter_mut().zip(pads.filter(|p| p.len() == 4).ok_or_else(|| refused("no pads"))?) {
            *side = usize::try_from(pad).map_err(|_| refused("negative pads"))?;
        }
        Ok(Self {
            processor: processor()?,
            group: number(context, "channels_of_group")?,
            kernel: number(context, "kernel")?,
            stride: number(context, "stride")?,
            pads: sides,
            before: activation(context, "before")?,
            after: activation(context, "after")?,
        })
    }

    /// The convolution of maps of such a size, if there is a kernel for it.
    pub(super) fn conv(&self, height: usize, width: usize) -> Option<GroupedConv> {
        let [top, left, bottom, right] = self.pads;
        let out =
            |side: usize, pads: usize| Some(side.checked_add(pads)?.checked_sub(self.kernel)? / self.stride.max(1) + 1);
        let conv = GroupedConv {
            block: self.processor.block(),
            group: self.group,
            kernel: self.kernel,
            stride: self.stride,
            height,
            width,
            pads: [top, left],
            out_height: out(height, top + bottom)?,
            out_width: out(width, left + right)?,
            before: self.before,
            after: self.after,
        };
        conv.is_supported().then_some(conv)
    }
}

/// What threads do one of at a time.
struct Unit<'a> {
    image: usize,
    block: usize,
    first: usize,
    output: &'a mut [f32],
    sums: Option<&'a mut [f32]>,
}

impl Kernel for GroupedKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let (x, weight, bias) = (input(context, 0)?, input(context, 1)?, input(context, 2)?);
        let (dims, x) = x.try_extract_tensor::<f32>()?;
        let [images, channels, height, width] = shape(dims)?;
        let (_, weight) = weight.try_extract_tensor::<f32>()?;
        let (_, bias) = bias.try_extract_tensor::<f32>()?;
        let conv = self.conv(height, width).ok_or_else(|| refused("a convolution without a kernel"))?;
        let (b, blocks) = (conv.block, channels / conv.block);
        let plane = values(&[height, width, b])?;
        let out_plane = values(&[conv.out_height, conv.out_width, b])?;
        let whole = channels.is_multiple_of(b.max(conv.group))
            && x.len() == values(&[images, blocks, plane])?
            && weight.len() == blocks * conv.weights()
            && bias.len() == channels;
        if !whole {
            return Err(refused("inputs don't fit together"));
        }
        let dims = |height: usize, width: usize| [images, channels, height, width].map(|side| side as i64);
        let mut y = context.output(0, dims(conv.out_height, conv.out_width))?.ok_or_else(|| refused("no output"))?;
        let (_, y) = y.try_extract_tensor_mut::<f32>()?;
        let mut means = context.output(1, dims(1, 1))?;

        // the same for any number of threads and images, since channels are summed up by it
        let bands = UNITS.div_ceil(blocks.max(1)).min(conv.out_height / ROWS).max(1);
        let rows = conv.out_height.div_ceil(bands);
        let bands = conv.out_height.div_ceil(rows);
        let mut sums = vec![0.0; if means.is_some() { images * blocks * bands * b } else { 0 }];
        let mut parts = sums.chunks_exact_mut(b);
        let mut units = Vec::with_capacity(images * blocks * bands);
        for (i, output) in y.chunks_exact_mut(out_plane).enumerate() {
            for (band, output) in output.chunks_mut(rows * conv.out_width * b).enumerate() {
                let unit =
                    Unit { image: i / blocks, block: i % blocks, first: band * rows, output, sums: parts.next() };
                units.push(Mutex::new(Some(unit)));
            }
        }
        context.par_for(units.len(), units.len(), |i| {
            let unit = units.get(i).and_then(|unit| unit.lock().ok()?.take());
            let Some(Unit { image, block, first, output, sums }) = unit else { return };
            let input = (image * blocks + conv.first_input(block)) * plane;
            let weights = conv.weights();
            let block = Block {
                input: &x[input..input + conv.depth() * plane],
                weight: &weight[block * weights..(block + 1) * weights],
                bias: &bias[block * b..(block + 1) * b],
                output,
                first,
                sums,
            };
            SCRATCH.with_borrow_mut(|scratch| self.processor.convolve(&conv, block, scratch));
        })?;
        drop(units);
        if let Some(means) = &mut means {
            let (_, means) = means.try_extract_tensor_mut::<f32>()?;
            let pixels = (conv.out_height * conv.out_width) as f32;
            for (mean, parts) in means.chunks_exact_mut(b).zip(sums.chunks_exact(bands * b)) {
                for (lane, mean) in mean.iter_mut().enumerate() {
                    *mean = parts.iter().skip(lane).step_by(b).sum::<f32>() / pixels;
                }
            }
        }
        Ok(())
    }
}
