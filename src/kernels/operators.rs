//! The kernels as operators of ONNX Runtime, in a domain of their own. They are for graphs in memory, which `relayout` writes.
//!
//! Maps come in blocks of channels, as ONNX Runtime's own blocked operators have them: the shape says `[N, C, H, W]`, the
//! values are `[N, C/b, H, W, b]`.

mod arguments;
mod expand;
mod grouped;
mod pointwise;

use std::sync::Mutex;

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput,
    ShapeInferenceContext,
};
use ort::value::TensorElementType;

use self::arguments::{activation, float, input, processor, refused, shape, shape_like_first, values};
use self::expand::ExpandOperator;
use self::grouped::GroupedOperator;
use self::pointwise::PointwiseOperator;
use super::DOMAIN;
use super::activation::Activation;
use super::processor::Processor;

/// All operators, for a session.
pub fn domain() -> ort::Result<OperatorDomain> {
    OperatorDomain::new(DOMAIN)?
        .add(GroupedOperator)?
        .add(ExpandOperator)?
        .add(PointwiseOperator)?
        .add(GatedOperator)?
        .add(ActivationOperator)
}

/// Fewest values that are a unit of a pass.
const VALUES: usize = 1 << 14;

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

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        shape_like_first(context, 0, Some)
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

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        shape_like_first(context, 0, Some)
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
            let gate = gate.map(|gate| &gate[i * b..(i + 1) * b]);
            match (apart, gate) {
                (Some(x), _) => {
                    self.processor.activate_from(self.activation, gate, &x[i * unit..i * unit + y.len()], y)
                }
                (None, Some(gate)) => self.processor.gated(self.activation, gate, y),
                (None, None) => self.processor.activate(self.activation, y),
            }
        })
    }
}
