//! The [convolution of single pixels](crate::kernels::pointwise_conv) as an operator of ONNX Runtime.

use std::cell::RefCell;
use std::sync::Mutex;

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::{TensorElementType, ValueRef};

use super::arguments::{
    UNITS, activation, float, input, length, number, processor, refused, shape, shape_like_first, values,
};
use crate::kernels::activation::Activation;
use crate::kernels::pointwise_conv::{Outputs, Panel};
use crate::kernels::processor::Processor;
use crate::kernels::scratch::Scratch;

/// Fewest pixels that are a unit of work, where a map is divided at all: every unit reads all weights.
const PIXELS: usize = 48;

/// Most values of a map that is read as a whole for every block of outputs: it stays in the second cache.
const MAP: usize = 1 << 18;

/// Most values of a panel of a larger one.
const PANEL: usize = 1 << 16;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `PointwiseConv(X, W, B, S, G) -> Y`: of `X`, of one `stride`-th of its rows and columns, times the gate `G` (of one pixel) if
/// it is `gated`, and an activation of that. `S` is added to the convolution if it `sums`, and `Y` is an activation of that. What
/// there isn't is left out, so that `G` may come fourth.
pub(super) struct PointwiseOperator;

pub(super) struct PointwiseKernel {
    processor: Processor,
    stride: usize,
    before: Activation,
    after: Activation,
    sums: bool,
    gated: bool,
}

impl Operator for PointwiseOperator {
    type Kernel<'a> = PointwiseKernel;

    const INPLACES: &[(u32, u32)] = &[(3, 0)];

    fn name(&self) -> &str {
        crate::kernels::POINTWISE_CONV
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        let optional = || OperatorInput::optional(TensorElementType::Float32);
        [float(), float(), float(), optional(), optional()]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'a>(&self, context: &KernelContext<'a>) -> ort::Result<PointwiseKernel> {
        Ok(PointwiseKernel {
            processor: processor()?,
            stride: number(context, "stride")?.max(1),
            before: activation(context, "before")?,
            after: activation(context, "after")?,
            sums: number(context, "sums")? > 0,
            gated: number(context, "gated")? > 0,
        })
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        let (channels, stride) = (length(context, 2), context.attr("stride").ok());
        shape_like_first(context, 0, |[_, height, width]| {
            let out = |side: i64| side.checked_sub(1)?.checked_div(stride?)?.checked_add(1);
            Some([channels?, out(height)?, out(width)?])
        })
    }
}

/// Maps of all images, and how they are read.
pub(super) struct Maps<'a> {
    pub(super) processor: Processor,
    pub(super) x: &'a [f32],
    /// Blocks of channels.
    pub(super) depth: usize,
    /// Values of a block of an image.
    pub(super) plane: usize,
    /// Of pixels of a row, in and out.
    pub(super) widths: [usize; 2],
    /// Step from one row and column that is read to the next.
    pub(super) stride: usize,
    pub(super) gate: Option<&'a [f32]>,
    pub(super) before: Activation,
}

