//! A network of integers as a list of steps, and how it runs: image by image, with memory of its own.

use std::cell::RefCell;
use std::sync::Mutex;

use super::function::Function;
use super::scale::Scale;
use crate::kernels::int8::packed::Packed;
use crate::kernels::int8::packed_floats::PackedFloats;
use crate::kernels::int8::processor::Processor;
use crate::kernels::int8::scratch::Scratch;
use crate::kernels::int8::{Band, Gated, Output, Pool, SLACK, Table, ToBytes, reference};

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A place in an image's memory.
pub type Slot = usize;

/// What a step does.
#[derive(Debug)]
pub enum Work {
    /// A convolution, or the classifier.
    Conv(Box<Packed>),
    /// `x` times `gate`.
    Gated(Gated),
    /// The sum of `terms` and `addend`.
    Add(Output),
    /// `x` as a term of a residual sum.
    Widen(Box<[i16; 256]>),
    /// A table's value for each of `x`.
    LookUp(Box<Table>),
    /// A pooling of `x`.
    Pool(Pool),
    /// The mean of `x` over all pixels.
    Mean {
        /// Zero point of `x`.
        zero: u8,
        /// Scale of `x` divided by that of the mean and by the number of pixels.
        factor: f32,
        /// How it becomes u8.
        to: ToBytes,
    },
    /// The output `features`: the mean of `x` in single precision.
    Features {
        /// Zero point of `x`.
        zero: u8,
        /// Scale of `x` divided by the number of pixels, times what features are multiplied by.
        factor: f32,
    },
    /// The output `map`: `x` in single precision, channels first.
    Map {
        /// Zero point of `x`.
        zero: u8,
        /// Scale of `x`, times what the map is multiplied by.
        factor: f32,
    },
    /// A layer that stays in single precision: a convolution of `from`, or the classifier.
    FloatConv(Box<PackedFloats>),
    /// A function of each of `from`.
    Activate(Function),
    /// The sum of `from` and `from_too`.
    AddSingles,
    /// `x` in single precision, by a table.
    Dequantise(Box<[f32; 256]>),
    /// `terms` in single precision, times this scale.
    OfSums(f32),
    /// The mean of `x` over all pixels, in single precision.
    MeanInSingles {
        /// Zero point of `x`.
        zero: u8,
        /// Scale of `x` divided by the number of pixels.
        factor: f32,
    },
    /// `from` as u8.
    Quantise(Scale),
    /// `from` as a term of a residual sum of this scale.
    ToSums(f32),
}

/// A step: what it does, what it reads and what it writes.
#[derive(Debug)]
pub struct Step {
    /// The layer's name.
    pub name: String,
    /// What it does.
    pub work: Work,
    /// u8 map that it reads.
    pub x: Option<Slot>,
    /// u8 gate that it reads.
    pub gate: Option<Slot>,
    /// Residual sum that it reads, of a sum of two.
    pub terms: Option<Slot>,
    /// Residual sum that it adds.
    pub addend: Option<Slot>,
    /// Map in single precision that it reads.
    pub from: Option<Slot>,
    /// The other one, of a sum of two.
    pub from_too: Option<Slot>,
    /// Where residual sums go.
    pub sums: Option<Slot>,
    /// Where bytes go.
    pub bytes: Option<Slot>,
    /// Where numbers in single precision go, if they aren't logits.
    pub singles: Option<Slot>,
    /// Channels, height and width of what it writes.
    pub size: [usize; 3],
    /// Pixels of `x`, where a step reads all of them at once.
    pub pixels: usize,
    /// The map's name that bytes are, and their scale.
    pub map: Option<(String, Scale)>,
}

/// A network, ready to run.
#[derive(Debug)]
pub struct Network {
    /// Whose kernels run it.
    pub processor: Processor,
    /// In order.
    pub steps: Vec<Step>,
    /// Channels, height and width of the image.
    pub shape: [usize; 3],
    /// Where the image goes as u8, and its scale.
    pub image: Option<(Slot, Scale)>,
    /// Where the image goes in single precision.
    pub image_singles: Option<Slot>,
    /// Sizes of u8 slots.
    pub bytes: Vec<usize>,
    /// Sizes of slots of residual sums.
    pub sums: Vec<usize>,
    /// Sizes of slots of numbers in single precision.
    pub singles: Vec<usize>,
    /// Number of logits.
    pub classes: usize,
    /// Width of the output `features`.
    pub features: Option<usize>,
    /// Channels, height and width of the output `map`.
    pub map: Option<[usize; 3]>,
}

