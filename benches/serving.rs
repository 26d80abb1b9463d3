//! `POST /v1/classify` against a plain loop over the same decode, resize and ONNX Runtime sessions, on the same cores.
//!
//! `cargo bench --bench serving -- REPOSITORY MODEL [ROUNDS]` interleaves both in one process and prints medians and
//! their ratio: saturated throughput (the loop: one thread and one session a core; the server: its defaults and two
//! connections a core, whose client shares the cores), and latency of one client at a time (the loop: one session with
//! every core). The image is a photograph of 500x375 as JPEG.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use libjpeg_turbo_rs::{PixelFormat, Subsampling, compress};
use nfold::bench::load::protocol::{self, Protocol};
use nfold::bench::load::record::Step;
use nfold::bench::load::schedule::Arrivals;
use nfold::bench::load::{self, Plan};
use nfold::engine::{Backend as _, Batch, EngineOptions, Fitted, Kernels, OrtBackend};
use nfold::infer::job::SchedulerOptions;
use nfold::infer::registry::{Registry, RegistryOptions};
use nfold::infer::top_k::top_k;
use nfold::model::{Interpolation, ModelDir};
use nfold::pixels::{Decoder, Preprocessor, resize};
use nfold::server::{self, Control, Options, Server};

const WINDOW: Duration = Duration::from_secs(2);
const WARM_UP: Duration = Duration::from_millis(300);
/// Phases of one answer, by the server's names; the loop has no queue.
const PHASES: [&str; 4] = ["decode", "preprocess", "queue", "inference"];

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [repository, model, rest @ ..] = args.as_slice() else {
        println!("nothing is measured without: -- REPOSITORY MODEL [ROUNDS]");
        return Ok(());
    };
    let rounds = rest.first().map_or(Ok(11), |r| r.parse()).context("ROUNDS is no number")?;
    let cores = std::thread::available_parallelism()?.get();
    let dir = ModelDir::open(Path::new(repository), Some(model), None)?;
    let photograph = photograph()?;
    let house = House::start(repository, model, cores)?;
    let bare = Bare { dir: &dir, graph: Fitted::for_this_cpu(dir.read_onnx()?, Kernels::Own), photograph: &photograph };

    let (mut saturated, mut alone, mut phases) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        saturated.push((bare.images_per_second(cores)?, house.load(&photograph, 2 * cores)?.throughput));
        let (looped, served) = (bare.alone(cores)?, house.load(&photograph, 1)?);
        let latency = served.latency_ms.as_ref().context("nothing was answered")?;
        alone.push((looped.median, latency.p50));
        phases.push((looped.phases, PHASES.map(|phase| served.server_ms.get(phase).copied().unwrap_or_default())));
    }
    let (loops, served, share) = (
        median(saturated.iter().map(|p| p.0)),
        median(saturated.iter().map(|p| p.1)),
        median(saturated.iter().map(|p| p.1 / p.0)),
    );
    println!("{model}, {cores} cores, {rounds} rounds of {} s", WINDOW.as_secs());
    println!("saturated: loop {loops:.1}/s, server {served:.1}/s, the server reaches {:.1} %", 100.0 * share);
    let (loops, served, added) =
        (median(alone.iter().map(|p| p.0)), median(alone.iter().map(|p| p.1)), median(alone.iter().map(|p| p.1 - p.0)));
    println!("one client: loop {loops:.2} ms, server {served:.2} ms, the server adds {added:.2} ms");
    for (i, phase) in PHASES.iter().enumerate() {
        let (looped, served) = (median(phases.iter().map(|p| p.0[i])), median(phases.iter().map(|p| p.1[i])));
        println!("  {phase}: loop {looped:.2} ms, server {served:.2} ms (means)");
    }
    house.end()
}

fn photograph() -> Result<Vec<u8>> {
    let cat = include_bytes!("../tests/data/cat.jpg");
    let cat = Decoder::default().decode(cat, false, |width, height| [width, height])?;
    let photograph = resize(&cat, 500, 375, Interpolation::Bicubic);
    Ok(compress(&photograph.data, 500, 375, PixelFormat::Rgb, 90, Subsampling::S420)?)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The lower bound of any server: the work and nothing else.
struct Bare<'a> {
    dir: &'a ModelDir,
    graph: Fitted,
    photograph: &'a [u8],
}

