//! Folds a checkpoint into a network of integers: ranges from calibration images, the method by measured agreement, and a guard
//! that measures the result on images that were held out.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use super::folding::{FoldingError, fold_verified};
use crate::checkpoint::Checkpoint;
use crate::engine::{
    Backend as _, BackendError, Batch, EngineError, EngineOptions, Fitted, Kernels, MapBackend, MapView, OrtBackend,
};
use crate::eval::Share;
use crate::fold::{FoldOptions, FoldedFile};
use crate::int8::network::{Answers, Memory, Network, one_by_one};
use crate::int8::quantise::Plan;
use crate::int8::ranges::Ranges;
use crate::int8::{Int8Error, lowering};
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
/// Images that layers are compared on.
const COMPARED: usize = 8;
/// Layers that a report names.
const NAMED: usize = 5;
/// Share of calibration images of one class from which on it is said.
const ONE_CLASS: f64 = 0.95;
/// Correlation of neighbouring pixels below which images are no photographs.
const NOISE: f64 = 0.3;

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
    /// Least share of held-out images that keep the class of single precision, 0 to 1.
    pub min_agreement: f64,
    /// Most that the share of right answers may fall by, 0 to 1.
    pub max_drop: f64,
    /// Told what is being done and how far it is: images done, of how many.
    pub progress: &'a mut dyn FnMut(&str, usize, usize),
}

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
    },
}

/// A folded network of integers, and what is to be said about its calibration.
#[derive(Debug)]
pub struct Quantised {
    /// What was written.
    pub folded: FoldedFile,
    /// Warnings and notes, a line each.
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
    let engine = EngineOptions {
        intra_threads: std::thread::available_parallelism().map_or(1, usize::from),
        ..EngineOptions::default()
    };
    let (measured, held_out) = split(calibration.images);
    let mut notes = Vec::new();

    let mut looked = Looked::default();
    let mut ranges = Ranges::new();
    let mut exposed = MapBackend::open(&plan.exposed(), "the network with its maps", &engine)?;
    let shape = preprocessing.shape();
    let (mut expected, mut in_single) = (Vec::new(), Vec::new());
    for (done, &i) in measured.iter().enumerate() {
        (calibration.progress)("ranges", done, measured.len());
        let data = (calibration.image)(i).map_err(QuantisingError::Image)?;
        looked.add(&data, shape);
        let [channels, height, width] = shape;
        let mut class = None;
        exposed.run(&[MapView { name: INPUT, shape: [1, channels, height, width], data: &data }], |map| {
            if map.name == OUTPUT {
                class = decided(map.data);
                in_single.push(map.data.to_vec());
            } else {
                ranges.add(map.name, map.data);
            }
        })?;
        expected.push(class.ok_or(QuantisingError::NotFinite)?);
    }
    notes.extend(looked.note());
    notes.extend(one_class(&expected, &folded.manifest.labels));

    // the method that keeps most classes, then the one whose logits are nearest
    let methods = calibration.method.map_or(RangeMethod::ALL.to_vec(), |method| vec![method]);
    let mut tried = BTreeMap::new();
    let mut best: Option<Candidate> = None;
    for method in methods {
        let onnx = plan.quantise(&ranges.choose(method)?)?;
        let network = lowering::lower(&onnx)?;
        let mut session = open(onnx.clone(), &engine)?;
        let what = format!("agreement of {}", method.name());
        let logits = answers(&mut session, &measured, shape, calibration, &what)?;
        let same = logits.iter().zip(&expected).filter(|(logits, class)| decided(logits) == Some(**class)).count();
        tried.insert(method.name().to_string(), same as f64 / measured.len() as f64);
        let apart =
            |(a, b): (&Vec<f32>, &Vec<f32>)| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        let apart = logits.iter().zip(&in_single).map(apart).sum::<f64>();
        let nearer = |best: &Candidate| same > best.same || (same == best.same && apart < best.apart);
        if best.as_ref().is_none_or(nearer) {
            best = Some(Candidate { same, apart, method, onnx, network });
        }
    }
    let Some(Candidate { method, onnx: quantised, network, .. }) = best else {
        return Err(QuantisingError::TooFew(0));
    };

