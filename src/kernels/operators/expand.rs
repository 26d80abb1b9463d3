//! A [convolution of single pixels](crate::kernels::pointwise_conv) and, of what comes of it, one [in groups](crate::kernels::grouped_conv), as
//! an operator of ONNX Runtime: the map between them, the largest of a network, never leaves a thread's nearest caches.

use std::cell::RefCell;
use std::sync::Mutex;

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::TensorElementType;

use super::arguments::{activation, float, input, length, refused, shape, shape_like_first, values};
use super::grouped::{GroupedKernel, Sides};
use super::pointwise::Maps;
use crate::kernels::activation::Activation;
use crate::kernels::grouped_conv::{Block, GroupedConv};
use crate::kernels::pointwise_conv::Outputs;
use crate::kernels::scratch::Scratch;

/// Most values of the map between, of one block and some rows.
const BETWEEN: usize = 1 << 15;

/// Blocks that are computed at a time, from the same inputs.
const PAIR: usize = 2;

thread_local! {
    /// The whole input, where it is copied.
    static COPY: RefCell<Scratch> = RefCell::default();
    static BETWEEN_ROWS: RefCell<Scratch> = RefCell::default();
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `ExpandConv(X, V, A, W, B) -> Y, means of Y's channels`: a convolution of single pixels of an activation of `X` (by `V` and
/// `A`), and of an activation of that one in groups (by `W` and `B`), and an activation of that.
pub(super) struct ExpandOperator;

pub(super) struct ExpandKernel {
    first: Activation,
    grouped: GroupedKernel,
}

impl Operator for ExpandOperator {
    type Kernel<'a> = ExpandKernel;

    fn name(&self) -> &str {
        crate::kernels::EXPAND_CONV
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [float(), float(), float(), float(), float()]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32), OperatorOutput::optional(TensorElementType::Float32)]
    }

    fn create_kernel<'a>(&self, context: &KernelContext<'a>) -> ort::Result<ExpandKernel> {
        Ok(ExpandKernel { first: activation(context, "first")?, grouped: GroupedKernel::read(context)? })
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        let (sides, channels) = (Sides::read(context), length(context, 2));
        shape_like_first(context, 0, |[_, height, width]| sides.as_ref()?.of(channels?, height, width))
    }
}

/// Rows of the output that are computed at a time, and those of the map between that they need.
struct Band {
    /// First row between.
    top: usize,
    /// The convolution of those rows.
    conv: GroupedConv,
}

impl Band {
    /// The one of such output rows.
    fn of(conv: &GroupedConv, first: usize, rows: usize) -> Self {
        let start = (first * conv.stride).saturating_sub(conv.pads[0]);
        let end = ((first + rows - 1) * conv.stride + conv.kernel).saturating_sub(conv.pads[0]).min(conv.height);
        // zeros above are only those that are still needed
        let pads = [conv.pads[0].saturating_sub(first * conv.stride), conv.pads[1]];
        let conv = GroupedConv { height: end.saturating_sub(start), pads, out_height: rows, ..*conv };
        Self { top: start, conv }
    }
}

/// Rows of two blocks, which a thread computes at a time.
#[derive(Default)]
struct Unit<'a> {
    outputs: Vec<&'a mut [f32]>,
    sums: Vec<&'a mut [f32]>,
}