impl Bare<'_> {
    fn session(&self, intra_threads: usize) -> Result<OrtBackend> {
        let options = EngineOptions { intra_threads, spinning: intra_threads > 1, ..EngineOptions::default() };
        Ok(OrtBackend::open_fitted(&self.graph, "bench", &options)?)
    }

    /// Answers one image and returns how long each of [`PHASES`] took.
    fn one(&self, preprocessor: &Preprocessor, session: &mut OrtBackend) -> Result<[Duration; 4]> {
        let started = Instant::now();
        let image = Decoder::default().decode(self.photograph, false, |width, height| [width, height])?;
        let decoded = Instant::now();
        let mut batch = Batch::zeros(1, preprocessor.height(), preprocessor.width());
        preprocessor.apply(&image, batch.image_mut(0));
        let preprocessed = Instant::now();
        let logits = session.run(&batch)?;
        let ran = Instant::now();
        let labels = &self.dir.manifest.labels;
        std::hint::black_box(top_k(logits.row(0), 5, labels)?);
        Ok([decoded - started, preprocessed - decoded, Duration::ZERO, ran - preprocessed])
    }

    fn images_per_second(&self, threads: usize) -> Result<f64> {
        let (warm, over) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|_| {
                    scope.spawn(|| -> Result<usize> {
                        let preprocessor = Preprocessor::new(&self.dir.manifest.preprocessing);
                        let mut session = self.session(1)?;
                        let mut count = 0;
                        while !over.load(Ordering::Relaxed) {
                            self.one(&preprocessor, &mut session)?;
                            count += usize::from(warm.load(Ordering::Relaxed));
                        }
                        Ok(count)
                    })
                })
                .collect();
            // opening the session takes longer than its first runs
            std::thread::sleep(WARM_UP * 4);
            warm.store(true, Ordering::Relaxed);
            let started = Instant::now();
            std::thread::sleep(WINDOW);
            over.store(true, Ordering::Relaxed);
            let took = started.elapsed().as_secs_f64();
            let mut all = 0;
            for worker in workers {
                all += worker.join().map_err(|_| anyhow::anyhow!("a thread of the loop died"))??;
            }
            Ok(all as f64 / took)
        })
    }

    fn alone(&self, cores: usize) -> Result<Alone> {
        let preprocessor = Preprocessor::new(&self.dir.manifest.preprocessing);
        let mut session = self.session(cores)?;
        let started = Instant::now();
        let (mut times, mut phases) = (Vec::new(), [Duration::ZERO; 4]);
        while started.elapsed() < WARM_UP + WINDOW {
            let one = Instant::now();
            let took = self.one(&preprocessor, &mut session)?;
            if started.elapsed() > WARM_UP {
                times.push(one.elapsed().as_secs_f64() * 1e3);
                phases.iter_mut().zip(took).for_each(|(sum, took)| *sum += took);
            }
        }
        let phases = phases.map(|sum| sum.as_secs_f64() * 1e3 / times.len() as f64);
        Ok(Alone { median: median(times.into_iter()), phases })
    }
}

/// One image at a time, in milliseconds.
struct Alone {
    median: f64,
    phases: [f64; 4],
}

/// The server with the defaults of `nfold serve`.
struct House {
    runtime: tokio::runtime::Runtime,
    address: String,
    control: tokio::sync::mpsc::Sender<Control>,
    served: tokio::task::JoinHandle<Result<(), nfold::server::ServeError>>,
}

impl House {
    fn start(repository: &str, model: &str, cores: usize) -> Result<Self> {
        let runtime = server::runtime()?;
        let registry = RegistryOptions {
            max_input_pixels: 1024 * 1024,
            skip_broken: false,
            default_model: None,
            repository: repository.into(),
            models: vec![(model.into(), None)],
            engine: EngineOptions::default(),
            graph_cache: None,
            pad_channels: true,
            kernels: Kernels::Own,
            elastic_threads: cores,
            scheduler: SchedulerOptions { workers: cores, ..SchedulerOptions::default() },
        };
        let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let server = {
            let _inside = runtime.enter();
            Server::bind(Options { http: any, grpc: any, admin: any, ..Options::default() })?
        };
        let (address, metrics) = (server.http_address().to_string(), server.metrics());
        let (control, controlled) = tokio::sync::mpsc::channel(1);
        let served = runtime.spawn(server.run(move |metrics| Registry::open(&registry, metrics), controlled));
        while metrics.ready.get() == 0 {
            ensure!(!served.is_finished(), "the server does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Self { runtime, address, control, served })
    }

    fn load(&self, photograph: &[u8], connections: usize) -> Result<Step> {
        let plan = Plan {
            server: self.address.clone(),
            protocol: Protocol::Classify,
            tensors: protocol::Tensors::default(),
            model: None,
            connections: vec![connections],
            rates: vec![],
            sweep: false,
            arrivals: Arrivals::Constant,
            warmup_s: WARM_UP.as_secs_f64(),
            window_s: WINDOW.as_secs_f64(),
            timeout_s: 20.0,
            slo_ms: 1000.0,
            max_lag_ms: 1000.0,
            seed: 1,
        };
        let payloads = protocol::classify(vec![photograph.to_vec()], None)?;
        // on the same cores, but on a thread of its own, like a separate program
        let client = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let report = client.block_on(load::run(&plan, payloads, |_| {}));
        report.steps.into_iter().next().context("nothing was measured")
    }

    fn end(self) -> Result<()> {
        self.runtime.block_on(async {
            self.control.send(Control::Stop).await?;
            Ok(self.served.await??)
        })
    }
}