/// An image's memory while it runs.
#[derive(Debug, Default)]
pub struct Memory {
    bytes: Vec<Vec<u8>>,
    sums: Vec<Vec<i16>>,
    singles: Vec<Vec<f32>>,
    totals: Vec<i32>,
}

/// Where an image's answers go.
#[derive(Debug)]
pub struct Answers<'a> {
    /// `[classes]`.
    pub logits: &'a mut [f32],
    /// `[width]`.
    pub features: Option<&'a mut [f32]>,
    /// `[channels, height, width]`.
    pub map: Option<&'a mut [f32]>,
}

/// What a step made, for those who look: a u8 map, channels last.
#[derive(Debug)]
pub struct Seen<'a> {
    /// The layer that made it.
    pub layer: &'a str,
    /// The map's name.
    pub map: &'a str,
    /// Its scale.
    pub scale: Scale,
    /// Channels, height and width.
    pub size: [usize; 3],
    /// Values.
    pub bytes: &'a [u8],
}

/// Runs numbered pieces of work, which may run at once.
pub type Workers<'a> = &'a dyn Fn(usize, &(dyn Fn(usize) + Send + Sync));

/// Runs pieces of work one after the other.
pub fn one_by_one(count: usize, piece: &(dyn Fn(usize) + Send + Sync)) {
    (0..count).for_each(piece);
}

/// Fewest values that a piece of work makes.
const VALUES: usize = 1 << 12;

