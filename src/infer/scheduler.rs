//! Admission, queue, batching and deadlines of one model.
//!
//! An image is admitted with a slot or refused at once; its queue entry owns the slot, and dropping the entry, wherever
//! that happens, frees it: admission and queue can't disagree. Compute threads (see `worker`) ask this room for their
//! next task. It knows no protocol, no labels and no engine's inner life.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::engine::{Backend, EngineError};
use super::error::InferError;
use super::image::ImageLimits;
use super::resize::Preprocessor;
use super::tensor::RawTensor;
use super::worker::{self, Role};
use crate::metrics::{ModelMetrics, Outcome};

/// Opens a fresh engine for a compute thread: at the start, and again after a panic in the old one.
pub type OpenBackend = Box<dyn Fn() -> Result<Box<dyn Backend>, EngineError> + Send + Sync>;

/// How the images of one model are queued, batched and spread over threads.
#[derive(Debug, Clone)]
pub struct SchedulerOptions {
    /// Threads that own an engine each.
    pub workers: usize,
    /// Further threads that only decode and resize; with 0 the workers do that too. On a CPU the workers use every core
    /// already; a GPU's workers mostly wait, and need others to feed them.
    pub decoders: usize,
    /// Most images in one engine run.
    pub max_batch: usize,
    /// How long an image may wait for company while an engine is free. Zero: not at all; batches then form from what
    /// waits when a worker becomes free.
    pub max_queue_delay: Duration,
    /// Most images admitted and not yet answered.
    pub queue_limit: usize,
    /// What an encoded image may cost at most.
    pub image_limits: ImageLimits,
}

/// What a scheduler runs.
pub struct Job {
    /// Name for threads and log lines.
    pub what: String,
    /// From RGB image to tensor.
    pub preprocessor: Preprocessor,
    /// Turn images upright by their EXIF orientation.
    pub exif_orientation: bool,
    /// Logits per image.
    pub classes: usize,
    /// Opens an engine.
    pub open: OpenBackend,
    /// Where numbers go.
    pub metrics: ModelMetrics,
}

/// Why a model could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A real run failed before the model was ready.
    #[error("warm-up with a batch of {batch} failed: {reason}")]
    WarmUp {
        /// Images in the run.
        batch: usize,
        /// What went wrong.
        reason: String,
    },
    /// The system gave no thread, or the thread died.
    #[error("can't start a compute thread: {0}")]
    Thread(String),
}

/// One image, as the caller brings it.
#[derive(Debug, Clone)]
pub enum Input {
    /// A JPEG, PNG … file.
    Encoded(Bytes),
    /// A tensor ready for the network, `[3, height, width]`.
    Tensor(Vec<f32>),
    /// The same, or its pixels, in bytes.
    Raw(RawTensor),
}

impl Input {
    /// Whether it can be a network's input of `len` values. Encoded images can, until they are decoded.
    fn fits(&self, len: usize) -> bool {
        match self {
            Self::Encoded(_) => true,
            Self::Tensor(values) => values.len() == len,
            Self::Raw(raw) => raw.values() == Some(len),
        }
    }
}

/// Where an image's time went.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    /// Decoding.
    pub decode: Duration,
    /// Resizing, cropping, normalising.
    pub preprocess: Duration,
    /// Waiting, from admission to the engine run, without the two above.
    pub queue: Duration,
    /// The engine run.
    pub inference: Duration,
    /// Images in that run.
    pub batch: usize,
}

/// What an image gets.
#[derive(Debug, Clone)]
pub struct Output {
    /// `[classes]`.
    pub logits: Vec<f32>,
    /// Where the time went.
    pub timings: Timings,
}

/// The caller's end of one admitted image. Dropping it cancels the image if no engine has taken it yet.
#[derive(Debug)]
pub struct Ticket {
    reply: oneshot::Receiver<Result<Output, InferError>>,
    deadline: Instant,
}

impl Ticket {
    /// The image's logits; at the deadline at the latest, [`InferError::DeadlineExceeded`].
    pub async fn answer(self) -> Result<Output, InferError> {
        match tokio::time::timeout_at(self.deadline.into(), self.reply).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(InferError::Internal("an image was dropped without an answer".into())),
            Err(_) => Err(InferError::DeadlineExceeded),
        }
    }
}

