//! Folds a checkpoint into a network of integers: ranges from calibration images, the method by measured agreement, and a guard
//! that measures the result on images that were held out, and says which layers could stay in single precision.

mod judged;
mod layers;
mod looks;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use self::judged::{Judged, decided};
pub use self::layers::Gain;
use self::layers::report;
use self::looks::{Looked, one_class};
use super::folding::{FoldingError, fold_verified};
use crate::checkpoint::Checkpoint;
use crate::engine::{
    Backend as _, BackendError, Batch, EngineError, EngineOptions, Fitted, Kernels, MapBackend, MapView, OrtBackend,
};
use crate::fold::{FoldOptions, FoldedFile};
use crate::int8::Int8Error;
use crate::int8::quantise::Plan;
pub use crate::int8::quantise::is_below;
use crate::int8::ranges::Ranges;
use crate::model::{
    Gate, Golden, INPUT, ModelError, OUTPUT, Precision, Preprocessing, Quantisation, RangeMethod, Staging,
};
use crate::model::{golden, sha256};

/// Fewest calibration images.
pub const FEWEST: usize = 10;
/// Most images that ranges are taken from; the rest are held out.
const MOST: usize = 512;
/// Images that run together.
const TOGETHER: usize = 16;
/// Images that layers are ranked by.
const RANKED: usize = 64;
/// What messages call the network in single precision whose maps are outputs.
const EXPOSED: &str = "the network with its maps";
/// Images that the noise of maps is measured on.
const COMPARED: usize = 8;
/// One of so many layers may stay in single precision by [`Keep::Auto`].
const MOST_KEPT: usize = 4;

/// Layers that stay in single precision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keep {
    /// These, by name, or those below a name. None: all are integers.
    Layers(Vec<String>),
    /// Those that gain most by it, as many as the guard asks for and at most a quarter of all.
    Auto,
}

/// What a network of integers has to keep of its answers on held-out images.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guard {
    /// Least share of images that keep the class of single precision, 0 to 1.
    pub min_agreement: f64,
    /// Most that the share of right answers may fall by, 0 to 1.
    pub max_drop: f64,
}

/// Images, and what the result has to keep.
pub struct Calibration<'a> {
    /// Number of images.
    pub images: usize,
    /// An image by its number, as the network takes it: `[channels, height, width]`; or why it can't be read.
    pub image: &'a mut dyn FnMut(usize) -> Result<Vec<f32>, String>,
    /// Every image's class, where they are known.
    pub classes: Option<Vec<usize>>,
    /// How ranges are chosen; `None`: by measured agreement.
    pub method: Option<RangeMethod>,
    /// Layers that stay in single precision.
    pub keep: Keep,
    /// What is measured; `None`: nothing, the images are noise.
    pub guard: Option<Guard>,
    /// Told what is being done, and how many of its units are.
    pub progress: &'a mut dyn FnMut(&Stage<'_>, usize),
}

/// A part of calibration that takes a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stage<'a> {
    /// What is done.
    pub what: &'a str,
    /// Number of units.
    pub of: usize,
    /// What is counted, in the plural.
    pub unit: &'static str,
}

/// Units of a [`Stage`]: photographs that ranges are taken from, or noise.
const IMAGES: &str = "images";
/// Units of a [`Stage`]: photographs that ranges are not taken from.
const HELD_OUT: &str = "held-out images";

