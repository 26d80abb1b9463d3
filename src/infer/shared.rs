//! What a model's threads and callers share: the queue behind its lock, the sleeping threads, and the wake-ups.
//!
//! **The invariant.** A thread sleeps only if the [`Queue`], asked under the lock, has nothing for it before its timer
//! ends. Whoever changes the queue asks [`Queue::demand`], before releasing the lock, what there is to do now, and
//! wakes as many sleepers that can do it, less those that were woken and have not looked yet. Changes are: images
//! arrive, are decoded, expire, are dequeued; engines open and fail; the phase. A thread that dequeues a task asks too,
//! so that the remaining work wakes the next sleeper, and so does one that goes to sleep after it evicted images.
//! Nothing relies on a busy thread to look again, except for what it hands over (`Done`): it decides under the same
//! lock. No wake-up can be lost between lock and sleep, see [`System::park`].

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::error::InferError;
use super::job::{Invariance, Job, SchedulerOptions, StartError};
use super::line::{Entry, Memory, Parked, Prepared};
use super::pending::{Pending, Slots};
use super::queue::{Able, Demand, Phase, Queue, Step, Task};
use super::request::{Class, DEFAULT_PRIORITY, Input, Terms, Ticket};
use super::system::System;
use crate::engine::{Backend, Extras};
use crate::metrics::ModelMetrics;

#[cfg(test)]
#[path = "../../tests/simulation/idle.rs"]
mod idle;

/// Health of a model's engines.
#[derive(Debug, Clone, Copy)]
pub struct Health {
    /// Workers that hold a working engine.
    pub engines: usize,
    /// Images in a row that no engine could run; 0 after any success.
    pub failures: u32,
    /// Age of the longest engine run in progress.
    pub longest_run: Option<Duration>,
}

/// Measurements of an engine's warm-up.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Warm {
    /// Engine time per image in large batches.
    pub(super) run_cost: Duration,
    /// Time to decode and resize an image; zero: not measured.
    pub(super) prepare_cost: Duration,
    /// Largest difference of a logit between an image alone and in any batch, or on all cores.
    pub(super) max_abs_diff: f64,
}

/// The result that a thread hands over when it asks for its next task.
#[derive(Debug)]
pub(super) enum Done {
    /// None.
    Nothing,
    /// A decoded image, or `None` if it is answered already; and the time of decoding and resizing (zero if there was
    /// nothing to decode).
    Prepared(Option<Prepared>, Duration),
    /// An image that waits for decode memory.
    Parked(Parked),
}

pub(super) struct Shared {
    state: Mutex<State>,
    /// The engine that uses every core. The thread that runs it holds the lock; the others don't wait for it.
    pub(super) wide: Mutex<Option<Box<dyn Backend>>>,
    slots: Arc<Slots>,
    pub(super) options: SchedulerOptions,
    pub(super) job: Job,
}

#[derive(Debug)]
struct State {
    queue: Queue,
    sleepers: Vec<Sleeper>,
    /// One per worker: warm, or why not.
    reports: VecDeque<Result<Warm, StartError>>,
    /// Threads that have not ended.
    alive: usize,
    /// Workers that have not died of a panic.
    workers: usize,
    /// Threads that wait for a report, or for threads to end.
    waiting: Vec<Waker>,
}

/// A thread without work.
#[derive(Debug)]
struct Sleeper {
    thread: usize,
    able: Able,
    until: Option<Instant>,
    waker: Waker,
    /// Whether it was woken and will look for work.
    woken: bool,
}

