//! `nfold classify`: image files → classes, without a server.

mod answers;
pub mod search;
mod side;
pub mod workers;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use clap::Args;
use clap::builder::FalseyValueParser;
use indicatif::ProgressBar;

use self::answers::{Format, Out, Printer};
use self::search::{Found, Search};
use self::side::{Features, Heat};
use self::workers::{ModelArgs, Workers, bar, engine, is_stdin};
use super::images::ImageArgs;
use super::printable::{self, say};
use crate::engine::Extras;
use crate::infer::top_k::{Selection, select};
use crate::model::scoring::check_threshold;

/// For more images than this, the default format is JSON lines, with a progress bar.
const MANY: usize = 20;

/// Arguments of `nfold classify`.
#[derive(Debug, Args)]
pub struct ClassifyArgs {
    /// Image files, folders (with --recursive), or `-` for one image on standard input
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// Search folders for images, in order of their names
    #[arg(long, short, env = "NFOLD_RECURSIVE", value_parser = FalseyValueParser::new())]
    recursive: bool,
    /// With --recursive, also include names that begin with a dot, and system folders beside photographs, such as
    /// @eaDir
    #[arg(long, env = "NFOLD_HIDDEN", value_parser = FalseyValueParser::new())]
    hidden: bool,
    #[command(flatten)]
    model: ModelArgs,
    /// Classes to name for each image [default: all that reach the model's thresholds, or 5 where it has none]
    #[arg(long, short = 'k', env = "NFOLD_TOP_K", value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    top_k: Option<u32>,
    /// Name the classes with this score or more [default: the model's thresholds]
    #[arg(long, env = "NFOLD_THRESHOLD", value_name = "SCORE", allow_negative_numbers = true)]
    threshold: Option<f64>,
    #[command(flatten)]
    limits: ImageArgs,
    /// Process every Nth image only, from the Ith on, counted from 0 (I/N); for N processes that share the images
    #[arg(long, env = "NFOLD_SHARD", value_name = "I/N", value_parser = shard)]
    shard: Option<Shard>,
    /// Output format [default: by the name of --output, else a table for up to 20 images and JSON lines for more]
    #[arg(long, value_enum, env = "NFOLD_FORMAT")]
    format: Option<Format>,
    /// Write the predictions to this file, as JSON lines or as its extension says (.csv, .txt); the file appears once
    /// it is complete
    #[arg(long, env = "NFOLD_OUTPUT", value_name = "FILE")]
    output: Option<PathBuf>,
    /// Also write each image's feature vector, what the classifier reads, to this file: .npy (NumPy, float32, a row an image in the
    /// order of the answers) or .csv (a row an image, with its name)
    #[arg(long, env = "NFOLD_FEATURES", value_name = "FILE")]
    features: Option<PathBuf>,
    /// With --features: vectors of length 1
    #[arg(long, env = "NFOLD_L2", requires = "features", value_parser = FalseyValueParser::new())]
    l2: bool,
    /// Also write a picture for each image into this folder: where it speaks for its most probable class
    #[arg(long, env = "NFOLD_EXPLAIN", value_name = "DIR")]
    explain: Option<PathBuf>,
    /// Exit 0 even if some images are missing or could not be classified; the output names them
    #[arg(long, env = "NFOLD_SKIP_BROKEN", value_parser = FalseyValueParser::new())]
    skip_broken: bool,
    /// Short for --format jsonl
    #[arg(long, env = "NFOLD_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

/// The share of the images that this process classifies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shard {
    index: usize,
    count: usize,
}

/// `I/N` with I < N.
fn shard(text: &str) -> Result<Shard, String> {
    let parsed = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    let (index, count) = parsed.ok_or("not two whole numbers, such as 0/8")?;
    if index < count {
        Ok(Shard { index, count })
    } else {
        Err(format!("there is no shard {index} of {count}: the first is 0"))
    }
}

