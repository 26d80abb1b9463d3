//! `nfold fold`: folds, verifies the fold through ONNX Runtime, and only then writes.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::bail;
use clap::builder::FalseyValueParser;
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::checkpoint::Checkpoint;
use crate::engine::verify;
use crate::engine::{EngineOptions, OrtBackend};
use crate::fold::{self, FoldOptions, Folded, Size};
use crate::model::{self, Gate, Golden, Manifest, ModelDir, ModelError, Precision, Target, Verification};

/// Arguments of `nfold fold`.
#[derive(Debug, Args)]
pub struct FoldArgs {
    /// Checkpoint folder as the model hub lays it out: config.json and model.safetensors
    checkpoint: PathBuf,
    /// Model repository to write into; made when missing
    #[arg(long, env = "NFOLD_REPOSITORY", default_value = "repository", value_name = "DIR")]
    repository: PathBuf,
    /// Name of the model [default: the checkpoint folder's name]
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
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
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
    let mut folded = fold::fold(&checkpoint, &options)?;
    let (verification, golden) = verify(&checkpoint, &folded, &options)?;
    folded.manifest.fold.verification = Some(verification);
    folded.manifest.golden = Some(golden);

    let target = Target { repository: &args.repository, name, version: args.model_version, replace: args.replace };
    let (written, state) = match ModelDir::publish(&target, &folded.onnx, &folded.manifest) {
        Ok(written) => (written, "wrote"),
        Err(ModelError::Exists(path)) => match ModelDir::open_path(&path) {
            Ok(there) if same(&there.manifest, &folded.manifest) => (there, "unchanged:"),
            _ => return Err(ModelError::Exists(path).into()),
        },
        Err(e) => return Err(e.into()),
    };
    if args.json {
        let report = json!({ "model": written.name, "version": written.version, "path": written.path, "manifest": written.manifest });
        writeln!(io::stdout(), "{report:#}")?;
    } else {
        eprint!("{}", super::inspect::describe(&written.manifest));
        let (path, megabytes) = (written.path.display(), folded.onnx.len() as f64 / 1e6);
        eprintln!("{state} {path} ({megabytes:.1} MB) after {:.1} s", started.elapsed().as_secs_f64());
    }
    Ok(ExitCode::SUCCESS)
}

/// The same model, whatever this machine measured.
fn same(a: &Manifest, b: &Manifest) -> bool {
    let mut a = a.clone();
    a.fold.verification.clone_from(&b.fold.verification);
    a.golden.clone_from(&b.golden);
    a == *b
}

/// Runs the graph against its counterpart (folded against unfolded) on random images. The counterpart is in single
/// precision with weight arithmetic in double: ONNX Runtime has no double-precision convolution.
fn verify(checkpoint: &Checkpoint, folded: &Folded, options: &FoldOptions) -> anyhow::Result<(Verification, Golden)> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let engine = EngineOptions { intra_threads: threads, ..EngineOptions::default() };
    let manifest = &folded.manifest;
    let images = if manifest.fold.gmacs < 5.0 { 4 } else { 1 };
    let size = (manifest.preprocessing.height as usize, manifest.preprocessing.width as usize);
    // one session after the other: a large network's weights need not be in memory four times
    let answers = |onnx: &[u8], what: &str| -> anyhow::Result<Vec<f32>> {
        Ok(verify::answers(&mut OrtBackend::open(onnx, what, &engine)?, images, size)?)
    };
    let counterpart =
        FoldOptions { unfolded: !options.unfolded, precision: Precision::Fp32, gate: Gate::Broadcast, ..*options };
    let reference = answers(&fold::fold(checkpoint, &counterpart)?.onnx, "the counterpart for verification")?;
    let mut logits = answers(&folded.onnx, "the folded graph")?;
    let found = verify::compare(&reference, &logits);
    let tolerance = match options.precision {
        Precision::Fp32 => 1e-4 * found.logit_span + 1e-6,
        Precision::Fp16 => 2e-2 * found.logit_span + 1e-3,
    };
    if found.max_abs_diff.is_nan() || found.max_abs_diff > tolerance {
        bail!(
            "the folded graph's logits differ by {:.3e} from the unfolded graph's (tolerance {tolerance:.3e}, span {:.3e}); \
             nothing was written; try --precision fp32, and report this checkpoint if it is",
            found.max_abs_diff,
            found.logit_span
        );
    }
    logits.truncate(manifest.classes as usize);
    let input = verify::images(size).next().unwrap_or_default();
    let golden = Golden { input_sha256: verify::digest(&input), logits, tolerance };
    let verification = Verification {
        images: images as u32,
        max_abs_diff: found.max_abs_diff,
        logit_span: found.logit_span,
        tolerance,
    };
    Ok((verification, golden))
}
