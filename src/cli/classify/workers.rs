//! Computes the logits of image files without a server: one worker per core, each with its own session; results come in
//! the order of the files.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use anyhow::bail;
use clap::Args;
use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use super::search::Found;
use crate::engine::{Answers, Backend, Batch, ClassMaps, EngineOptions, Extras, Fitted, Kernels, OrtBackend, verify};
use crate::infer::top_k::NotFinite;
use crate::model::{Colors, ModelDir};
use crate::pixels::{DecodeMemory, Decoder, ImageError, Preprocessor};

/// Why an image has no result: a stable reason and a message.
pub type Refusal = (&'static str, String);

/// Flags that name the model, and the number of threads that run it.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Model repository
    #[arg(long, env = "NFOLD_REPOSITORY", default_value = "repository", value_name = "DIR")]
    repository: PathBuf,
    /// Name of the model [default: the repository's only one]
    #[arg(long, env = "NFOLD_MODEL", value_name = "NAME")]
    model: Option<String>,
    /// Version of the model [default: the highest]
    #[arg(long, env = "NFOLD_MODEL_VERSION", value_name = "N")]
    model_version: Option<u64>,
    /// Worker threads [default: one per core]
    #[arg(long, env = "NFOLD_THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl ModelArgs {
    /// Name and version of the model, as far as given.
    pub fn named(&self) -> (Option<&str>, Option<u64>) {
        (self.model.as_deref(), self.model_version)
    }

    /// The same flags for another model, in its highest version.
    pub fn beside(&self, model: &str) -> Self {
        let (repository, model) = (self.repository.clone(), Some(model.into()));
        Self { repository, model, model_version: None, threads: self.threads }
    }

    /// Model repository.
    pub fn repository(&self) -> &Path {
        &self.repository
    }
}

/// Workers that are ready to run a model.
pub struct Workers(Vec<OrtBackend>, Option<Result<ClassMaps, &'static str>>);

/// What a run gave for one image.
#[derive(Debug, Clone)]
pub struct Given {
    /// `[classes]`.
    pub logits: Vec<f32>,
    /// The vector that the classifier reads; empty where it was not asked for.
    pub features: Vec<f32>,
    /// The map that is pooled; empty where it was not asked for.
    pub map: Vec<f32>,
    /// What the network saw; empty where the map was not asked for.
    pub input: Vec<f32>,
}

impl Workers {
    /// Opens the model for a number of images.
    pub fn open(chosen: &ModelArgs, images: usize) -> anyhow::Result<(ModelDir, Self)> {
        let model = ModelDir::open(&chosen.repository, chosen.model.as_deref(), chosen.model_version)?;
        let channels = model.manifest.preprocessing.channels();
        if Colors::of_channels(channels).is_none() {
            bail!(
                "`{}` takes {channels} channels, and an image has 1 or 3 (grey, RGB); serve it, and send tensors to /v2",
                model.name
            );
        }
        let (model, onnx) = model.with_onnx()?;
        let class_maps = model.manifest.map.map(|_| ClassMaps::of(&onnx));
        let graph = Fitted::for_this_cpu(onnx, Kernels::Own);
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let threads = chosen.threads.map_or(cores, usize::from);
        let workers = threads.clamp(1, images.max(1));
        // a single image may use all cores; several are faster with one core each
        let intra_threads = if workers == 1 { threads } else { 1 };
        let options = EngineOptions { intra_threads, ..EngineOptions::default() };
        let what = model.onnx().display().to_string();
        let mut backends =
            (0..workers).map(|_| OrtBackend::open_fitted(&graph, &what, &options)).collect::<Result<Vec<_>, _>>()?;
        if let (Some(golden), Some(backend)) = (&model.manifest.golden, backends.first_mut()) {
            let logits = verify::answers(backend, 1, model.manifest.preprocessing.shape())?;
            let (difference, tolerance) = (verify::compare(&golden.logits, &logits).max_abs_diff, golden.tolerance);
            if difference > tolerance {
                bail!(
                    "`{}` gives other answers here than at folding: logits differ by {difference:.3e} (tolerance {tolerance:.3e}); fold \
                     the checkpoint again",
                    model.name
                );
            }
        }
        Ok((model, Self(backends, class_maps)))
    }

    /// The class activation maps of a model with the output `map`; the error says why there are none.
    pub fn class_maps(&self) -> Option<&Result<ClassMaps, &'static str>> {
        self.1.as_ref()
    }

    /// Runs the images and passes their logits, or why there are none, to `answered` in order. Stops once `answered`
    /// fails.
    pub fn each(
        self,
        model: &ModelDir,
        images: &[Found],
        decoder: (Decoder, &Arc<DecodeMemory>),
        extras: Extras,
        mut answered: impl FnMut(usize, Result<Given, Refusal>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let preprocessor = Preprocessor::new(&model.manifest.preprocessing);
        let next = AtomicUsize::new(0);
        thread::scope(|scope| {
            let (sender, receiver) = mpsc::sync_channel(64);
            for mut backend in self.0 {
                let (sender, next, preprocessor) = (sender.clone(), &next, &preprocessor);
                scope.spawn(move || {
                    while let Some((i, image)) =
                        Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, images.get(i)?)))
                    {
                        let answer = match &image.refused {
                            Some(reason) => Err(("unreadable", reason.clone())),
                            None => one(&image.path, &mut backend, (model, preprocessor), decoder, extras),
                        };
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
}

fn one(
    path: &Path,
    backend: &mut dyn Backend,
    (model, preprocessor): (&ModelDir, &Preprocessor),
    (decoder, memory): (Decoder, &Arc<DecodeMemory>),
    extras: Extras,
) -> Result<Given, Refusal> {
    let manifest = &model.manifest;
    let bytes = read(path, decoder.limits.max_bytes).map_err(|e| ("unreadable", format!("can't read it: {e}")))?;
    let upright = manifest.preprocessing.exif_orientation;
    let refused = |e: ImageError| (e.reason(), e.to_string());
    let image = decoder.open(&bytes, upright).map_err(refused)?;
    let need = image.need();
    let share = memory.claim(need.bytes + preprocessor.scratch(need.width, need.height)).wait();
    let image = image.decode(|width, height| preprocessor.resized(width, height)).map_err(refused)?;
    let mut batch = Batch::zeros_of(1, manifest.preprocessing.shape());
    preprocessor.apply(&image, batch.image_mut(0));
    drop((image, share));
    let Answers { logits, features, map } = backend.run_with(&batch, extras).map_err(|e| ("engine", e.to_string()))?;
    let input = if extras.map { batch.data } else { Vec::new() };
    Ok(Given { logits: logits.data, features, map, input })
}

/// The error for logits that are not finite.
pub fn engine(error: NotFinite) -> Refusal {
    ("engine", error.to_string())
}

/// Reads a file or standard input, at most one byte past `limit`: decoding then refuses it by its size.
pub fn read(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = limit as u64 + 1;
    if is_stdin(path) {
        io::stdin().lock().take(limit).read_to_end(&mut bytes)?;
    } else {
        fs::File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

/// Whether the path is `-`.
pub fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// A progress bar for this many images, on stderr.
pub fn bar(images: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} images, {speed}, {eta} left");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    let speed = |state: &ProgressState, out: &mut dyn fmt::Write| {
        let _ = write!(out, "{:.1} images/s", state.per_sec());
    };
    ProgressBar::new(images as u64).with_style(style.with_key("speed", speed))
}
