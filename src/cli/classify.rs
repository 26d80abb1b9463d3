//! `nfold classify`: image files → classes, without a server. One worker per core, each with its own session; answers
//! come out in the order of the files.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter, Read as _, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use anyhow::{anyhow, bail};
use clap::Args;
use clap::builder::FalseyValueParser;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tempfile::NamedTempFile;

use super::images::ImageArgs;
use crate::engine::{Backend, Batch, EngineOptions, Fitted, OrtBackend};
use crate::infer::top_k::{Prediction, top_k};
use crate::model::ModelDir;
use crate::pixels::{DecodeMemory, Decoder, ImageError, Preprocessor};

/// More images than this are answered as JSON lines, with a progress bar.
const MANY: usize = 20;
/// What a folder is searched for: extensions of the formats that can be decoded.
const EXTENSIONS: [&str; 9] = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jpe"];

/// Arguments of `nfold classify`.
#[derive(Debug, Args)]
pub struct ClassifyArgs {
    /// Image files, folders (with --recursive), or `-` for one image on standard input
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// Search folders for images, in order of their names
    #[arg(long, short, env = "NFOLD_RECURSIVE", value_parser = FalseyValueParser::new())]
    recursive: bool,
    /// Model repository
    #[arg(long, env = "NFOLD_REPOSITORY", default_value = "repository", value_name = "DIR")]
    repository: PathBuf,
    /// Name of the model [default: the repository's only one]
    #[arg(long, env = "NFOLD_MODEL", value_name = "NAME")]
    model: Option<String>,
    /// Version of the model [default: the highest]
    #[arg(long, env = "NFOLD_MODEL_VERSION", value_name = "N")]
    model_version: Option<u64>,
    /// Classes to name for each image
    #[arg(long, short = 'k', env = "NFOLD_TOP_K", default_value_t = 5, value_name = "K")]
    top_k: usize,
    /// Worker threads [default: one per core]
    #[arg(long, env = "NFOLD_THREADS", value_name = "N")]
    threads: Option<usize>,
    #[command(flatten)]
    limits: ImageArgs,
    /// Of the images, in order, take every Nth from the Ith on (I/N, counted from 0): shares for N processes
    #[arg(long, env = "NFOLD_SHARD", value_name = "I/N", value_parser = shard)]
    shard: Option<Shard>,
    /// Write the answers to this file, as JSON lines; it appears when it is complete
    #[arg(long, env = "NFOLD_OUTPUT", value_name = "FILE")]
    output: Option<PathBuf>,
    /// Exit 0 although some images could not be classified; the answers say which
    #[arg(long, env = "NFOLD_SKIP_BROKEN", value_parser = FalseyValueParser::new())]
    skip_broken: bool,
    /// Print one JSON object a line on stdout
    #[arg(long, env = "NFOLD_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

/// Which share of the images is this process's.
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

/// What became of one image: its predictions, or why there are none (a stable reason and a message).
type Answer = Result<Vec<Prediction>, (&'static str, String)>;

/// Runs `nfold classify`. Exit code 1 when any image could not be classified.
pub fn run(args: &ClassifyArgs) -> anyhow::Result<ExitCode> {
    let (decoder, memory) = args.limits.resolve();
    let mut images = gather(args)?;
    if let Some(Shard { index, count }) = args.shard {
        images = images.into_iter().skip(index).step_by(count).collect();
    }
    let model = ModelDir::open(&args.repository, args.model.as_deref(), args.model_version)?;
    let graph = Fitted::for_this_cpu(model.read_onnx()?);
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let workers = args.threads.unwrap_or(cores).clamp(1, images.len().max(1));
    // one image may have all the cores; several are faster with a core each
    let intra_threads = if workers == 1 { args.threads.unwrap_or(cores).max(1) } else { 1 };
    let options = EngineOptions { intra_threads, ..EngineOptions::default() };
    let what = model.onnx().display().to_string();
    let backends: Vec<_> =
        (0..workers).map(|_| OrtBackend::open_fitted(&graph, &what, &options)).collect::<Result<_, _>>()?;

    let many = images.len() > MANY;
    let (out, written): (Box<dyn Write>, _) = match &args.output {
        None => (Box::new(io::stdout().lock()), None),
        Some(path) => {
            let file = temporary(path)?;
            (Box::new(BufWriter::new(file.reopen()?)), Some((file, path)))
        }
    };
    let json = args.json || many || args.output.is_some();
    let mut printer = Printer { model: &model, json, failed: 0, out };
    let progress = if many { bar(images.len()) } else { ProgressBar::hidden() };
    classify(&images, backends, &model, (decoder, &memory), args.top_k, |i, answer| {
        progress.inc(1);
        printer.print(&images[i], answer)
    })?;
    progress.finish_and_clear();
    printer.out.flush()?;
    if let Some((file, path)) = written {
        file.as_file().sync_all()?;
        file.persist(path).map_err(|e| anyhow!("can't write `{}`: {}", path.display(), e.error))?;
    }
    Ok(if printer.failed == 0 || args.skip_broken { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A file beside `path`, to be renamed to it.
fn temporary(path: &Path) -> anyhow::Result<NamedTempFile> {
    let folder = path.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    // as readable as any other file: whoever collects the answers may be another user
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644));
    let file = builder.prefix(".classify-").tempfile_in(folder);
    file.map_err(|e| anyhow!("can't write into `{}`: {e}; check --output", folder.display()))
}

/// Classifies on one thread per backend and hands over the answers in the order of `images`. Stops early when
/// `answered` fails.
fn classify(
    images: &[PathBuf],
    backends: Vec<OrtBackend>,
    model: &ModelDir,
    decoder: (Decoder, &Arc<DecodeMemory>),
    k: usize,
    mut answered: impl FnMut(usize, Answer) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let preprocessor = Preprocessor::new(&model.manifest.preprocessing);
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::sync_channel(64);
        for mut backend in backends {
            let (sender, next, preprocessor) = (sender.clone(), &next, &preprocessor);
            scope.spawn(move || {
                while let Some((i, image)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, images.get(i)?)))
                {
                    let answer = one(image, &mut backend, model, preprocessor, decoder, k);
                    if sender.send((i, answer)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let (mut waiting, mut turn) = (BTreeMap::new(), 0);
        for (i, answer) in receiver {
            waiting.insert(i, answer);
            while let Some(answer) = waiting.remove(&turn) {
                answered(turn, answer)?;
                turn += 1;
            }
        }
        Ok(())
    })
}

fn one(
    path: &Path,
    backend: &mut dyn Backend,
    model: &ModelDir,
    preprocessor: &Preprocessor,
    (decoder, memory): (Decoder, &Arc<DecodeMemory>),
    k: usize,
) -> Answer {
    let manifest = &model.manifest;
    let bytes = read(path, decoder.limits.max_bytes).map_err(|e| ("unreadable", format!("can't read it: {e}")))?;
    let upright = manifest.preprocessing.exif_orientation;
    let refused = |e: ImageError| (e.reason(), e.to_string());
    let image = decoder.open(&bytes, upright).map_err(refused)?;
    let need = image.need();
    let share = memory.claim(need.bytes + preprocessor.scratch(need.width, need.height)).wait();
    let image = image.decode(|width, height| preprocessor.resized(width, height)).map_err(refused)?;
    let mut batch = Batch::zeros(1, preprocessor.height(), preprocessor.width());
    preprocessor.apply(&image, batch.image_mut(0));
    drop((image, share));
    let logits = backend.run(&batch).map_err(|e| ("engine", e.to_string()))?;
    top_k(logits.row(0), k, &manifest.labels).map_err(|e| ("engine", e.to_string()))
}

/// Reads a file or standard input, one byte past `limit` at most: decoding then refuses it by its size.
fn read(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = limit as u64 + 1;
    if is_stdin(path) {
        io::stdin().lock().take(limit).read_to_end(&mut bytes)?;
    } else {
        fs::File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// Files named, and files found in folders named.
fn gather(args: &ClassifyArgs) -> anyhow::Result<Vec<PathBuf>> {
    let mut images = Vec::new();
    for path in &args.images {
        if is_stdin(path) || path.is_file() {
            images.push(path.clone());
        } else if path.is_dir() && args.recursive {
            let before = images.len();
            search(path, &mut images).map_err(|e| anyhow!("can't search `{}`: {e}", path.display()))?;
            if images.len() == before {
                let known = EXTENSIONS.join(", ");
                bail!(
                    "folder `{}` holds no image file (looked for: {known}); name the files themselves",
                    path.display()
                );
            }
        } else if path.is_dir() {
            bail!("`{}` is a folder; add --recursive to classify the images in it", path.display());
        } else if let Err(e) = fs::metadata(path) {
            bail!("can't read `{}`: {e}; check the path", path.display());
        } else {
            // a pipe or device: read like a file
            images.push(path.clone());
        }
    }
    Ok(images)
}

/// Every image file under `folder`, in order of the names; links to folders are not followed.
pub fn search(folder: &Path, images: &mut Vec<PathBuf>) -> io::Result<()> {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    entries.sort();
    for path in entries {
        // links are not followed into folders: they may lead back
        if path.is_dir() && !path.is_symlink() {
            search(&path, images)?;
        } else if path.is_file() {
            let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
            if extension.is_some_and(|e| EXTENSIONS.contains(&e.as_str())) {
                images.push(path);
            }
        }
    }
    Ok(())
}

fn bar(images: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} images, {per_sec}, {eta} left");
    ProgressBar::new(images as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Answers as a person, or a program, would like to read them.
struct Printer<'a, W> {
    model: &'a ModelDir,
    json: bool,
    failed: usize,
    out: W,
}

impl<W: Write> Printer<'_, W> {
    fn print(&mut self, path: &Path, answer: Answer) -> anyhow::Result<()> {
        let path = path.display().to_string();
        self.failed += usize::from(answer.is_err());
        match (self.json, answer) {
            (true, Ok(predictions)) => {
                let (model, version) = (&self.model.name, self.model.version);
                let line = json!({ "image": path, "model": model, "version": version, "predictions": predictions });
                writeln!(self.out, "{line}")?;
            }
            (true, Err((reason, message))) => {
                let line = json!({ "image": path, "error": { "reason": reason, "message": message } });
                writeln!(self.out, "{line}")?;
            }
            (false, Ok(predictions)) => {
                writeln!(self.out, "{path}")?;
                let width = predictions.iter().map(|p| p.label.chars().count()).max().unwrap_or(0);
                for p in &predictions {
                    let line = format!("  {:<width$}  {:5.1} %  {}", p.label, 100.0 * p.score, blocks(p.score));
                    writeln!(self.out, "{}", line.trim_end())?;
                }
            }
            (false, Err((_, message))) => eprintln!("error: `{path}`: {message}"),
        }
        Ok(())
    }
}

/// A bar of up to 30 characters, in eighths.
fn blocks(share: f64) -> String {
    let eighths = (share * 240.0).round() as usize;
    let partial = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    "█".repeat(eighths / 8) + partial[eighths % 8]
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