/// What a health check wants to know.
#[derive(Debug, Clone, Copy)]
pub struct Health {
    /// Workers that hold a working engine.
    pub engines: usize,
    /// Images in a row that no engine could run; 0 after any success.
    pub failures: u32,
    /// Age of the longest engine run under way.
    pub longest_run: Option<Duration>,
}

/// The queue of one model and its compute threads.
#[derive(Debug)]
pub struct Scheduler {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Scheduler {
    /// Starts the threads; returns once every worker has opened its engine and warmed it with real runs.
    pub fn start(job: Job, options: SchedulerOptions) -> Result<Self, StartError> {
        let (workers, decoders) = (options.workers.max(1), options.decoders);
        let what = job.what.clone();
        let shared = Arc::new(Shared::new(job, options));
        let scheduler = Self { shared: shared.clone(), threads: Mutex::default() };
        let (report, reports) = std::sync::mpsc::channel();
        let roles = (0..workers).map(Role::Worker).chain((0..decoders).map(|_| Role::Decoder));
        for (i, role) in roles.enumerate() {
            let (shared, report) = (shared.clone(), report.clone());
            let thread = std::thread::Builder::new()
                .name(format!("{what}-{i}"))
                .spawn(move || worker::main(&shared, role, report))
                .map_err(|e| StartError::Thread(e.to_string()))?;
            scheduler.threads().push(thread);
        }
        drop(report);
        for _ in 0..workers {
            // the scheduler is dropped on failure, and that stops the other threads
            let warm = reports.recv().map_err(|_| StartError::Thread("it died while warming up".into()))??;
            shared.warmed(&warm);
        }
        Ok(scheduler)
    }

    /// Admits all images of a request or none. Nothing has been computed when this refuses.
    pub fn submit(&self, inputs: Vec<Input>, deadline: Instant) -> Result<Vec<Ticket>, InferError> {
        let images = inputs.len();
        let admitted = self.shared.admit(inputs, deadline);
        if let Err(error) = &admitted {
            self.shared.metrics().images(outcome(error), images);
        }
        admitted
    }

    /// Most images that can be admitted at once.
    pub fn queue_limit(&self) -> usize {
        self.shared.slots.limit
    }

    /// How images are queued and batched.
    pub fn options(&self) -> &SchedulerOptions {
        &self.shared.options
    }

    /// Whether the engines work.
    pub fn health(&self) -> Health {
        let state = self.shared.lock();
        let now = Instant::now();
        let longest_run = state.running.iter().flatten().map(|&since| now.saturating_duration_since(since)).max();
        Health { engines: state.engines, failures: state.failures, longest_run }
    }

    /// Sets the gauges that are measured when somebody looks.
    pub fn observe(&self) {
        let state = self.shared.lock();
        let oldest =
            state.raw.iter().map(|e| e.pending.arrived).chain(state.ready.front().map(|p| p.pending.arrived)).min();
        let age = oldest.map_or(Duration::ZERO, |a| a.elapsed());
        let engines = state.engines;
        drop(state);
        self.shared.metrics().queue_oldest_age_seconds.set(age.as_secs_f64());
        self.shared.metrics().engine_workers.set(engines as i64);
    }

    /// Takes no new images; what is queued is still answered, then the threads end.
    pub fn close(&self) {
        self.shared.end(Phase::Closing);
    }

    /// Answers everything queued with [`InferError::ShuttingDown`] and lets the threads end.
    pub fn abort(&self) {
        self.shared.end(Phase::Aborted);
    }

