//! Layers that stay in single precision, and how maps get there and back.

use std::collections::HashMap;

use super::layer::fits;
use super::{Lowering, Storage, step, uncovered};
use crate::int8::Int8Error;
use crate::int8::function::Function;
use crate::int8::network::{Slot, Step, Work};
use crate::int8::operators::{Kind, Operator, Operators};
use crate::kernels::int8::float_conv::FloatConv;
use crate::kernels::int8::packed_floats::PackedFloats;
use crate::model::OUTPUT;

/// Which operators compute in single precision: layers whose weights aren't integers, sums that nothing reads as integers, and
/// activations of what isn't u8, unless they are part of the integer operator before them.
pub(super) fn in_singles(operators: &Operators, sum_scales: &HashMap<&str, f32>) -> Vec<bool> {
    let stays = |weight: &String| !operators.integers.contains_key(weight);
    let mut singles = vec![false; operators.all.len()];
    // readers before what they read
    for (at, operator) in operators.all.iter().enumerate().rev() {
        singles[at] = match &operator.kind {
            Kind::Conv { weight, .. } | Kind::ChannelConv { weight, .. } | Kind::Linear { weight, .. } => stays(weight),
            Kind::Add => !sum_scales.contains_key(operator.output.as_str()),
            Kind::Function(function) => {
                let edge = operator.inputs.first();
                edge.is_some_and(|edge| !edge.bytes) && !is_part(operators, sum_scales, &singles, operator, *function)
            }
            _ => false,
        };
    }
    singles
}

/// Whether an activation is part of the integer operator before it.
fn is_part(
    operators: &Operators,
    sum_scales: &HashMap<&str, f32>,
    singles: &[bool],
    operator: &Operator,
    function: Function,
) -> bool {
    let Some(edge) = operator.inputs.first() else { return false };
    let Some(maker) = operators.maker(&edge.map) else { return false };
    let limits = matches!(function, Function::Relu | Function::Relu6) && operators.readers(&edge.map).len() == 1;
    let read_so = || operators.readers(&operator.output).any(|(i, j)| singles[i] && !operators.all[i].inputs[j].bytes);
    limits
        && match &maker.kind {
            Kind::Conv { weight, .. } | Kind::ChannelConv { weight, .. } => {
                operators.integers.contains_key(weight) && !read_so()
            }
            Kind::Gate => !read_so(),
            Kind::Add => sum_scales.contains_key(edge.map.as_str()),
            _ => false,
        }
}

impl<'a> Lowering<'a> {
    /// An operator in single precision.
    pub(super) fn in_single_precision(&mut self, operator: &'a Operator) -> Result<(), Int8Error> {
        let size = self.sizes[operator.output.as_str()];
        let mut made = match &operator.kind {
            Kind::Function(function) => {
                let from = self.single(operator, 0)?;
                Step { from: Some(from), ..step(operator, Work::Activate(*function), size) }
            }
            Kind::Add => {
                let (from, from_too) = (self.single(operator, 0)?, self.single(operator, 1)?);
                Step { from: Some(from), from_too: Some(from_too), ..step(operator, Work::AddSingles, size) }
            }
            _ => {
                let from = self.single(operator, 0)?;
                let packed = PackedFloats::new(self.processor, self.float_conv(operator)?);
                Step { from: Some(from), ..step(operator, Work::FloatConv(Box::new(packed)), size) }
            }
        };
        if matches!(operator.kind, Kind::Linear { .. }) {
            if operator.output != OUTPUT {
                return Err(uncovered(operator, "it doesn't make the logits"));
            }
            self.classes = Some(size[0]);
            self.push(made);
            return Ok(());
        }
        let value = self.value(Storage::Singles, size)?;
        made.singles = Some(value);
        self.singles.insert(&operator.output, value);
        self.push(made);
        self.read_otherwise(operator, &operator.output)
    }

