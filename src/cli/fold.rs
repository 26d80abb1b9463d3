//! `nfold fold`: folds, verifies the fold through ONNX Runtime, and only then writes.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use clap::builder::FalseyValueParser;
use serde_json::json;

use super::calibrate::CalibrateArgs;
use super::fetching::Progress;
use super::inspect::Detail;
use super::printable::say;
use super::source::{FoldingArgs, SourceArgs};
use crate::fold::FoldOptions;
use crate::hub::HubOptions;
use crate::model::{self, Manifest, ModelDir, ModelError, Precision, ScoreFunction, Staging, Target};
use crate::sources::{FoldCache, Origin, fold_verified};

/// Arguments of `nfold fold`.
#[derive(Debug, Args)]
pub struct FoldArgs {
    /// Checkpoint: a folder as the model hub lays it out (config.json and model.safetensors, shards or
    /// pytorch_model.bin), a file of weights (.safetensors, .pth, .pth.tar, .bin, .ckpt), or a model on the hub,
    /// ORG/NAME or ORG/NAME@REVISION
    checkpoint: PathBuf,
    #[command(flatten)]
    source: SourceArgs,
    /// Model repository to write into; created if missing
    #[arg(long, env = "NFOLD_REPOSITORY", default_value = REPOSITORY, value_name = "DIR")]
    repository: PathBuf,
    /// Name of the model [default: name of the checkpoint's folder or file; NAME for the hub]
    #[arg(long, env = "NFOLD_NAME")]
    name: Option<String>,
    /// Version of the model
    #[arg(long, env = "NFOLD_MODEL_VERSION", default_value_t = 1, value_name = "N")]
    model_version: u64,
    #[command(flatten)]
    folding: FoldingArgs,
    #[command(flatten)]
    calibrate: CalibrateArgs,
    /// Keep standardisation, normalisation, gains, α and β as operations of the graph, for comparison
    #[arg(long, env = "NFOLD_UNFOLDED", value_parser = FalseyValueParser::new())]
    unfolded: bool,
    /// Replace the version if it exists
    #[arg(long, env = "NFOLD_REPLACE", value_parser = FalseyValueParser::new())]
    replace: bool,
    /// Also print every setting's origin and every block's α and β
    #[arg(long, short, env = "NFOLD_VERBOSE", value_parser = FalseyValueParser::new())]
    verbose: bool,
    /// Print the report as JSON on stdout
    #[arg(long, env = "NFOLD_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

/// The default repository.
const REPOSITORY: &str = "repository";

/// Runs `nfold fold`.
pub fn run(args: &FoldArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let mut progress = Progress::default();
    let origin = Origin::parse(&args.checkpoint)?;
    let options = FoldOptions { unfolded: args.unfolded, ..args.folding.options() };
    args.calibrate.check(&options)?;
    let target =
        |name| Target { repository: &args.repository, name, version: args.model_version, replace: args.replace };
    let known = match &origin {
        Origin::Hub(id) => args.name.as_deref().or(Some(id.name())),
        Origin::Path(_) => args.name.as_deref(),
    };
    if let Some(name) = known {
        check_target(&target(name), (options.precision, &args.calibrate), None)?;
    }
    // kept until the checkpoint is read: it may be a temporary folder
    let spare = if matches!(origin, Origin::Hub(_)) { Some(FoldCache::open(None)?) } else { None };
    let hub = || HubOptions::from_environment(spare.as_ref().map_or(Path::new("."), FoldCache::folder));
    let checkpoint = origin.open(&args.source.options(), hub, &mut |event| progress.show(event))?;
    let target = target(args.name.as_deref().unwrap_or(&checkpoint.name));
    check_target(&target, (options.precision, &args.calibrate), Some(&checkpoint.sha256))?;
    let staging = Staging::new(&args.repository)?;
    let folded = match options.precision {
        Precision::Int8 => args.calibrate.fold(&checkpoint, &options, &staging)?,
        Precision::Fp32 | Precision::Fp16 => fold_verified(&checkpoint, &options, &staging)?,
    };

    if folded.manifest.classes == 1 && folded.manifest.scoring().activation == ScoreFunction::Sigmoid {
        say(format_args!(
            "warning: the network has one output; `classify` and `serve` answer its sigmoid as the score, /v2 the logit itself"
        ));
    }
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
        let detail = if args.verbose { Detail::Whole } else { Detail::Brief };
        super::inspect::describe(&written.manifest, detail).lines().for_each(|line| say(format_args!("{line}")));
        let (path, megabytes) = (written.path.display(), folded.len as f64 / 1e6);
        say(format_args!("{state} {path} ({megabytes:.1} MB) after {:.1} s", started.elapsed().as_secs_f64()));
        say(format_args!("next: {}", next(args, &written)));
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses a target before the work for it is done. A version that is there is refused later if it can still turn out to be the
/// same model: one of this precision and checkpoint, of integers also of such a calibration.
fn check_target(
    target: &Target<'_>,
    (precision, calibrate): (Precision, &CalibrateArgs),
    sha256: Option<&str>,
) -> Result<(), ModelError> {
    target.check_repository()?;
    match target.folder() {
        Err(ModelError::Exists(path)) => {
            let may_be_same = |there: &Manifest| {
                there.precision == precision
                    && there.quantisation.as_ref().is_none_or(|recorded| calibrate.may_give(recorded))
                    && sha256.is_none_or(|sha256| there.source_sha256 == sha256)
            };
            match ModelDir::open_path(&path) {
                Ok(there) if may_be_same(&there.manifest) => Ok(()),
                _ => Err(ModelError::Exists(path)),
            }
        }
        free => free.map(drop),
    }
}

/// The next command for the user, with the same flags.
fn next(args: &FoldArgs, written: &ModelDir) -> String {
    let mut command = String::from("nfold serve");
    if args.repository.as_os_str() != REPOSITORY && std::env::var_os("NFOLD_REPOSITORY").is_none() {
        command.push_str(&format!(" --repository {}", quoted(&args.repository.to_string_lossy())));
    }
    if model::list(&args.repository).is_ok_and(|listing| listing.models.len() > 1) {
        command.push_str(&format!(" --default-model {}", written.name));
    }
    command
}

/// A word quoted for a shell.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "_-./:@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.into() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

/// Whether two manifests describe the same model, apart from measurements on this machine.
fn same(a: &Manifest, b: &Manifest) -> bool {
    let mut a = a.clone();
    a.fold.verification.clone_from(&b.fold.verification);
    a.golden.clone_from(&b.golden);
    a == *b
}
