//! Convolutions, the classifier and gates.

use super::layer::fits;
use super::outputs::Finished;
use super::{Lowering, MOST, MOST_SCALED, step, uncovered};
use crate::int8::Int8Error;
use crate::int8::constants::INT8;
use crate::int8::network::{Step, Work};
use crate::int8::operators::Operator;
use crate::kernels::int8::packed::Packed;
use crate::kernels::int8::{Conv, Gated};

impl<'a> Lowering<'a> {
    /// A convolution or the classifier.
    pub(super) fn convolution(&mut self, operator: &'a Operator, finished: Finished<'a>) -> Result<Step, Int8Error> {
        let (x, input, size) = self.input(operator, 0)?;
        let layer = self.layer(operator, size)?;
        let unreadable = || uncovered(operator, "its weights aren't integers that fit it");
        let [weight, scales] = self.integers(layer.weight).ok_or_else(unreadable)?;
        let dims = self.constants.dims(weight).ok_or_else(unreadable)?;
        let weight = self.constants.bytes(weight, INT8).ok_or_else(unreadable)?;
        let scales = self.constants.singles(scales).ok_or_else(unreadable)?;
        let (bias, shape) = (layer.bias, layer.shape());
        let (filters, depth, taps) = (shape.filters, shape.depth(), shape.kernel[0] * shape.kernel[1]);
        let bias = match bias {
            Some(bias) => {
                let [bias, steps] = self.integers(bias).ok_or_else(unreadable)?;
                let step = |scale: &f32| (f64::from(*scale) * input.step()) as f32;
                let steps = self.constants.singles(steps).ok_or_else(unreadable)?;
                if !steps.iter().copied().eq(scales.iter().map(step)) {
                    return Err(uncovered(operator, "its biases have other scales than its products"));
                }
                self.constants.integers(bias).ok_or_else(unreadable)?
            }
            None => vec![0; filters],
        };
        let fits = fits(&dims, &layer)
            && bias.len() == filters
            && scales.len() == filters
            && scales.iter().all(|scale| scale.is_normal() && *scale > 0.0);
        if !fits {
            return Err(unreadable());
        }
        let mut conv = Conv {
            shape,
            zero: input.zero,
            weight: Vec::with_capacity(weight.len()),
            bias: Vec::with_capacity(filters),
            factor: Vec::with_capacity(filters),
            output: finished.output.clone(),
        };
        for ((filter, bias), scale) in weight.chunks_exact(depth * taps).zip(bias).zip(scales) {
            // channels last
            conv.weight.extend((0..taps).flat_map(|tap| (0..depth).map(move |d| filter[d * taps + tap] as i8)));
            let sums = |of: fn(i64) -> i64| filter.iter().map(|&w| of(i64::from(w as i8))).sum::<i64>();
            let folded = i64::from(bias) - i64::from(input.zero) * sums(|w| w);
            let factor = (input.step() * f64::from(scale) / finished.scale) as f32;
            let most = 255.0 * sums(i64::abs) as f64 + folded.abs() as f64;
            let overflows = |what| Int8Error::Overflow { what, name: operator.name.clone() };
            conv.bias.push(i32::try_from(folded).map_err(|_| overflows("a bias"))?);
            if most >= MOST {
                return Err(overflows("a sum"));
            }
            if !factor.is_finite() || most * f64::from(factor) >= MOST_SCALED {
                return Err(overflows("a scaled sum"));
            }
            conv.factor.push(factor);
        }
        let work = Work::Conv(Box::new(Packed::new(self.processor, conv)));
        let step = Step { x: Some(x), ..step(operator, work, self.sizes[operator.output.as_str()]) };
        self.placed(step, &finished)
    }

    pub(super) fn gate(&mut self, operator: &'a Operator, finished: Finished<'a>) -> Result<Step, Int8Error> {
        let (x, map, size) = self.input(operator, 0)?;
        let (gate, factor, _) = self.input(operator, 1)?;
        let gated = Gated {
            zero: map.zero,
            gate_zero: factor.zero,
            factor: (map.step() * factor.step() / finished.scale) as f32,
            output: finished.output.clone(),
        };
        if f64::from(gated.factor) * 255.0 * 255.0 >= MOST_SCALED {
            return Err(Int8Error::Overflow { what: "a product", name: operator.name.clone() });
        }
        let step = Step { x: Some(x), gate: Some(gate), ..step(operator, Work::Gated(gated), size) };
        self.placed(step, &finished)
    }
}
