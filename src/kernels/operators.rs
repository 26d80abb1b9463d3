//! The kernels as operators of ONNX Runtime, in a domain of their own. They are for graphs in memory, which `relayout` writes.
//!
//! Maps come in blocks of channels, as ONNX Runtime's own blocked operators have them: the shape says `[N, C, H, W]`, the
//! values are `[N, C/b, H, W, b]`.

use std::cell::RefCell;
use std::sync::Mutex;

use ort::operator::{ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput};
use ort::value::{TensorElementType, ValueRef};

use super::DOMAIN;
use super::activation::Activation;
use super::grouped_conv::{Block, GroupedConv};
use super::processor::Processor;
use super::scratch::Scratch;

/// All operators, for a session.
pub fn domain() -> ort::Result<OperatorDomain> {
    OperatorDomain::new(DOMAIN)?.add(ConvOperator)?.add(GatedOperator)?.add(ActivationOperator)
}

/// Units of work that an operator makes of an image at least, for threads to share.
const UNITS: usize = 6;

/// Fewest rows of a map that are a unit: what is above and below is read twice.
const ROWS: usize = 8;

/// Fewest values that are a unit of a pass.
const VALUES: usize = 1 << 14;

/// Values that a pass copies and works on at once: whole blocks, which stay in the nearest cache.
const PART: usize = 1 << 11;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

fn float() -> OperatorInput {
    OperatorInput::required(TensorElementType::Float32)
}

fn refused(what: &str) -> ort::Error {
    ort::Error::new(format!("{DOMAIN}: {what}"))
}

fn processor() -> ort::Result<Processor> {
    Processor::here().ok_or_else(|| refused("this processor has no kernels"))
}

fn activation(context: &KernelContext<'_>, name: &str) -> ort::Result<Activation> {
    let activation: Option<String> = context.get(name);
    Activation::named(activation.as_deref().unwrap_or_default()).ok_or_else(|| refused("an unknown activation"))
}

fn number(context: &KernelContext<'_>, name: &str) -> ort::Result<usize> {
    let number: Option<i64> = context.get(name);
    number.and_then(|v| usize::try_from(v).ok()).ok_or_else(|| refused(&format!("`{name}` is missing or negative")))
}

fn input(context: &ComputeContext, i: usize) -> ort::Result<ValueRef<'_>> {
    context.input(i)?.ok_or_else(|| refused("an input is missing"))
}

/// `[N, C, H, W]`.
fn shape(dims: &[i64]) -> ort::Result<[usize; 4]> {
    let mut shape = [0; 4];
    for (to, dim) in shape.iter_mut().zip(dims) {
        *to = usize::try_from(*dim).map_err(|_| refused("a negative shape"))?;
    }
    if dims.len() == 4 { Ok(shape) } else { Err(refused("a map of other than four dimensions")) }
}

/// Their product: how many values a part of a map has.
fn values(sides: &[usize]) -> ort::Result<usize> {
    let product = sides.iter().try_fold(1, |product: usize, &side| product.checked_mul(side));
    product.ok_or_else(|| refused("a map larger than any"))
}

/// `GroupedConv(X, W, B) -> Y, means of Y's channels`.
struct ConvOperator;

struct ConvKernel {
    processor: Processor,
    group: usize,
    kernel: usize,
    stride: usize,
    pads: [usize; 4],
    before: Activation,
    after: Activation,
}

impl Operator for ConvOperator {
    type Kernel<'a> = ConvKernel;

    fn name(&self) -> &str {
        super::GROUPED_CONV
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [float(), float(), float()]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32), OperatorOutput::optional(TensorElementType::Float32)]
    }

    fn create_kernel<'a>(&self, context: &KernelContext<'a>) -> ort::Result<ConvKernel> {
        let pads: Option<Vec<i64>> = context.get("pads");
        let mut sides = [0; 4];
        for (side, pad) in sides.iter_mut().zip(pads.filter(|p| p.len() == 4).ok_or_else(|| refused("no pads"))?) {
            *side = usize::try_from(pad).map_err(|_| refused("negative pads"))?;
        }
        Ok(ConvKernel {
            processor: processor()?,
            group: number(context, "channels_of_group")?,
            kernel: number(context, "kernel")?,
            stride: number(context, "stride")?,
            pads: sides,
            before: activation(context, "before")?,
            after: activation(context, "after")?,
        })
    }
}

impl ConvKernel {
    fn conv(&self, height: usize, width: usize) -> Option<GroupedConv> {
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

impl Kernel for ConvKernel {
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

/// `Gated(X, G) -> activation(X · G)`, where `G` is of one pixel.
struct GatedOperator;

/// `Activation(X) -> activation(X)`.
struct ActivationOperator;

struct PassKernel {
    processor: Processor,
    activation: Activation,
    gated: bool,
}

impl Operator for GatedOperator {
    type Kernel<'a> = PassKernel;

    const INPLACES: &[(u32, u32)] = &[(0, 0)];

    fn name(&self) -> &str {
        super::GATED
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [float(), float()]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'a>(&self, context: &KernelContext<'a>) -> ort::Result<PassKernel> {
        Ok(PassKernel { processor: processor()?, activation: activation(context, "activation")?, gated: true })
    }
}

impl Operator for ActivationOperator {
    type Kernel<'a> = PassKernel;

    const INPLACES: &[(u32, u32)] = &[(0, 0)];

    fn name(&self) -> &str {
        super::ACTIVATION
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [float()]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'a>(&self, context: &KernelContext<'a>) -> ort::Result<PassKernel> {
        Ok(PassKernel { processor: processor()?, activation: activation(context, "activation")?, gated: false })
    }
}

impl Kernel for PassKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let b = self.processor.block();
        let x = input(context, 0)?;
        let (dims, x) = x.try_extract_tensor::<f32>()?;
        let [images, channels, height, width] = shape(dims)?;
        let plane = values(&[height, width, b])?;
        let whole = channels.is_multiple_of(b) && x.len() == values(&[images, channels / b, plane])?;
        let gate = if self.gated { Some(input(context, 1)?) } else { None };
        let gate = gate.as_ref().map(|gate| gate.try_extract_tensor::<f32>()).transpose()?.map(|(_, gate)| gate);
        if !whole || gate.is_some_and(|gate| gate.len() != images * channels) {
            return Err(refused("inputs don't fit together"));
        }
        let mut y = context.output(0, dims.to_vec())?.ok_or_else(|| refused("no output"))?;
        // read no more if the output came to be in the input's place
        let place = x.as_ptr();
        let (_, y) = y.try_extract_tensor_mut::<f32>()?;
        if y.is_empty() {
            return Ok(());
        }
        let apart = if std::ptr::eq(place, y.as_ptr()) { None } else { Some(x) };
        // whole maps, since each has its gate
        let maps = if self.gated || plane >= VALUES { 1 } else { VALUES.div_ceil(plane) };
        let unit = maps * plane;
        let units: Vec<_> = y.chunks_mut(unit).map(|y| Mutex::new(Some(y))).collect();
        context.par_for(units.len(), units.len(), |i| {
            let Some(y) = units.get(i).and_then(|unit| unit.lock().ok()?.take()) else { return };
            for (part, y) in y.chunks_mut(PART).enumerate() {
                if let Some(x) = apart {
                    let from = i * unit + part * PART;
                    y.copy_from_slice(&x[from..from + y.len()]);
                }
                match gate {
                    Some(gate) => self.processor.gated(self.activation, &gate[i * b..(i + 1) * b], y),
                    None => self.processor.activate(self.activation, y),
                }
            }
        })
    }
}
