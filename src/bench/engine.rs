//! Times graphs in process against each other. Every round runs every contender, in random order, so that disturbances
//! of the machine affect all of them. Knows graphs as bytes, not their origin.

use std::thread;
use std::time::{Duration, Instant};

use rand::SeedableRng as _;
use rand::seq::SliceRandom as _;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution as _, StandardNormal};
use serde::{Deserialize, Serialize};

use super::BenchError;
use super::accuracy::Published;
pub use super::contender::{Contender, Setting};
use super::machine::{Machine, ProcessorTime};
use super::peak::{self, Peak};
use super::statistics::{self, Ratio, Summary, median};
use crate::engine::{
    self, Backend as _, BackendError, Batch, BoundBackend, EngineOptions, Fitted, GpuOptions, Logits, OrtBackend,
    Provider,
};

/// Version of the report's format, documented in `docs/benchmarks.md`.
pub const SCHEMA: &str = "nfold-bench-engine/1";
/// Longest wait for the thread pools of other sessions to stop spinning before a session is timed.
const SETTLE: Duration = Duration::from_millis(80);
/// A GPU raises its clock under load, so warm-up continues until a stretch of runs of this length is no faster than the
/// previous one, for at most this many stretches.
const STRETCH: Duration = Duration::from_millis(100);
const STRETCHES: usize = 20;
/// Largest relative difference between two stretches of a steady clock.
const STEADY: f64 = 0.01;

/// Settings of a measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// Batch sizes, in images per run.
    pub batches: Vec<usize>,
    /// Numbers of threads inside one operator.
    pub threads: Vec<usize>,
    /// Hardware that runs the graphs.
    #[serde(default)]
    pub provider: Provider,
    /// Index of the GPU.
    #[serde(default)]
    pub device: u16,
    /// On a GPU: whether timed runs include copying images to it and logits from it.
    #[serde(default)]
    pub transfers: bool,
    /// Rounds; each gives every contender one turn.
    pub rounds: usize,
    /// Shortest duration of a turn, in milliseconds; a turn has at least one run.
    pub turn_ms: u64,
    /// Shortest warm-up of each contender, in milliseconds.
    pub warmup_ms: u64,
    /// Fewest warm-up runs of each contender.
    pub warmup_runs: usize,
    /// Whether the threads of a pool spin between operators, as those of a session alone on the machine would.
    pub spinning: bool,
    /// Label of the contender that speeds are relative to; the first if absent.
    pub reference: Option<String>,
    /// Seed of images, orders and bootstrap.
    pub seed: u64,
}

/// Results of a measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Always [`SCHEMA`].
    pub schema: String,
    /// Machine and versions.
    pub machine: Machine,
    /// Settings of the measurement.
    pub plan: Plan,
    /// Share of processor time that the hypervisor gave to other machines during the measurement (steal time).
    pub stolen_share: Option<f64>,
    /// Measured single-precision peaks of the CPU; empty on a GPU.
    pub peaks: Vec<Peak>,
    /// One for every contender, batch and thread count.
    pub rows: Vec<Row>,
    /// Why a contender has no row where others have one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<Failed>,
}

/// A contender that could not be measured at one batch size and thread count.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failed {
    /// The contender.
    pub label: String,
    /// Images in a run.
    pub batch: usize,
    /// Threads of a run.
    pub threads: usize,
    /// What went wrong.
    pub reason: String,
}

impl Report {
    /// Describes a figure that is impossible, if there is one.
    pub fn implausible(&self) -> Option<&'static str> {
        let above = self.rows.iter().filter_map(|row| row.peak_share).any(|share| share > 1.0);
        above.then_some(
            "more than 100 % of peak is implausible: the processor's speed changed, or others used it, while the peak was \
             measured; measure again on an idle machine",
        )
    }
}

/// Results of one contender at one batch size and thread count.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Row {
    pub label: String,
    pub model: String,
    pub variant: String,
    pub height: usize,
    pub width: usize,
    pub batch: usize,
    pub threads: usize,
    pub parameters: Option<u64>,
    pub gmacs: Option<f64>,
    /// Size of the graph, in bytes.
    pub onnx_bytes: usize,
    /// Time to open the session, in milliseconds.
    pub load_ms: f64,
    /// Latency of a run, in milliseconds.
    pub latency_ms: Summary,
    /// Median latency of each round, in milliseconds.
    pub rounds_ms: Vec<f64>,
    /// Latency at the percentiles 0, 1, … 100 of the runs, in milliseconds.
    pub percentiles_ms: Vec<f64>,
    pub images_per_s: f64,
    /// Arithmetic throughput at the median, in GFLOP/s; a multiply-accumulate counts as two operations.
    pub gflops: Option<f64>,
    /// `gflops` as a share of the measured peak of the same number of threads in single precision; none for networks of integers.
    pub peak_share: Option<f64>,
    /// Speed relative to the reference at the same batch size and thread count; above 1 is faster.
    pub speed: Option<Ratio>,
    pub published: Option<Published>,
}

