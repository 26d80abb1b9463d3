//! One random schedule: models with engines that are slow, fail, panic or hang; clients that arrive in crowds, wait or
//! leave; a repository that changes; an operator who reloads, loads and unloads; and a shutdown.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future as _;
use std::pin::Pin;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::system::{HOLD_UP, Simulated};
use crate::engine::{Backend, BackendError, Batch, Logits};
use crate::infer::error::InferError;
use crate::infer::job::{Invariance, OpenBackend, SchedulerOptions};
use crate::infer::registry::{Engines, LiveModel, LoadError, Look, Registry, RegistryError, Source};
use crate::infer::request::{Input, Terms, Ticket};
use crate::infer::system::System;
use crate::metrics::{Metrics, Outcome};
use crate::model::{Listing, Manifest, ModelDir, ModelError};
use crate::random::Random;

const MS: Duration = Duration::from_millis(1);
/// A hung engine returns after all else is over, so that the schedule ends.
const HANGS: Duration = Duration::from_secs(3600);
/// Deadline of clients that wait as long as it takes.
const PATIENT: Duration = Duration::from_secs(600);
/// When a schedule is over.
pub const END: Duration = Duration::from_secs(2 * 3600);
const SIDE: usize = 1;
const CLASSES: usize = 2;

/// Faults of engines, each once in this many runs; 0: never.
#[derive(Debug, Clone, Copy)]
struct Faults {
    slow: u64,
    fails: u64,
    panics: u64,
    hangs: u64,
}

/// How a version of the repository opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opens {
    Well,
    Slowly,
    Fails,
    Panics,
    PanicsInRun,
}

/// One image that a client sent.
#[derive(Debug, Clone, Copy)]
struct Sent {
    deadline: Instant,
    /// When its client left, if it did.
    left: Option<Instant>,
}

#[derive(Debug, Default)]
struct Record {
    sent: BTreeMap<u32, Sent>,
    next: u32,
    /// Images that clients submitted, admitted or not.
    asked: u64,
    /// Of these, refused at admission; and answered.
    refused: u64,
    answered: u64,
    /// Whether an engine has hung: its images wait long.
    hung: bool,
    /// Every model that was seen, to be checked.
    models: Vec<Weak<LiveModel>>,
    violations: Vec<String>,
    /// Whether a client has unloaded the model.
    unloaded: bool,
    /// Whether everything queued was evicted, on the second request to stop.
    aborted: bool,
    /// Versions that were ever opened.
    versions: BTreeSet<u64>,
}

/// The state of one schedule.
#[derive(Debug)]
pub struct Scenario {
    system: Arc<Simulated>,
    record: Mutex<Record>,
    options: SchedulerOptions,
    wide: bool,
    faults: Faults,
    run_cost: Duration,
    metrics: Metrics,
    versions: Mutex<BTreeMap<u64, (Opens, u64)>>,
    random: Mutex<Random>,
}