    let mut reference = OrtBackend::open(&onnx, "the network in single precision", &engine)?;
    let in_single = answers(&mut reference, &held_out, shape, calibration, "held-out images in single precision")?;
    let mut session = open(quantised.clone(), &engine)?;
    let in_integers = answers(&mut session, &held_out, shape, calibration, "held-out images in integers")?;
    let classes = calibration.classes.as_ref();
    let labels: Option<Vec<usize>> = classes.map(|classes| held_out.iter().map(|&i| classes[i]).collect());
    let judged = Judged::new(&in_single, &in_integers, labels.as_deref())?;
    if let Some(reason) = judged.refusal(calibration.min_agreement, calibration.max_drop) {
        let images = measured.iter().take(COMPARED);
        let images: Result<Vec<_>, _> = images.map(|&i| (calibration.image)(i)).collect();
        let noise = noise(&mut exposed, &network, &images.map_err(QuantisingError::Image)?, shape)?;
        return Err(QuantisingError::Guard { reason, layers: report(&noise) });
    }
    notes.push(judged.line());
    notes.extend(judged.doubt(calibration.min_agreement));

    let input = golden::images(shape).next().unwrap_or_default();
    let logits = session.run(&Batch { images: 1, height: shape[1], width: shape[2], data: input.clone() })?.data;
    staging.replace_onnx(&quantised)?;
    let manifest = &mut folded.manifest;
    manifest.precision = Precision::Int8;
    manifest.onnx_sha256 = sha256(&quantised);
    manifest.golden = Some(Golden { input_sha256: golden::digest(&input), logits, tolerance: 0.0 });
    manifest.quantisation = Some(Quantisation {
        method,
        theory: false,
        images: measured.len() as u32,
        tried,
        held_out: held_out.len() as u32,
        agreement: judged.same.value,
        agreement_interval: [judged.same.low, judged.same.high],
        top1: judged.right.map(|[single, integers]| [single.value, integers.value]),
        maps: plan.map_ranges(&ranges.choose(method)?)?,
    });
    folded.len = quantised.len() as u64;
    Ok(Quantised { folded, notes })
}

/// A network of integers by one of the methods.
struct Candidate {
    /// Images that keep their class.
    same: usize,
    /// Sum of squares of what logits are off by.
    apart: f64,
    method: RangeMethod,
    onnx: Vec<u8>,
    network: Network,
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

/// Logits of these images.
fn answers(
    session: &mut OrtBackend,
    images: &[usize],
    [channels, height, width]: [usize; 3],
    calibration: &mut Calibration<'_>,
    what: &str,
) -> Result<Vec<Vec<f32>>, QuantisingError> {
    let mut all = Vec::with_capacity(images.len());
    for together in images.chunks(TOGETHER) {
        (calibration.progress)(what, all.len(), images.len());
        let mut data = Vec::with_capacity(together.len() * channels * height * width);
        for &i in together {
            data.extend((calibration.image)(i).map_err(QuantisingError::Image)?);
        }
        let logits = session.run(&Batch { images: together.len(), height, width, data })?;
        all.extend((0..logits.images).map(|i| logits.row(i).to_vec()));
    }
    Ok(all)
}

/// The class that logits decide for; whether it is likely, where there is one. `None` if they aren't finite.
fn decided(logits: &[f32]) -> Option<usize> {
    if !logits.iter().all(|logit| logit.is_finite()) {
        return None;
    }
    match logits {
        [only] => Some(usize::from(*only > 0.0)),
        // the first of equals
        _ => logits.iter().enumerate().rev().max_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(class, _)| class),
    }
}

/// How a network of integers answers held-out images.
struct Judged {
    /// Keep the class of single precision.
    same: Share,
    /// Right answers in single precision and in integers.
    right: Option<[Share; 2]>,
    /// Images whose answers were right only in single precision, and only in integers.
    moved: [usize; 2],
}

