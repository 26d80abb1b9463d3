//! `nfold bench load`: arguments, and the load and server that they describe.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{anyhow, bail};
use clap::builder::FalseyValueParser;
use clap::{Args, ValueEnum};

use crate::bench::load::answer::Outcome;
use crate::bench::load::protocol::{self, Datatype, Protocol, Tensors};
use crate::bench::load::schedule::Arrivals;
use crate::bench::load::{self, Plan, Report};
use crate::bench::report;
use crate::cli::classify::search::{Found, Search};
use crate::cli::printable::say;
use crate::cli::serve::{duration, positive};
use crate::model::regular_file;

/// Most bytes of an image to send.
const LARGEST_IMAGE: u64 = 1 << 30;

/// Arguments of `nfold bench load`.
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// Server to load
    #[arg(long, env = "NFOLD_SERVER", value_name = "HOST:PORT", default_value = "127.0.0.1:8000", value_parser = server)]
    server: String,
    /// Protocol: /v1/classify with photographs, or the Open Inference Protocol with tensors over HTTP or gRPC (--server
    /// then names the gRPC port)
    #[arg(long, value_enum, env = "NFOLD_PROTOCOL", default_value = "classify")]
    protocol: ProtocolArg,
    /// Elements of tensors: fp32 is `[N,3,H,W]` normalised, uint8 is `[N,H,W,3]` pixels, which nfold normalises
    #[arg(long, value_enum, env = "NFOLD_DATATYPE", default_value = "fp32")]
    datatype: DatatypeArg,
    /// Images per tensor; throughput counts requests
    #[arg(long, env = "NFOLD_TENSOR_IMAGES", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    tensor_images: u16,
    /// Model to request [default: the server's only one]
    #[arg(long, env = "NFOLD_MODEL", value_name = "NAME", value_parser = name)]
    model: Option<String>,
    /// Photograph to send, or a folder of them; repeat for several
    #[arg(long, env = "NFOLD_IMAGE", value_name = "FILE|DIR", value_delimiter = ',')]
    image: Vec<PathBuf>,
    /// Most different request bodies
    #[arg(long, env = "NFOLD_BODIES", value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    bodies: u32,
    /// Closed loop: connections with one request in flight each; several steps separated by commas [default: 4 without
    /// --rate]
    #[arg(long, env = "NFOLD_LOAD_CONNECTIONS", value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=10_000))]
    connections: Vec<u32>,
    /// Open loop: requests per second; several steps separated by commas
    #[arg(long, env = "NFOLD_RATE", value_name = "R", value_delimiter = ',', value_parser = rate)]
    rate: Vec<f64>,
    /// After the closed loop, run open loops at 0.25 to 5 times its throughput
    #[arg(long, env = "NFOLD_SWEEP", value_parser = FalseyValueParser::new())]
    sweep: bool,
    /// Distribution of open-loop arrivals
    #[arg(long, value_enum, env = "NFOLD_ARRIVALS", default_value = "poisson")]
    arrivals: ArrivalsArg,
    /// Unmeasured start of each step
    #[arg(long, env = "NFOLD_WARMUP", value_name = "TIME", default_value = "2s", value_parser = duration)]
    warmup: Duration,
    /// Measured part of each step
    #[arg(long, env = "NFOLD_DURATION", value_name = "TIME", default_value = "10s", value_parser = positive)]
    duration: Duration,
    /// How long to wait for a response
    #[arg(long, env = "NFOLD_TIMEOUT", value_name = "TIME", default_value = "10s", value_parser = positive)]
    timeout: Duration,
    /// Service level objective: responses within this latency count as goodput
    #[arg(long, env = "NFOLD_SLO", value_name = "TIME", default_value = "100ms", value_parser = positive)]
    slo: Duration,
    /// Largest 99th percentile of the load generator's own lag; a step above it is void [default: a hundredth of --slo]
    #[arg(long, env = "NFOLD_MAX_LAG", value_name = "TIME", value_parser = positive)]
    max_lag: Option<Duration>,
    /// Seed of arrivals, order and noise
    #[arg(long, env = "NFOLD_SEED", default_value_t = 0)]
    seed: u64,
    /// Folder to write load.json, load.csv, load.hlog and index.html into
    #[arg(long, env = "NFOLD_REPORT", value_name = "DIR")]
    report: Option<PathBuf>,
    /// Print the report as JSON on stdout
    #[arg(long, env = "NFOLD_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ProtocolArg {
    Classify,
    OipHttp,
    OipJson,
    OipGrpc,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DatatypeArg {
    Fp32,
    Uint8,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ArrivalsArg {
    Poisson,
    Constant,
}

/// Runs the load. Exit code 1 if the generator could not keep up in some step.
pub fn run(args: &LoadArgs) -> anyhow::Result<ExitCode> {
    args.report.as_deref().map(report::check).transpose()?;
    let connections: Vec<usize> = match args.connections.as_slice() {
        [] if args.rate.is_empty() => vec![4],
        [] if args.sweep => vec![4],
        given => given.iter().map(|&c| c as usize).collect(),
    };
    let slo_ms = args.slo.as_secs_f64() * 1e3;
    let plan = Plan {
        server: args.server.clone(),
        protocol: match args.protocol {
            ProtocolArg::Classify => Protocol::Classify,
            ProtocolArg::OipHttp => Protocol::OipHttp,
            ProtocolArg::OipJson => Protocol::OipJson,
            ProtocolArg::OipGrpc => Protocol::OipGrpc,
        },
        tensors: Tensors {
            datatype: match args.datatype {
                DatatypeArg::Fp32 => Datatype::Fp32,
                DatatypeArg::Uint8 => Datatype::Uint8,
            },
            images: args.tensor_images.into(),
        },
        model: args.model.clone(),
        connections,
        rates: args.rate.clone(),
        sweep: args.sweep,
        arrivals: match args.arrivals {
            ArrivalsArg::Poisson => Arrivals::Poisson,
            ArrivalsArg::Constant => Arrivals::Constant,
        },
        warmup_s: args.warmup.as_secs_f64(),
        window_s: args.duration.as_secs_f64(),
        timeout_s: args.timeout.as_secs_f64(),
        slo_ms,
        max_lag_ms: args.max_lag.map_or(slo_ms / 100.0, |l| l.as_secs_f64() * 1e3),
        seed: args.seed,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|e| anyhow!("can't start the async runtime: {e}"))?;
    let report = runtime.block_on(async {
        let (model, bodies) = (plan.model.as_deref(), args.bodies as usize);
        let payloads = match plan.protocol {
            Protocol::Classify => protocol::classify(images(&args.image, bodies)?, model)?,
            spoken @ (Protocol::OipHttp | Protocol::OipJson) => {
                protocol::oip_http(spoken, &plan.server, model, plan.tensors, bodies, plan.seed).await?
            }
            Protocol::OipGrpc => protocol::oip_grpc(&plan.server, model, plan.tensors, bodies, plan.seed).await?,
        };
        protocol::check(&plan.server, &payloads, args.timeout).await?;
        anyhow::Ok(load::run(&plan, payloads, |what| say(format_args!("{what}"))).await)
    })?;
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?
    } else {
        print(&mut out, &report)?
    }
    if let Some(folder) = &args.report {
        report::write_load(folder, &report)?;
        say(format_args!("wrote {}", folder.join(report::PAGE).display()));
    }
    let void = report.steps.iter().filter(|s| !s.valid).count();
    if void > 0 {
        bail!(
            "in {void} of {} steps the generator itself lagged by more than {} ms (99th percentile), so their latencies \
             are its own; run it on other cores than the server, or at a higher priority, or allow more with --max-lag",
            report.steps.len(),
            plan.max_lag_ms
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads the named files and the files of named folders; at most `most`, spread evenly over them.
fn images(named: &[PathBuf], most: usize) -> anyhow::Result<Vec<Vec<u8>>> {
    if named.is_empty() {
        bail!(
            "there is no photograph to send; name one, or a folder of them, with --image (--protocol oip-… sends noise)"
        );
    }
    let mut search = Search::new(false);
    for path in named {
        if path.is_dir() {
            search.folder(path).map_err(|e| anyhow!("can't read `{}`: {e}", path.display()))?;
        } else {
            search.found.push(Found::image(path.clone()));
        }
    }
    let mut files = search.readable("name others with --image")?;
    files.sort();
    let step = files.len().div_ceil(most).max(1);
    let read = |path: &PathBuf| {
        regular_file::read(path, LARGEST_IMAGE).map_err(|e| anyhow!("can't read `{}`: {e}", path.display()))
    };
    files.iter().step_by(step).map(read).collect()
}

/// Prints the report as text.
fn print(out: &mut impl io::Write, report: &Report) -> io::Result<()> {
    writeln!(
        out,
        "{:<26} {:>12} {:>10} {:>7} {:>8} {:>7} {:>8} {:>8} {:>8} {:>9}",
        "step", "throughput/s", "goodput/s", "ok", "refused", "failed", "p50 ms", "p90", "p99", "lag p99"
    )?;
    for s in &report.steps {
        let failed = s.failed();
        let or = |v: Option<f64>| v.map_or_else(|| "-".into(), |v| format!("{v:.1}"));
        let l = s.latency_ms.as_ref();
        let name = match (s.connections, s.rate, s.multiple) {
            (Some(n), ..) => format!("closed, {n} connections"),
            (_, Some(rate), Some(m)) => format!("open, {rate:.1}/s ({m} x)"),
            (_, rate, _) => format!("open, {:.1}/s", rate.unwrap_or(0.0)),
        };
        writeln!(
            out,
            "{name:<26} {:>12.1} {:>10.1} {:>7} {:>8} {failed:>7} {:>8} {:>8} {:>8} {:>7.2}{}",
            s.throughput,
            s.goodput,
            s.count(Outcome::Ok),
            s.count(Outcome::Refused),
            or(l.map(|l| l.p50)),
            or(l.map(|l| l.p90)),
            or(l.and_then(|l| l.p99)),
            s.lag_ms[1],
            if s.valid { "" } else { " void" },
        )?;
    }
    Ok(())
}

/// `HOST:PORT`, with an optional `http://` before it.
fn server(text: &str) -> Result<String, String> {
    let plain = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
    let port = plain.rsplit_once(':').and_then(|(host, port)| port.parse::<u16>().ok().filter(|_| !host.is_empty()));
    match port {
        Some(_) if !plain.contains('/') => Ok(plain.into()),
        _ => Err("give HOST:PORT, as in 127.0.0.1:8000; TLS is not spoken".into()),
    }
}

fn name(text: &str) -> Result<String, String> {
    crate::model::check_name(text).map(|()| text.into()).map_err(|e| e.to_string())
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (0.001..=1e6).contains(&rate) => Ok(rate),
        _ => Err("not a number of requests a second from 0.001 to 1000000".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_read() {
        assert_eq!(server("http://127.0.0.1:80/").as_deref(), Ok("127.0.0.1:80"));
        assert_eq!(server("[::1]:8000").as_deref(), Ok("[::1]:8000"));
        for bad in ["", ":80", "host", "https://a:1", "a:1/v2", "a:99999"] {
            assert!(server(bad).is_err(), "{bad}");
        }
        assert!(rate("0").is_err() && rate("nan").is_err() && rate("2.5").is_ok());
    }
}