/// A contender's session, by where its tensors are.
enum Timed {
    Plain(OrtBackend),
    /// Whether each run copies them.
    Bound(BoundBackend, bool),
}

struct Lane<'a> {
    contender: &'a Contender,
    backend: Timed,
    batch: Batch,
    load_ms: f64,
    samples: Vec<f64>,
    rounds: Vec<f64>,
}

impl<'a> Lane<'a> {
    /// Opens the contender with `options` and its own settings, and warms it up on `images`.
    fn open(
        contender: &'a Contender,
        plan: &Plan,
        mut options: EngineOptions,
        images: Batch,
    ) -> Result<Self, BenchError> {
        let started = Instant::now();
        contender.settings.iter().for_each(|setting| setting.apply(&mut options));
        let on_cpu = plan.provider == Provider::Cpu;
        let onnx = contender.onnx.clone();
        let pads = contender.pad_channels && on_cpu;
        let graph = if pads { Fitted::for_this_cpu(onnx, contender.kernels) } else { Fitted::as_it_is(onnx) };
        let bound = contender.settings.iter().any(|s| matches!(s, Setting::Bound | Setting::Graph));
        let backend = if bound || !on_cpu {
            let backend = BoundBackend::open(&graph, &contender.label(), &options, &[images.images])?;
            Timed::Bound(backend, plan.transfers)
        } else {
            Timed::Plain(OrtBackend::open_fitted(&graph, &contender.label(), &options)?)
        };
        let load_ms = started.elapsed().as_secs_f64() * 1e3;
        let mut lane = Self { contender, backend, batch: images, load_ms, samples: Vec::new(), rounds: Vec::new() };
        lane.warm_up(plan)?;
        Ok(lane)
    }

    fn run(&mut self) -> Result<f64, BenchError> {
        let started = Instant::now();
        let logits = match &mut self.backend {
            Timed::Plain(backend) => backend.run(&self.batch).map(Some),
            Timed::Bound(backend, true) => backend.run(&self.batch).map(Some),
            Timed::Bound(backend, false) => backend.repeat(),
        };
        let elapsed = started.elapsed().as_secs_f64() * 1e3;
        self.finite(logits)?;
        Ok(elapsed)
    }

    fn finite(&self, logits: Result<Option<Logits>, BackendError>) -> Result<(), BenchError> {
        let (model, batch) = (self.contender.label(), self.batch.images);
        match logits {
            Err(source) => Err(BenchError::Run { model, batch, source }),
            Ok(Some(logits)) if logits.data.iter().any(|v| !v.is_finite()) => Err(BenchError::NotFinite { model }),
            Ok(_) => Ok(()),
        }
    }

    fn warm_up(&mut self, plan: &Plan) -> Result<(), BenchError> {
        let (started, mut runs) = (Instant::now(), 0);
        let (model, batch) = (self.contender.label(), self.batch.images);
        if let Timed::Bound(backend, transfers) = &mut self.backend {
            // check the logits here, while they are still copied from the device
            let logits = backend.run(&self.batch).map(Some);
            if !*transfers {
                backend.keep_on_device();
                backend.stage(&self.batch).map_err(|source| BenchError::Run { model, batch, source })?;
            }
            self.finite(logits)?;
        }
        while runs < plan.warmup_runs || started.elapsed() < Duration::from_millis(plan.warmup_ms) {
            self.run()?;
            runs += 1;
        }
        let mut last = f64::INFINITY;
        let stretches = if plan.provider == Provider::Cpu { 0 } else { STRETCHES };
        for _ in 0..stretches {
            let (started, mut samples) = (Instant::now(), Vec::new());
            while samples.is_empty() || started.elapsed() < STRETCH {
                samples.push(self.run()?);
            }
            let now = median(&samples);
            if now > last * (1.0 - STEADY) {
                break;
            }
            last = now;
        }
        Ok(())
    }

    /// One untimed run, since the caches hold another contender's data, then timed runs.
    fn turn(&mut self, plan: &Plan) -> Result<(), BenchError> {
        self.run()?;
        let (started, first) = (Instant::now(), self.samples.len());
        while self.samples.len() == first || started.elapsed() < Duration::from_millis(plan.turn_ms) {
            let elapsed = self.run()?;
            self.samples.push(elapsed);
        }
        self.rounds.push(median(&self.samples[first..]));
        Ok(())
    }
}