impl Judged {
    fn new(single: &[Vec<f32>], integers: &[Vec<f32>], labels: Option<&[usize]>) -> Result<Self, QuantisingError> {
        let decide = |logits: &Vec<f32>| decided(logits).ok_or(QuantisingError::NotFinite);
        let single: Vec<usize> = single.iter().map(decide).collect::<Result<_, _>>()?;
        let integers: Vec<usize> = integers.iter().map(decide).collect::<Result<_, _>>()?;
        let of = single.len();
        let same = Share::new(single.iter().zip(&integers).filter(|(a, b)| a == b).count(), of);
        let Some(labels) = labels else { return Ok(Self { same, right: None, moved: [0, 0] }) };
        let right = |decided: &[usize]| -> Vec<bool> { decided.iter().zip(labels).map(|(a, b)| a == b).collect() };
        let (single, integers) = (right(&single), right(&integers));
        let share = |right: &[bool]| Share::new(right.iter().filter(|right| **right).count(), of);
        let only = |a: &[bool], b: &[bool]| a.iter().zip(b).filter(|(a, b)| **a && !**b).count();
        let moved = [only(&single, &integers), only(&integers, &single)];
        Ok(Self { same, right: Some([share(&single), share(&integers)]), moved })
    }

    /// Why the network isn't good enough, if it isn't.
    fn refusal(&self, min_agreement: f64, max_drop: f64) -> Option<String> {
        let Share { value, of, low, high, .. } = self.same;
        if value < min_agreement {
            return Some(format!(
                "int8 keeps the class of single precision for {:.1} % of {of} held-out images (95 % interval {:.1} to {:.1}), and \
                 --min-agreement asks for {:.1}",
                100.0 * value,
                100.0 * low,
                100.0 * high,
                100.0 * min_agreement
            ));
        }
        let [single, integers] = self.right?;
        let (lost, gained) = (self.moved[0] as f64, self.moved[1] as f64);
        let (drop, n) = (single.value - integers.value, of as f64);
        // of paired answers: images that moved neither way say nothing
        let reach = 1.96 * (lost + gained - (lost - gained).powi(2) / n).max(0.0).sqrt() / n;
        (drop > max_drop && drop - reach > 0.0).then(|| {
            format!(
                "int8 loses {:.2} points of top-1 on {of} held-out images (95 % interval {:.2} to {:.2}), and --max-drop allows {:.2}",
                100.0 * drop,
                100.0 * (drop - reach),
                100.0 * (drop + reach),
                100.0 * max_drop
            )
        })
    }

    fn line(&self) -> String {
        let Share { value, of, low, high, .. } = self.same;
        let mut line = format!(
            "int8: {:.1} % of {of} held-out images keep their class (95 % interval {:.1} to {:.1})",
            100.0 * value,
            100.0 * low,
            100.0 * high
        );
        if let Some([single, integers]) = self.right {
            let _ = write!(
                line,
                "; top-1 {:.2} % in single precision, {:.2} % in integers",
                100.0 * single.value,
                100.0 * integers.value
            );
        }
        line
    }

    fn doubt(&self, min_agreement: f64) -> Option<String> {
        (self.same.low < min_agreement).then(|| {
            format!(
                "note: with {} held-out images the agreement could be as low as {:.1} %; more calibration images would tell",
                self.same.of,
                100.0 * self.same.low
            )
        })
    }
}

/// What the calibration images look like.
#[derive(Default)]
struct Looked {
    images: usize,
    /// Sum of the correlations of neighbouring pixels.
    correlation: f64,
}

impl Looked {
    fn add(&mut self, image: &[f32], [_, height, width]: [usize; 3]) {
        let plane = &image[..(height * width).min(image.len())];
        let pairs = plane
            .chunks_exact(width.max(1))
            .flat_map(|row| row.windows(2))
            .map(|pair| [pair[0], pair[1]].map(f64::from));
        let mean = plane.iter().map(|&x| f64::from(x)).sum::<f64>() / plane.len().max(1) as f64;
        let (mut along, mut own) = (0.0, 0.0);
        for [a, b] in pairs {
            along += (a - mean) * (b - mean);
            own += ((a - mean).powi(2) + (b - mean).powi(2)) / 2.0;
        }
        self.images += 1;
        self.correlation += if own > 0.0 { along / own } else { 1.0 };
    }