impl Maps<'_> {
    /// Whether pixels are read as they are.
    pub(super) fn are_plain(&self) -> bool {
        self.gate.is_none() && self.before == Activation::None && self.stride == 1
    }

    /// An image, as it is.
    pub(super) fn panel(&self, image: usize) -> Panel<'_> {
        let size = self.depth * self.plane;
        Panel { values: &self.x[image * size..(image + 1) * size], pitch: self.plane, depth: self.depth }
    }

    /// Copies pixels of a block from the `first` on, times their gate, through the activation.
    fn copy(&self, image: usize, block: usize, first: usize, target: &mut [f32]) {
        let b = self.processor.block();
        let i = image * self.depth + block;
        let source = &self.x[i * self.plane..(i + 1) * self.plane];
        let gate = self.gate.map(|gate| &gate[i * b..(i + 1) * b]);
        let [width, out_width] = self.widths;
        if self.stride == 1 {
            let source = &source[first * b..first * b + target.len()];
            return self.processor.activate_from(self.before, gate, source, target);
        }
        for (pixel, target) in (first..).zip(target.chunks_exact_mut(b)) {
            let (row, column) = (pixel / out_width, pixel % out_width);
            let at = (row * width + column) * self.stride * b;
            self.processor.activate_from(self.before, gate, &source[at..at + b], target);
        }
    }

    /// Copies an image of so many values a block, with the threads that there are.
    pub(super) fn copy_all<'a>(
        &self,
        context: &ComputeContext,
        image: usize,
        plane: usize,
        values: &'a mut [f32],
    ) -> ort::Result<Panel<'a>> {
        let some = self.depth.div_ceil(UNITS);
        let copies: Vec<_> = values.chunks_mut(some * plane).map(Mutex::new).collect();
        context.par_for(copies.len(), copies.len(), |i| {
            let Some(mut targets) = copies.get(i).and_then(|copy| copy.lock().ok()) else { return };
            for (block, target) in (i * some..).zip(targets.chunks_exact_mut(plane)) {
                self.copy(image, block, 0, target);
            }
        })?;
        drop(copies);
        Ok(Panel { values, pitch: plane, depth: self.depth })
    }
}

/// Some pixels of some blocks of output channels, which a thread computes at a time.
type Unit<'a> = Mutex<Vec<&'a mut [f32]>>;

/// How outputs are divided into units.
struct Division {
    /// Values of a block of an image.
    plane: usize,
    /// Blocks of an image.
    blocks: usize,
    /// Pixels of a unit, in values.
    part: usize,
    /// Blocks of a unit.
    group: usize,
}

impl Division {
    fn parts(&self) -> usize {
        self.plane.div_ceil(self.part)
    }

    fn groups(&self) -> usize {
        self.blocks.div_ceil(self.group)
    }

    /// Image by image, group by group, part by part.
    fn units<'a>(&self, y: &'a mut [f32]) -> Vec<Unit<'a>> {
        let (parts, groups) = (self.parts(), self.groups());
        let images = y.len() / (self.plane * self.blocks);
        let mut units: Vec<_> = (0..images * groups * parts).map(|_| Vec::with_capacity(self.group)).collect();
        for (i, map) in y.chunks_exact_mut(self.plane).enumerate() {
            let first = (i / self.blocks * groups + i % self.blocks / self.group) * parts;
            map.chunks_mut(self.part).zip(&mut units[first..]).for_each(|(part, unit)| unit.push(part));
        }
        units.into_iter().map(Mutex::new).collect()
    }
}

impl PointwiseKernel {
    /// A map of few pixels is divided by output channels, any other by pixels.
    fn division(&self, plane: usize, channels: usize, blocks: usize) -> Division {
        let b = self.processor.block();
        let pixels = plane / b;
        if channels * pixels <= MAP {
            let group = blocks.div_ceil(UNITS).next_multiple_of(2);
            return Division { plane, blocks, part: plane, group };
        }
        let most = (PANEL / channels).max(PIXELS);
        let parts = pixels.div_ceil(most).max(UNITS);
        // whole tiles of whatever processor
        let part = pixels.div_ceil(parts).next_multiple_of(12) * b;
        Division { plane, blocks, part, group: blocks }
    }
}

/// Values of an input that may be missing.
fn numbers<'a>(value: &'a Option<ValueRef<'_>>) -> ort::Result<Option<&'a [f32]>> {
    match value {
        Some(value) => Ok(Some(value.try_extract_tensor::<f32>()?.1)),
        None => Ok(None),
    }
}