/// Why a network of integers isn't written.
#[derive(Debug, thiserror::Error)]
pub enum QuantisingError {
    /// Folding in single precision failed.
    #[error(transparent)]
    Fold(#[from] FoldingError),
    /// The network isn't one that int8 covers.
    #[error(transparent)]
    Int8(#[from] Int8Error),
    /// A graph can't be opened.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A graph can't be run.
    #[error(transparent)]
    Run(#[from] BackendError),
    /// The file can't be written.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Too few images.
    #[error("{0} calibration images can be read, {FEWEST} are needed and a few hundred are better; check --calibrate")]
    TooFew(usize),
    /// An image can't be read.
    #[error("calibration: {0}")]
    Image(String),
    /// Logits aren't finite.
    #[error("logits are not finite on a calibration image; the checkpoint's weights are too large")]
    NotFinite,
    /// The network loses too much.
    #[error("{reason}; nothing was written")]
    Guard {
        /// What it loses.
        reason: String,
        /// The layers that add most noise, a line each.
        layers: Vec<String>,
        /// Layers that could stay in single precision, those that gain most first.
        gains: Vec<Gain>,
    },
    /// A layer that there isn't.
    #[error("there is no layer `{name}` to keep in single precision; the nearest are `{nearest}`")]
    UnknownLayer {
        /// As it was given.
        name: String,
        /// Names that there are.
        nearest: String,
    },
    /// Nothing would be integers.
    #[error("all {0} layers would stay in single precision; keep fewer, or fold with --precision fp32")]
    AllKept(usize),
}

/// A folded network of integers, and what is to be said about its calibration.
#[derive(Debug)]
pub struct Quantised {
    /// What was written.
    pub folded: FoldedFile,
    /// Layers that stay in single precision, warnings and notes, a line each.
    pub notes: Vec<String>,
}

/// Folds into the graph of `staging` as a network of integers.
pub fn fold_quantised(
    checkpoint: &Checkpoint,
    options: &FoldOptions,
    staging: &Staging,
    calibration: &mut Calibration<'_>,
) -> Result<Quantised, QuantisingError> {
    if calibration.images < FEWEST {
        return Err(QuantisingError::TooFew(calibration.images));
    }
    let single = FoldOptions { precision: Precision::Fp32, gate: Gate::Broadcast, ..options.clone() };
    let mut folded = fold_verified(checkpoint, &single, staging)?;
    let onnx = std::fs::read(staging.onnx()).map_err(|source| ModelError::Io {
        action: "read",
        path: staging.onnx(),
        source,
    })?;
    let preprocessing = folded.manifest.preprocessing.clone();
    let plan = Plan::new(&onnx, image_range(&preprocessing))?;
    let kept = asked(&plan, &calibration.keep)?;
    let (measured, held_out) = split(calibration.images);
    let engine = EngineOptions {
        intra_threads: std::thread::available_parallelism().map_or(1, usize::from),
        ..EngineOptions::default()
    };
    let shape = preprocessing.shape();
    let in_single = Vec::new();
    let mut quantiser = Quantiser { plan, kept, engine, shape, measured, held_out, in_single, calibration };

    let (ranges, mut notes) = quantiser.look(&folded.manifest.labels)?;
    let (Candidate { method, onnx: mut quantised, .. }, tried) = quantiser.choose(&ranges)?;
    let ranges = ranges.choose(method, |map| quantiser.plan.activation(map))?;
    let mut judged = None;
    if let Some(guard) = quantiser.calibration.guard {
        let passed = quantiser.guarded(guard, &onnx, quantised, &ranges)?;
        quantised = passed.onnx;
        notes.extend(passed.notes);
        notes.push(passed.judged.line());
        notes.extend(passed.judged.doubt(guard.min_agreement));
        judged = Some(passed.judged);
    }
    let Quantiser { plan, kept, engine, measured, .. } = quantiser;
    notes.extend(stay(&kept, &plan));

    let input = golden::images(shape).next().unwrap_or_default();
    let mut session = open(quantised.clone(), &engine)?;
    let logits = session.run(&Batch { images: 1, height: shape[1], width: shape[2], data: input.clone() })?.data;
    staging.replace_onnx(&quantised)?;
    let manifest = &mut folded.manifest;
    manifest.precision = Precision::Int8;
    manifest.onnx_sha256 = sha256(&quantised);
    manifest.golden = Some(Golden { input_sha256: golden::digest(&input), logits, tolerance: 0.0 });
    manifest.quantisation = Some(Quantisation {
        method,
        theory: judged.is_none(),
        images: measured.len() as u32,
        // noise is of no class: which one it is called says nothing
        tried: if judged.is_some() { tried } else { BTreeMap::new() },
        held_out: judged.as_ref().map_or(0, |judged| judged.same.of as u32),
        agreement: judged.as_ref().map(|judged| judged.same.value),
        agreement_interval: judged.as_ref().map(|judged| [judged.same.low, judged.same.high]),
        top1: judged.and_then(|judged| judged.right).map(|[single, integers]| [single.value, integers.value]),
        keep: plan.layers().filter(|layer| kept.contains(*layer)).map(str::to_string).collect(),
        maps: plan.map_ranges(&ranges)?,
    });
    folded.len = quantised.len() as u64;
    Ok(Quantised { folded, notes })
}

/// A network that is being made one of integers.
struct Quantiser<'a, 'b> {
    plan: Plan,
    /// Layers that stay in single precision.
    kept: BTreeSet<String>,
    engine: EngineOptions,
    /// Channels, height and width of images.
    shape: [usize; 3],
    /// Images that ranges are from.
    measured: Vec<usize>,
    /// Images that are held out.
    held_out: Vec<usize>,
    /// Logits of the measured images in single precision.
    in_single: Vec<Vec<f32>>,
    calibration: &'a mut Calibration<'b>,
}

/// A network of integers by one of the methods.
struct Candidate {
    /// Images that keep their class.
    same: usize,
    /// What logits are off by, see [`apart`].
    apart: f64,
    method: RangeMethod,
    onnx: Vec<u8>,
}

/// A network of integers that the guard lets through.
struct Passed {
    onnx: Vec<u8>,
    judged: Judged,
    notes: Vec<String>,
}

impl Quantiser<'_, '_> {
    fn image(&mut self, i: usize) -> Result<Vec<f32>, QuantisingError> {
        (self.calibration.image)(i).map_err(QuantisingError::Image)
    }

    /// Ranges of all maps that the measured images have, and what is to be said about these images.
    fn look(&mut self, labels: &[String]) -> Result<(Ranges, Vec<String>), QuantisingError> {
        let mut exposed = MapBackend::open(&self.plan.exposed(), EXPOSED, &self.engine)?;
        let (mut looked, mut ranges) = (Looked::default(), Ranges::new());
        let [channels, height, width] = self.shape;
        let mut classes = Vec::with_capacity(self.measured.len());
        for at in 0..self.measured.len() {
            let stage = Stage { what: "ranges of maps in single precision", of: self.measured.len(), unit: IMAGES };
            (self.calibration.progress)(&stage, at);
            let data = self.image(self.measured[at])?;
            looked.add(&data, self.shape);
            let mut logits = Vec::new();
            exposed.run(&[MapView { name: INPUT, shape: [1, channels, height, width], data: &data }], |map| {
                if map.name == OUTPUT {
                    logits = map.data.to_vec();
                } else {
                    ranges.add(map.name, map.data);
                }
            })?;
            classes.push(decided(&logits).ok_or(QuantisingError::NotFinite)?);
            self.in_single.push(logits);
        }
        let notes = looked.note().into_iter().chain(one_class(&classes, labels)).collect();
        self.plan.keep(&self.kept);
        Ok((ranges, notes))
    }

    /// The method that keeps most classes, and of equals the one whose logits are nearest; and the agreement of each.
    fn choose(&mut self, ranges: &Ranges) -> Result<(Candidate, BTreeMap<String, f64>), QuantisingError> {
        let methods = self.calibration.method.map_or(RangeMethod::ALL.to_vec(), |method| vec![method]);
        let mut tried = BTreeMap::new();
        let mut best: Option<Candidate> = None;
        let measured = self.measured.clone();
        for method in methods {
            let onnx = self.plan.quantise(&ranges.choose(method, |map| self.plan.activation(map))?)?;
            let what = format!("answers in integers, ranges by {}", method.name());
            let logits = self.answers(&onnx, &measured, (&what, IMAGES))?;
            let pairs = logits.iter().zip(&self.in_single);
            let same = pairs.filter(|(integers, single)| decided(integers) == decided(single)).count();
            tried.insert(method.name().to_string(), same as f64 / measured.len() as f64);
            let apart = apart(&logits, &self.in_single);
            if best.as_ref().is_none_or(|best| same > best.same || (same == best.same && apart < best.apart)) {
                best = Some(Candidate { same, apart, method, onnx });
            }
        }
        best.map(|best| (best, tried)).ok_or(QuantisingError::TooFew(0))
    }

    /// Logits of these images by a network of integers.
    fn answers(
        &mut self,
        onnx: &[u8],
        images: &[usize],
        stage: (&str, &'static str),
    ) -> Result<Vec<Vec<f32>>, QuantisingError> {
        let mut session = open(onnx.to_vec(), &self.engine)?;
        self.logits(&mut session, images, Some(stage))
    }

    /// Logits of these images; what they are for, and what images they are, is told if it is given.
    fn logits(
        &mut self,
        session: &mut OrtBackend,
        images: &[usize],
        stage: Option<(&str, &'static str)>,
    ) -> Result<Vec<Vec<f32>>, QuantisingError> {
        let [channels, height, width] = self.shape;
        let mut all = Vec::with_capacity(images.len());
        for together in images.chunks(TOGETHER) {
            if let Some((what, unit)) = stage {
                (self.calibration.progress)(&Stage { what, of: images.len(), unit }, all.len());
            }
            let mut data = Vec::with_capacity(together.len() * channels * height * width);
            for &i in together {
                data.extend(self.image(i)?);
            }
            let logits = session.run(&Batch { images: together.len(), height, width, data })?;
            all.extend((0..logits.images).map(|i| logits.row(i).to_vec()));
        }
        Ok(all)
    }

    /// The network, if it keeps what it has to on the images that were held out; with layers in single precision, if that is
    /// what it takes and they were to be found.
    fn guarded(
        &mut self,
        guard: Guard,
        single: &[u8],
        onnx: Vec<u8>,
        ranges: &BTreeMap<String, (f32, f32)>,
    ) -> Result<Passed, QuantisingError> {
        let held_out = self.held_out.clone();
        let mut reference = OrtBackend::open(single, "the network in single precision", &self.engine)?;
        let in_single = self.logits(&mut reference, &held_out, Some(("answers in single precision", HELD_OUT)))?;
        drop(reference);
        let classes = self.calibration.classes.as_ref();
        let labels: Option<Vec<usize>> = classes.map(|classes| held_out.iter().map(|&i| classes[i]).collect());
        let judge = |of: &mut Self, onnx: &[u8], what: &str| {
            let logits = of.answers(onnx, &held_out, (what, HELD_OUT))?;
            Judged::new(&in_single, &logits, labels.as_deref())
        };
        let judged = judge(self, &onnx, "answers in integers")?;
        let Some(mut reason) = judged.refusal(guard) else {
            return Ok(Passed { onnx, judged, notes: Vec::new() });
        };
        let gains = self.gains(&onnx, ranges)?;
        if self.calibration.keep == Keep::Auto {
            let most = (self.plan.layers().count() / MOST_KEPT).max(1).min(gains.len());
            let mut best: Option<(usize, f64)> = None;
            for count in doubled(most) {
                self.kept = gains[..count].iter().map(|gain| gain.layer.clone()).collect();
                self.plan.keep(&self.kept);
                let onnx = self.plan.quantise(ranges)?;
                let mixed = judge(self, &onnx, &format!("answers with {count} layers in single precision"))?;
                if mixed.refusal(guard).is_none() {
                    let notes = vec![format!("without layers in single precision, {reason}")];
                    return Ok(Passed { onnx, judged: mixed, notes });
                }
                // more layers are not always better
                if best.is_none_or(|(_, share)| mixed.same.value > share) {
                    best = Some((count, mixed.same.value));
                }
            }
            if let Some((count, share)) = best {
                let share = 100.0 * share;
                let _ = write!(
                    reason,
                    "; of what --keep auto tried, {most} layers at most, {count} in single precision were best: {share:.2} % keep it"
                );
            }
            // the report is of the network without layers in single precision
            self.kept.clear();
            self.plan.keep(&self.kept);
        }
        let noise = self.noise(&onnx)?;
        Err(QuantisingError::Guard { reason, layers: report(&noise), gains })
    }
}

/// 1, 2, 4 and so on, and the most.
fn doubled(most: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(1), |count| Some(2 * count))
        .take_while(move |&count| count < most)
        .chain((most > 0).then_some(most))
}

/// The layers that are to stay in single precision from the start.
fn asked(plan: &Plan, keep: &Keep) -> Result<BTreeSet<String>, QuantisingError> {
    let Keep::Layers(names) = keep else { return Ok(BTreeSet::new()) };
    let mut kept = BTreeSet::new();
    for name in names {
        let layers = plan.named(name);
        let layers = layers.map_err(|nearest| QuantisingError::UnknownLayer { name: name.clone(), nearest })?;
        kept.extend(layers.into_iter().map(str::to_string));
    }
    let all = plan.layers().count();
    if kept.len() == all { Err(QuantisingError::AllKept(all)) } else { Ok(kept) }
}

/// A line about layers that stay in single precision, if any do.
fn stay(kept: &BTreeSet<String>, plan: &Plan) -> Option<String> {
    let names: Vec<&str> = plan.layers().filter(|layer| kept.contains(*layer)).collect();
    let of = plan.layers().count();
    (!names.is_empty())
        .then(|| format!("int8: {} of {of} layers stay in single precision: {}", names.len(), names.join(", ")))
}

/// Sum of squares of what logits are off by.
fn apart(logits: &[Vec<f32>], expected: &[Vec<f32>]) -> f64 {
    let of = |(a, b): (&Vec<f32>, &Vec<f32>)| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    logits.iter().zip(expected).map(of).sum()
}

/// The numbers that images can hold.
fn image_range(p: &Preprocessing) -> (f32, f32) {
    let bound = |shade: f64| p.mean.iter().zip(&p.std).map(move |(mean, std)| ((shade - mean) / std) as f32);
    (bound(0.0).fold(0.0, f32::min), bound(1.0).fold(0.0, f32::max))
}

/// Images that ranges are taken from, and images that are held out: of every five images in their order three and two, so that
/// folders of classes are in both.
fn split(images: usize) -> (Vec<usize>, Vec<usize>) {
    let (mut measured, mut held_out): (Vec<usize>, Vec<usize>) = (0..images).partition(|i| !matches!(i % 5, 1 | 3));
    if measured.len() > MOST {
        let count = measured.len();
        let chosen = |i: usize| (i + 1) * MOST / count > i * MOST / count;
        let mut places = 0..count;
        let mut rest = measured.clone();
        measured.retain(|_| places.next().is_some_and(chosen));
        rest.retain(|i| measured.binary_search(i).is_err());
        held_out.extend(rest);
        held_out.sort_unstable();
    }
    (measured, held_out)
}

fn open(onnx: Vec<u8>, engine: &EngineOptions) -> Result<OrtBackend, EngineError> {
    OrtBackend::open_fitted(&Fitted::for_this_cpu(onnx, Kernels::Own), "the network in integers", engine)
}
