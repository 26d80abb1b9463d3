//! `nfold fold`: folds, verifies the fold through ONNX Runtime, and only then writes.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::bail;
use clap::builder::FalseyValueParser;
use clap::{Args, ValueEnum};
use serde_json::json;

use super::printable::say;
use super::source::SourceArgs;
use crate::checkpoint::Checkpoint;
use crate::engine::verify;
use crate::engine::{EngineError, EngineOptions, MapBackend, MapView, OrtBackend};
use crate::fold::verified::{self, Question};
use crate::fold::{self, FoldOptions, Size};
use crate::model::golden::compare;
use crate::model::{self, Gate, INPUT, Manifest, ModelDir, ModelError, Precision, Staging, Target};

/// Arguments of `nfold fold`.
#[derive(Debug, Args)]
pub struct FoldArgs {
    /// Checkpoint: a folder as the model hub lays it out (config.json and model.safetensors, shards or
    /// pytorch_model.bin), or a file of weights (.safetensors, .pth, .pth.tar, .bin, .ckpt)
    checkpoint: PathBuf,
    #[command(flatten)]
    source: SourceArgs,
    /// Model repository to write into; made when missing
    #[arg(long, env = "NFOLD_REPOSITORY", default_value = "repository", value_name = "DIR")]
    repository: PathBuf,
    /// Name of the model [default: the checkpoint's folder or file name]
    #[arg(long, env = "NFOLD_NAME")]
    name: Option<String>,
    /// Version of the model
    #[arg(long, env = "NFOLD_MODEL_VERSION", default_value_t = 1, value_name = "N")]
    model_version: u64,
    /// Input size in pixels: `dynamic`, `H` or `HxW` [default: the checkpoint's evaluation size]
    #[arg(long, env = "NFOLD_SIZE", value_parser = parse_size)]
    size: Option<Size>,
    /// Number format of weights and arithmetic
    #[arg(long, env = "NFOLD_PRECISION", default_value = "fp32")]
    precision: PrecisionArg,
    /// How attention gates multiply: `resize` is fastest on ONNX Runtime's CPU, `broadcast` suits other runtimes
    #[arg(long, env = "NFOLD_GATE", default_value = "resize")]
    gate: GateArg,
    /// Leave standardisation, normalisation, gains, α and β as graph operations, for comparison
    #[arg(long, env = "NFOLD_UNFOLDED", value_parser = FalseyValueParser::new())]
    unfolded: bool,
    /// Turn images upright by their EXIF orientation before they are classified; timm, and so training, does not
    #[arg(long, env = "NFOLD_EXIF_ORIENTATION", value_parser = FalseyValueParser::new())]
    exif_orientation: bool,
    /// Replace the version if it exists
    #[arg(long, env = "NFOLD_REPLACE", value_parser = FalseyValueParser::new())]
    replace: bool,
    /// Print the report as JSON on stdout
    #[arg(long, env = "NFOLD_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PrecisionArg {
    Fp32,
    Fp16,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum GateArg {
    Resize,
    Broadcast,
}

fn parse_size(text: &str) -> Result<Size, String> {
    let side =
        |s: &str| s.parse::<u32>().map_err(|_| format!("`{text}` is not `dynamic`, `H` or `HxW`, as in 288x288"));
    match text.split_once('x') {
        _ if text == "dynamic" => Ok(Size::Dynamic),
        Some((height, width)) => Ok(Size::Fixed(side(height)?, side(width)?)),
        None => side(text).map(|s| Size::Fixed(s, s)),
    }
}

/// Runs `nfold fold`.
pub fn run(args: &FoldArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let checkpoint = Checkpoint::open_with(&args.checkpoint, &args.source.options())?;
    let options = FoldOptions {
        size: args.size.unwrap_or_default(),
        precision: match args.precision {
            PrecisionArg::Fp32 => Precision::Fp32,
            PrecisionArg::Fp16 => Precision::Fp16,
        },
        gate: match args.gate {
            GateArg::Resize => Gate::Resize,
            GateArg::Broadcast => Gate::Broadcast,
        },
        unfolded: args.unfolded,
        exif_orientation: args.exif_orientation,
    };
    let name = args.name.as_deref().unwrap_or(&checkpoint.name);
    model::check_name(name)?;
    let staging = Staging::new(&args.repository)?;
    let mut folded = fold::fold_to_file(&checkpoint, &options, &staging.onnx())?;
    verify(&checkpoint, &mut folded.manifest, &staging, &options)?;

    if folded.manifest.classes == 1 {
        say(format_args!(
            "warning: the network has one output; `classify` and `serve` answer its sigmoid as the score, /v2 the logit itself"
        ));
    }
    let target = Target { repository: &args.repository, name, version: args.model_version, replace: args.replace };
    let (written, state) = match ModelDir::publish_staged(&target, staging, &folded.manifest) {
        Ok(written) => (written, "wrote"),
        Err(ModelError::Exists(path)) => match ModelDir::open_path(&path) {
            Ok(there) if same(&there.manifest, &folded.manifest) => (there, "unchanged:"),
            _ => return Err(ModelError::Exists(path).into()),
        },
        Err(e) => return Err(e.into()),
    };
    super::inspect::warn(&written.manifest);
    if args.json {
        let report = json!({ "model": written.name, "version": written.version, "path": written.path, "manifest": written.manifest });
        writeln!(io::stdout(), "{report:#}")?;
    } else {
        super::inspect::describe(&written.manifest).lines().for_each(|line| say(format_args!("{line}")));
        let (path, megabytes) = (written.path.display(), folded.len as f64 / 1e6);
        say(format_args!("{state} {path} ({megabytes:.1} MB) after {:.1} s", started.elapsed().as_secs_f64()));
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether two manifests describe the same model; measurements of this machine aside.
fn same(a: &Manifest, b: &Manifest) -> bool {
    let mut a = a.clone();
    a.fold.verification.clone_from(&b.fold.verification);
    a.golden.clone_from(&b.golden);
    a == *b
}

/// Folded against unfolded, through ONNX Runtime with all cores; and in half precision, what that does to the network.
fn verify(
    checkpoint: &Checkpoint,
    manifest: &mut Manifest,
    staging: &Staging,
    options: &FoldOptions,
) -> anyhow::Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let engine = EngineOptions { intra_threads: threads, ..EngineOptions::default() };
    let half = match options.precision {
        Precision::Fp32 => None,
        Precision::Fp16 => Some(in_half(checkpoint, manifest, options, &engine)?),
    };
    let answers = |q: Question<'_>| {
        let logits = if q.unfolded {
            let mut backend = OrtBackend::open_file_as_written(q.path, q.what, &engine)?;
            verify::answers_together(&mut backend, q.images, q.shape)
        } else {
            verify::answers(&mut OrtBackend::open_file(q.path, q.what, &engine)?, q.images, q.shape)
        };
        logits.map_err(|e| EngineError::BadModel { model: q.what.into(), reason: e.to_string() })
    };
    verified::verify(checkpoint, manifest, &staging.onnx(), options, answers)?;
    let (Some(half), Some(golden)) = (half, manifest.golden.as_ref()) else { return Ok(()) };
    // kernels of this machine may compute halves in single precision; others don't
    let found = compare(&golden.logits, &half.logits);
    if found.max_abs_diff.is_nan() || found.max_abs_diff > golden.tolerance {
        bail!(
            "in true half precision logits differ by {:.1e} (tolerance {:.1e}); nothing was written; use --precision fp32",
            found.max_abs_diff,
            golden.tolerance
        );
    }
    if let Some(verification) = &mut manifest.fold.verification {
        verification.headroom = Some(half.headroom);
    }
    Ok(())
}

/// What half precision does to a network.
struct InHalf {
    /// Logits of the golden image.
    logits: Vec<f32>,
    /// Largest number of half precision by the largest value of any map.
    headroom: f64,
}

/// Runs the network with every map rounded to half precision, on noise and on plain images. Fails where a map does not fit.
fn in_half(
    checkpoint: &Checkpoint,
    manifest: &Manifest,
    options: &FoldOptions,
    engine: &EngineOptions,
) -> anyhow::Result<InHalf> {
    let emulated = fold::fold_in_half(checkpoint, options)?;
    let mut session = MapBackend::open_as_written(&emulated, "the graph in half precision", engine)?;
    drop(emulated);
    let p = &manifest.preprocessing;
    let [channels, height, width] = p.shape();
    let noise = verify::images(p.shape()).take(4);
    let (mut logits, mut largest) = (Vec::new(), (0.0, String::new()));
    for (i, data) in noise.chain(verify::plain_images(p)).enumerate() {
        let input = MapView { name: INPUT, shape: [1, channels, height, width], data: &data };
        session.run(&[input], |output| match output.name.strip_suffix(fold::PEAK) {
            Some(map) => {
                let peak = output.data.first().map_or(0.0, |v| f64::from(*v));
                if peak.is_nan() || peak > largest.0 {
                    largest = (peak, map.to_string());
                }
            }
            None if i == 0 => logits.extend_from_slice(output.data),
            None => {}
        })?;
    }
    let (peak, map) = largest;
    let headroom = fold::LARGEST_HALF / peak;
    if headroom.is_nan() || headroom < 1.0 {
        bail!(
            "in half precision `{map}` overflows: it reaches {peak:.1e}, and half precision holds {:.0}; nothing was written; use --precision fp32",
            fold::LARGEST_HALF
        );
    }
    Ok(InHalf { logits, headroom })
}