    fn note(&self) -> Option<String> {
        let correlation = self.correlation / self.images.max(1) as f64;
        (correlation < NOISE).then(|| {
            format!(
                "warning: the calibration images look like noise (neighbouring pixels correlate by {correlation:.2}, those of \
                 photographs by 0.9): ranges may not hold for photographs"
            )
        })
    }
}

/// A warning if nearly all images are of one class.
fn one_class(expected: &[usize], labels: &[String]) -> Option<String> {
    let mut counts: HashMap<usize, usize> = HashMap::new();
    expected.iter().for_each(|class| *counts.entry(*class).or_default() += 1);
    let (class, count) = counts.into_iter().max_by_key(|(class, count)| (*count, std::cmp::Reverse(*class)))?;
    let name = labels
        .get(class)
        .map_or_else(|| class.to_string(), |label| format!("`{}`", crate::printable::printable(label)));
    (count as f64 >= ONE_CLASS * expected.len() as f64).then(|| {
        format!(
            "warning: {count} of {} calibration images are of one class ({name}) to the network: ranges may not hold for others",
            expected.len()
        )
    })
}

/// Noise of a map against its signal, as a share of the signal's power.
type Noise = Vec<(String, f64)>;

/// How far each map of integers is from the same map in single precision, in the network's order.
fn noise(
    exposed: &mut MapBackend,
    network: &Network,
    images: &[Vec<f32>],
    [channels, height, width]: [usize; 3],
) -> Result<Noise, QuantisingError> {
    let mut sums: Vec<(String, f64, f64)> = Vec::new();
    let mut memory = Memory::default();
    for image in images {
        let mut maps: HashMap<String, Vec<f32>> = HashMap::new();
        exposed.run(&[MapView { name: INPUT, shape: [1, channels, height, width], data: image }], |map| {
            maps.insert(map.name.into(), map.data.to_vec());
        })?;
        let mut logits = vec![0.0; network.classes];
        let mut features = network.features.map(|width| vec![0.0; width]);
        let mut map = network.map.map(|map| vec![0.0; map.iter().product()]);
        let answers = Answers { logits: &mut logits, features: features.as_deref_mut(), map: map.as_deref_mut() };
        network.run(image, &mut memory, answers, (1, &one_by_one), &mut |seen| {
            let Some(expected) = maps.get(seen.map) else { return };
            let [channels, height, width] = seen.size;
            let (mut noise, mut signal) = (0.0, 0.0);
            for (pixel, bytes) in seen.bytes.chunks_exact(channels).enumerate() {
                for (channel, &byte) in bytes.iter().enumerate() {
                    let expected = expected.get(channel * height * width + pixel).map_or(0.0, |&x| f64::from(x));
                    noise += (seen.scale.value(byte) - expected).powi(2);
                    signal += expected.powi(2);
                }
            }
            let layer = format!("{} ({})", seen.layer, seen.map);
            match sums.iter_mut().find(|(known, ..)| *known == layer) {
                Some((_, all, power)) => {
                    *all += noise;
                    *power += signal;
                }
                None => sums.push((layer, noise, signal)),
            }
        });
    }
    Ok(sums.into_iter().map(|(layer, noise, signal)| (layer, noise / signal.max(f64::MIN_POSITIVE))).collect())
}

/// Layers whose maps have more noise than the map before them, those with the most first: a line each.
fn report(noise: &Noise) -> Vec<String> {
    let before = std::iter::once(0.0).chain(noise.iter().map(|(_, share)| *share));
    let mut added: Vec<(&str, f64, f64)> =
        noise.iter().zip(before).map(|((layer, share), before)| (layer.as_str(), share - before, *share)).collect();
    added.sort_by(|a, b| b.1.total_cmp(&a.1));
    let added = added.into_iter().take(NAMED).filter(|(_, added, _)| *added > 0.0);
    added.map(|(layer, added, all)| format!("{:8.3} % of {:.3} %  {layer}", 100.0 * added, 100.0 * all)).collect()
}