/// Times all contenders. `progress` is called after each round with a description and the share done (0 to 1).
pub fn measure(contenders: &[Contender], plan: &Plan, progress: &dyn Fn(&str, f64)) -> Result<Report, BenchError> {
    if let Some(name) = &plan.reference
        && !contenders.iter().any(|c| c.label() == *name)
    {
        let measured = contenders.iter().map(Contender::label).collect::<Vec<_>>().join(", ");
        return Err(BenchError::NoReference { name: name.clone(), measured });
    }
    let machine = Machine::look(Some(engine::runtime_build()?));
    let before = ProcessorTime::now();
    let on_cpu = plan.provider == Provider::Cpu;
    let peaks: Vec<Peak> = plan.threads.iter().filter(|_| on_cpu).map(|&t| peak::measure(t)).collect();
    let (mut rows, mut failed) = (Vec::new(), Vec::new());
    let cells = (plan.threads.len() * plan.batches.len()).max(1);
    for (i, &threads) in plan.threads.iter().enumerate() {
        for (j, &batch) in plan.batches.iter().enumerate() {
            let what = format!("batch {batch}, {threads} thread{}", if threads == 1 { "" } else { "s" });
            let done = (i * plan.batches.len() + j) as f64;
            let tell = |share: f64| progress(&what, (done + share) / cells as f64);
            let lanes = cell(contenders, plan, threads, batch, &mut failed, &tell)?;
            rows.extend(summarise(&lanes, plan, threads, peaks.get(i)));
        }
    }
    let stolen_share = before.zip(ProcessorTime::now()).map(|(before, after)| after.stolen_since(before));
    Ok(Report { schema: SCHEMA.into(), machine, plan: plan.clone(), stolen_share, peaks, rows, failed })
}

/// Every contender at one batch size and thread count, all rounds. One that can't be opened or run joins `failed`, and the others
/// are measured without it; none left is an error.
fn cell<'a>(
    contenders: &'a [Contender],
    plan: &Plan,
    threads: usize,
    batch: usize,
    failed: &mut Vec<Failed>,
    tell: &dyn Fn(f64),
) -> Result<Vec<Lane<'a>>, BenchError> {
    let provider = plan.provider;
    let gpu = GpuOptions { device: plan.device, allow_fallback: true, ..GpuOptions::default() };
    let options = EngineOptions { provider, intra_threads: threads, spinning: plan.spinning, gpu };
    let mut rng = ChaCha8Rng::seed_from_u64(plan.seed);
    let mut lanes = Vec::with_capacity(contenders.len());
    let mut last = None;
    for contender in contenders {
        let mut images = Batch::zeros_of(batch, [contender.channels, contender.height, contender.width]);
        images.data.iter_mut().for_each(|v| *v = StandardNormal.sample(&mut rng));
        match Lane::open(contender, plan, options.clone(), images) {
            Ok(lane) => lanes.push(lane),
            Err(error) => {
                failed.push(Failed { label: contender.label(), batch, threads, reason: error.to_string() });
                last = Some(error);
            }
        }
    }
    if let (true, Some(error)) = (lanes.is_empty(), last) {
        return Err(error);
    }
    let mut order: Vec<usize> = (0..lanes.len()).collect();
    for round in 0..plan.rounds {
        tell(round as f64 / plan.rounds as f64);
        order.shuffle(&mut rng);
        for &i in &order {
            if plan.spinning && threads > 1 {
                // a pool spins on for a while after its run, on cores that the next contender needs
                thread::sleep(SETTLE);
            }
            lanes[i].turn(plan)?;
        }
    }
    Ok(lanes)
}

fn summarise(lanes: &[Lane<'_>], plan: &Plan, threads: usize, peak: Option<&Peak>) -> Vec<Row> {
    let reference = plan.reference.as_ref().and_then(|r| lanes.iter().find(|l| l.contender.label() == *r));
    let reference = reference.or(lanes.first());
    let row = |lane: &Lane<'_>| {
        let latency_ms = Summary::of(&lane.samples)?;
        let mut sorted = lane.samples.clone();
        sorted.sort_by(f64::total_cmp);
        let c = lane.contender;
        let images_per_s = lane.batch.images as f64 * 1e3 / latency_ms.median;
        let gflops = c.gmacs.map(|g| 2.0 * g * images_per_s);
        Some(Row {
            label: c.label(),
            model: c.model.clone(),
            variant: c.variant(),
            height: c.height,
            width: c.width,
            batch: lane.batch.images,
            threads,
            parameters: c.parameters,
            gmacs: c.gmacs,
            onnx_bytes: c.onnx.len(),
            load_ms: lane.load_ms,
            rounds_ms: lane.rounds.clone(),
            percentiles_ms: (0..=100).map(|p| statistics::quantile(&sorted, f64::from(p) / 100.0)).collect(),
            images_per_s,
            gflops,
            peak_share: gflops.zip(peak).filter(|_| !c.integers).map(|(g, peak)| g / peak.gflops),
            speed: reference.and_then(|r| statistics::ratio(&r.rounds, &lane.rounds, plan.seed)),
            published: c.published.clone(),
            latency_ms,
        })
    };
    lanes.iter().filter_map(row).collect()
}
