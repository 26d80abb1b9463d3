//! `nfold eval`: the accuracy of a folded model on images whose classes are known.

pub mod dataset;
mod page;
mod remote;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{anyhow, bail};
use clap::Args;
use clap::builder::FalseyValueParser;
use serde_json::{Value, json};

use self::dataset::{Other, Sample};
use self::remote::{Remote, Subject};
use super::classify::search::Found;
use super::classify::workers::{Given, ModelArgs, Refusal, Workers, bar, engine};
use super::fold::quoted;
use super::images::ImageArgs;
use super::printable::{self, printable, say};
use crate::engine::Extras;
use crate::eval::{Comparison, Evaluation, Fit, Judged, Share, TOP, fit_temperature};
use crate::files::{self, DraftFile};
use crate::infer::top_k::{Prediction, Selection, select};
use crate::model::{ModelDir, Precision, ScoreFunction};

/// Classes that the table lists before it refers to --json.
const CLASSES: usize = 40;
/// Confusions that the table lists.
const CONFUSIONS: usize = 10;

/// Arguments of `nfold eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Folder with a folder of images per class, or a CSV table of path,class. Classes are named by label, by index, or
    /// by WordNet id (synset)
    #[arg(value_name = "DATA")]
    data: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    /// Evaluate a running server by its answers at /v1/classify; its own limits and its own decoding count
    #[arg(long, env = "NFOLD_SERVER", value_name = "URL", conflicts_with = "fit_temperature")]
    server: Option<String>,
    /// Compare image by image with another run: JSON lines of `nfold classify` or of --predictions
    #[arg(long, env = "NFOLD_AGAINST", value_name = "FILE")]
    against: Option<PathBuf>,
    /// Evaluate another model of the repository beside it, on the same images: the same network in int8, say
    #[arg(long, env = "NFOLD_BESIDE", value_name = "NAME", conflicts_with_all = ["server", "against"])]
    beside: Option<String>,
    /// Evaluate this many images, spread evenly over all
    #[arg(long, env = "NFOLD_LIMIT", value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Write each image's class and predictions to this file, as JSON lines; the file appears once it is complete
    #[arg(long, env = "NFOLD_PREDICTIONS", value_name = "FILE")]
    predictions: Option<PathBuf>,
    /// Write a page with the results and the pictures of the worst errors into this folder
    #[arg(long, env = "NFOLD_REPORT", value_name = "DIR")]
    report: Option<PathBuf>,
    /// Also include names that begin with a dot, and system folders beside photographs, such as @eaDir
    #[arg(long, env = "NFOLD_HIDDEN", value_parser = FalseyValueParser::new())]
    hidden: bool,
    /// Find the temperature that makes scores most probable, and say how far they are from the share of right answers with it
    #[arg(long, env = "NFOLD_FIT_TEMPERATURE", value_parser = FalseyValueParser::new())]
    fit_temperature: bool,
    #[command(flatten)]
    limits: ImageArgs,
    /// Exit 0 even if some images could not be evaluated; they are named and not counted
    #[arg(long, env = "NFOLD_SKIP_BROKEN", value_parser = FalseyValueParser::new())]
    skip_broken: bool,
    /// Print the results as JSON
    #[arg(long, env = "NFOLD_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

/// The result of a run.
struct Run {
    subject: Subject,
    samples: Vec<Sample>,
    /// By the sample's index: its judgement and predictions, most probable class first.
    answered: Vec<(usize, Judged, Vec<Prediction>)>,
    /// By the sample's index: why it has no prediction.
    failed: Vec<(usize, String)>,
    evaluation: Evaluation,
    against: Option<(String, Comparison)>,
    beside: Option<Beside>,
    fit: Option<Fitted>,
    seconds: f64,
}

impl Run {
    /// Number of images that could not be evaluated, and number of folders that could not be searched, as in `1 folder`; `None` if
    /// all could.
    fn missed(&self) -> (usize, Option<String>) {
        let folders = self.samples.iter().filter(|sample| sample.found.is_folder).count();
        let named = match folders {
            0 => None,
            1 => Some("1 folder".into()),
            _ => Some(format!("{folders} folders")),
        };
        (self.failed.len() - folders, named)
    }
}

/// Where predictions come from.
enum Answerer {
    Here(Box<ModelDir>, Workers),
    There(Remote),
}

/// The model of --beside.
struct Beside {
    subject: Subject,
    precision: Precision,
    evaluation: Evaluation,
    /// Of its answers with the other model's.
    comparison: Comparison,
    seconds: f64,
}