    /// Where an operator's input is in single precision.
    fn single(&mut self, operator: &'a Operator, i: usize) -> Result<Slot, Int8Error> {
        let edge = operator.inputs.get(i).ok_or_else(|| uncovered(operator, "an input is missing"))?;
        let map = edge.map.as_str();
        let known = if edge.bytes { &self.dequantised } else { &self.singles };
        if let Some(&value) = known.get(map) {
            return Ok(value);
        }
        let size = self.sizes[map];
        if edge.bytes {
            let x = self.bytes.get(map).copied();
            let x = x.ok_or_else(|| Int8Error::Unreadable(format!("`{map}` is read before it is made")))?;
            let scale = self.scale(map)?;
            let value = self.value(Storage::Singles, size)?;
            let number = |q: usize| (q as i32 - i32::from(scale.zero)) as f32 * scale.scale;
            let work = Work::Dequantise(Box::new(std::array::from_fn(number)));
            self.push(Step { x: Some(x), singles: Some(value), ..step(operator, work, size) });
            self.dequantised.insert(map, value);
            return Ok(value);
        }
        if map == self.operators.input {
            let value = self.value(Storage::Singles, size)?;
            self.image_singles = Some(value);
            self.singles.insert(map, value);
            return Ok(value);
        }
        Err(uncovered(operator, "what it reads is neither u8 nor in single precision"))
    }

    /// Adds steps for those that read a map in another way than it was made: what is in single precision as integers, and a
    /// residual sum in single precision.
    pub(super) fn read_otherwise(&mut self, operator: &'a Operator, map: &'a str) -> Result<(), Int8Error> {
        let readers = self.readers(map);
        let (mut terms, mut bytes, mut singles) = (false, false, false);
        for &(at, reader, as_bytes) in &readers {
            bytes |= as_bytes;
            singles |= !as_bytes && self.in_singles[at];
            terms |= !as_bytes && !self.in_singles[at] && reader.kind == Kind::Add;
        }
        let size = self.sizes[map];
        let Some(&from) = self.singles.get(map) else {
            if let Some(&sums) = self.sums.get(map).filter(|_| singles) {
                let value = self.value(Storage::Singles, size)?;
                let work = Work::OfSums(self.sum_scale(map)?);
                self.push(Step { terms: Some(sums), singles: Some(value), ..step(operator, work, size) });
                self.singles.insert(map, value);
            }
            return Ok(());
        };
        if bytes {
            let work = Work::Quantise(self.scale(map)?);
            self.bytes_step(map, Step { from: Some(from), ..step(operator, work, size) })?;
        }
        if terms {
            let work = Work::ToSums(self.sum_scale(map)?);
            let sums = self.value(Storage::Sums, size)?;
            self.sums.insert(map, sums);
            self.push(Step { from: Some(from), sums: Some(sums), ..step(operator, work, size) });
        }
        Ok(())
    }

    /// A convolution or the classifier, as its weights are in the file.
    fn float_conv(&self, operator: &'a Operator) -> Result<FloatConv, Int8Error> {
        let edge = operator.inputs.first().ok_or_else(|| uncovered(operator, "an input is missing"))?;
        let layer = self.layer(operator, self.sizes[edge.map.as_str()])?;
        let (weight, bias, shape) = (layer.weight, layer.bias, layer.shape());
        let unreadable =
            || uncovered(operator, "its weights are neither integers nor in single precision, or don't fit it");
        let dims = self.constants.dims(weight).ok_or_else(unreadable)?;
        let values = self.constants.singles(weight).ok_or_else(unreadable)?;
        let bias = match bias {
            Some(bias) => self.constants.singles(bias).ok_or_else(unreadable)?,
            None => vec![0.0; shape.filters],
        };
        let (filters, depth, taps) = (shape.filters, shape.depth(), shape.kernel[0] * shape.kernel[1]);
        if !fits(&dims, &layer) || bias.len() != filters {
            return Err(unreadable());
        }
        if !values.iter().chain(&bias).all(|value| value.is_finite()) {
            return Err(uncovered(operator, "it has weights that aren't finite"));
        }
        let mut ordered = Vec::with_capacity(values.len());
        for filter in values.chunks_exact((depth * taps).max(1)) {
            // channels last
            ordered.extend((0..taps).flat_map(|tap| (0..depth).map(move |d| filter[d * taps + tap])));
        }
        let conv = FloatConv { shape: layer.shape(), weight: ordered, bias };
        if conv.is_whole() { Ok(conv) } else { Err(unreadable()) }
    }
}