    /// Waits for the threads until `deadline`; returns how many still run. Blocks: not for async threads.
    pub fn join(&self, deadline: Instant) -> usize {
        loop {
            let mut threads = self.threads();
            for i in (0..threads.len()).rev() {
                // a hung engine can't be joined, so only finished threads are
                if threads[i].is_finished() {
                    let _ = threads.swap_remove(i).join();
                }
            }
            if threads.is_empty() || Instant::now() >= deadline {
                return threads.len();
            }
            drop(threads);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.abort();
    }
}

/// How an error counts.
pub fn outcome(error: &InferError) -> Outcome {
    use super::image::ImageError;
    match error {
        InferError::Image(ImageError::Unsupported { .. }) => Outcome::UnsupportedMediaType,
        InferError::Image(ImageError::TooLarge { .. }) => Outcome::ImageTooLarge,
        InferError::Image(_) => Outcome::InvalidImage,
        InferError::BadTensor(_) | InferError::TooManyImages { .. } | InferError::ModelNotNamed { .. } => {
            Outcome::InvalidRequest
        }
        InferError::Overloaded { .. } => Outcome::Overloaded,
        InferError::DeadlineExceeded => Outcome::DeadlineExceeded,
        InferError::ShuttingDown => Outcome::ShuttingDown,
        InferError::NotReady => Outcome::NotReady,
        InferError::ModelNotFound { .. } => Outcome::ModelNotFound,
        InferError::Internal(_) => Outcome::Internal,
    }
}

/// Counts images admitted and not yet answered.
#[derive(Debug)]
struct Slots {
    used: AtomicUsize,
    limit: usize,
    metrics: ModelMetrics,
}

impl Slots {
    /// Takes `count` slots or none.
    fn take(self: &Arc<Self>, count: usize) -> Option<Vec<Slot>> {
        let fits = |used: usize| used.checked_add(count).filter(|&sum| sum <= self.limit);
        self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).ok()?;
        self.metrics.queue_depth.add(count as i64);
        Some((0..count).map(|_| Slot(self.clone())).collect())
    }

    fn used(&self) -> usize {
        self.used.load(Ordering::Acquire)
    }
}

/// The right of one image to be in the house. Not `Clone`: released once, by drop.
#[derive(Debug)]
struct Slot(Arc<Slots>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::AcqRel);
        self.0.metrics.queue_depth.dec();
    }
}

/// The scheduler's end of one admitted image.
#[derive(Debug)]
pub(super) struct Pending {
    reply: Option<oneshot::Sender<Result<Output, InferError>>>,
    slot: Option<Slot>,
    sequence: u64,
    /// When it was admitted.
    pub(super) arrived: Instant,
    deadline: Instant,
}

impl Pending {
    /// Answers and counts the image. The slot is free and the image counted before the caller can see the answer, so
    /// that a caller who sends its next image at once finds room.
    pub(super) fn answer(mut self, result: Result<Output, InferError>) {
        self.end(result);
    }

    fn end(&mut self, result: Result<Output, InferError>) {
        let (Some(slot), Some(reply)) = (self.slot.take(), self.reply.take()) else { return };
        let slots = slot.0.clone();
        drop(slot);
        let ended = match (&result, reply.is_closed()) {
            (Ok(_), false) => Outcome::Ok,
            (Err(error), false) => outcome(error),
            (_, true) if self.deadline <= Instant::now() => Outcome::DeadlineExceeded,
            (_, true) => Outcome::Cancelled,
        };
        slots.metrics.images(ended, 1);
        // an error means that the caller has gone since
        let _ = reply.send(result);
    }

    /// True when nobody waits for the answer, or nobody would when it came (`lead` from now).
    fn is_dead(&self, now: Instant, lead: Duration) -> bool {
        self.deadline <= now + lead || self.reply.as_ref().is_none_or(oneshot::Sender::is_closed)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.end(Err(InferError::Internal("an image was dropped without an answer".into())));
    }
}

/// An image waiting to be decoded.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) input: Input,
    pub(super) pending: Pending,
}

/// An image waiting for an engine.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) tensor: Vec<f32>,
    pub(super) decode: Duration,
    pub(super) preprocess: Duration,
    pub(super) pending: Pending,
}

/// What a compute thread does next.
#[derive(Debug)]
pub(super) enum Task {
    Prepare(Entry),
    Run(Vec<Prepared>),
    Reopen,
    Stop,
}