impl Kernel for PointwiseKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let (x, weight, bias) = (input(context, 0)?, input(context, 1)?, input(context, 2)?);
        let sum = if self.sums { Some(input(context, 3)?) } else { None };
        let gate = if self.gated { Some(input(context, if self.sums { 4 } else { 3 })?) } else { None };
        let (dims, x) = x.try_extract_tensor::<f32>()?;
        let [images, channels, height, width] = shape(dims)?;
        let (_, weight) = weight.try_extract_tensor::<f32>()?;
        let (_, bias) = bias.try_extract_tensor::<f32>()?;
        // a copy, since the output may come to be in the place of any fourth input
        let (sum, gate) = (numbers(&sum)?, numbers(&gate)?.map(<[f32]>::to_vec));
        let gate = gate.as_deref();

        let b = self.processor.block();
        let (depth, blocks) = (channels / b, bias.len() / b);
        let [out_height, out_width] = [height, width].map(|side| side.div_ceil(self.stride));
        let plane = values(&[height, width, b])?;
        let out_plane = values(&[out_height, out_width, b])?;
        let whole = channels.is_multiple_of(b)
            && bias.len().is_multiple_of(b)
            && x.len() == values(&[images, depth, plane])?
            && weight.len() == values(&[bias.len(), channels])?
            && gate.is_none_or(|gate| gate.len() == images * channels);
        if !whole {
            return Err(refused("inputs don't fit together"));
        }
        let dims = [images, bias.len(), out_height, out_width].map(|side| side as i64);
        let mut y = context.output(0, dims)?.ok_or_else(|| refused("no output"))?;
        // read no more if the output came to be in its place
        let place = sum.map(|sum| (sum.as_ptr(), sum.len()));
        let (_, y) = y.try_extract_tensor_mut::<f32>()?;
        if y.is_empty() {
            return Ok(());
        }
        if place.is_some_and(|(_, count)| count != y.len()) {
            return Err(refused("a sum of maps that differ"));
        }
        if let Some(sum) = sum.filter(|_| place.is_some_and(|(place, _)| !std::ptr::eq(place, y.as_ptr()))) {
            y.copy_from_slice(sum);
        }

        let (processor, stride, before) = (self.processor, self.stride, self.before);
        let maps = Maps { processor, x, depth, plane, widths: [width, out_width], stride, gate, before };
        let adds = place.is_some();
        let division = self.division(out_plane, channels, blocks);
        let (parts, groups) = (division.parts(), division.groups());
        let units = division.units(y);
        let convolve = |panel: Panel<'_>, i: usize, maps: &mut [&mut [f32]]| {
            let first = i / parts % groups * division.group;
            let (first, last) = (first * b, (first + maps.len()) * b);
            let weight = &weight[first * channels..last * channels];
            let bias = &bias[first..last];
            let outputs = Outputs { weight, bias, maps, adds, after: self.after };
            self.processor.convolve_pixels(panel, outputs);
        };
        let outputs_of = |i: usize| Some(std::mem::take(&mut *units.get(i)?.lock().ok()?));
        if maps.are_plain() || groups == 1 {
            return context.par_for(units.len(), units.len(), |i| {
                let Some(mut outputs) = outputs_of(i) else { return };
                let (image, first) = (i / (parts * groups), i % parts * division.part);
                if maps.are_plain() {
                    return convolve(maps.panel(image).from(first), i, &mut outputs);
                }
                let pitch = outputs.first().map_or(0, |output| output.len());
                SCRATCH.with_borrow_mut(|scratch| {
                    let values = scratch.values(depth * pitch);
                    for (block, target) in values.chunks_exact_mut(pitch).enumerate() {
                        maps.copy(image, block, first / b, target);
                    }
                    convolve(Panel { values, pitch, depth }, i, &mut outputs);
                });
            });
        }
        // the whole image is copied once, for all groups
        let mut scratch = SCRATCH.take();
        let values = scratch.values(depth * out_plane);
        for image in 0..images {
            let panel = maps.copy_all(context, image, out_plane, values)?;
            context.par_for(groups, groups, |i| {
                let i = image * groups + i;
                let Some(mut outputs) = outputs_of(i) else { return };
                convolve(panel, i, &mut outputs);
            })?;
        }
        SCRATCH.set(scratch);
        Ok(())
    }
}