impl Beside {
    /// Runs the model on all images and compares it with what was answered.
    fn run(
        (args, name): (&EvalArgs, &str),
        subject: &Subject,
        (samples, images): (&[Sample], &[Found]),
        classes: &BTreeMap<String, usize>,
        answered: &[(usize, Judged, Vec<Prediction>)],
    ) -> anyhow::Result<Self> {
        let (decoder, memory) = args.limits.resolve();
        let (model, workers) = Workers::open(&args.model.beside(name), images.len())?;
        if model.manifest.labels != subject.labels || model.manifest.classes as usize != subject.classes {
            bail!(
                "--beside {}: its classes are other ones than those of {}",
                printable(name),
                printable(&subject.name)
            );
        }
        let first: BTreeMap<usize, usize> = answered.iter().map(|(i, judged, _)| (*i, judged.predicted)).collect();
        let (scoring, labels) = (model.manifest.scoring(), model.manifest.labels.clone());
        let (mut pairs, mut missed) = (Vec::new(), 0);
        let progress = bar(images.len());
        let started = Instant::now();
        workers.each(&model, images, (decoder, &memory), Extras::NONE, |i, given| {
            progress.inc(1);
            let top =
                given.and_then(|given| select(&given.logits, &scoring, Selection::top(TOP), &labels).map_err(engine));
            match (top, first.get(&i)) {
                (Ok(top), Some(predicted)) => pairs.push((judged(classes[&samples[i].class], &top), *predicted)),
                _ => missed += 1,
            }
            Ok(())
        })?;
        progress.finish_and_clear();
        if pairs.is_empty() {
            bail!("--beside {}: none of {missed} images could be evaluated by both models", printable(name));
        }
        if missed > 0 {
            say(format_args!(
                "note: {missed} images aren't in the figures of {}: one of the models failed with them",
                printable(name)
            ));
        }
        let evaluation = Evaluation::of(&pairs.iter().map(|(judged, _)| *judged).collect::<Vec<_>>());
        let (comparison, seconds) = (Comparison::of(&pairs), started.elapsed().as_secs_f64());
        Ok(Self { subject: Subject::of(&model), precision: model.manifest.precision, evaluation, comparison, seconds })
    }
}

/// What --fit-temperature found.
struct Fitted {
    fit: Fit,
    /// The figures with scores at that temperature.
    evaluation: Evaluation,
    /// What makes it the model's.
    command: String,
}

/// Most bytes of logits that are kept to fit a temperature.
const MOST_KEPT: usize = 2 << 30;

