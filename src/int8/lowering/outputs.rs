//! What becomes of an operator's integers: who reads them decides.

use super::{Lowering, MOST_SCALED, Storage, uncovered};
use crate::int8::Int8Error;
use crate::int8::function::Function;
use crate::int8::network::Step;
use crate::int8::operators::{Kind, Operator};
use crate::int8::scale::{Scale, table};
use crate::kernels::int8::{Output, Read, ToBytes};

/// What becomes of an operator's integers.
pub(super) struct Finished<'a> {
    /// The map, after a ReLU that became part of the operator.
    pub map: &'a str,
    pub output: Output,
    /// The scale that they get.
    pub scale: f64,
    /// The map that sums are, where they are read.
    pub sums: Option<&'a str>,
    /// The map that bytes are, where they are read.
    pub bytes: Option<(&'a str, Scale)>,
    /// The map in single precision, where that is what the operator makes.
    pub singles: Option<&'a str>,
}

impl<'a> Lowering<'a> {
    /// What becomes of an operator's integers, by who reads them: a ReLU and an activation that read nothing else become
    /// part of it.
    pub(super) fn finished(&mut self, operator: &'a Operator, is_sum: bool) -> Result<Finished<'a>, Int8Error> {
        let (mut map, mut relu, mut clips) = (operator.output.as_str(), false, false);
        if let [(at, reader, false)] = self.readers(map)[..]
            && let Kind::Function(function @ (Function::Relu | Function::Relu6)) = reader.kind
            && !self.in_singles[at]
        {
            if is_sum && function == Function::Relu6 {
                return Err(uncovered(reader, "it is of a sum"));
            }
            self.done.insert(at);
            clips = function == Function::Relu6;
            (map, relu) = (&reader.output, true);
        }
        let readers = self.readers(map);
        let (as_bytes, others): (Vec<&_>, Vec<&_>) = readers.iter().partition(|(.., bytes)| *bytes);
        let (singles, terms): (Vec<&_>, Vec<&_>) =
            others.into_iter().partition(|&&(at, ..): &&(usize, _, _)| self.in_singles[at]);
        if terms.iter().any(|(_, reader, _)| reader.kind != Kind::Add) {
            return Err(uncovered(operator, "what reads it doesn't take integers"));
        }
        let (terms, singles) = (terms.len(), singles.len());
        if terms == 0 && singles > 0 && !is_sum {
            let output = Output::Singles;
            return Ok(Finished { map, output, scale: 1.0, sums: None, bytes: None, singles: Some(map) });
        }
        let mut bytes = None;
        let mut to = ToBytes { zero: 0, table: None };
        if !as_bytes.is_empty() {
            let scale = self.scale(map)?;
            to.zero = scale.zero;
            bytes = Some((map, scale));
            if let [(at, reader, _)] = as_bytes[..]
                && let Kind::Function(function) = reader.kind
            {
                let after = self.scale(&reader.output)?;
                to.table = Some(Box::new(table(function, scale, after)));
                bytes = Some((&reader.output, after));
                self.done.insert(*at);
            }
        }
        let is_sum = is_sum || terms > 0;
        if is_sum && clips {
            return Err(uncovered(operator, "a sum can't be limited to 6"));
        }
        if !is_sum {
            let scale = self.scale(map)?;
            if as_bytes.is_empty() || (relu && scale.zero != 0) {
                return Err(uncovered(operator, "what it makes isn't read as it has to be"));
            }
            let output = Output::Bytes(to);
            return Ok(Finished { map, output, scale: scale.step(), sums: None, bytes, singles: None });
        }
        let scale = self.sum_scale(map)?;
        if bytes.is_some() && 32_768.0 * f64::from(scale) / self.scale(map)?.step() >= MOST_SCALED {
            return Err(Int8Error::Overflow { what: "a sum read as bytes", name: operator.name.clone() });
        }
        let read = match bytes {
            Some(_) => Some(Read { factor: (f64::from(scale) / self.scale(map)?.step()) as f32, to }),
            None => None,
        };
        let sums = (terms + singles > 0).then_some(map);
        Ok(Finished { map, output: Output::Sum { relu, read }, scale: scale.into(), sums, bytes, singles: None })
    }

    /// A step with room for what it makes.
    pub(super) fn placed(&mut self, mut step: Step, finished: &Finished<'a>) -> Result<Step, Int8Error> {
        (step.sums, step.bytes, step.map, step.singles) = (None, None, None, None);
        if let Some(map) = finished.sums {
            let slot = self.value(Storage::Sums, step.size)?;
            self.sums.insert(map, slot);
            step.sums = Some(slot);
        }
        if let Some((map, scale)) = finished.bytes {
            let slot = self.value(Storage::Bytes, step.size)?;
            self.bytes.insert(map, slot);
            step.bytes = Some(slot);
            step.map = Some((map.into(), scale));
        }
        if let Some(map) = finished.singles {
            let slot = self.value(Storage::Singles, step.size)?;
            self.singles.insert(map, slot);
            step.singles = Some(slot);
        }
        Ok(step)
    }
}