/// A compute thread's handle on the shared state.
#[derive(Debug)]
pub(super) struct Caller {
    /// The thread's number among the model's threads.
    pub(super) thread: usize,
    pub(super) waker: Waker,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("what", &self.job.what).finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn new(job: Job, mut options: SchedulerOptions) -> Self {
        options.workers = options.workers.max(1);
        options.buckets.sort_unstable();
        options.max_batch = options.buckets.last().map_or(options.max_batch, |&b| b.min(options.max_batch)).max(1);
        options.queue_limit = options.queue_limit.max(1);
        let limit = options.queue_limit;
        job.metrics.queue_limit.set(limit as i64);
        let unknown = options.invariance == Invariance::Off || options.warms_up_later();
        job.metrics.invariance_max_abs_diff.set(if unknown { f64::NAN } else { 0.0 });
        let slots = Arc::new(Slots::new(limit, job.metrics.clone()));
        let mut queue = Queue::new(options.workers, job.system.now());
        if options.warms_up_later() {
            queue.warm = 1;
        }
        let state = State {
            queue,
            sleepers: Vec::new(),
            reports: VecDeque::new(),
            alive: 0,
            workers: options.workers,
            waiting: Vec::new(),
        };
        Self { state: Mutex::new(state), wide: Mutex::new(None), slots, options, job }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.job.system.step();
        // no code that can panic runs under the lock; should some ever do so, the queue stays in use as it is
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Releases the lock as the invariant demands: wakes sleepers that have work now, and answers evicted images.
    fn release(&self, mut state: MutexGuard<'_, State>, now: Instant) {
        let demand = state.queue.demand(now, &self.options);
        let woken = state.wake(demand);
        let (given_up, reason) = (std::mem::take(&mut state.queue.given_up), state.queue.reason());
        drop(state);
        woken.into_iter().for_each(Waker::wake);
        give_up(given_up, &reason, now);
    }

    pub(super) fn system(&self) -> &Arc<dyn System> {
        &self.job.system
    }

    pub(super) fn now(&self) -> Instant {
        self.job.system.now()
    }

    pub(super) fn metrics(&self) -> &ModelMetrics {
        &self.slots.metrics
    }

    pub(super) fn queue_limit(&self) -> usize {
        self.slots.limit
    }

    /// Admits all images of a request or none.
    pub(super) fn admit(&self, inputs: Vec<Input>, terms: Terms, extras: Extras) -> Result<Vec<Ticket>, InferError> {
        let Terms { deadline, priority } = terms;
        let priority = if priority == 0 { DEFAULT_PRIORITY } else { priority };
        let class = Class::of(priority);
        let (images, limit) = (inputs.len(), self.slots.limit_of(class));
        if images > limit {
            return Err(InferError::TooManyImages { images, limit });
        }
        let tensor_len = self.job.preprocessor.tensor_len();
        if !inputs.iter().all(|input| input.fits(tensor_len)) {
            return Err(InferError::Internal(format!("a tensor does not have {tensor_len} values")));
        }
        let preprocessor = &self.job.preprocessor;
        if !preprocessor.takes_images() && inputs.iter().any(|input| matches!(input, Input::Encoded(_))) {
            return Err(InferError::NoImages { channels: preprocessor.channels() });
        }
        let now = self.now();
        if deadline <= now {
            return Err(InferError::DeadlineExceeded);
        }
        let mut state = self.lock();
        state.queue.accepts()?;
        if state.queue.evicts(now, self.slots.is_full(images, class)) {
            state.queue.evict(now);
            if !state.queue.given_up.is_empty() {
                // answering frees slots; answers are sent without the lock
                self.release(state, now);
                state = self.lock();
                state.queue.accepts()?;
            }
        }
        let used = self.slots.used();
        state.queue.admits(used, deadline, now, &self.options)?;
        let Some(slots) = self.slots.take(images, class) else {
            return Err(state.queue.refuse(used, now, &self.options));
        };
        let mut tickets = Vec::with_capacity(images);
        for (input, slot) in inputs.into_iter().zip(slots) {
            let (reply, receiver) = oneshot::channel();
            let rank = (priority, state.queue.sequence);
            state.queue.sequence += 1;
            let pending = Pending { reply: Some(reply), slot: Some(slot), class, rank, arrived: now, deadline, extras };
            state.queue.raw.push(Entry { input, pending, memory: Memory::Unasked });
            tickets.push(Ticket { reply: receiver, deadline });
        }
        self.release(state, now);
        Ok(tickets)
    }

    /// Why an image that arrived now would be refused because of the queue; checked before its bytes are read.
    pub(super) fn refuses(&self, deadline: Instant) -> Option<InferError> {
        let now = self.now();
        let mut state = self.lock();
        state.queue.accepts().ok()?;
        let full = self.slots.is_full(1, Class::Default);
        if state.queue.evicts(now, full) {
            state.queue.evict(now);
            if !state.queue.given_up.is_empty() {
                self.release(state, now);
                state = self.lock();
            }
        }
        let used = self.slots.used();
        if self.slots.is_full(1, Class::Default) {
            return Some(state.queue.refuse(used, now, &self.options));
        }
        state.queue.admits(used, deadline, now, &self.options).err()
    }

    /// Hands over what a thread has done, and blocks until there is something else for it to do.
    pub(super) fn next(&self, caller: &Caller, able: Able, done: Done) -> Task {
        let mut state = self.lock();
        if let Some(worker) = able.worker {
            state.queue.running[worker] = None;
        }
        match done {
            Done::Nothing => {}
            Done::Prepared(prepared, took) => {
                state.queue.prepared(prepared, took);
            }
            Done::Parked(parked) => {
                state.queue.decoding -= 1;
                state.queue.parked.push(parked);
            }
        }
        loop {
            state.sleepers.retain(|sleeper| sleeper.thread != caller.thread);
            let now = self.now();
            state.queue.holds(self.slots.used(), now, &self.options);
            match state.queue.next(able, now, &self.options) {
                Step::Do(task) => {
                    self.release(state, now);
                    return task;
                }
                Step::Sleep(until) => {
                    let answers = !state.queue.given_up.is_empty();
                    if !answers {
                        let waker = caller.waker.clone();
                        state.sleepers.push(Sleeper { thread: caller.thread, able, until, waker, woken: false });
                    }
                    self.release(state, now);
                    if !answers {
                        self.system().park(until);
                    }
                }
            }
            state = self.lock();
        }
    }

    /// Records that a worker's engine run begins.
    pub(super) fn runs(&self, worker: usize, now: Instant) {
        self.lock().queue.running[worker] = Some(now);
    }

    /// Records that an engine run of `images` images ended, successfully or not (`ok`), and took `cost` for each image,
    /// if that is typical. Called before the images are answered, so that the same caller's next image finds the
    /// machine idle. Wakes no thread: the worker returns for its next task.
    pub(super) fn ran(&self, worker: usize, images: usize, ok: bool, cost: Option<Duration>) {
        let now = self.now();
        let mut state = self.lock();
        state.queue.running[worker] = None;
        state.queue.ran(images, ok, cost, now, &self.options);
    }

    /// Records that a worker opened (+1) or lost (-1) its engine.
    pub(super) fn engines(&self, change: isize) {
        let mut state = self.lock();
        state.queue.engines = state.queue.engines.saturating_add_signed(change);
        let engines = state.queue.engines;
        let now = self.now();
        self.release(state, now);
        self.metrics().engine_workers.set(engines as i64);
    }

    /// Refuses new images; with [`Phase::Aborted`] also evicts all that wait.
    pub(super) fn end(&self, phase: Phase) {
        let mut state = self.lock();
        state.queue.phase = state.queue.phase.max(phase);
        if state.queue.phase == Phase::Aborted {
            state.queue.give_up_all();
        }
        let now = self.now();
        self.release(state, now);
    }

    pub(super) fn health(&self) -> Health {
        let now = self.now();
        let state = self.lock();
        let queue = &state.queue;
        let longest_run = queue.running.iter().flatten().map(|&since| now.saturating_duration_since(since)).max();
        Health { engines: queue.engines, failures: queue.failures, longest_run }
    }

    /// Evicts expired images and updates the gauges that are measured at each scrape.
    pub(super) fn observe(&self) {
        let now = self.now();
        let mut state = self.lock();
        state.queue.evict(now);
        let age = state.queue.oldest().map_or(Duration::ZERO, |arrived| now.saturating_duration_since(arrived));
        let engines = state.queue.engines;
        self.release(state, now);
        self.metrics().queue_oldest_age_seconds.set(age.as_secs_f64());
        self.metrics().engine_workers.set(engines as i64);
    }

    /// Records that a thread is about to be started.
    pub(super) fn begins(&self) {
        self.lock().alive += 1;
    }

    /// Records that a thread has ended, or could not be started.
    pub(super) fn ended(&self) {
        let mut state = self.lock();
        state.alive = state.alive.saturating_sub(1);
        tell(state);
    }

    /// Records that a thread died of an unguarded panic. Others are woken for its work; with the last worker, all
    /// waiting images are evicted, and nothing more is admitted.
    pub(super) fn died(&self, thread: usize, is_worker: bool) {
        let mut state = self.lock();
        state.sleepers.retain(|sleeper| sleeper.thread != thread);
        state.workers = state.workers.saturating_sub(usize::from(is_worker));
        if state.workers == 0 {
            state.queue.phase = Phase::Aborted;
            state.queue.give_up_all();
        }
        let now = self.now();
        self.release(state, now);
    }

    /// Records that a worker is warm, or why not.
    pub(super) fn report(&self, warm: Result<Warm, StartError>) {
        let mut state = self.lock();
        state.reports.push_back(warm);
        tell(state);
    }

    /// Waits for a worker's report; fails if it is not warm, or measured something that must not be served.
    pub(super) fn warmed(&self) -> Result<(), StartError> {
        let report = self.wait_for(None, |state| state.reports.pop_front());
        let warm = report.unwrap_or_else(|| Err(StartError::Thread("it never reported".into())))?;
        self.lock().queue.estimate.warmed(warm.run_cost, warm.prepare_cost);
        if self.options.invariance != Invariance::Off && !self.options.warms_up_later() {
            self.differs(warm.max_abs_diff);
        }
        if self.options.invariance == Invariance::Require && warm.max_abs_diff > 0.0 {
            return Err(StartError::Variant { difference: warm.max_abs_diff });
        }
        Ok(())
    }

    /// Records that batches of up to so many images are warm.
    pub(super) fn warms(&self, images: usize) {
        let mut state = self.lock();
        state.queue.warm = images.max(state.queue.warm);
        let now = self.now();
        self.release(state, now);
    }

    /// From now on batches have at most so many images: an engine failed with more.
    pub(super) fn limit_batches(&self, images: usize) {
        let mut state = self.lock();
        state.queue.largest = images.min(state.queue.largest);
    }

    /// Whether requests are accepted: not any more once a stop has begun.
    pub(super) fn is_open(&self) -> bool {
        self.lock().queue.phase == Phase::Open
    }

    /// Images in the largest batch that is run.
    pub(super) fn max_batch(&self) -> usize {
        self.lock().queue.max_batch(&self.options)
    }

    /// Records the largest difference of a logit between an image alone and in a batch, as a worker measured it.
    pub(super) fn differs(&self, max_abs_diff: f64) {
        let gauge = &self.metrics().invariance_max_abs_diff;
        // of a number and NaN, the larger is the number
        gauge.set(gauge.get().max(max_abs_diff));
    }

    /// Waits until all threads have ended, or until that moment; returns how many have not.
    pub(super) fn join(&self, until: Instant) -> usize {
        self.wait_for(Some(until), |state| (state.alive == 0).then_some(()));
        self.lock().alive
    }

    /// Waits until `found` returns something, asked again after each [`tell`]; `None` after `until`.
    fn wait_for<T>(&self, until: Option<Instant>, mut found: impl FnMut(&mut State) -> Option<T>) -> Option<T> {
        loop {
            let mut state = self.lock();
            let found = found(&mut state);
            if found.is_some() || until.is_some_and(|until| until <= self.now()) {
                return found;
            }
            state.waiting.push(self.system().current());
            drop(state);
            self.system().park(until);
        }
    }
}

/// Wakes the threads that wait for a report.
fn tell(mut state: MutexGuard<'_, State>) {
    let waiting = std::mem::take(&mut state.waiting);
    drop(state);
    waiting.into_iter().for_each(Waker::wake);
}

fn give_up(images: Vec<Pending>, reason: &InferError, now: Instant) {
    for pending in images {
        pending.answer(Err(reason.clone()), now);
    }
}

impl State {
    /// Marks sleepers for what there is to do, the last to fall asleep first, and returns their wakers.
    fn wake(&mut self, demand: Demand) -> Vec<Waker> {
        let Demand { mut batches, batch_at, memory_at, mut images, over } = demand;
        let mut serves = |able: &Able| {
            let wanted = [(able.runs, &mut batches), (able.prepares, &mut images)];
            wanted.into_iter().any(|(able, wanted)| {
                let serves = able && *wanted > 0;
                *wanted -= usize::from(serves);
                serves
            })
        };
        for sleeper in self.sleepers.iter().filter(|sleeper| sleeper.woken) {
            // on its way to do some of it
            serves(&sleeper.able);
        }
        let mut wakers = Vec::new();
        for sleeper in self.sleepers.iter_mut().rev().filter(|sleeper| !sleeper.woken) {
            if over || serves(&sleeper.able) {
                sleeper.woken = true;
                wakers.push(sleeper.waker.clone());
            }
        }
        let timed =
            |sleeper: &Sleeper, at| sleeper.able.runs && (sleeper.woken || sleeper.until.is_some_and(|u| u <= at));
        if let Some(at) = batch_at
            && !self.sleepers.iter().any(|sleeper| timed(sleeper, at))
            && let Some(sleeper) = self.sleepers.iter_mut().rev().find(|sleeper| sleeper.able.runs)
        {
            // no sleeper's timer is set for it
            sleeper.woken = true;
            wakers.push(sleeper.waker.clone());
        }
        let looks =
            |sleeper: &Sleeper, at| sleeper.able.prepares && (sleeper.woken || sleeper.until.is_some_and(|u| u <= at));
        if let Some(at) = memory_at
            && !self.sleepers.iter().any(|sleeper| looks(sleeper, at))
            && let Some(sleeper) = self.sleepers.iter_mut().rev().find(|sleeper| sleeper.able.prepares)
        {
            sleeper.woken = true;
            wakers.push(sleeper.waker.clone());
        }
        wakers
    }
}
