//! Calibration images of `nfold fold --precision int8`: finds and reads them, and shows how far it is.

use std::cell::RefCell;
use std::collections::HashMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{anyhow, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::classify::search::{Found, Search};
use super::classify::workers::read;
use super::eval::dataset::{Sample, resolve};
use super::images::ImageArgs;
use super::printable::{self, say};
use crate::checkpoint::Checkpoint;
use crate::fold::{FoldOptions, FoldedFile, Size};
use crate::model::{Colors, Precision, Preprocessing, Quantisation, RangeMethod, Staging, golden};
use crate::pixels::{DecodeMemory, Decoder, Preprocessor};
use crate::sources::{Calibration, Gain, Guard, Keep, Quantised, QuantisingError, Stage, fold_quantised, is_below};

/// Options of integers.
#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// With --precision int8: photographs like those that will be served, a few hundred; in a folder for each class, top-1 is
    /// measured too. Three fifths give ranges, two fifths are held out. `theory` takes noise, as the theory of these networks assumes,
    /// and measures nothing
    #[arg(help_heading = "Integers", long, env = "NFOLD_CALIBRATE", value_name = "DIR|theory")]
    calibrate: Option<PathBuf>,
    /// How the ranges of integers are chosen: min_max, percentile or mse [default: all are tried, by agreement]
    #[arg(help_heading = "Integers", long, env = "NFOLD_RANGE_METHOD", value_name = "METHOD", value_parser = super::source::parse_word::<RangeMethod>)]
    range_method: Option<RangeMethod>,
    /// Write nothing unless at least this share of the held-out photographs keeps the class of single precision, in per cent [default:
    /// 97.5]
    #[arg(help_heading = "Integers", long, env = "NFOLD_MIN_AGREEMENT", value_name = "PERCENT", value_parser = agreement)]
    min_agreement: Option<f64>,
    /// Write nothing if top-1 falls by more, in points, where the folder says the classes [default: 0.5]
    #[arg(help_heading = "Integers", long, env = "NFOLD_MAX_DROP", value_name = "POINTS", value_parser = percent)]
    max_drop: Option<f64>,
    /// Layers that stay in single precision, by name, or all below a name such as `stages.3`; `auto`: if too few photographs keep their
    /// class, the layers that gain most, at most a quarter of all
    #[arg(help_heading = "Integers", long, env = "NFOLD_KEEP", value_name = "LAYER,…|auto", value_delimiter = ',', value_parser = trimmed)]
    keep: Vec<String>,
    #[command(flatten)]
    limits: ImageArgs,
}

fn trimmed(text: &str) -> Result<String, Infallible> {
    Ok(text.trim().to_owned())
}

/// Per cent, and no share by mistake, which would let everything pass.
fn agreement(text: &str) -> Result<f64, String> {
    match percent(text)? {
        share if share > 0.0 && share < 1.0 => {
            Err(format!("`{text}` is less than 1 per cent; give 97.5 for 97.5 per cent"))
        }
        number => Ok(number),
    }
}

fn percent(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.0..=100.0).contains(number));
    number.ok_or_else(|| format!("`{text}` is no number between 0 and 100"))
}

/// The default of --min-agreement, in per cent.
const MIN_AGREEMENT: f64 = 97.5;
/// The default of --max-drop, in points.
const MAX_DROP: f64 = 0.5;
/// What --keep finds the layers by itself with.
const AUTO: &str = "auto";
/// Layers that are offered to be kept.
const NAMED: usize = 5;
/// What --calibrate is called without photographs.
const THEORY: &str = "theory";
/// Images of noise that ranges are taken from then.
const NOISE: usize = 60;

/// Most bytes of images that are kept; what is beyond is decoded again.
const KEPT: usize = 1 << 29;

/// Images as the network takes them.
struct Images {
    found: Vec<Found>,
    preprocessor: Preprocessor,
    shape: [usize; 3],
    upright: bool,
    decoder: Decoder,
    memory: Arc<DecodeMemory>,
    kept: RefCell<HashMap<usize, Vec<f32>>>,
}

impl Images {
    fn get(&self, i: usize) -> Result<Vec<f32>, String> {
        if let Some(image) = self.kept.borrow().get(&i) {
            return Ok(image.clone());
        }
        let Found { path, refused, .. } = &self.found[i];
        let image = match refused {
            Some(reason) => Err(reason.clone()),
            None => self.decode(path),
        };
        let image = image.map_err(|reason| format!("`{}`: {reason}", printable::path(path)))?;
        let mut kept = self.kept.borrow_mut();
        if (kept.len() + 1).saturating_mul(image.len() * size_of::<f32>()) <= KEPT {
            kept.insert(i, image.clone());
        }
        Ok(image)
    }

