//! Residual sums: their scales, and which step makes them.

use std::collections::HashMap;

use super::{Lowering, Storage, step, uncovered};
use crate::int8::Int8Error;
use crate::int8::function::Function;
use crate::int8::network::{Slot, Step, Work};
use crate::int8::operators::{Edge, Kind, Operator, Operators};
use crate::int8::scale::widening;
use crate::kernels::int8::Output;

/// How much finer than bytes a residual sum is.
const FINER: f32 = 64.0;

/// A sum that nothing is done to.
const PLAIN_SUM: Output = Output::Sum { relu: false, read: None };

impl<'a> Lowering<'a> {
    /// A sum becomes part of the step that makes its last term, if only the sum reads that.
    pub(super) fn sum(&mut self, operator: &'a Operator) -> Result<(), Int8Error> {
        let [a, b] = operator.inputs.as_slice() else { return Err(uncovered(operator, "it has not two terms")) };
        let finished = self.finished(operator, true)?;
        let scale = self.sum_scale(&operator.output)?;
        let maker = |edge: &Edge| {
            let slot = self.sums.get(edge.map.as_str()).filter(|_| !edge.bytes)?;
            let alone = self.operators.readers(&edge.map).len() == 1;
            // what is activated or read before the sum stays as it is
            let is_plain = |step: &Step| match &step.work {
                Work::Conv(packed) => packed.conv().output == PLAIN_SUM,
                Work::Gated(gated) => gated.output == PLAIN_SUM,
                _ => false,
            };
            let at = *self.makers.get(slot)?;
            let step = self.steps.get(at)?.as_ref()?;
            (alone && is_plain(step) && step.addend.is_none()).then_some(at)
        };
        let last = match (maker(a), maker(b)) {
            (Some(i), Some(j)) if i > j => Some((i, b)),
            (_, Some(j)) => Some((j, a)),
            (Some(i), None) => Some((i, b)),
            (None, None) => None,
        };
        let size = self.sizes[operator.output.as_str()];
        if let Some((at, other)) = last {
            let addend = self.term(operator, other, scale)?;
            // terms are widened by steps at the end, and before what reads them
            let Some(mut step) = self.steps[at].take() else {
                return Err(uncovered(operator, "a term of the sum isn't made before it"));
            };
            step.addend = Some(addend);
            match &mut step.work {
                Work::Conv(packed) => packed.set_output(finished.output.clone()),
                Work::Gated(gated) => gated.output = finished.output.clone(),
                _ => {}
            }
            let step = self.placed(step, &finished)?;
            self.push(step);
            return self.read_otherwise(operator, finished.map);
        }
        let (terms, addend) = (self.term(operator, a, scale)?, self.term(operator, b, scale)?);
        let step = step(operator, Work::Add(finished.output.clone()), size);
        let step = self.placed(Step { terms: Some(terms), addend: Some(addend), ..step }, &finished)?;
        self.push(step);
        self.read_otherwise(operator, finished.map)
    }

    /// Where a term of a sum is.
    fn term(&mut self, operator: &'a Operator, edge: &'a Edge, scale: f32) -> Result<Slot, Int8Error> {
        let map = edge.map.as_str();
        if !edge.bytes {
            let slot = self.sums.get(map).copied();
            return slot.ok_or_else(|| uncovered(operator, "a term of the sum isn't made before it"));
        }
        let x = self
            .bytes
            .get(map)
            .copied()
            .ok_or_else(|| uncovered(operator, "a term of the sum isn't made before it"))?;
        let size = self.sizes[map];
        let sums = self.value(Storage::Sums, size)?;
        let work = Work::Widen(Box::new(widening(self.scale(map)?, scale)));
        self.push(Step { x: Some(x), sums: Some(sums), ..step(operator, work, size) });
        Ok(sums)
    }
}

/// Maps that sums connect: each refers to another of its stream, the last to itself.
#[derive(Default)]
struct Streams<'a> {
    numbers: HashMap<&'a str, usize>,
    next: Vec<usize>,
}

impl<'a> Streams<'a> {
    fn contains(&self, map: &str) -> bool {
        self.numbers.contains_key(map)
    }

    /// The last map of a map's stream, which is the stream's number.
    fn last(&mut self, map: &'a str) -> usize {
        let mut at = *self.numbers.entry(map).or_insert(self.next.len());
        if at == self.next.len() {
            self.next.push(at);
        }
        while self.next[at] != at {
            // half the way next time
            self.next[at] = self.next[self.next[at]];
            at = self.next[at];
        }
        at
    }

    fn join(&mut self, a: &'a str, b: &'a str) {
        let (a, b) = (self.last(a), self.last(b));
        self.next[a.max(b)] = a.min(b);
    }
}

/// Scales of residual sums: one for all maps that sums connect, finer than the coarsest bytes that are read of them.
pub(super) fn sum_scales(operators: &Operators) -> HashMap<&str, f32> {
    let mut streams = Streams::default();
    for operator in &operators.all {
        let plain = operator.inputs.iter().filter(|edge| !edge.bytes).map(|edge| edge.map.as_str());
        let is_sum = match operator.kind {
            Kind::Add => true,
            // part of the sum before it
            Kind::Function(Function::Relu) => {
                plain.clone().any(|map| streams.contains(map) && operators.readers(map).len() == 1)
            }
            _ => false,
        };
        if is_sum {
            streams.last(&operator.output);
            plain.for_each(|map| streams.join(map, &operator.output));
        }
    }
    let maps: Vec<&str> = streams.numbers.keys().copied().collect();
    let streams: Vec<(&str, usize)> = maps.into_iter().map(|map| (map, streams.last(map))).collect();
    let mut coarsest: HashMap<usize, f32> = HashMap::new();
    for (map, stream) in &streams {
        let read = operators.readers(map).any(|(i, j)| operators.all[i].inputs[j].bytes);
        if let Some(scale) = operators.scales.get(*map).filter(|_| read) {
            let entry = coarsest.entry(*stream).or_insert(0.0);
            *entry = entry.max(scale.scale);
        }
    }
    streams.into_iter().filter_map(|(map, stream)| Some((map, coarsest.get(&stream)? / FINER))).collect()
}
