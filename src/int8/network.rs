//! A network of integers as a list of steps, and how it runs: image by image, with memory of its own.

use std::cell::RefCell;
use std::sync::Mutex;

use super::scale::Scale;
use crate::kernels::int8::packed::Packed;
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
    /// Where residual sums go.
    pub sums: Option<Slot>,
    /// Where bytes go.
    pub bytes: Option<Slot>,
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
    /// The image's scale.
    pub input: Scale,
    /// Where the image goes.
    pub image: Slot,
    /// Sizes of u8 slots.
    pub bytes: Vec<usize>,
    /// Sizes of slots of residual sums.
    pub sums: Vec<usize>,
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
        let mut first = std::mem::take(&mut memory.bytes[self.image]);
        self.processor.quantise(image, channels, (self.input.scale, self.input.zero), &mut first);
        memory.bytes[self.image] = first;
        for step in &self.steps {
            let mut sums = step.sums.map(|slot| std::mem::take(&mut memory.sums[slot]));
            let mut bytes = step.bytes.map(|slot| std::mem::take(&mut memory.bytes[slot]));
            self.step(step, memory, (sums.as_deref_mut(), bytes.as_deref_mut()), &mut answers, (threads, workers));
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
        }
    }

    fn step(
        &self,
        step: &Step,
        memory: &mut Memory,
        (sums, bytes): (Option<&mut [i16]>, Option<&mut [u8]>),
        answers: &mut Answers<'_>,
        (threads, workers): (usize, Workers<'_>),
    ) {
        let processor = self.processor;
        let [channels, height, width] = step.size;
        let len = channels * height * width;
        let Memory { bytes: u8s, sums: s16s, totals } = memory;
        let x: &[u8] = match step.x {
            Some(slot) => &u8s[slot],
            None => &[],
        };
        let bytes = bytes.map(|bytes| &mut bytes[..len]);
        let sums = sums.map(|sums| &mut sums[..len]);
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
                let singles = if packed.conv().output == Output::Singles { Some(&mut *answers.logits) } else { None };
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
                let parts = Parts { piece, rows, height, addend, sums, bytes, singles: None };
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
        }
    }

    /// Bytes of weights.
    pub fn weights(&self) -> usize {
        let of = |step: &Step| if let Work::Conv(packed) = &step.work { packed.bytes() } else { 0 };
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
    }
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