/// What the thread that asks is able to do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seat {
    /// The worker's number; none for a decoder.
    pub(super) worker: Option<usize>,
    /// When a worker without an engine tries to open one again.
    pub(super) reopen_at: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Open,
    Closing,
    Aborted,
}

/// What threads and callers share.
pub(super) struct Shared {
    state: Mutex<State>,
    /// Something to decode, or (without decoders) to run.
    work: Condvar,
    /// Something to run, where decoders do the rest.
    batch: Condvar,
    slots: Arc<Slots>,
    pub(super) options: SchedulerOptions,
    pub(super) job: Job,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("what", &self.job.what).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct State {
    phase: Phase,
    raw: VecDeque<Entry>,
    /// Images that a thread is decoding right now.
    decoding: usize,
    ready: VecDeque<Prepared>,
    sequence: u64,
    engines: usize,
    failures: u32,
    running: Vec<Option<Instant>>,
    /// Engine time per image, and decode plus resize time per image: moving averages.
    run_cost: Duration,
    prepare_cost: Duration,
}

impl Shared {
    fn new(job: Job, mut options: SchedulerOptions) -> Self {
        options.workers = options.workers.max(1);
        options.max_batch = options.max_batch.max(1);
        options.queue_limit = options.queue_limit.max(1);
        let limit = options.queue_limit;
        job.metrics.queue_limit.set(limit as i64);
        let slots = Arc::new(Slots { used: AtomicUsize::new(0), limit, metrics: job.metrics.clone() });
        let state = State {
            phase: Phase::Open,
            raw: VecDeque::new(),
            decoding: 0,
            ready: VecDeque::new(),
            sequence: 0,
            engines: 0,
            failures: 0,
            running: vec![None; options.workers],
            run_cost: Duration::ZERO,
            prepare_cost: Duration::ZERO,
        };
        Self { state: Mutex::new(state), work: Condvar::new(), batch: Condvar::new(), slots, options, job }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // no code that can panic runs under the lock; if some ever does, a queue in doubt beats a dead server
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn metrics(&self) -> &ModelMetrics {
        &self.slots.metrics
    }

    fn warmed(&self, warm: &worker::Warm) {
        let mut state = self.lock();
        state.run_cost = state.run_cost.max(warm.run_cost);
        let gauge = &self.metrics().invariance_max_abs_diff;
        gauge.set(gauge.get().max(warm.max_abs_diff));
    }

    fn admit(&self, inputs: Vec<Input>, deadline: Instant) -> Result<Vec<Ticket>, InferError> {
        let (images, limit) = (inputs.len(), self.slots.limit);
        let now = Instant::now();
        if images > limit {
            return Err(InferError::TooManyImages { images, limit });
        }
        let tensor_len = self.job.preprocessor.tensor_len();
        if !inputs.iter().all(|input| input.fits(tensor_len)) {
            return Err(InferError::Internal(format!("a tensor does not have {tensor_len} values")));
        }
        if deadline <= now {
            return Err(InferError::DeadlineExceeded);
        }
        let mut state = self.lock();
        if state.phase != Phase::Open {
            return Err(InferError::ShuttingDown);
        }
        if state.engines == 0 {
            return Err(InferError::NotReady);
        }
        if self.slots.used() + images > limit {
            state.bury(now);
        }
        let wait = state.drain_time(self.slots.used(), &self.options);
        let busy =
            InferError::Overloaded { retry_after: wait.clamp(Duration::from_millis(100), Duration::from_secs(60)) };
        if now + wait > deadline {
            return Err(busy);
        }
        let slots = self.slots.take(images).ok_or(busy)?;
        let mut tickets = Vec::with_capacity(images);
        for (input, slot) in inputs.into_iter().zip(slots) {
            let (reply, receiver) = oneshot::channel();
            let sequence = state.sequence;
            state.sequence += 1;
            let pending = Pending { reply: Some(reply), slot: Some(slot), sequence, arrived: now, deadline };
            state.raw.push_back(Entry { input, pending });
            tickets.push(Ticket { reply: receiver, deadline });
        }
        drop(state);
        if images == 1 {
            self.work.notify_one()
        } else {
            self.work.notify_all()
        }
        Ok(tickets)
    }

    /// Blocks until there is something for this thread to do.
    pub(super) fn next(&self, seat: Seat) -> Task {
        let feeds_engines = self.options.decoders > 0;
        let prepares = seat.worker.is_none() || !feeds_engines;
        let can_run = seat.worker.is_some() && seat.reopen_at.is_none();
        let signal = if prepares { &self.work } else { &self.batch };
        let mut state = self.lock();
        if let Some(worker) = seat.worker {
            state.running[worker] = None;
        }
        loop {
            let now = Instant::now();
            if state.phase == Phase::Aborted {
                state.answer_all();
                return Task::Stop;
            }
            let mut wake = seat.reopen_at;
            if can_run {
                match state.take_batch(now, &self.options) {
                    Take::Batch(batch) => {
                        if let Some(worker) = seat.worker {
                            state.running[worker] = Some(now);
                        }
                        return Task::Run(batch);
                    }
                    Take::At(time) => wake = Some(time),
                    Take::Nothing => {}
                }
            }
            if seat.reopen_at.is_some_and(|at| at <= now) {
                return Task::Reopen;
            }
            // decoders stop when the engines are well fed: a decoded image is far bigger than an encoded one
            let ahead = state.ready.len() + state.decoding;
            let fed = feeds_engines && ahead >= 2 * self.options.workers * self.options.max_batch;
            if prepares
                && !fed
                && let Some(entry) = state.take_raw(now, &self.options)
            {
                state.decoding += 1;
                return Task::Prepare(entry);
            }
            if state.phase == Phase::Closing && state.is_empty() {
                self.notify_all();
                return Task::Stop;
            }
            let woken = match wake.map(|at| at.saturating_duration_since(now)) {
                None => signal.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(timeout) => signal.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner).0,
            };
            state = woken;
        }
    }

