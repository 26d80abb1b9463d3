//! Memory: every value gets a slot that no value has which is still read.

use std::collections::{BTreeMap, HashMap};

use super::{Lowering, Storage, Value};
use crate::int8::Int8Error;
use crate::int8::network::{Network, Slot, Step};

/// Most bytes of all maps together, of an image.
const MOST_BYTES: usize = 1 << 31;

/// Values that a step reads.
fn reads(step: &Step) -> impl Iterator<Item = Slot> + use<> {
    [step.x, step.gate, step.terms, step.addend, step.from, step.from_too].into_iter().flatten()
}

/// Values that a step writes.
fn writes(step: &Step) -> impl Iterator<Item = Slot> + use<> {
    [step.sums, step.bytes, step.singles].into_iter().flatten()
}

impl Lowering<'_> {
    /// Gives every value a slot that no value has which is still read.
    pub(super) fn finish(self) -> Result<Network, Int8Error> {
        let Self { processor, steps, values, operators, .. } = self;
        let mut steps: Vec<Step> = steps.into_iter().flatten().collect();
        let mut last: BTreeMap<Slot, usize> = BTreeMap::new();
        for (at, step) in steps.iter().enumerate() {
            last.extend(reads(step).map(|value| (value, at)));
        }
        let mut slots =
            Slots { values: &values, sizes: Default::default(), free: Default::default(), of: HashMap::new() };
        let scale = operators.scales.get(&operators.input).copied();
        let image = scale.map(|scale| (slots.assign(self.image), scale));
        let image_singles = self.image_singles.map(|value| slots.assign(value));
        for (at, step) in steps.iter_mut().enumerate() {
            let read: Vec<Slot> = reads(step).collect();
            let written: Vec<Slot> = writes(step).collect();
            for &value in &written {
                slots.assign(value);
            }
            for slot in [
                &mut step.x,
                &mut step.gate,
                &mut step.terms,
                &mut step.addend,
                &mut step.from,
                &mut step.from_too,
                &mut step.sums,
                &mut step.bytes,
                &mut step.singles,
            ] {
                *slot = slot.and_then(|value| slots.of.get(&value).copied());
            }
            let mut over: Vec<Slot> = read.into_iter().filter(|value| last[value] == at).collect();
            over.extend(written.into_iter().filter(|value| !last.contains_key(value)));
            over.sort_unstable();
            over.dedup();
            over.into_iter().for_each(|value| slots.release(value));
        }
        let each = [1, size_of::<i16>(), size_of::<f32>()];
        let mut lens =
            slots.sizes.iter().zip(each).flat_map(|(lens, each)| lens.iter().map(move |len| len.checked_mul(each)));
        let all = lens.try_fold(0_usize, |all, len| all.checked_add(len?));
        if all.is_none_or(|all| all > MOST_BYTES) {
            return Err(Int8Error::Overflow { what: "the size", name: "all maps together".into() });
        }
        let Slots { sizes: [bytes, sums, singles], .. } = slots;
        let classes = self.classes.ok_or_else(|| Int8Error::Unreadable("it makes no logits".into()))?;
        Ok(Network {
            processor,
            steps,
            shape: operators.shape,
            image,
            image_singles,
            bytes,
            sums,
            singles,
            classes,
            features: self.features,
            map: self.map,
        })
    }
}

/// Slots being assigned to values, by what their numbers are.
struct Slots<'a> {
    values: &'a [Value],
    /// Values that a slot has room for.
    sizes: [Vec<usize>; 3],
    free: [Vec<Slot>; 3],
    of: HashMap<Slot, Slot>,
}

fn number(storage: Storage) -> usize {
    match storage {
        Storage::Bytes => 0,
        Storage::Sums => 1,
        Storage::Singles => 2,
    }
}

impl Slots<'_> {
    fn assign(&mut self, value: Slot) -> Slot {
        let Value { storage, len } = self.values[value];
        let (sizes, free) = (&mut self.sizes[number(storage)], &mut self.free[number(storage)]);
        // the one that is nearest in size
        let nearest = free.iter().enumerate().min_by_key(|(_, slot)| sizes[**slot].abs_diff(len)).map(|(i, _)| i);
        let slot = match nearest {
            Some(i) => free.swap_remove(i),
            None => {
                sizes.push(0);
                sizes.len() - 1
            }
        };
        sizes[slot] = sizes[slot].max(len);
        self.of.insert(value, slot);
        slot
    }

    fn release(&mut self, value: Slot) {
        if let Some(slot) = self.of.remove(&value) {
            self.free[number(self.values[value].storage)].push(slot);
        }
    }
}