/// Runs `nfold classify`. Exit code 1 if any image could not be classified.
pub fn run(args: &ClassifyArgs) -> anyhow::Result<ExitCode> {
    if args.json && args.format.is_some_and(|format| format != Format::Jsonl) {
        bail!("--json means --format jsonl and contradicts the --format given; give one of them");
    }
    let (decoder, memory) = args.limits.resolve();
    let mut images = gather(args)?;
    if let Some(Shard { index, count }) = args.shard {
        images = images.into_iter().skip(index).step_by(count).collect();
    }
    let (model, workers) = Workers::open(&args.model, images.len())?;
    let many = images.len() > MANY;
    let format = match &args.output {
        _ if args.format.is_some() || args.json => args.format.unwrap_or(Format::Jsonl),
        Some(path) => Format::of(path).unwrap_or(Format::Jsonl),
        None if many => Format::Jsonl,
        None => Format::Table,
    };
    let scoring = model.manifest.scoring();
    if let Some(threshold) = args.threshold {
        check_threshold(threshold, scoring.activation).map_err(|e| anyhow!("{e}; check --threshold"))?;
    }
    let selection = Selection { top_k: args.top_k.map(|k| k as usize), threshold: args.threshold };
    let extras = Extras { features: args.features.is_some(), map: args.explain.is_some() };
    let features = args.features.as_deref().map(|path| Features::create(path, &model, images.len(), args.l2));
    let mut features = features.transpose()?;
    let class_maps = workers.class_maps().cloned();
    let heat = args.explain.as_deref().map(|path| Heat::create(path, &model, class_maps.as_ref(), images.len()));
    let mut heat = heat.transpose()?;
    let mut printer = Printer::new(&model, format, Out::open(args.output.as_deref())?)?;
    let progress = if many { bar(images.len()) } else { ProgressBar::hidden() };
    let started = Instant::now();
    workers.each(&model, &images, (decoder, &memory), extras, |i, given| {
        progress.inc(1);
        let labels = &model.manifest.labels;
        if let Some(file) = &mut features {
            file.add(&images[i].path, given.as_ref().ok().map(|given| given.features.as_slice()))?;
        }
        if let (Some(heat), Ok(given)) = (&mut heat, &given)
            && let Ok([top, ..]) = select(&given.logits, &scoring, Selection::top(1), labels).as_deref()
        {
            heat.add(i, &images[i].path, given, top)?;
        }
        let top = given.and_then(|given| select(&given.logits, &scoring, selection, labels).map_err(engine));
        // the bar and the predictions may share a terminal
        progress.suspend(|| printer.print(&images[i].path, top))
    })?;
    progress.finish_and_clear();
    summary(images.len(), &printer, format, args, started.elapsed());
    let failed = printer.failed;
    printer.finish()?;
    if let Some(file) = features {
        say(format_args!("{}", file.publish()?));
    }
    if let Some(heat) = heat {
        say(format_args!("{}", heat.summary()));
    }
    Ok(if failed == 0 || args.skip_broken { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The named files, and the images of the named folders. With --skip-broken, what can't be read is among them, with the reason.
fn gather(args: &ClassifyArgs) -> anyhow::Result<Vec<Found>> {
    let mut search = Search::new(args.hidden);
    for path in &args.images {
        let shown = printable::path(path);
        match fs::metadata(path) {
            _ if is_stdin(path) => search.found.push(Found::image(path.clone())),
            Ok(there) if there.is_dir() && !args.recursive => {
                const WHY: &str = "is a folder; add --recursive to classify the images in it";
                if !args.skip_broken {
                    bail!("`{shown}` {WHY}");
                }
                search.refuse(path.clone(), format!("it {WHY}"));
            }
            Ok(there) if there.is_dir() => {
                let before = search.found.len();
                match search.folder(path) {
                    Ok(()) => {}
                    Err(e) if args.skip_broken => search.refuse_folder(path.clone(), &e),
                    Err(e) => bail!("can't search `{shown}`: {e}"),
                }
                if search.found.len() == before {
                    let left = search.left_out().map(|left| format!("; {left}")).unwrap_or_default();
                    let why = format!("holds no image file (looked for: {})", search::known());
                    if !args.skip_broken {
                        bail!("folder `{shown}` {why}; name the files themselves{left}");
                    }
                    search.refuse(path.clone(), format!("the folder {why}"));
                }
            }
            // a pipe or device is read like a file
            Ok(_) => search.found.push(Found::image(path.clone())),
            Err(e) if args.skip_broken => search.refuse(path.clone(), format!("can't read it: {e}")),
            Err(e) if args.images.len() == 1 => bail!("can't read `{shown}`: {e}; check the path"),
            Err(e) => bail!("can't read `{shown}`: {e}; check the path (--skip-broken classifies the others)"),
        }
    }
    if let Some(left) = search.left_out() {
        say(format_args!("note: {left}"));
    }
    Ok(search.found)
}

/// Prints the summary on stderr. A single classified image needs none.
fn summary(images: usize, printer: &Printer<'_>, format: Format, args: &ClassifyArgs, elapsed: Duration) {
    let (failed, seconds) = (printer.failed, elapsed.as_secs_f64());
    let speed = images as f64 / seconds.max(1e-3);
    match failed {
        0 if images == 1 => {}
        0 => say(format_args!("classified {images} images in {seconds:.1} s ({speed:.1} images/s)")),
        // the table has a line for it already
        _ if images == 1 && format == Format::Table => {}
        _ if images == 1 => say(format_args!("error: {}", printer.last_error)),
        _ if args.skip_broken => say(format_args!(
            "classified {} of {images} images in {seconds:.1} s ({speed:.1} images/s); {failed} could not be",
            images - failed
        )),
        _ => {
            let why = if format == Format::Table { "the lines above say why" } else { "their answers say why" };
            say(format_args!(
                "error: {failed} of {images} images could not be classified; {why} (--skip-broken exits with 0 all the same)"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_counted_from_zero() {
        assert_eq!(shard("0/1"), Ok(Shard { index: 0, count: 1 }));
        assert_eq!(shard("7/8"), Ok(Shard { index: 7, count: 8 }));
        for bad in ["", "1", "8/8", "1/0", "0/0", "-1/2", "a/b", "1/2/3"] {
            assert!(shard(bad).is_err(), "{bad}");
        }
    }
}