    /// A thread is done preparing an image; `None` if it was answered already.
    pub(super) fn prepared(&self, prepared: Option<Prepared>, took: Duration) {
        let mut state = self.lock();
        state.decoding -= 1;
        if took > Duration::ZERO {
            state.prepare_cost = smooth(state.prepare_cost, took);
        }
        if let Some(prepared) = prepared {
            // decoding may finish out of order; images run in the order they came
            let behind =
                state.ready.iter().rev().take_while(|p| p.pending.sequence > prepared.pending.sequence).count();
            let at = state.ready.len() - behind;
            state.ready.insert(at, prepared);
        }
        let idle_hands = state.engines < self.options.workers || state.phase != Phase::Open;
        drop(state);
        if self.options.decoders > 0 {
            self.batch.notify_one();
        } else if idle_hands {
            // this thread may have no engine to run what it prepared
            self.work.notify_all();
        }
    }

    /// An engine run of `images` ended well or badly after `took`.
    pub(super) fn ran(&self, images: usize, took: Duration, ok: bool) {
        let mut state = self.lock();
        match ok {
            true => {
                state.run_cost = smooth(state.run_cost, took / images.max(1) as u32);
                state.failures = 0;
            }
            false => state.failures = state.failures.saturating_add(1),
        }
        let feed = self.options.decoders > 0;
        drop(state);
        if feed {
            self.work.notify_all();
        }
    }

    /// A worker won (+1) or lost (-1) its engine.
    pub(super) fn engines(&self, change: isize) {
        let mut state = self.lock();
        state.engines = state.engines.saturating_add_signed(change);
        let engines = state.engines;
        drop(state);
        self.metrics().engine_workers.set(engines as i64);
    }

    fn end(&self, phase: Phase) {
        let mut state = self.lock();
        state.phase = state.phase.max(phase);
        if state.phase == Phase::Aborted {
            state.answer_all();
        }
        drop(state);
        self.notify_all();
    }

    fn notify_all(&self) {
        self.work.notify_all();
        self.batch.notify_all();
    }
}

/// What there is for a free engine.
enum Take {
    Batch(Vec<Prepared>),
    /// Nothing before that moment: the oldest image may wait for company until then.
    At(Instant),
    Nothing,
}

impl State {
    fn is_empty(&self) -> bool {
        self.raw.is_empty() && self.ready.is_empty() && self.decoding == 0
    }