impl Network {
    /// Runs one image, `[channels, height, width]`. The answers are the same for any number of `threads`, which is what
    /// `workers` have.
    ///
    /// # Panics
    /// If the image or the places for answers don't have the network's sizes.
    pub fn run(
        &self,
        image: &[f32],
        memory: &mut Memory,
        mut answers: Answers<'_>,
        (threads, workers): (usize, Workers<'_>),
        seen: &mut dyn FnMut(Seen<'_>),
    ) {
        let [channels, height, width] = self.shape;
        assert!(image.len() == channels * height * width && answers.logits.len() == self.classes);
        if !image.iter().all(|value| value.is_finite()) {
            let Answers { logits, features, map } = answers;
            let all = std::iter::once(logits).chain(features).chain(map);
            all.for_each(|values| values.fill(f32::NAN));
            return;
        }
        memory.fit(self);
        if let Some((slot, scale)) = self.image {
            self.processor.quantise(image, channels, (scale.scale, scale.zero), &mut memory.bytes[slot]);
        }
        if let Some(slot) = self.image_singles {
            channels_last(image, channels, &mut memory.singles[slot]);
        }
        for step in &self.steps {
            let mut sums = step.sums.map(|slot| std::mem::take(&mut memory.sums[slot]));
            let mut bytes = step.bytes.map(|slot| std::mem::take(&mut memory.bytes[slot]));
            let mut singles = step.singles.map(|slot| std::mem::take(&mut memory.singles[slot]));
            let written =
                Written { sums: sums.as_deref_mut(), bytes: bytes.as_deref_mut(), singles: singles.as_deref_mut() };
            self.step(step, memory, written, &mut answers, (threads, workers));
            if let (Some((map, scale)), Some(bytes)) = (&step.map, &bytes) {
                let bytes = &bytes[..step.size.iter().product()];
                seen(Seen { layer: &step.name, map, scale: *scale, size: step.size, bytes });
            }
            if let (Some(slot), Some(sums)) = (step.sums, sums) {
                memory.sums[slot] = sums;
            }
            if let (Some(slot), Some(bytes)) = (step.bytes, bytes) {
                memory.bytes[slot] = bytes;
            }
            if let (Some(slot), Some(singles)) = (step.singles, singles) {
                memory.singles[slot] = singles;
            }
        }
    }

    fn step(
        &self,
        step: &Step,
        memory: &mut Memory,
        Written { sums, bytes, singles }: Written<'_>,
        answers: &mut Answers<'_>,
        (threads, workers): (usize, Workers<'_>),
    ) {
        let processor = self.processor;
        let [channels, height, width] = step.size;
        let len = channels * height * width;
        let Memory { bytes: u8s, sums: s16s, singles: f32s, totals } = memory;
        let x: &[u8] = match step.x {
            Some(slot) => &u8s[slot],
            None => &[],
        };
        let bytes = bytes.map(|bytes| &mut bytes[..len]);
        let sums = sums.map(|sums| &mut sums[..len]);
        let singles = singles.map(|singles| &mut singles[..len]);
        let from = |slot: Option<Slot>| slot.map_or(&[][..], |slot| &f32s[slot]);
        let s16s = &s16s[..];
        let addend = step.addend.map(|slot| &s16s[slot][..len]);
        // whole rows, at least so many values, and some more than threads: not all pieces take as long
        let rows = match threads {
            0 | 1 => height,
            _ => height.div_ceil(2 * threads).max(VALUES.div_ceil(channels * width).min(height)),
        };
        let piece = (rows * width * channels).max(1);
        match &step.work {
            Work::Conv(packed) => {
                let is_single = packed.conv().output == Output::Singles;
                let singles = if is_single { singles.or(Some(&mut *answers.logits)) } else { None };
                let parts = Parts { piece, rows, height, addend, sums, bytes, singles };
                parts.each(workers, |mut band| {
                    band.input = x;
                    SCRATCH.with_borrow_mut(|scratch| packed.convolve(band, scratch));
                });
            }
            Work::Gated(gated) => {
                let gate: &[u8] = match step.gate {
                    Some(slot) => &u8s[slot][..channels],
                    None => &[],
                };
                let parts = Parts { piece, rows, height, addend, sums, bytes, singles };
                parts.each(workers, |mut band| {
                    band.input = &x[band.rows.start * width * channels..];
                    processor.gated(gated, gate, band);
                });
            }
            Work::Add(output) => {
                let terms: &[i16] = match step.terms {
                    Some(slot) => &s16s[slot][..len],
                    None => &[],
                };
                let parts = Parts { piece, rows, height, addend, sums, bytes, singles: None };
                parts.each(workers, |band| {
                    let (first, end) = (band.rows.start * width * channels, band.rows.end * width * channels);
                    processor.add(output, &terms[first..end], band);
                });
            }
            Work::Widen(table) => reference::widen(table, &x[..len], sums.unwrap_or_default()),
            Work::LookUp(table) => processor.look_up(table, &x[..len], bytes.unwrap_or_default()),
            Work::Pool(pool) => processor.pool(pool, x, bytes.unwrap_or_default()),
            Work::Mean { zero, factor, to } => {
                let bytes = bytes.unwrap_or_default();
                totals.resize(channels, 0);
                processor.totals(&x[..step.pixels * channels], *zero, totals);
                for (byte, &total) in bytes.iter_mut().zip(&*totals) {
                    *byte = reference::to_bytes(to, reference::scaled(total, *factor));
                }
            }
            Work::Features { zero, factor } => {
                totals.resize(channels, 0);
                processor.totals(&x[..step.pixels * channels], *zero, totals);
                for (feature, &total) in answers.features.iter_mut().flat_map(|f| f.iter_mut()).zip(&*totals) {
                    *feature = reference::single(total, *factor);
                }
            }
            Work::Map { zero, factor } => {
                for (channel, values) in
                    answers.map.iter_mut().flat_map(|map| map.chunks_exact_mut(height * width)).enumerate()
                {
                    for (value, pixel) in values.iter_mut().zip(x.chunks_exact(channels)) {
                        *value = reference::single(i32::from(pixel[channel]) - i32::from(*zero), *factor);
                    }
                }
            }
            Work::FloatConv(packed) => {
                let singles = singles.or(Some(&mut *answers.logits));
                let parts = Parts { piece, rows, height, addend: None, sums: None, bytes: None, singles };
                let input = from(step.from);
                parts.each(workers, |band| packed.convolve(band.rows, input, band.singles.unwrap_or_default()));
                if step.singles.is_none() {
                    // one bit pattern for what is no number
                    answers.logits.iter_mut().filter(|logit| logit.is_nan()).for_each(|logit| *logit = f32::NAN);
                }
            }
            Work::Activate(function) => {
                let parts = Parts { piece, rows, height, addend: None, sums: None, bytes: None, singles };
                let input = from(step.from);
                parts.each(workers, |band| {
                    let input = &input[band.rows.start * width * channels..];
                    for (y, &x) in band.singles.unwrap_or_default().iter_mut().zip(input) {
                        *y = function.apply(x.into()) as f32;
                    }
                });
            }
            Work::AddSingles => {
                let terms = from(step.from).iter().zip(from(step.from_too));
                singles.unwrap_or_default().iter_mut().zip(terms).for_each(|(sum, (a, b))| *sum = a + b);
            }
            Work::Dequantise(table) => {
                singles.unwrap_or_default().iter_mut().zip(x).for_each(|(y, &x)| *y = table[usize::from(x)]);
            }
            Work::OfSums(scale) => {
                let terms: &[i16] = match step.terms {
                    Some(slot) => &s16s[slot],
                    None => &[],
                };
                singles
                    .unwrap_or_default()
                    .iter_mut()
                    .zip(terms)
                    .for_each(|(y, &r)| *y = reference::single(r.into(), *scale));
            }
            Work::MeanInSingles { zero, factor } => {
                totals.resize(channels, 0);
                processor.totals(&x[..step.pixels * channels], *zero, totals);
                let means = totals.iter().map(|&total| reference::single(total, *factor));
                singles.unwrap_or_default().iter_mut().zip(means).for_each(|(to, mean)| *to = mean);
            }
            Work::Quantise(scale) => {
                let parts = Parts { piece, rows, height, addend: None, sums: None, bytes, singles: None };
                let input = from(step.from);
                parts.each(workers, |band| {
                    let input = &input[band.rows.start * width * channels..];
                    for (byte, &x) in band.bytes.unwrap_or_default().iter_mut().zip(input) {
                        *byte = reference::quantised(x, (scale.scale, scale.zero));
                    }
                });
            }
            Work::ToSums(scale) => {
                let input = from(step.from);
                sums.unwrap_or_default().iter_mut().zip(input).for_each(|(sum, &x)| *sum = reference::term(x, *scale));
            }
        }
    }

    /// Bytes of weights.
    pub fn weights(&self) -> usize {
        let of = |step: &Step| match &step.work {
            Work::Conv(packed) => packed.bytes(),
            Work::FloatConv(packed) => packed.bytes(),
            _ => 0,
        };
        self.steps.iter().map(of).sum()
    }
}

impl Memory {
    fn fit(&mut self, network: &Network) {
        self.bytes.resize_with(network.bytes.len(), Vec::new);
        self.sums.resize_with(network.sums.len(), Vec::new);
        for (slot, &len) in self.bytes.iter_mut().zip(&network.bytes) {
            slot.resize(len + SLACK, 0);
        }
        for (slot, &len) in self.sums.iter_mut().zip(&network.sums) {
            slot.resize(len, 0);
        }
        self.singles.resize_with(network.singles.len(), Vec::new);
        for (slot, &len) in self.singles.iter_mut().zip(&network.singles) {
            slot.resize(len, 0.0);
        }
    }
}

/// An image `[channels, pixels]` as `[pixels, channels]`.
fn channels_last(image: &[f32], channels: usize, to: &mut [f32]) {
    for (channel, values) in image.chunks_exact((image.len() / channels).max(1)).enumerate() {
        to.iter_mut().skip(channel).step_by(channels).zip(values).for_each(|(to, &value)| *to = value);
    }
}

/// What a step writes.
struct Written<'a> {
    sums: Option<&'a mut [i16]>,
    bytes: Option<&'a mut [u8]>,
    singles: Option<&'a mut [f32]>,
}

/// What a step writes, to be divided.
struct Parts<'a> {
    /// Values of a piece.
    piece: usize,
    /// Rows of a piece.
    rows: usize,
    height: usize,
    addend: Option<&'a [i16]>,
    sums: Option<&'a mut [i16]>,
    bytes: Option<&'a mut [u8]>,
    singles: Option<&'a mut [f32]>,
}

impl<'a> Parts<'a> {
    /// Does a piece of work for each part. Their `input` is empty.
    fn each(self, workers: Workers<'_>, work: impl Fn(Band<'a>) + Send + Sync) {
        let Self { piece, rows, height, addend, sums, bytes, singles } = self;
        let count = height.div_ceil(rows.max(1));
        let mut addends = addend.map(|addend| addend.chunks(piece));
        let mut sums = sums.map(|sums| sums.chunks_mut(piece));
        let mut bytes = bytes.map(|bytes| bytes.chunks_mut(piece));
        let mut singles = singles.map(|singles| singles.chunks_mut(piece));
        let mut bands: Vec<_> = (0..count)
            .map(|i| Band {
                rows: i * rows..((i + 1) * rows).min(height),
                input: &[],
                addend: addends.as_mut().and_then(Iterator::next),
                sums: sums.as_mut().and_then(Iterator::next),
                bytes: bytes.as_mut().and_then(Iterator::next),
                singles: singles.as_mut().and_then(Iterator::next),
            })
            .collect();
        if count == 1 {
            bands.pop().into_iter().for_each(work);
            return;
        }
        let bands: Vec<_> = bands.into_iter().map(|band| Mutex::new(Some(band))).collect();
        workers(count, &|i| {
            if let Some(band) = bands.get(i).and_then(|band| band.lock().ok()?.take()) {
                work(band);
            }
        });
    }
}
