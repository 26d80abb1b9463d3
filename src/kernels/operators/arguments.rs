//! What operators read of a graph, and how they divide their work.

use ort::operator::{ComputeContext, KernelContext, OperatorInput, ShapeInferenceContext};
use ort::value::{SymbolicDimensions, TensorElementType, ValueRef, ValueType};

use crate::kernels::DOMAIN;
use crate::kernels::activation::Activation;
use crate::kernels::processor::Processor;

/// Units of work that an operator makes of an image at least, for threads to share.
pub(super) const UNITS: usize = 6;

pub(super) fn float() -> OperatorInput {
    OperatorInput::required(TensorElementType::Float32)
}

pub(super) fn refused(what: &str) -> ort::Error {
    ort::Error::new(format!("{DOMAIN}: {what}"))
}

pub(super) fn processor() -> ort::Result<Processor> {
    Processor::here().ok_or_else(|| refused("this processor has no kernels"))
}

pub(super) fn activation(context: &KernelContext<'_>, name: &str) -> ort::Result<Activation> {
    let activation: Option<String> = context.get(name);
    Activation::named(activation.as_deref().unwrap_or_default()).ok_or_else(|| refused("an unknown activation"))
}

pub(super) fn number(context: &KernelContext<'_>, name: &str) -> ort::Result<usize> {
    let number: Option<i64> = context.get(name);
    number.and_then(|v| usize::try_from(v).ok()).ok_or_else(|| refused(&format!("`{name}` is missing or negative")))
}

pub(super) fn input(context: &ComputeContext, i: usize) -> ort::Result<ValueRef<'_>> {
    context.input(i)?.ok_or_else(|| refused("an input is missing"))
}

/// `[N, C, H, W]`.
pub(super) fn shape(dims: &[i64]) -> ort::Result<[usize; 4]> {
    let mut shape = [0; 4];
    for (to, dim) in shape.iter_mut().zip(dims) {
        *to = usize::try_from(*dim).map_err(|_| refused("a negative shape"))?;
    }
    if dims.len() == 4 { Ok(shape) } else { Err(refused("a map of other than four dimensions")) }
}

/// Their product: how many values a part of a map has.
pub(super) fn values(sides: &[usize]) -> ort::Result<usize> {
    let product = sides.iter().try_fold(1, |product: usize, &side| product.checked_mul(side));
    product.ok_or_else(|| refused("a map larger than any"))
}

/// Says an output's shape where the first input's is known: other channels, height and width. ONNX Runtime plans its memory by
/// it, and lets an output be in the place of an input of the same shape.
pub(super) fn shape_like_first(
    context: &mut ShapeInferenceContext,
    output: usize,
    sides: impl Fn([i64; 3]) -> Option<[i64; 3]>,
) -> ort::Result<()> {
    let first = context.inputs().into_iter().next();
    let Some(ValueType::Tensor { ty, mut shape, dimension_symbols }) = first else { return Ok(()) };
    let &[_, channels, height, width] = &*shape else { return Ok(()) };
    let known = [channels, height, width].iter().all(|&side| side >= 0);
    let Some(sides) = sides([channels, height, width]).filter(|_| known) else { return Ok(()) };
    shape[1..].copy_from_slice(&sides);
    let images = dimension_symbols.first().cloned().unwrap_or_default();
    let dimension_symbols = SymbolicDimensions::new([images, String::new(), String::new(), String::new()]);
    context.set_output(output, &ValueType::Tensor { ty, shape, dimension_symbols })
}

/// Length of an input of one dimension, such as a bias, where it is known.
pub(super) fn length(context: &ShapeInferenceContext, input: usize) -> Option<i64> {
    match context.inputs().get(input)? {
        ValueType::Tensor { shape, .. } => shape.first().copied().filter(|&length| length >= 0),
        _ => None,
    }
}