    /// The next live image to decode.
    fn take_raw(&mut self, now: Instant, options: &SchedulerOptions) -> Option<Entry> {
        while let Some(entry) = self.raw.pop_front() {
            let lead = self.lead(self.raw.len(), self.run_cost + self.prepare_cost, options);
            if !entry.pending.is_dead(now, lead) {
                return Some(entry);
            }
            entry.pending.answer(Err(InferError::DeadlineExceeded));
        }
        None
    }

    /// What a free engine runs now: its fair share of what waits, so that a burst on an idle machine spreads over all
    /// engines and batches grow only with the queue.
    fn take_batch(&mut self, now: Instant, options: &SchedulerOptions) -> Take {
        let Some(oldest) = self.ready.front() else { return Take::Nothing };
        let waits = !options.max_queue_delay.is_zero();
        let undecoded = if options.decoders == 0 { self.raw.len() + self.decoding } else { 0 };
        let waiting = self.ready.len() + undecoded;
        let share =
            if waits { options.max_batch } else { waiting.div_ceil(self.engines.max(1)).min(options.max_batch) };
        if self.ready.len() < share {
            if options.decoders == 0 && !self.raw.is_empty() {
                return Take::Nothing; // decode first, this thread can
            }
            let until = oldest.pending.arrived + options.max_queue_delay;
            if waits && self.phase == Phase::Open && now < until {
                return Take::At(until);
            }
        }
        let mut batch = Vec::with_capacity(share);
        while batch.len() < share
            && let Some(prepared) = self.ready.pop_front()
        {
            let lead = self.lead(self.ready.len() + self.raw.len(), self.run_cost, options);
            match prepared.pending.is_dead(now, lead) {
                true => prepared.pending.answer(Err(InferError::DeadlineExceeded)),
                false => batch.push(prepared),
            }
        }
        if batch.is_empty() { Take::Nothing } else { Take::Batch(batch) }
    }

    /// How long before its deadline an image is given up: under a backlog, work that would finish too late only makes
    /// the others late; without one, there is nothing to lose by trying.
    fn lead(&self, behind: usize, cost: Duration, options: &SchedulerOptions) -> Duration {
        if behind >= options.workers { cost } else { Duration::ZERO }
    }

    /// Removes images that nobody waits for, so that they don't keep out those that somebody does.
    fn bury(&mut self, now: Instant) {
        let dead = |pending: &Pending| pending.is_dead(now, Duration::ZERO);
        for i in (0..self.raw.len()).rev() {
            if dead(&self.raw[i].pending)
                && let Some(entry) = self.raw.remove(i)
            {
                entry.pending.answer(Err(InferError::DeadlineExceeded));
            }
        }
        for i in (0..self.ready.len()).rev() {
            if dead(&self.ready[i].pending)
                && let Some(prepared) = self.ready.remove(i)
            {
                prepared.pending.answer(Err(InferError::DeadlineExceeded));
            }
        }
    }

    fn answer_all(&mut self) {
        for entry in self.raw.drain(..) {
            entry.pending.answer(Err(InferError::ShuttingDown));
        }
        for prepared in self.ready.drain(..) {
            prepared.pending.answer(Err(InferError::ShuttingDown));
        }
    }

    /// How long `images` keep the threads busy, by the measured costs.
    fn drain_time(&self, images: usize, options: &SchedulerOptions) -> Duration {
        let engines = self.engines.max(1) as f64;
        let (run, prepare) = (self.run_cost.as_secs_f64(), self.prepare_cost.as_secs_f64());
        let each = match options.decoders {
            0 => (run + prepare) / engines,
            decoders => (run / engines).max(prepare / decoders as f64),
        };
        Duration::try_from_secs_f64(each * images as f64).unwrap_or(Duration::MAX)
    }
}

/// Moving average over about ten values.
fn smooth(average: Duration, value: Duration) -> Duration {
    if average.is_zero() { value } else { (average * 9 + value) / 10 }
}
