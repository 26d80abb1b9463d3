//! `nfold inspect`: describes a folded model or a checkpoint.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use clap::Args;
use clap::builder::FalseyValueParser;
use serde_json::json;

use super::printable::printable;
use super::source::SourceArgs;
use crate::checkpoint::{CONFIG_FILE, Checkpoint};
use crate::fold::{FoldOptions, fold};
use crate::model::{MANIFEST_FILE, MODEL_FILE, Manifest, ModelDir, Quantisation, Scoring, SourceSetting};

/// Arguments of `nfold inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Name of a model in the repository, a path that `fold` printed, or a checkpoint (folder or file of weights)
    model: PathBuf,
    #[command(flatten)]
    source: SourceArgs,
    /// Model repository that names are looked up in
    #[arg(long, env = "NFOLD_REPOSITORY", default_value = "repository", value_name = "DIR")]
    repository: PathBuf,
    /// Version of the model [default: the highest]
    #[arg(long, env = "NFOLD_MODEL_VERSION", value_name = "N")]
    model_version: Option<u64>,
    /// Print as JSON
    #[arg(long, env = "NFOLD_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

/// Runs `nfold inspect`. A checkpoint is read completely and folded in memory, so that its description is verified.
pub fn run(args: &InspectArgs) -> anyhow::Result<ExitCode> {
    let path = &args.model;
    let of_model = path.file_name().is_some_and(|name| name == MANIFEST_FILE || name == MODEL_FILE);
    let (kind, name, manifest) = if path.join(CONFIG_FILE).is_file() || (path.is_file() && !of_model) {
        let checkpoint = Checkpoint::open_with(path, &args.source.options())?;
        let manifest = fold(&checkpoint, &FoldOptions::default())?.manifest;
        ("checkpoint", checkpoint.name, manifest)
    } else {
        let (model, _) = open(args, path)?.with_onnx()?;
        ("model", format!("{} version {}", model.name, model.version), model.manifest)
    };
    warn(&manifest);
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{:#}", json!({ "kind": kind, "name": name, "manifest": manifest }))?;
    } else {
        write!(out, "{kind} {}\n{}", printable(&name), describe(&manifest, Detail::Whole))?;
        writeln!(out, "source sha256  {}", printable(&manifest.source_sha256))?;
        if kind == "model" {
            writeln!(out, "onnx sha256    {}", printable(&manifest.onnx_sha256))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn open(args: &InspectArgs, path: &Path) -> anyhow::Result<ModelDir> {
    // a version folder, a file in it, or a model's folder
    let named = path.file_name().is_some_and(|name| name == MANIFEST_FILE || name == MODEL_FILE);
    let folder =
        if named { path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")) } else { path };
    if folder.join(MANIFEST_FILE).is_file() {
        return Ok(ModelDir::open_path(folder)?);
    }
    if path.is_dir()
        && let (Some(repository), Some(name)) = (path.parent(), path.file_name().and_then(OsStr::to_str))
        && let repository = if repository.as_os_str().is_empty() { Path::new(".") } else { repository }
        && let Ok(model) = ModelDir::open(repository, Some(name), args.model_version)
    {
        return Ok(model);
    }
    if !path.exists() && path.components().count() > 1 {
        bail!(
            "there is nothing at `{}`; name a model of the repository, a path that `nfold fold` printed, or a checkpoint",
            path.display()
        );
    }
    Ok(ModelDir::open(&args.repository, Some(&path.to_string_lossy()), args.model_version)?)
}

/// Prints the checkpoint's warnings on stderr.
pub fn warn(m: &Manifest) {
    for warning in &m.source.warnings {
        super::printable::say(format_args!("warning: {warning}"));
    }
}

/// How much detail to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// The model, with the origin of its settings in at most five lines.
    Brief,
    /// Also every setting's origin and every block's scalars.
    Whole,
}

/// A manifest as text.
pub fn describe(m: &Manifest, detail: Detail) -> String {
    let (f, p) = (&m.fold, &m.preprocessing);
    let mut out = String::new();
    // names come from an untrusted file
    let mut line = |key: &str, value: String| {
        let _ = writeln!(out, "{key:<14} {}", printable(&value));
    };
    line("architecture", m.architecture.clone());
    let dynamic = if m.graph_height.is_none() { " (dynamic)" } else { "" };
    line("input", format!("{}x{}x{}{dynamic}, {} classes", p.channels(), p.height, p.width, m.classes));
    if !m.labels.is_empty() {
        line("labels", labels(&m.labels));
    }
    if let Some(scoring) = &m.scoring {
        line("scores", scores(scoring, &m.labels));
    }
    line(
        "parameters",
        format!("{:.2} M, {:.2} M folded, {}", mega(f.parameters), mega(f.folded_parameters), m.precision),
    );
    line("work", format!("{:.3} GMACs an image", f.gmacs));
    let crop = format!("{} crop {} of {} resize", p.crop_mode, p.crop_pct, p.interpolation);
    line("preprocessing", format!("{crop}, mean {:?}, std {:?}", p.mean, p.std));
    match detail {
        Detail::Whole => {
            m.source.settings.iter().for_each(|s| line("  from", format!("{}: {}", s.setting, s.origin)));
        }
        Detail::Brief => origins(&m.source.settings).into_iter().for_each(|text| line("  from", text)),
    }
    if !m.source.unused.is_empty() {
        line("not used", m.source.unused.join(", "));
    }
    match f.gamma {
        Some(gamma) => line("activation", format!("{}, γ {gamma}", f.activation)),
        None => line("activation", f.activation.clone()),
    }
    if let Some(v) = &f.verification {
        let text = "largest logit difference folded against unfolded";
        line(
            "verified",
            format!("{text} {:.2e} of a span of {:.3} ({} images)", v.max_abs_diff, v.logit_span, v.images),
        );
    }
    if let Some(headroom) = f.verification.as_ref().and_then(|v| v.headroom) {
        line("half precision", format!("the largest value of any map fits {headroom:.0} times"));
    }
    if let Some(quantisation) = &m.quantisation {
        integers(quantisation).into_iter().for_each(|(key, text)| line(key, text));
    }
    if detail == Detail::Brief {
        return out;
    }
    if !f.blocks.is_empty() {
        let _ = writeln!(
            out,
            "{:<14} {:>8} {:>8} {:>10} {:>10} {:>10}",
            "block", "α", "β", "variance", "attn gain", "skip gain"
        );
    }
    for b in &f.blocks {
        let optional = |v: Option<f64>| v.map_or_else(|| "-".into(), |v| format!("{v:.4}"));
        let (attn, skip) = (optional(b.attn_gain), optional(b.skipinit_gain));
        let note = if b.dropped { "  left out: its scale is 0" } else { "" };
        let _ = writeln!(
            out,
            "{:<14} {:>8.4} {:>8.5} {:>10.4} {attn:>10} {skip:>10}{note}",
            printable(&b.block),
            b.alpha,
            b.beta,
            b.expected_variance
        );
    }
    out
}

/// How a network of integers was made.
fn integers(q: &Quantisation) -> Vec<(&'static str, String)> {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let images = if q.theory { "images of noise, as the theory assumes" } else { "calibration images" };
    let mut lines = vec![("integers", format!("ranges by {} of {} {images}", q.method.name(), q.images))];
    match (q.agreement, q.agreement_interval) {
        (Some(agreement), Some([low, high])) => {
            let mut text = format!(
                "{} of {} held-out images keep the class of single precision (95 % interval {} to {})",
                percent(agreement),
                q.held_out,
                percent(low),
                percent(high)
            );
            if let Some([single, integers]) = q.top1 {
                let _ = write!(
                    text,
                    "; top-1 {:.2} % in single precision, {:.2} % in integers",
                    100.0 * single,
                    100.0 * integers
                );
            }
            lines.push(("agreement", text));
        }
        _ => lines.push(("agreement", "not measured; `nfold eval DATA --beside NAME` does".into())),
    }
    if !q.keep.is_empty() {
        lines.push(("kept in fp32", q.keep.join(", ")));
    }
    lines
}

/// The origins of settings in at most five lines: those of the same file and table share a line, and the last line sums
/// up the rest.
fn origins(settings: &[SourceSetting]) -> Vec<String> {
    const LINES: usize = 5;
    let mut groups: Vec<(String, Vec<&str>)> = Vec::new();
    for SourceSetting { setting, origin } in settings {
        // `pretrained_cfg.crop_pct in config.json` and `pretrained_cfg.mean in config.json` have the same origin
        let place = match origin.split_once(" in ") {
            Some((field, file)) if field == setting => file.to_string(),
            Some((path, file)) => match path.rsplit_once('.').filter(|(_, field)| field == setting) {
                Some((table, _)) => format!("{table} in {file}"),
                None => origin.clone(),
            },
            None => origin.clone(),
        };
        match groups.iter_mut().find(|(p, _)| *p == place) {
            Some((_, names)) => names.push(setting),
            None => groups.push((place, vec![setting])),
        }
    }
    let mut lines: Vec<String> = groups.iter().map(|(place, names)| format!("{}: {place}", names.join(", "))).collect();
    if lines.len() > LINES {
        let rest = lines.split_off(LINES - 1).len();
        lines.push(format!("{rest} more: --verbose lists them, and so does `nfold inspect`"));
    }
    lines
}

/// How logits become scores, and which classes are named.
fn scores(scoring: &Scoring, labels: &[String]) -> String {
    let mut text = scoring.activation.name().to_string();
    if scoring.temperature != 1.0 {
        let _ = write!(text, " at temperature {}", scoring.temperature);
    }
    if let Some(threshold) = scoring.threshold {
        let _ = write!(text, ", named from {threshold} on");
    }
    for (n, (&index, threshold)) in scoring.thresholds.iter().enumerate() {
        if n == 5 {
            let _ = write!(text, ", and {} more", scoring.thresholds.len() - n);
            break;
        }
        let label = labels.get(index as usize).cloned().unwrap_or_else(|| index.to_string());
        let _ = write!(text, ", {label} from {threshold} on");
    }
    text
}

/// The first and the last of a list of labels.
fn labels(labels: &[String]) -> String {
    const SHOWN: usize = 10;
    match labels.split_last() {
        Some((last, others)) if labels.len() > SHOWN + 1 => format!("{}, … {last}", others[..SHOWN].join(", ")),
        _ => labels.join(", "),
    }
}

fn mega(n: u64) -> f64 {
    n as f64 / 1e6
}