static MANIFEST: LazyLock<Manifest> = LazyLock::new(|| {
    serde_json::from_value(serde_json::json!({
        "format": 1, "producer": "test", "architecture": "simulated", "precision": "fp32", "classes": CLASSES, "labels": [],
        "preprocessing": { "height": SIDE, "width": SIDE, "crop_pct": 1.0, "crop_mode": "center",
            "interpolation": "bilinear", "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0] },
        "source_sha256": "00", "onnx_sha256": "11",
        "fold": { "family": "nf", "activation": "relu", "parameters": 1, "folded_parameters": 1, "gmacs": 0.0,
                  "gate": "resize", "blocks": [] },
    }))
    .expect("a manifest")
});

/// An engine of a version; the first logit of an image is its number.
struct Engine {
    scenario: Arc<Scenario>,
    panics: bool,
}

impl Backend for Engine {
    fn run(&mut self, batch: &Batch) -> Result<Logits, BackendError> {
        let scenario = &self.scenario;
        let ids: Vec<f32> = batch.data.chunks(3 * SIDE * SIDE).map(|image| image[0]).collect();
        // warm-up images have no number
        let ids: Vec<f32> = ids.into_iter().map(|id| if id >= 1.0 && id.fract() == 0.0 { id } else { 0.0 }).collect();
        let is_real = ids.iter().any(|&id| id > 0.0);
        let Faults { slow, fails, panics, hangs } = scenario.faults;
        let lot = |of: u64| is_real && of > 0 && scenario.random().once_in(of);
        scenario.expects_live(&ids);
        let mut cost = scenario.run_cost * batch.images as u32;
        if lot(slow) {
            cost *= 20;
        }
        if lot(hangs) {
            scenario.record().hung = true;
            cost = HANGS;
        }
        scenario.system.sleep(cost);
        if lot(fails) {
            return Err(BackendError::Run("told to fail".into()));
        }
        if self.panics || lot(panics) {
            std::panic::resume_unwind(Box::new("told to panic"));
        }
        let data = ids.iter().flat_map(|&id| [id, 0.0]).collect();
        Ok(Logits { images: batch.images, classes: CLASSES, data })
    }
}

#[derive(Debug)]
struct Shelf(Arc<Scenario>);

impl Source for Shelf {
    fn list(&self) -> Result<Listing, ModelError> {
        let versions: Vec<u64> = self.0.versions().keys().copied().collect();
        let models = if versions.is_empty() { BTreeMap::new() } else { BTreeMap::from([("m".to_string(), versions)]) };
        Ok(Listing { models, left_out: Vec::new() })
    }

    fn read(&self, name: &str, version: u64) -> Result<ModelDir, ModelError> {
        let manifest = Manifest { source_sha256: self.fingerprint(name, version), ..MANIFEST.clone() };
        Ok(ModelDir { path: "nowhere".into(), name: name.into(), version, manifest })
    }

    fn fingerprint(&self, _: &str, version: u64) -> String {
        self.0.versions().get(&version).map_or(0, |(_, files)| *files).to_string()
    }

    fn open(&self, dir: &ModelDir, metrics: &Metrics) -> Result<LiveModel, LoadError> {
        let scenario = self.0.clone();
        let opens = scenario.versions().get(&dir.version).map_or(Opens::Fails, |(opens, _)| *opens);
        let open = |wide: bool| -> OpenBackend {
            let scenario = scenario.clone();
            Box::new(move || {
                scenario.system.sleep(if opens == Opens::Slowly { 2000 * MS } else { 5 * MS });
                match opens {
                    Opens::Fails => {
                        Err(crate::engine::EngineError::BadModel { model: "m".into(), reason: "told to fail".into() })
                    }
                    Opens::Panics => std::panic::resume_unwind(Box::new("told to panic")),
                    _ => Ok(Box::new(Engine {
                        scenario: scenario.clone(),
                        panics: opens == Opens::PanicsInRun && !wide,
                    })),
                }
            })
        };
        let engines = Engines {
            open: open(false),
            open_wide: scenario.wide.then(|| open(true)),
            provider: "simulated",
            reduced: false,
        };
        scenario.record().versions.insert(dir.version);
        LiveModel::start_on(scenario.system.clone(), dir, engines, &scenario.options, metrics)
    }
}

impl Scenario {
    /// Draws the scenario, and starts its threads.
    pub fn begin(seed: u64) -> Arc<Self> {
        let mut random = Random::new(seed);
        let system = Simulated::new(seed ^ 0x5851_f42d_4c95_7f2d);
        let workers = random.between(1, 3) as usize;
        let decoders = random.one(&[0, 0, 0, 1, 2]);
        let run_cost = random.one(&[1, 5, 20]) * MS;
        let options = SchedulerOptions {
            workers,
            decoders,
            max_batch: random.between(1, 4) as usize,
            max_queue_delay: random.one(&[0, 0, 10, 40]) * MS,
            queue_limit: random.between(2, 16) as usize,
            max_queue_wait: random.one(&[50, 1000, 100_000]) * MS,
            standing_wait: random.one(&[20, 100, 100_000]) * MS,
            buckets: if random.once_in(4) { vec![1, 3] } else { Vec::new() },
            invariance: random.one(&[Invariance::Off, Invariance::Report]),
            one_by_one: random.once_in(2),
            ready_at_one: random.once_in(2),
            ..SchedulerOptions::default()
        };
        let rare = |random: &mut Random| random.one(&[0, 0, 0, 5, 20]);
        let faults = Faults {
            slow: rare(&mut random),
            fails: rare(&mut random),
            panics: rare(&mut random),
            hangs: random.one(&[0, 0, 0, 0, 0, 60]),
        };
        let wide = random.once_in(2);
        let versions = Mutex::new(BTreeMap::from([(1, (Opens::Well, 0))]));
        let scenario = Arc::new(Self {
            system: system.clone(),
            record: Mutex::default(),
            options,
            wide,
            faults,
            run_cost,
            metrics: Metrics::new(),
            versions,
            random: Mutex::new(random),
        });
        let main = scenario.clone();
        system.start("main", move || main.main());
        scenario
    }

    /// Runs the schedule and checks it.
    pub fn run(&self) -> Result<(), String> {
        let left = self.system.run(END, || self.at_rest())?;
        if let Some(violation) = self.record().violations.first() {
            return Err(violation.clone());
        }
        if !left.is_empty() {
            return Err(format!("never ended: {}", left.join(", ")));
        }
        let all: u64 = Outcome::ALL.into_iter().map(|outcome| self.ended(outcome)).sum();
        let record = self.record();
        if all != record.asked {
            return Err(format!("{} images were sent, and {all} ended", record.asked));
        }
        for version in &record.versions {
            let depth = self.metrics.queue_depth.with_label_values(&["m", &version.to_string()]).get();
            if depth != 0 {
                return Err(format!("version {version} keeps {depth} slots"));
            }
        }
        Ok(())
    }

    /// Images with this outcome.
    pub fn ended(&self, outcome: Outcome) -> u64 {
        let of = |version: &u64| {
            self.metrics.images_total.with_label_values(&["m", &version.to_string(), outcome.name()]).get()
        };
        self.record().versions.iter().map(of).sum()
    }

    /// Reloads with this result.
    pub fn reloads(&self, result: &str) -> u64 {
        self.metrics.model_reloads_total.with_label_values(&["m", result]).get()
    }

    /// A summary of what happened.
    pub fn told(&self) -> String {
        let record = self.record();
        let Record { asked, refused, answered, hung, aborted, versions, .. } = &*record;
        let at = self.system.elapsed();
        format!("{asked} {refused} {answered} {hung} {aborted} {versions:?} {at:?}")
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn random(&self) -> MutexGuard<'_, Random> {
        self.random.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn versions(&self) -> MutexGuard<'_, BTreeMap<u64, (Opens, u64)>> {
        self.versions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn violated(&self, what: impl Into<String>) {
        let at = self.system.elapsed();
        self.record().violations.push(format!("{} (after {at:?})", what.into()));
    }

    /// Checks that no thread sleeps beside work. Called whenever no thread can run.
    fn at_rest(&self) -> Result<(), String> {
        let mut record = self.record();
        if let Some(violation) = record.violations.first() {
            return Err(violation.clone());
        }
        record.models.retain(|model| model.strong_count() > 0);
        let models: Vec<_> = record.models.iter().filter_map(Weak::upgrade).collect();
        drop(record);
        let idle = models.iter().find_map(|model| model.scheduler().idle_beside_work());
        idle.map_or(Ok(()), |idle| Err(format!("{idle} after {:?}, with {:?}", self.system.elapsed(), self.options)))
    }

    /// Checks that nothing expired is computed, nor anything whose client has left; a decision may be a few delays old.
    fn expects_live(&self, ids: &[f32]) {
        let now = self.system.now();
        let record = self.record();
        let late = ids.iter().filter_map(|&id| {
            let sent = record.sent.get(&(id as u32))?;
            let over = sent.left.map_or(sent.deadline, |left| left.min(sent.deadline));
            (over + HOLD_UP * 8 < now).then(|| format!("image {id} is computed {:?} after its time", now - over))
        });
        let late: Vec<_> = late.collect();
        drop(record);
        late.into_iter().for_each(|violation| self.violated(violation));
    }

    /// The server's life.
    fn main(self: Arc<Self>) {
        let registry = Arc::new(Registry::of(Box::new(Shelf(self.clone())), self.system.clone()));
        if let Err(error) = registry.reload(&self.metrics, Look::Asked) {
            return self.violated(format!("a good model does not start: {error}"));
        }
        if registry.find(Some("m"), None).is_err() {
            return self.violated("a good model is not served");
        }
        let clients = self.random().between(1, 12);
        let at_work = Arc::new(Mutex::new(0_u64));
        for client in 0..clients {
            *at_work.lock().unwrap_or_else(PoisonError::into_inner) += 1;
            let (scenario, registry, at_work) = (self.clone(), registry.clone(), at_work.clone());
            self.system.start(format!("client {client}"), move || {
                scenario.client(&registry);
                *at_work.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
            });
        }
        if self.random().once_in(2) {
            for operator in 0..self.random().between(1, 2) {
                let (scenario, registry) = (self.clone(), registry.clone());
                self.system.start(format!("operator {operator}"), move || scenario.operate(&registry));
            }
        }
        let served = self.random().between(1, 300);
        self.system.sleep(served as u32 * MS);
        // SIGTERM: requests in flight are finished, within limits
        let asked_twice = self.random().once_in(8);
        let limit = if asked_twice { Duration::ZERO } else { 3 * PATIENT };
        let until = self.system.elapsed() + limit;
        let mut pause = 20 * MS;
        while *at_work.lock().unwrap_or_else(PoisonError::into_inner) > 0 && self.system.elapsed() < until {
            registry.observe(&self.metrics);
            if self.random().once_in(3) {
                // new images are refused, queued ones are answered
                registry.close();
            }
            self.system.sleep(pause);
            pause = (pause * 2).min(60_000 * MS);
        }
        if asked_twice {
            self.record().aborted = true;
            registry.abort();
        }
        registry.close();
        let left = registry.join(self.system.now() + Duration::from_secs(60));
        if left > 0 && !self.record().hung {
            self.violated(format!("{left} threads don't end"));
        }
        // the process would have ended now
        self.record().aborted = true;
        registry.abort();
    }

    /// Sends a few requests, one after the other or all at once.
    fn client(&self, registry: &Registry) {
        let requests = self.random().between(1, 4);
        for _ in 0..requests {
            let pause = self.random().between(0, 80);
            self.system.sleep(pause as u32 * MS);
            let Ok(model) = registry.find(Some("m"), None) else { continue };
            let weak = Arc::downgrade(&model);
            let mut record = self.record();
            if !record.models.iter().any(|known| known.ptr_eq(&weak)) {
                record.models.push(weak);
            }
            drop(record);
            self.request(&model);
        }
    }

    fn request(&self, model: &LiveModel) {
        let (count, patience, leaves, priority) = {
            let mut random = self.random();
            let count = random.one(&[1, 1, 1, 2, 5]);
            let patience = random.one(&[PATIENT, PATIENT, 30 * MS, 100 * MS, 5 * MS]);
            let leaves = if random.once_in(4) { Some(random.between(0, 60) as u32 * MS) } else { None };
            (count, patience, leaves, random.one(&[0, 0, 1, 50, 1000]))
        };
        let now = self.system.now();
        let deadline = now + patience;
        let mut record = self.record();
        let ids: Vec<u32> = (1..=count).map(|i| record.next + i).collect();
        record.next += count;
        record.asked += u64::from(count);
        record.sent.extend(ids.iter().map(|&id| (id, Sent { deadline, left: None })));
        drop(record);
        let inputs = ids.iter().map(|&id| self.image(id)).collect();
        let tickets = match model.scheduler().submit(inputs, Terms { deadline, priority }) {
            Ok(tickets) => tickets,
            Err(error) => {
                self.record().refused += u64::from(count);
                return self.judge_refusal(&error);
            }
        };
        if model.scheduler().held() > self.options.queue_limit {
            self.violated(format!("{} images are held, {} may be", model.scheduler().held(), self.options.queue_limit));
        }
        let gives_up = leaves.map_or(deadline, |leaves| deadline.min(now + leaves));
        self.wait(tickets, &ids, gives_up, deadline, patience == PATIENT && leaves.is_none());
    }

    fn image(&self, id: u32) -> Input {
        if self.random().once_in(12) {
            // not an image, which shows when it is decoded
            return Input::Encoded(bytes::Bytes::from_static(b"no image"));
        }
        let mut values = vec![0.0; 3 * SIDE * SIDE];
        values[0] = id as f32;
        Input::Tensor(values)
    }

    fn judge_refusal(&self, error: &InferError) {
        match error {
            InferError::Overloaded { .. } | InferError::DeadlineExceeded | InferError::ShuttingDown => {}
            InferError::TooManyImages { images, limit } if images > limit => {}
            InferError::NotReady if self.faults.panics > 0 => {}
            other => self.violated(format!("refused for no reason: {other}")),
        }
    }

    /// Waits as a client does: for each image in turn, until its time is over.
    fn wait(&self, tickets: Vec<Ticket>, ids: &[u32], gives_up: Instant, deadline: Instant, patient: bool) {
        let mut tickets = tickets.into_iter();
        for &id in ids {
            let Some(Ticket { mut reply, .. }) = tickets.next() else { return self.violated("a ticket is missing") };
            loop {
                let waker = self.system.current();
                match Pin::new(&mut reply).poll(&mut Context::from_waker(&waker)) {
                    Poll::Ready(Ok(answer)) => {
                        self.record().answered += 1;
                        self.judge(id, answer.map(|output| output.logits), deadline);
                        break;
                    }
                    Poll::Ready(Err(_)) => return self.violated(format!("image {id} was dropped without an answer")),
                    Poll::Pending => {}
                }
                let now = self.system.now();
                if now >= gives_up {
                    if patient && !self.record().hung {
                        self.violated(format!("image {id} waits for ever"));
                    }
                    drop(reply);
                    drop(tickets);
                    let mut record = self.record();
                    for later in ids.iter().filter(|&&later| later >= id) {
                        if let Some(sent) = record.sent.get_mut(later) {
                            sent.left = Some(now);
                        }
                    }
                    return;
                }
                self.system.park(Some(gives_up));
            }
        }
    }

    fn judge(&self, id: u32, answer: Result<Vec<f32>, InferError>, deadline: Instant) {
        match answer {
            Ok(logits) if logits == [id as f32, 0.0] => {}
            Ok(logits) => self.violated(format!("image {id} was answered with {logits:?}")),
            Err(InferError::Image(_)) => {}
            Err(InferError::ShuttingDown) if self.record().aborted => {}
            Err(InferError::DeadlineExceeded) if deadline <= self.system.now() + 20 * self.run_cost * 8 => {}
            Err(InferError::Internal(why)) if self.faults.fails + self.faults.panics > 0 && why.contains("told to") => {
            }
            Err(InferError::Internal(why)) if self.faults.panics > 0 && why.contains("no engine") => {}
            Err(other) => self.violated(format!("image {id} was refused for no reason: {other}")),
        }
    }

    /// Changes the repository and requests a reload.
    fn operate(&self, registry: &Registry) {
        let deeds = self.random().between(1, 4);
        for deed in 0..deeds {
            let pause = self.random().between(0, 100);
            self.system.sleep(pause as u32 * MS);
            let (version, opens, deed_of, files) = {
                let mut random = self.random();
                let all = [Opens::Well, Opens::Well, Opens::Slowly, Opens::Fails, Opens::Panics, Opens::PanicsInRun];
                (random.between(1, 3), random.one(&all), random.below(8), random.below(1 << 40) + deed)
            };
            let before = registry.all().len();
            match deed_of {
                0 => {
                    self.record().unloaded = true;
                    let _ = registry.unload("m");
                }
                1 => {
                    let _ = registry.load("m", &self.metrics);
                }
                2 => {
                    self.versions().retain(|_, (opens, _)| *opens == Opens::Well);
                    self.reload(registry);
                }
                _ => {
                    self.versions().insert(version, (opens, files));
                    self.reload(registry);
                    let broken = !matches!(opens, Opens::Well | Opens::Slowly);
                    if broken && before > 0 && !self.record().unloaded && registry.all().is_empty() {
                        self.violated("a version that does not start has ended the one that served");
                    }
                }
            }
        }
    }

    fn reload(&self, registry: &Registry) {
        let look = if self.random().once_in(2) { Look::Asked } else { Look::Again };
        let before = self.system.elapsed();
        match registry.reload(&self.metrics, look) {
            Ok(()) | Err(RegistryError::Empty { .. }) => {}
            Err(other) => self.violated(format!("the reload fails: {other}")),
        }
        let took = self.system.elapsed() - before;
        if took > Duration::from_secs(300) && !self.record().hung {
            self.violated(format!("the reload took {took:?}"));
        }
    }
}
