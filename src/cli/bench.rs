//! `nfold bench`: arguments, and what they measure.

mod contenders;
mod load;

use std::io::{self, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::builder::FalseyValueParser;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

use super::examples;
use super::printable::say;
use super::serve::{ProviderArg, duration};
use crate::bench::engine::{self, Plan, Report};
use crate::bench::report;
use crate::bench::statistics::{self, Ratio};
use crate::engine::Provider;

/// Arguments of `nfold bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Time graphs in process, interleaved, against each other
    #[command(after_help = examples::BENCH_ENGINE)]
    Engine(EngineArgs),
    /// Load a server, closed or open loop, and past saturation
    #[command(after_help = examples::BENCH_LOAD)]
    Load(load::LoadArgs),
}

/// Networks that are timed by default: Normalizer-Free networks, BN-folded ResNets, and the two families closest to the
/// Pareto front, each at its evaluation size.
const DEFAULT: [&str; 11] = [
    "nf_regnet_b0",
    "nf_regnet_b1",
    "nf_resnet50",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "regnety_008",
    "regnety_016",
    "efficientnet_b0",
    "efficientnet_b1",
];

/// Arguments of `nfold bench engine`.
#[derive(Debug, Args)]
pub struct EngineArgs {
    /// Architectures (initialised here, nothing is downloaded), models of the repository, checkpoint or version
    /// folders: MODEL[@H|@HxW][:VARIANT[+VARIANT…][+SETTING…]]. Variants of the graph: folded, runtime
    /// (without nfold's own kernels), unpadded, unfolded,
    /// fp16, broadcast. Settings of its session: bound (tensors stay on the device; always on GPUs), graph (a CUDA
    /// graph), and for GPUs tf32, nhwc (channels last) and fuse (biases in cuDNN's kernels) [default: eleven networks]
    #[arg(value_name = "MODEL")]
    models: Vec<String>,
    /// Model repository that names are looked up in
    #[arg(long, env = "NFOLD_REPOSITORY", default_value = "repository", value_name = "DIR")]
    repository: PathBuf,
    /// ONNX file to time as well, one float32 input [N, C, H, W]; repeat for several
    #[arg(long, env = "NFOLD_ONNX", value_name = "FILE[@H|@HxW][:onnx+SETTING…]", value_delimiter = ',')]
    onnx: Vec<String>,
    /// Hardware that runs the graphs
    #[arg(long, value_enum, env = "NFOLD_PROVIDER", default_value = "cpu")]
    provider: ProviderArg,
    /// Index of the GPU
    #[arg(long, env = "NFOLD_DEVICE", value_name = "N", default_value_t = 0)]
    device: u16,
    /// Also time copying images to the GPU and logits back
    #[arg(long, env = "NFOLD_TRANSFERS", value_parser = FalseyValueParser::new())]
    transfers: bool,
    /// Images per run; several values separated by commas
    #[arg(long, env = "NFOLD_BATCH", value_name = "N", value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: Vec<u16>,
    /// Threads inside one operator; several values separated by commas
    #[arg(long, env = "NFOLD_THREADS", value_name = "N", value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Vec<u16>,
    /// Rounds; in each, every model has one turn, in random order
    #[arg(long, env = "NFOLD_ROUNDS", value_name = "N", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,
    /// Shortest duration of a turn, which has at least one run
    #[arg(long, env = "NFOLD_TURN", value_name = "TIME", default_value = "200ms", value_parser = duration)]
    turn: Duration,
    /// Shortest warm-up of each model
    #[arg(long, env = "NFOLD_WARMUP", value_name = "TIME", default_value = "500ms", value_parser = duration)]
    warmup: Duration,
    /// Fewest warm-up runs of each model
    #[arg(long, env = "NFOLD_WARMUP_RUNS", value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    warmup_runs: u32,
    /// Model that speeds are relative to, as the table names it [default: resnet50, or the first]
    #[arg(long, env = "NFOLD_REFERENCE", value_name = "MODEL@SIZE[:VARIANT]")]
    reference: Option<String>,
    /// Let the threads of a pool spin between operators, as a session that has the machine to itself would
    #[arg(long, env = "NFOLD_SPINNING", value_parser = FalseyValueParser::new())]
    spinning: bool,
    /// Seed of weights, images, orders and bootstrap
    #[arg(long, env = "NFOLD_SEED", default_value_t = 0)]
    seed: u64,
    /// Folder to write engine.json, engine.csv and index.html into
    #[arg(long, env = "NFOLD_REPORT", value_name = "DIR")]
    report: Option<PathBuf>,
    /// Print the report as JSON on stdout
    #[arg(long, env = "NFOLD_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

/// Runs `nfold bench`.
pub fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        BenchCommand::Engine(args) => run_engine(args),
        BenchCommand::Load(args) => load::run(args),
    }
}