    fn decode(&self, path: &Path) -> Result<Vec<f32>, String> {
        let bytes = read(path, self.decoder.limits.max_bytes).map_err(|e| format!("can't read it: {e}"))?;
        let image = self.decoder.open(&bytes, self.upright).map_err(|e| e.to_string())?;
        let need = image.need();
        let share = self.memory.claim(need.bytes + self.preprocessor.scratch(need.width, need.height)).wait();
        let image =
            image.decode(|width, height| self.preprocessor.resized(width, height)).map_err(|e| e.to_string())?;
        let mut tensor = vec![0.0; self.shape.iter().product()];
        self.preprocessor.apply(&image, &mut tensor);
        drop((image, share));
        Ok(tensor)
    }
}

impl CalibrateArgs {
    /// The first of these flags that is given.
    pub fn given(&self) -> Option<&'static str> {
        let flags = [
            ("--calibrate", self.calibrate.is_some()),
            ("--range-method", self.range_method.is_some()),
            ("--keep", !self.keep.is_empty()),
        ];
        flags.into_iter().find(|(_, given)| *given).map(|(flag, _)| flag).or_else(|| self.guard())
    }

    /// The first flag of the guard that is given.
    fn guard(&self) -> Option<&'static str> {
        let flags = [("--min-agreement", self.min_agreement.is_some()), ("--max-drop", self.max_drop.is_some())];
        flags.into_iter().find(|(_, given)| *given).map(|(flag, _)| flag)
    }

    /// Refuses what is known to be wrong before a checkpoint is read or fetched.
    pub fn check(&self, options: &FoldOptions) -> anyhow::Result<()> {
        if options.precision != Precision::Int8 {
            return match self.given() {
                Some(flag) => bail!("{flag} is for --precision int8; {} needs no calibration", options.precision),
                None => Ok(()),
            };
        }
        if options.unfolded {
            bail!("int8 is of folded networks: leave out --unfolded or --precision int8");
        }
        fixed_size(options)?;
        let (folder, keep) = (self.folder()?, self.keep()?);
        if folder.as_os_str() != THEORY {
            if !folder.is_dir() {
                bail!("--calibrate `{}` is no folder; give a folder of photographs", printable::path(folder));
            }
            return Ok(());
        }
        if let Some(flag) = self.guard() {
            bail!(
                "--calibrate theory measures nothing that {flag} could compare; leave that out, or give photographs (a folder of that name is ./theory)"
            );
        }
        if keep == Keep::Auto {
            bail!(
                "--calibrate theory measures nothing that --keep auto could go by; name the layers, or give photographs"
            );
        }
        Ok(())
    }

    fn folder(&self) -> anyhow::Result<&Path> {
        let Some(folder) = &self.calibrate else {
            bail!(
                "--precision int8 needs --calibrate DIR: photographs like those that will be served, a few hundred, of all classes"
            );
        };
        Ok(folder)
    }

    /// Whether folding with these flags can give the network that this is recorded of: nothing recorded contradicts them.
    pub fn may_give(&self, recorded: &Quantisation) -> bool {
        let (Ok(folder), Ok(keep)) = (self.folder(), self.keep()) else { return false };
        let has = |layers: &[String], name: &String| layers.iter().any(|layer| is_below(layer, name));
        let may_keep = match &keep {
            Keep::Auto => true,
            Keep::Layers(names) => {
                let is_named = |layer: &String| names.iter().any(|name| is_below(layer, name));
                recorded.keep.iter().all(is_named) && names.iter().all(|name| has(&recorded.keep, name))
            }
        };
        if !may_keep || self.range_method.is_some_and(|method| method != recorded.method) {
            return false;
        }
        if recorded.theory || folder.as_os_str() == THEORY {
            return recorded.theory && folder.as_os_str() == THEORY;
        }
        let tried = self.range_method.map_or(RangeMethod::ALL.len(), |_| 1);
        let mut search = Search::new(false);
        // what can't be read may be among those that are there
        let photographs = search.folder(folder).map_or(0, |()| search.found.len() as u64);
        recorded.tried.len() == tried && photographs >= u64::from(recorded.images) + u64::from(recorded.held_out)
    }

    /// The layers that stay in single precision.
    fn keep(&self) -> anyhow::Result<Keep> {
        match self.keep.as_slice() {
            [only] if only == AUTO => Ok(Keep::Auto),
            names if names.iter().any(|name| name == AUTO) => {
                bail!("--keep auto finds the layers: leave out the names, or `auto`")
            }
            names if names.iter().any(|name| name.is_empty()) => {
                bail!("--keep has an empty name; give layers as in --keep stem.conv,stages.3")
            }
            names => Ok(Keep::Layers(names.to_vec())),
        }
    }

    /// Folds into integers, with what was [checked](Self::check).
    pub fn fold(
        &self,
        checkpoint: &Checkpoint,
        options: &FoldOptions,
        staging: &Staging,
    ) -> anyhow::Result<FoldedFile> {
        let (folder, size) = (self.folder()?, fixed_size(options)?);
        let (mut preprocessing, _) =
            checkpoint.preprocessing(size).map_err(|reason| anyhow!("{reason}; choose another --size"))?;
        preprocessing.exif_orientation = options.exif_orientation;
        let keep = self.keep()?;
        if folder.as_os_str() == THEORY {
            return self.fold_by_theory((checkpoint, options, staging), preprocessing.shape(), keep);
        }
        let (mut images, left_out) = self.images(folder, &preprocessing)?;
        let classes = classes(folder, &images.found, &checkpoint.labels, checkpoint.network.classes());
        let mut progress = Progress::default();
        // once, so that it is known how many there are
        let mut readable = Vec::new();
        let (total, mut unreadable) = (images.found.len(), Vec::new());
        let reading = Stage { what: "reading photographs", of: total, unit: "files" };
        for i in 0..total {
            progress.show(&reading, i);
            match images.get(i) {
                Ok(_) => readable.push(i),
                Err(reason) => unreadable.push(reason),
            }
        }
        progress.end();
        if let Some(first) = unreadable.first() {
            say(format_args!(
                "note: left out {} of {total} photographs that can't be read; the first: {first}",
                unreadable.len()
            ));
        }
        for left in left_out {
            say(format_args!("note: {left}"));
        }
        if readable.is_empty() {
            bail!(
                "`{}` holds no photograph that can be read; give --calibrate a folder of photographs",
                printable::path(folder)
            );
        }
        let classes = match classes {
            Ok(classes) => Some(readable.iter().map(|&i| classes[i]).collect()),
            Err(reason) => {
                say(format_args!("note: top-1 isn't measured: {reason}"));
                None
            }
        };
        images.found.shrink_to_fit();
        let mut calibration = Calibration {
            images: readable.len(),
            image: &mut |i| {
                readable.get(i).ok_or_else(|| "no such photograph".to_string()).and_then(|&i| images.get(i))
            },
            classes,
            method: self.range_method,
            keep,
            guard: Some(Guard {
                min_agreement: self.min_agreement.unwrap_or(MIN_AGREEMENT) / 100.0,
                max_drop: self.max_drop.unwrap_or(MAX_DROP) / 100.0,
            }),
            progress: &mut |stage, done| progress.show(stage, done),
        };
        let quantised = fold_quantised(checkpoint, options, staging, &mut calibration);
        progress.end();
        let quantised = quantised.map_err(|error| {
            if let QuantisingError::Guard { layers, gains, .. } = &error {
                say(format_args!(
                    "layers that add most noise (share of the signal's power: added, and in all after it):"
                ));
                layers.iter().for_each(|layer| say(format_args!("{layer}")));
                return anyhow!("{error}; {}", self.next_step(gains));
            }
            error.into()
        })?;
        quantised.notes.iter().for_each(|note| say(format_args!("{note}")));
        Ok(quantised.folded)
    }

    /// Prints the layers that could stay in single precision, and says what to try.
    fn next_step(&self, gains: &[Gain]) -> String {
        const OTHERS: &str = "give --calibrate more photographs like those that will be served, try --range-method, or fold with --precision fp32";
        if gains.is_empty() {
            return OTHERS.into();
        }
        say(format_args!(
            "layers that could stay in single precision, and how much of the error of logits each alone takes away:"
        ));
        let best = &gains[..gains.len().min(NAMED)];
        best.iter().for_each(|Gain { layer, share }| {
            say(format_args!("{:8.1} %  {}", 100.0 * share, printable::printable(layer)))
        });
        if self.keep.iter().any(|name| name == AUTO) {
            return OTHERS.into();
        }
        let names: Vec<&str> =
            self.keep.iter().map(String::as_str).chain(best.iter().map(|gain| gain.layer.as_str())).collect();
        format!("keep layers in single precision (--keep auto, or --keep {}), {OTHERS}", names.join(","))
    }

    /// Folds into integers with ranges of unit Gaussian images: what the analysis of Brock et al. (2021) takes networks to see.
    fn fold_by_theory(
        &self,
        (checkpoint, options, staging): (&Checkpoint, &FoldOptions, &Staging),
        shape: [usize; 3],
        keep: Keep,
    ) -> anyhow::Result<FoldedFile> {
        let noise: Vec<Vec<f32>> = golden::images(shape).take(NOISE).collect();
        let mut progress = Progress::default();
        let mut calibration = Calibration {
            images: noise.len(),
            image: &mut |i| noise.get(i).cloned().ok_or_else(|| "no such image".to_string()),
            classes: None,
            method: self.range_method,
            keep,
            guard: None,
            progress: &mut |stage, done| progress.show(stage, done),
        };
        let quantised = fold_quantised(checkpoint, options, staging, &mut calibration);
        progress.end();
        let Quantised { folded, notes } = quantised?;
        // of ranges and noise nothing is to be said: it is noise
        notes.iter().filter(|note| note.starts_with("int8:")).for_each(|note| say(format_args!("{note}")));
        say(format_args!(
            "warning: ranges are those of noise, and nothing was measured: compare with single precision on photographs, by `nfold eval DATA --model \
             NAME --beside {}`",
            checkpoint.name
        ));
        Ok(folded)
    }

    fn images(&self, folder: &Path, preprocessing: &Preprocessing) -> anyhow::Result<(Images, Vec<String>)> {
        let shown = printable::path(folder);
        let channels = preprocessing.channels();
        if Colors::of_channels(channels).is_none() {
            bail!(
                "the network takes {channels} channels, and a photograph has 1 or 3: it can't be calibrated on photographs"
            );
        }
        let mut search = Search::new(false);
        search.folder(folder).map_err(|e| anyhow!("can't search `{shown}`: {e}"))?;
        let left_out = search.left_out().into_iter().map(|left| left.to_string()).collect();
        if search.found.is_empty() {
            bail!("`{shown}` holds no photographs; give --calibrate a folder of photographs");
        }
        let (decoder, memory) = self.limits.resolve();
        let images = Images {
            found: search.found,
            preprocessor: Preprocessor::new(preprocessing),
            shape: preprocessing.shape(),
            upright: preprocessing.exif_orientation,
            decoder,
            memory,
            kept: RefCell::default(),
        };
        Ok((images, left_out))
    }
}