/// Runs `nfold eval`. Exit code 1 if any image could not be evaluated.
pub fn run(args: &EvalArgs) -> anyhow::Result<ExitCode> {
    let (decoder, memory) = args.limits.resolve();
    if let Some(folder) = &args.report {
        files::check_folder(folder)
            .map_err(|e| anyhow!("can't make `{}`: {e}; check --report", printable::path(folder)))?;
    }
    let mut samples = dataset::read(&args.data, args.hidden)?;
    if let Some(limit) = args.limit {
        samples = dataset::limited(samples, usize::try_from(limit).unwrap_or(usize::MAX));
    }
    let other = args.against.as_deref().map(Other::read).transpose()?;
    let images: Vec<_> = samples.iter().map(|sample| sample.found.clone()).collect();
    let (subject, answerer) = match &args.server {
        None => {
            let (model, workers) = Workers::open(&args.model, samples.len())?;
            (Subject::of(&model), Answerer::Here(Box::new(model), workers))
        }
        Some(server) => {
            let (name, version) = args.model.named();
            let (subject, remote) = Remote::open(server, name, version, &images, decoder.limits.max_bytes)?;
            (subject, Answerer::There(remote))
        }
    };
    let labels = &subject.labels;
    let classes = dataset::resolve(&samples, labels, subject.classes)?;
    let mut predictions = args.predictions.as_ref().map(|path| Predictions::create(path)).transpose()?;
    if args.fit_temperature {
        let kept = samples.len().saturating_mul(4 * subject.classes);
        if subject.activation == ScoreFunction::None {
            bail!(
                "`{}` was folded with --activation none: its scores are logits and have no temperature",
                subject.name
            );
        }
        if kept > MOST_KEPT {
            bail!("--fit-temperature keeps every image's logits, {:.1} GB here; add --limit", kept as f64 / 1e9);
        }
    }
    let (mut answered, mut failed, mut rows) = (Vec::new(), Vec::new(), Vec::new());
    let progress = bar(samples.len());
    let started = Instant::now();
    let mut judge = |i: usize, answer: Result<Vec<Prediction>, Refusal>| {
        progress.inc(1);
        let sample = &samples[i];
        match answer {
            Ok(top) => {
                let class = classes[&sample.class];
                if let Some(file) = &mut predictions {
                    file.write(&json!({
                        "image": sample.name, "class": label(labels, class), "model": subject.name,
                        "version": subject.version,
                        "predictions": top,
                    }))?;
                }
                answered.push((i, judged(class, &top), top));
            }
            Err((reason, message)) => {
                progress.suspend(|| say(format_args!("error: `{}`: {message}", printable(&sample.name))));
                if let Some(file) = &mut predictions {
                    file.write(&json!({ "image": sample.name, "error": { "reason": reason, "message": message } }))?;
                }
                failed.push((i, message));
            }
        }
        anyhow::Ok(())
    };
    let model = match answerer {
        Answerer::There(remote) => {
            remote.each(&images, judge)?;
            None
        }
        Answerer::Here(model, workers) => {
            let scoring = model.manifest.scoring();
            workers.each(&model, &images, (decoder, &memory), Extras::NONE, |i, given| {
                let top = given.and_then(|Given { logits, .. }| {
                    let top = select(&logits, &scoring, Selection::top(TOP), labels).map_err(engine)?;
                    if args.fit_temperature {
                        rows.push((classes[&samples[i].class], logits));
                    }
                    Ok(top)
                });
                judge(i, top)
            })?;
            Some(model)
        }
    };
    progress.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    if answered.is_empty() {
        bail!("none of {} images could be evaluated; the lines above say why", samples.len());
    }
    if let Some(file) = predictions {
        file.publish()?;
    }
    let judged: Vec<_> = answered.iter().map(|(_, judged, _)| *judged).collect();
    let evaluation = Evaluation::of(&judged);
    let against = match (&args.against, other) {
        (Some(path), Some(other)) => {
            let by_label = |name: &str| (0..subject.classes).find(|&index| label(labels, index) == name);
            let pairs: Vec<_> = answered
                .iter()
                .filter_map(|(i, judged, _)| Some((*judged, by_label(other.of(&samples[*i].name)?)?)))
                .collect();
            if pairs.is_empty() {
                bail!(
                    "no image of `{}` is in `{}` by its name with a class of this model; the first here is `{}`",
                    printable::path(&args.data),
                    printable::path(path),
                    printable(&samples[0].name)
                );
            }
            Some((printable::path(path), Comparison::of(&pairs)))
        }
        _ => None,
    };
    let beside = args.beside.as_deref();
    let beside =
        beside.map(|name| Beside::run((args, name), &subject, (&samples, &images), &classes, &answered)).transpose()?;
    let fit = model.filter(|_| args.fit_temperature).map(|model| fit(args, &model, &rows)).transpose()?;
    drop(rows);
    let run = Run { subject, samples, answered, failed, evaluation, against, beside, fit, seconds };
    if let Some(folder) = &args.report {
        std::fs::create_dir_all(folder)
            .map_err(|e| anyhow!("can't make `{}`: {e}; check --report", printable::path(folder)))?;
        let path = folder.join("index.html");
        files::write(&path, page::html(&run, decoder.limits.max_bytes).as_bytes())
            .map_err(|e| anyhow!("can't write `{}`: {e}; check --report", printable::path(&path)))?;
        say(format_args!("wrote {}", printable::path(&path)));
    }
    let text = if args.json { format!("{}\n", object(&run)) } else { table(&run) };
    std::io::stdout().lock().write_all(text.as_bytes())?;
    if !run.failed.is_empty() && !args.skip_broken {
        let (failed, folders) = run.missed();
        let of = run.answered.len() + failed;
        let missed = match (failed, folders) {
            (_, None) => format!("{failed} of {of} images could not be evaluated"),
            (0, Some(folders)) => format!("{folders} could not be searched"),
            (_, Some(folders)) => format!("{failed} of {of} images could not be evaluated and {folders} not searched"),
        };
        say(format_args!("error: {missed}; the lines above say why (--skip-broken exits with 0 all the same)"));
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// An image's answer, most probable class first, against its class.
fn judged(class: usize, top: &[Prediction]) -> Judged {
    let (predicted, score) = top.first().map_or((usize::MAX, 0.0), |best| (best.index, best.score));
    Judged { class, predicted, score, in_top5: top.iter().any(|p| p.index == class) }
}

/// The temperature that fits best, and the figures with it.
fn fit(args: &EvalArgs, model: &ModelDir, rows: &[(usize, Vec<f32>)]) -> anyhow::Result<Fitted> {
    let mut scoring = model.manifest.scoring();
    let Some(fit) = fit_temperature(rows, &scoring) else {
        bail!(
            "no temperature is best for these {} images: every answer is right, or answers are no better than chance; \
             leave --fit-temperature out, or give it other images",
            rows.len()
        );
    };
    // as it will be in the manifest
    let temperature: f64 = format!("{:.4}", fit.temperature).parse()?;
    scoring.temperature = temperature;
    let again = rows.iter().map(|(class, logits)| {
        let top = select(logits, &scoring, Selection::top(TOP), &model.manifest.labels)?;
        Ok(judged(*class, &top))
    });
    let evaluation = Evaluation::of(&again.collect::<anyhow::Result<Vec<_>>>()?);
    let command = format!(
        "nfold fold CHECKPOINT --repository {} --name {} --model-version {} --temperature {temperature} --replace",
        quoted(&args.model.repository().to_string_lossy()),
        model.name,
        model.version
    );
    Ok(Fitted { fit, evaluation, command })
}

/// A class's label; its index if it has none.
fn label(labels: &[String], index: usize) -> String {
    labels.get(index).cloned().unwrap_or_else(|| index.to_string())
}

/// The file of --predictions.
struct Predictions {
    draft: DraftFile,
    path: String,
}

impl Predictions {
    fn create(path: &std::path::Path) -> anyhow::Result<Self> {
        let shown = printable::path(path);
        let draft = DraftFile::create(path).map_err(|e| anyhow!("can't write `{shown}`: {e}; check --predictions"))?;
        Ok(Self { draft, path: shown })
    }

    fn write(&mut self, row: &Value) -> anyhow::Result<()> {
        let written = self.draft.write_all(format!("{row}\n").as_bytes());
        written.map_err(|e| anyhow!("can't write `{}`: {e}; check --predictions", self.path))
    }

    fn publish(self) -> anyhow::Result<()> {
        self.draft.publish().map_err(|e| anyhow!("can't write `{}`: {e}; check --predictions", self.path))
    }
}

/// The results as JSON.
fn object(run: &Run) -> Value {
    let labels = &run.subject.labels;
    let mut evaluation = json!(run.evaluation);
    let named = |rows: Option<&mut Vec<Value>>, fields: &[(&str, &str)]| {
        for row in rows.into_iter().flatten() {
            for (position, name) in fields {
                let index = row[*position].as_u64().and_then(|i| usize::try_from(i).ok());
                row[*name] = index.map(|index| label(labels, index)).into();
            }
        }
    };
    named(evaluation["classes"].as_array_mut(), &[("index", "label")]);
    named(evaluation["confusions"].as_array_mut(), &[("class", "label"), ("predicted", "predicted_label")]);
    let failed = run.failed.iter().map(|(i, why)| json!({ "image": run.samples[*i].name, "message": why }));
    json!({
        "schema": "nfold-eval/1",
        "model": run.subject.name,
        "version": run.subject.version,
        "onnx_sha256": run.subject.onnx_sha256,
        "images": run.answered.len(),
        "failed": failed.collect::<Vec<_>>(),
        "seconds": run.seconds,
        "evaluation": evaluation,
        "scores": run.subject.activation,
        "fit": run.fit.as_ref().map(|found| json!({
            "fit": found.fit,
            "calibration_error_before": run.evaluation.calibration_error,
            "calibration_error_after": found.evaluation.calibration_error,
            "command": found.command,
        })),
        "beside": run.beside.as_ref().map(|beside| json!({
            "model": beside.subject.name,
            "version": beside.subject.version,
            "onnx_sha256": beside.subject.onnx_sha256,
            "precision": beside.precision,
            "seconds": beside.seconds,
            "evaluation": beside.evaluation,
            "comparison": beside.comparison,
        })),
        "against": run.against.as_ref().map(|(file, found)| json!({ "file": file, "comparison": found })),
    })
}

/// A share in per cent with its confidence interval.
fn percent(share: &Share) -> String {
    let Share { count, of, value, low, high } = share;
    format!("{:.2} %  ({count} of {of}; 95 %: {:.2} to {:.2})", 100.0 * value, 100.0 * low, 100.0 * high)
}

/// The results as text.
fn table(run: &Run) -> String {
    let Run { subject, evaluation, .. } = run;
    let labels = &subject.labels;
    let mut out = String::new();
    let mut line = |name: &str, text: String| {
        let _ = writeln!(out, "{name:<14} {text}");
    };
    line(
        "model",
        format!("{} version {}, sha256 {:.12}", printable(&subject.name), subject.version, subject.onnx_sha256),
    );
    let speed = run.answered.len() as f64 / run.seconds.max(1e-3);
    let (failed, folders) = run.missed();
    let unsearched = folders.map(|folders| format!(", {folders} could not be searched")).unwrap_or_default();
    line(
        "images",
        format!(
            "{} in {:.1} s ({speed:.1} images/s); {failed} could not be read{unsearched}",
            run.answered.len(),
            run.seconds,
        ),
    );
    line("top-1", percent(&evaluation.top1));
    if subject.classes > TOP {
        line("top-5", percent(&evaluation.top5));
    }
    line(
        "mean recall",
        format!(
            "{:.2} % of {} classes",
            100.0 * evaluation.mean_recall,
            evaluation.classes.iter().filter(|c| c.recall.of > 0).count()
        ),
    );
    let calibration = |evaluation: &Evaluation| {
        format!(
            "scores are {:.2} points from the share of right answers; their mean is {:.2} %",
            100.0 * evaluation.calibration_error,
            100.0 * evaluation.mean_score
        )
    };
    match subject.activation {
        ScoreFunction::None => line("calibration", "none: scores are logits (--activation none)".into()),
        _ => line("calibration", calibration(evaluation)),
    }
    if let Some(found) = &run.fit {
        line("temperature", format!("{:.4} fits best", found.fit.temperature));
        line("  with it", calibration(&found.evaluation));
        line(
            "  likelihood",
            format!("-{:.4} an image, before -{:.4}", found.fit.likelihood_after, found.fit.likelihood_before),
        );
        line("  next", format!("{}, with the flags it was folded with", found.command));
    }
    if let Some((file, found)) = &run.against {
        line("against", file.clone());
        line("  agreement", percent(&found.agreement));
        line(
            "  right",
            format!("{} here only, {} there only; p = {:.3} (McNemar)", found.only_this, found.only_other, found.p),
        );
    }
    if let Some(Beside { subject, precision, evaluation, comparison, seconds }) = &run.beside {
        line("beside", format!("{} version {}, {precision}", printable(&subject.name), subject.version));
        line("  top-1", percent(&evaluation.top1));
        line("  agreement", percent(&comparison.agreement));
        let Comparison { only_this, only_other, p, .. } = comparison;
        line("  right", format!("{only_this} there only, {only_other} here only; p = {p:.3} (McNemar)"));
        let speed = comparison.agreement.of as f64 / seconds.max(1e-3);
        line("  speed", format!("{speed:.1} images/s, decoding and all"));
    }
    let width = evaluation
        .classes
        .iter()
        .map(|c| printable(&label(labels, c.index)).chars().count())
        .max()
        .unwrap_or(0)
        .clamp(5, 40);
    let _ = writeln!(out, "\n{:<width$}  {:>7}  {:>8}  {:>9}", "class", "images", "recall %", "precision %");
    for class in evaluation.classes.iter().take(CLASSES) {
        let name: String = printable(&label(labels, class.index)).chars().take(width).collect();
        let of = |share: &Share| if share.of == 0 { "-".into() } else { format!("{:.1}", 100.0 * share.value) };
        let _ = writeln!(
            out,
            "{name:<width$}  {:>7}  {:>8}  {:>9}",
            class.recall.of,
            of(&class.recall),
            of(&class.precision)
        );
    }
    if evaluation.classes.len() > CLASSES {
        let _ = writeln!(out, "… and {} more: --json has all", evaluation.classes.len() - CLASSES);
    }
    if !evaluation.confusions.is_empty() {
        let _ = writeln!(out, "\nmost often confused");
    }
    for confusion in evaluation.confusions.iter().take(CONFUSIONS) {
        let name = |index| printable(&label(labels, index)).into_owned();
        let _ =
            writeln!(out, "{:>7}  {} taken for {}", confusion.images, name(confusion.class), name(confusion.predicted));
    }
    out
}