impl Kernel for ExpandKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let [x, weight, bias, grouped, after] = [0, 1, 2, 3, 4].map(|i| input(context, i));
        let (x, weight, bias, grouped, after) = (x?, weight?, bias?, grouped?, after?);
        let (dims, x) = x.try_extract_tensor::<f32>()?;
        let [images, channels, height, width] = shape(dims)?;
        let (_, weight) = weight.try_extract_tensor::<f32>()?;
        let (_, bias) = bias.try_extract_tensor::<f32>()?;
        let (_, grouped_weight) = grouped.try_extract_tensor::<f32>()?;
        let (_, grouped_bias) = after.try_extract_tensor::<f32>()?;
        let conv = self.grouped.conv(height, width).filter(|conv| conv.depth() == 1);
        let conv = conv.ok_or_else(|| refused("a convolution without a kernel"))?;
        let processor = self.grouped.processor;
        let b = processor.block();
        let (depth, blocks) = (channels / b, bias.len() / b);
        let plane = values(&[height, width, b])?;
        let out_plane = values(&[conv.out_height, conv.out_width, b])?;
        let whole = channels.is_multiple_of(b)
            && bias.len().is_multiple_of(b)
            && x.len() == values(&[images, depth, plane])?
            && weight.len() == values(&[bias.len(), channels])?
            && grouped_weight.len() == values(&[blocks, conv.weights()])?
            && grouped_bias.len() == bias.len();
        if !whole {
            return Err(refused("inputs don't fit together"));
        }
        let dims = |height: usize, width: usize| [images, bias.len(), height, width].map(|side| side as i64);
        let mut y = context.output(0, dims(conv.out_height, conv.out_width))?.ok_or_else(|| refused("no output"))?;
        let (_, y) = y.try_extract_tensor_mut::<f32>()?;
        let mut means = context.output(1, dims(1, 1))?;
        if y.is_empty() {
            return Ok(());
        }

        // the same for any number of threads and images, since channels are summed up by it
        let most = (BETWEEN / (width * b)).saturating_sub(conv.kernel) / conv.stride + 1;
        let bands = conv.out_height.div_ceil(most);
        let rows = conv.out_height.div_ceil(bands);
        let bands = conv.out_height.div_ceil(rows);
        let pairs = blocks.div_ceil(PAIR);
        let mut sums = vec![0.0; if means.is_some() { images * blocks * bands * b } else { 0 }];
        let mut all_sums = sums.chunks_exact_mut(b);

        let maps =
            Maps { processor, x, depth, plane, widths: [width, width], stride: 1, gate: None, before: self.first };
        let mut copy = COPY.take();
        for (image, y) in y.chunks_exact_mut(blocks * out_plane).enumerate() {
            // pair by pair of a band, since they read the same
            let mut units: Vec<Unit<'_>> = Vec::new();
            units.resize_with(bands * pairs, Unit::default);
            for (block, map) in y.chunks_exact_mut(out_plane).enumerate() {
                for (band, rows) in map.chunks_mut(rows * conv.out_width * b).enumerate() {
                    let unit = &mut units[band * pairs + block / PAIR];
                    unit.outputs.push(rows);
                    unit.sums.extend(all_sums.next());
                }
            }
            let units: Vec<_> = units.into_iter().map(|unit| Mutex::new(Some(unit))).collect();
            let panel = if maps.are_plain() {
                maps.panel(image)
            } else {
                maps.copy_all(context, image, plane, copy.values(depth * plane))?
            };
            context.par_for(units.len(), units.len(), |i| {
                let unit = units.get(i).and_then(|unit| unit.lock().ok()?.take());
                let Some(unit) = unit else { return };
                let (band, first) = (i / pairs, i % pairs * PAIR);
                let last = first + unit.outputs.len();
                let top = band * rows;
                let band = Band::of(&conv, top, rows.min(conv.out_height - top));
                let between = band.conv.height * width * b;
                BETWEEN_ROWS.with_borrow_mut(|memory| {
                    let memory = memory.values(unit.outputs.len() * between);
                    let mut maps: Vec<&mut [f32]> = memory.chunks_exact_mut(between).collect();
                    let outputs = Outputs {
                        weight: &weight[first * b * channels..last * b * channels],
                        bias: &bias[first * b..last * b],
                        maps: &mut maps,
                        adds: false,
                        after: Activation::None,
                    };
                    processor.convolve_pixels(panel.from(band.top * width * b), outputs);
                    let mut sums = unit.sums.into_iter();
                    for ((block, output), input) in (first..last).zip(unit.outputs).zip(&maps) {
                        let weights = conv.weights();
                        let block = Block {
                            input,
                            weight: &grouped_weight[block * weights..(block + 1) * weights],
                            bias: &grouped_bias[block * b..(block + 1) * b],
                            output,
                            first: 0,
                            sums: sums.next(),
                        };
                        SCRATCH.with_borrow_mut(|scratch| processor.convolve(&band.conv, block, scratch));
                    }
                });
            })?;
        }
        COPY.set(copy);
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