/// Height and width, as far as they are given.
fn fixed_size(options: &FoldOptions) -> anyhow::Result<Option<(u32, u32)>> {
    match options.size {
        Size::Fixed(height, width) => Ok(Some((height, width))),
        Size::Checkpoint => Ok(None),
        Size::Dynamic => bail!("int8 needs a fixed size, and --size dynamic has none; fold with --size H or HxW"),
    }
}

/// Every photograph's class, if each is in a folder that is named after one.
fn classes(folder: &Path, found: &[Found], labels: &[String], classes: usize) -> anyhow::Result<Vec<usize>> {
    let class = |found: &Found| {
        let below = found.path.strip_prefix(folder).unwrap_or(&found.path);
        let mut parts = below.components();
        let first = parts.next().map(|part| printable::path(Path::new(part.as_os_str())));
        first.filter(|_| parts.next().is_some()).ok_or_else(|| anyhow!("photographs aren't in folders of classes"))
    };
    let mut samples = Vec::with_capacity(found.len());
    for found in found {
        samples.push(Sample { name: String::new(), found: found.clone(), class: class(found)? });
    }
    let known = resolve(&samples, labels, classes)?;
    // only that of a folder that can't be searched is unknown, and no photograph's
    Ok(samples.iter().map(|sample| known.get(&sample.class).copied().unwrap_or_default()).collect())
}

/// A bar on a terminal, a line for each stage elsewhere.
struct Progress {
    bar: ProgressBar,
    what: String,
}

impl Default for Progress {
    fn default() -> Self {
        Self { bar: ProgressBar::hidden(), what: String::new() }
    }
}

impl Progress {
    fn show(&mut self, stage: &Stage<'_>, done: usize) {
        let Stage { what, of, unit } = *stage;
        if what != self.what {
            self.end();
            self.what = what.into();
            // hidden if stderr is no terminal
            self.bar = ProgressBar::with_draw_target(Some(of as u64), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {prefix}, {eta} left") {
                self.bar.set_style(style);
            }
            self.bar.set_message(self.what.clone());
            self.bar.set_prefix(unit);
            if self.bar.is_hidden() {
                say(format_args!("{what}: {of} {unit}"));
            }
        }
        self.bar.set_position(done as u64);
    }

    fn end(&mut self) {
        self.bar.finish_and_clear();
        self.what.clear();
    }
}
