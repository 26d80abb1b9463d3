//! Means over all pixels: for gates, and what the classifier reads.

use super::{Lowering, MOST, MOST_SCALED, Storage, step, uncovered};
use crate::int8::Int8Error;
use crate::int8::network::{Step, Work};
use crate::int8::operators::{Kind, Operator};
use crate::kernels::int8::ToBytes;
use crate::model::FEATURES;

impl<'a> Lowering<'a> {
    /// The mean of a map: for a gate, or what the classifier reads.
    pub(super) fn mean(&mut self, operator: &'a Operator) -> Result<(), Int8Error> {
        let (x, from, [channels, height, width]) = self.input(operator, 0)?;
        let pixels = height * width;
        let share = from.step() / pixels as f64;
        let mut map = operator.output.as_str();
        if let [(at, reader, false)] = self.readers(map)[..]
            && reader.kind == Kind::Flatten
        {
            self.done.insert(at);
            map = &reader.output;
        }
        let mut feature =
            if self.operators.outputs.iter().any(|output| output == map) { Some((map, share)) } else { None };
        let (mut as_bytes, mut in_singles) = (false, false);
        for (at, reader, bytes) in self.readers(map) {
            as_bytes |= bytes;
            match reader.kind {
                Kind::Times(factor) if !bytes => {
                    self.done.insert(at);
                    feature = Some((&reader.output, share * f64::from(factor)));
                }
                _ if bytes => {}
                _ if self.in_singles[at] => in_singles = true,
                _ => return Err(uncovered(reader, "it reads a mean that isn't quantised")),
            }
        }
        let size = [channels, 1, 1];
        if let Some((name, factor)) = feature {
            if name != FEATURES {
                return Err(uncovered(operator, "it isn't the output `features`"));
            }
            self.features = Some(channels);
            let work = Work::Features { zero: from.zero, factor: factor as f32 };
            self.push(Step { x: Some(x), pixels, ..step(operator, work, size) });
        }
        if 255.0 * pixels as f64 >= MOST {
            return Err(Int8Error::Overflow { what: "a mean", name: operator.name.clone() });
        }
        if in_singles {
            let value = self.value(Storage::Singles, size)?;
            self.singles.insert(map, value);
            let work = Work::MeanInSingles { zero: from.zero, factor: share as f32 };
            self.push(Step { x: Some(x), singles: Some(value), pixels, ..step(operator, work, size) });
        }
        if in_singles && !as_bytes {
            return Ok(());
        }
        let to = self.scale(map)?;
        let factor = (share / to.step()) as f32;
        if f64::from(factor) * 255.0 * pixels as f64 >= MOST_SCALED {
            return Err(Int8Error::Overflow { what: "a mean", name: operator.name.clone() });
        }
        let work = Work::Mean { zero: from.zero, factor, to: ToBytes { zero: to.zero, table: None } };
        self.bytes_step(map, Step { x: Some(x), pixels, ..step(operator, work, size) })
    }
}