fn run_engine(args: &EngineArgs) -> anyhow::Result<ExitCode> {
    args.report.as_deref().map(report::check).transpose()?;
    let named: Vec<&str> = if args.models.is_empty() && args.onnx.is_empty() {
        DEFAULT.to_vec()
    } else {
        args.models.iter().map(String::as_str).collect()
    };
    let mut contenders = Vec::with_capacity(named.len() + args.onnx.len());
    for text in named {
        say(format_args!("preparing {text}"));
        contenders.push(contenders::model(text, &args.repository, args.seed)?);
    }
    for text in &args.onnx {
        contenders.push(contenders::file(text)?);
    }
    let provider = args.provider.provider();
    let for_gpu = contenders.iter().find(|c| c.settings.iter().any(|s| s.is_for_gpu()));
    if let Some(contender) = for_gpu.filter(|_| provider == Provider::Cpu) {
        bail!("`{}` has a setting of GPUs; give --provider cuda or tensorrt", contender.label());
    }
    let usual = contenders.iter().map(engine::Contender::label).find(|l| l.starts_with("resnet50@"));
    let plan = Plan {
        batches: args.batch.iter().map(|&b| b.into()).collect(),
        threads: args.threads.iter().map(|&t| t.into()).collect(),
        provider,
        device: args.device,
        transfers: args.transfers,
        rounds: args.rounds as usize,
        turn_ms: args.turn.as_millis() as u64,
        warmup_ms: args.warmup.as_millis() as u64,
        warmup_runs: args.warmup_runs as usize,
        spinning: args.spinning,
        reference: args.reference.clone().or(usual),
        seed: args.seed,
    };
    let bar = ProgressBar::new(1000);
    if !io::stderr().is_terminal() {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    if let Ok(style) = ProgressStyle::with_template("{wide_bar} {percent} %  {msg}  {elapsed}") {
        bar.set_style(style);
    }
    let report = engine::measure(&contenders, &plan, &|what, share| {
        bar.set_message(what.to_string());
        bar.set_position((1000.0 * share) as u64);
    })?;
    bar.finish_and_clear();
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?
    } else {
        print(&mut out, &report)?
    }
    if let Some(folder) = &args.report {
        report::write_engine(folder, &report)?;
        say(format_args!("wrote {}", folder.join(report::PAGE).display()));
    }
    for failed in &report.failed {
        let engine::Failed { label, batch, threads, reason } = failed;
        say(format_args!("not measured: `{label}` with batch {batch}, {threads} threads: {reason}"));
    }
    Ok(if report.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// For each batch size and number of threads: the fastest network, and its lead, as far as the rounds can tell.
fn verdicts(report: &Report) -> Vec<String> {
    let mut sentences = Vec::new();
    for &threads in &report.plan.threads {
        for &batch in &report.plan.batches {
            let mut rows: Vec<_> = report.rows.iter().filter(|r| (r.threads, r.batch) == (threads, batch)).collect();
            rows.sort_by(|a, b| a.latency_ms.median.total_cmp(&b.latency_ms.median));
            let [first, second, ..] = rows.as_slice() else { continue };
            let ratio = statistics::ratio(&second.rounds_ms, &first.rounds_ms, report.plan.seed);
            let against = report.plan.reference.as_deref().filter(|r| *r != first.label && *r != second.label);
            let reference = match (against, &first.speed) {
                (Some(name), Some(s)) => {
                    format!(", and {:.2} times as fast as {name} (95 %: {:.2} to {:.2})", s.value, s.low, s.high)
                }
                _ => String::new(),
            };
            let (a, b) = (&first.label, &second.label);
            let verdict = match ratio {
                Some(Ratio { value, low, high }) if low > 1.0 => {
                    format!(
                        "{a} is the fastest, {value:.2} times as fast as {b} (95 %: {low:.2} to {high:.2}){reference}"
                    )
                }
                Some(Ratio { value, low, high }) => {
                    format!(
                        "{a} and {b} can't be told apart (ratio {value:.2}, 95 %: {low:.2} to {high:.2}); more --rounds may"
                    )
                }
                None => format!("{a} is the fastest{reference}"),
            };
            sentences.push(format!("batch {batch}, threads {threads}: {verdict}"));
        }
    }
    sentences
}

/// Prints the report as text.
fn print(out: &mut impl io::Write, report: &Report) -> io::Result<()> {
    let wide = report.rows.iter().map(|r| r.label.len()).max().unwrap_or(0).max(5);
    for (i, &threads) in report.plan.threads.iter().enumerate() {
        for &batch in &report.plan.batches {
            match report.peaks.get(i) {
                Some(peak) => writeln!(out, "batch {batch}, threads {threads}, peak {:.1} GFLOP/s", peak.gflops)?,
                None => writeln!(out, "batch {batch} on {}", report.plan.provider.name())?,
            }
            writeln!(
                out,
                "{:<wide$} {:>7} {:>8} {:>8} {:>9} {:>9} {:>9} {:>9} {:>7} {:>22}",
                "model", "top-1", "params M", "GMACs", "median ms", "p90", "p99", "images/s", "of peak", "speed (95 %)"
            )?;
            let mut rows: Vec<_> = report.rows.iter().filter(|r| (r.threads, r.batch) == (threads, batch)).collect();
            rows.sort_by(|a, b| a.latency_ms.median.total_cmp(&b.latency_ms.median));
            for r in rows {
                let or = |v: Option<f64>, digits: usize| v.map_or_else(|| "-".into(), |v| format!("{v:.digits$}"));
                let speed = r.speed.as_ref();
                writeln!(
                    out,
                    "{:<wide$} {:>7} {:>8} {:>8} {:>9.2} {:>9.2} {:>9} {:>9.1} {:>7} {:>22}",
                    r.label,
                    or(r.published.as_ref().map(|p| p.top1), 2),
                    or(r.parameters.map(|p| p as f64 / 1e6), 2),
                    or(r.gmacs, 3),
                    r.latency_ms.median,
                    r.latency_ms.p90,
                    or(r.latency_ms.p99, 2),
                    r.images_per_s,
                    r.peak_share.map_or_else(|| "-".into(), |s| format!("{:.0} %", 100.0 * s)),
                    speed.map_or_else(|| "-".into(), |s| format!("{:.3} ({:.3}-{:.3})", s.value, s.low, s.high)),
                )?;
            }
        }
    }
    for sentence in verdicts(report) {
        writeln!(out, "{sentence}")?;
    }
    if let Some(note) = report.implausible() {
        writeln!(out, "note: {note}")?;
    }
    if let Some(share) = report.stolen_share.filter(|s| *s > 0.01) {
        writeln!(out, "note: {:.1} % of processor time went to other guests of this machine", 100.0 * share)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A report of networks by name, with the medians of their rounds and their share of peak.
    fn report(rows: &[(&str, &[f64], f64)]) -> Report {
        let row = |(label, rounds, share): &(&str, &[f64], f64)| -> Value {
            let mut sorted = rounds.to_vec();
            sorted.sort_by(f64::total_cmp);
            let [min, median, max] = [sorted[0], sorted[sorted.len() / 2], sorted[sorted.len() - 1]];
            let latency = json!({ "runs": 5, "min": min, "median": median, "p90": max, "p99": null, "max": max });
            json!({ "label": label, "model": label, "variant": "folded", "height": 1, "width": 1, "batch": 1, "threads": 1,
                "onnx_bytes": 1, "load_ms": 1.0, "latency_ms": latency, "rounds_ms": rounds, "percentiles_ms": [],
                "images_per_s": 1.0, "peak_share": share })
        };
        let plan = json!({ "batches": [1], "threads": [1], "rounds": 5, "turn_ms": 1, "warmup_ms": 1, "warmup_runs": 1,
            "spinning": false, "reference": null, "seed": 0 });
        let machine = json!({ "processor": "p", "cores": 1, "extensions": [], "memory_gib": 1.0, "system": "s", "kernel": "k",
            "nfold": "0", "command": [], "unix_time": 0 });
        let rows: Vec<Value> = rows.iter().map(row).collect();
        let report = json!({ "schema": engine::SCHEMA, "machine": machine, "plan": plan, "peaks": [], "rows": rows });
        serde_json::from_value(report).expect("a report")
    }

    fn said(report: &Report) -> String {
        let mut out = Vec::new();
        print(&mut out, report).expect("printed");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn the_verdict_says_what_the_rounds_can_tell() {
        let (slow, fast): (&[f64], &[f64]) = (&[20.0, 20.1, 20.2, 19.9, 20.0], &[10.0, 10.1, 10.2, 9.9, 10.0]);
        let clear = said(&report(&[("slow", slow, 0.5), ("fast", fast, 0.5)]));
        assert!(clear.contains("threads 1: fast is the fastest, 2.00 times as fast as slow (95 %: "), "{clear}");
        let noisy: &[f64] = &[9.0, 11.5, 8.0, 12.0, 10.1];
        let unclear = said(&report(&[("noisy", noisy, 0.5), ("fast", fast, 0.5)]));
        assert!(unclear.contains("fast and noisy can't be told apart (ratio 1.01, 95 %: "), "{unclear}");
    }

    #[test]
    fn more_than_the_peak_is_called_implausible() {
        let rounds: &[f64] = &[1.0; 5];
        assert!(said(&report(&[("a", rounds, 1.01)])).contains("note: more than 100 % of peak is implausible"));
        assert!(!said(&report(&[("a", rounds, 0.99)])).contains("implausible"));
    }
}
