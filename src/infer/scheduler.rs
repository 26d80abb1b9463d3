//! Admission, queue, batching and deadlines of one model.
//!
//! An image is admitted with a slot or refused at once: admission and queue (see `queue`) can't disagree. Compute threads
//! (see `worker`) ask this room for their next task. It knows no protocol, no labels and no engine's inner life.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::error::InferError;
use super::job::{Invariance, Job, SchedulerOptions, StartError};
use super::queue::{Entry, Pending, Phase, Prepared, Slots, State, Take, smooth};
use super::request::{DEFAULT_PRIORITY, Input, Terms, Ticket};
use super::warm_up::Warm;
use super::worker::{self, Role};
use crate::engine::Backend;
use crate::metrics::ModelMetrics;

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
        // the scheduler is dropped on failure, and that stops the other threads
        let warmed = || {
            let warm = reports.recv().map_err(|_| StartError::Thread("it died while warming up".into()))??;
            shared.warmed(&warm)
        };
        for (i, role) in roles.enumerate() {
            let (its, report) = (shared.clone(), report.clone());
            let thread = std::thread::Builder::new()
                .name(format!("{what}-{i}"))
                .spawn(move || worker::main(&its, role, report))
                .map_err(|e| StartError::Thread(e.to_string()))?;
            scheduler.threads().push(thread);
            if shared.options.one_by_one && i < workers {
                warmed()?;
            }
        }
        drop(report);
        for _ in 0..if shared.options.one_by_one { 0 } else { workers } {
            warmed()?;
        }
        Ok(scheduler)
    }

    /// Admits all images of a request or none. Nothing has been computed when this refuses.
    pub fn submit(&self, inputs: Vec<Input>, terms: impl Into<Terms>) -> Result<Vec<Ticket>, InferError> {
        let images = inputs.len();
        let admitted = self.shared.admit(inputs, terms.into());
        if let Err(error) = &admitted {
            self.shared.metrics().images(error.outcome(), images);
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
        let mut state = self.shared.lock();
        state.bury(Instant::now(), true);
        let age = state.oldest().map_or(Duration::ZERO, |arrived| arrived.elapsed());
        let engines = state.engines;
        drop(state);
        self.shared.work.notify_all();
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

/// What a compute thread does next.
#[derive(Debug)]
pub(super) enum Task {
    Prepare(Entry),
    Run { images: Vec<Prepared>, alone: bool },
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

/// What threads and callers share.
pub(super) struct Shared {
    state: Mutex<State>,
    /// Something to decode, or (without decoders) to run.
    work: Condvar,
    /// Something to run, where decoders do the rest.
    batch: Condvar,
    /// The engine that has every core; whoever runs it holds the lock, nobody waits for it.
    pub(super) wide: Mutex<Option<Box<dyn Backend>>>,
    slots: Arc<Slots>,
    pub(super) options: SchedulerOptions,
    pub(super) job: Job,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("what", &self.job.what).finish_non_exhaustive()
    }
}

impl Shared {
    fn new(job: Job, mut options: SchedulerOptions) -> Self {
        options.workers = options.workers.max(1);
        options.buckets.sort_unstable();
        options.max_batch = options.buckets.last().map_or(options.max_batch, |&b| b.min(options.max_batch)).max(1);
        options.queue_limit = options.queue_limit.max(1);
        let limit = options.queue_limit;
        job.metrics.queue_limit.set(limit as i64);
        job.metrics.invariance_max_abs_diff.set(0.0);
        let slots = Arc::new(Slots::new(limit, job.metrics.clone()));
        let state = Mutex::new(State::new(options.workers));
        let (work, batch, wide) = (Condvar::new(), Condvar::new(), Mutex::new(None));
        Self { state, work, batch, wide, slots, options, job }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // no code that can panic runs under the lock; if some ever does, a queue in doubt beats a dead server
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn metrics(&self) -> &ModelMetrics {
        &self.slots.metrics
    }

    /// A worker is warm; says so if what it showed is not to be served.
    fn warmed(&self, warm: &Warm) -> Result<(), StartError> {
        let mut state = self.lock();
        state.run_cost = state.run_cost.max(warm.run_cost);
        let gauge = &self.metrics().invariance_max_abs_diff;
        match self.options.invariance {
            Invariance::Off => gauge.set(f64::NAN),
            _ => gauge.set(gauge.get().max(warm.max_abs_diff)),
        }
        match self.options.invariance == Invariance::Require && warm.max_abs_diff > 0.0 {
            true => Err(StartError::Variant { difference: warm.max_abs_diff }),
            false => Ok(()),
        }
    }

    fn admit(&self, inputs: Vec<Input>, terms: Terms) -> Result<Vec<Ticket>, InferError> {
        let Terms { deadline, priority } = terms;
        let priority = if priority == 0 { DEFAULT_PRIORITY } else { priority };
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
        state.bury(now, self.slots.used() + images > limit);
        let used = self.slots.used();
        let wait = state.drain_time(used, &self.options);
        let busy =
            InferError::Overloaded { retry_after: wait.clamp(Duration::from_millis(100), Duration::from_secs(60)) };
        let slow = wait > self.options.max_queue_wait && used >= 2 * self.options.workers;
        if slow || now + wait > deadline {
            return Err(busy);
        }
        let slots = self.slots.take(images).ok_or(busy)?;
        let mut tickets = Vec::with_capacity(images);
        for (input, slot) in inputs.into_iter().zip(slots) {
            let (reply, receiver) = oneshot::channel();
            let place = (priority, state.sequence);
            state.sequence += 1;
            let pending = Pending { reply: Some(reply), slot: Some(slot), place, arrived: now, deadline };
            state.push_raw(Entry { input, pending });
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
                let waited = state.ready.len();
                let taken = state.take_batch(now, &self.options);
                if feeds_engines && state.ready.len() < waited {
                    // decoders may have stopped because the engines were well fed
                    self.work.notify_all();
                }
                match taken {
                    Take::Batch { images, alone } => {
                        if let Some(worker) = seat.worker {
                            state.running[worker] = Some(now);
                        }
                        return Task::Run { images, alone };
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
            state.push_ready(prepared);
        }
        let idle_hands = state.engines < self.options.workers || state.phase != Phase::Open;
        drop(state);
        match (self.options.decoders > 0, idle_hands) {
            // whoever wakes may have no engine to run what was prepared
            (true, true) => self.batch.notify_all(),
            (true, false) => self.batch.notify_one(),
            (false, true) => self.work.notify_all(),
            // this thread runs it itself
            (false, false) => {}
        }
    }

    /// A worker's engine run begins.
    pub(super) fn runs(&self, worker: Option<usize>, now: Instant) {
        if let Some(worker) = worker {
            self.lock().running[worker] = Some(now);
        }
    }

    /// An engine run of `images` ended well or badly after `took`. Said before the images are answered: the next one of the
    /// same caller should find the machine idle.
    pub(super) fn ran(&self, worker: Option<usize>, images: usize, took: Duration, ok: bool) {
        let mut state = self.lock();
        if let Some(worker) = worker {
            state.running[worker] = None;
        }
        match ok {
            true => {
                state.run_cost = smooth(state.run_cost, took / images.max(1) as u32);
                state.failures = 0;
            }
            false => state.failures = state.failures.saturating_add(1),
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
