//! What waits for one model, in which order, and what a free thread does next.
//!
//! Pure decisions: every one takes the moment as an argument. No locks, no threads, no engines (`shared` has them). An image
//! is admitted by its slot, which its queue entry owns: dropping the entry, wherever that happens, frees it. Images that are
//! given up gather in `given_up`, to be answered when the lock is released.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::admission::{Bounds, Speed, Standing};
use super::error::InferError;
use super::job::SchedulerOptions;
use super::request::{Class, Input, Output};
use crate::metrics::{ModelMetrics, Outcome};
use crate::pixels::{Claim, Share};

/// Images admitted and not yet answered, at most `limit`.
#[derive(Debug)]
pub(super) struct Slots {
    pub(super) limit: usize,
    pub(super) metrics: ModelMetrics,
    used: AtomicUsize,
    /// Of these, by images of other classes than the default one.
    used_by_others: AtomicUsize,
}

impl Slots {
    pub(super) fn new(limit: usize, metrics: ModelMetrics) -> Self {
        Self { limit, metrics, used: AtomicUsize::new(0), used_by_others: AtomicUsize::new(0) }
    }

    /// Most slots that images of this class have at once. A quarter is for those that name no priority.
    pub(super) fn limit_of(&self, class: Class) -> usize {
        match class {
            Class::Default => self.limit,
            Class::First | Class::Last => self.limit - self.limit / 4,
        }
    }

    /// Takes `count` slots or none.
    pub(super) fn take(self: &Arc<Self>, count: usize, class: Class) -> Option<Vec<Slot>> {
        let add = |counter: &AtomicUsize, limit: usize| {
            let sum = |used: usize| used.checked_add(count).filter(|&sum| sum <= limit);
            counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, sum).is_ok()
        };
        if class != Class::Default && !add(&self.used_by_others, self.limit_of(class)) {
            return None;
        }
        if !add(&self.used, self.limit) {
            if class != Class::Default {
                self.used_by_others.fetch_sub(count, Ordering::SeqCst);
            }
            return None;
        }
        self.metrics.queue_depth.add(count as i64);
        Some((0..count).map(|_| Slot { slots: self.clone(), class }).collect())
    }

    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::SeqCst)
    }

    /// Whether `count` more images of this class find no slots.
    pub(super) fn is_full(&self, count: usize, class: Class) -> bool {
        let others = class != Class::Default
            && self.used_by_others.load(Ordering::SeqCst).saturating_add(count) > self.limit_of(class);
        others || self.used().saturating_add(count) > self.limit
    }
}

/// The right of one image to wait and be computed. Not `Clone`: released once, by drop.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Arc<Slots>,
    class: Class,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.used.fetch_sub(1, Ordering::SeqCst);
        if self.class != Class::Default {
            self.slots.used_by_others.fetch_sub(1, Ordering::SeqCst);
        }
        self.slots.metrics.queue_depth.dec();
    }
}

/// The scheduler's end of one admitted image.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) reply: Option<oneshot::Sender<Result<Output, InferError>>>,
    pub(super) slot: Option<Slot>,
    pub(super) class: Class,
    /// Where it stands in its class: priority first, then the order of arrival.
    pub(super) rank: (u32, u64),
    /// When it was admitted.
    pub(super) arrived: Instant,
    pub(super) deadline: Instant,
}

impl Pending {
    /// Answers and counts the image. It is counted before its slot is free, so that an empty queue has counted all, and
    /// both before the caller can see the answer, so that a caller who sends its next image at once finds room.
    pub(super) fn answer(mut self, result: Result<Output, InferError>, now: Instant) {
        self.end(result, now >= self.deadline);
    }

    fn end(&mut self, result: Result<Output, InferError>, late: bool) {
        let (Some(slot), Some(reply)) = (self.slot.take(), self.reply.take()) else { return };
        let ended = match (&result, reply.is_closed()) {
            (Ok(_), false) => Outcome::Ok,
            (Err(error), false) => error.outcome(),
            (_, true) if late => Outcome::DeadlineExceeded,
            (_, true) => Outcome::Cancelled,
        };
        slot.slots.metrics.images(ended, 1);
        drop(slot);
        // an error means that the caller has gone since
        let _ = reply.send(result);
    }

    /// True when nobody waits for the answer, or nobody would when it came (`lead` from now).
    pub(super) fn is_expired(&self, now: Instant, lead: Duration) -> bool {
        self.deadline <= now + lead || self.reply.as_ref().is_none_or(oneshot::Sender::is_closed)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.end(Err(InferError::Internal("an image was dropped without an answer".into())), false);
    }
}

/// An image waiting to be decoded.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) input: Input,
    pub(super) pending: Pending,
    pub(super) memory: Memory,
}

/// Whether an image has the memory that it is decoded in.
#[derive(Debug)]
pub(super) enum Memory {
    /// Nobody has looked at its header yet.
    Unasked,
    /// It has.
    Held(Share),
}

/// An image for which there was no memory to decode it in.
#[derive(Debug)]
pub(super) struct Parked {
    pub(super) entry: Entry,
    pub(super) claim: Claim,
}

/// How often idle threads look whether there is memory for a parked image: it comes back from threads of any model.
const MEMORY_PAUSE: Duration = Duration::from_millis(5);

/// An image waiting for an engine.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) tensor: Vec<f32>,
    pub(super) decode: Duration,
    pub(super) preprocess: Duration,
    pub(super) pending: Pending,
}

/// What stands in a line.
pub(super) trait Queued {
    fn pending(&self) -> &Pending;
    fn into_pending(self) -> Pending;
}

impl Queued for Entry {
    fn pending(&self) -> &Pending {
        &self.pending
    }

    fn into_pending(self) -> Pending {
        self.pending
    }
}

impl Queued for Prepared {
    fn pending(&self) -> &Pending {
        &self.pending
    }

    fn into_pending(self) -> Pending {
        self.pending
    }
}

/// How many images of other classes may go while an image of this class waits: then it is due.
pub(super) const PATIENCE: [u32; Class::ALL.len()] = [0, 3, 14];

/// Images in the order in which they go: of each class by priority, then by arrival; of the classes the first that has
/// any, unless a later one is due. So whatever the others bring, one image in 4 is of the default class and one in 16 of
/// the last, as long as they have any.
#[derive(Debug)]
pub(super) struct Line<T> {
    classes: [BTreeMap<(u32, u64), T>; Class::ALL.len()],
    /// Images of other classes that went while this one had any waiting.
    passed: [u32; Class::ALL.len()],
}

impl<T: Queued> Line<T> {
    fn new() -> Self {
        Self { classes: Default::default(), passed: Default::default() }
    }

    pub(super) fn push(&mut self, item: T) {
        let Pending { class, rank, .. } = *item.pending();
        self.classes[class as usize].insert(rank, item);
    }

    pub(super) fn len(&self) -> usize {
        self.classes.iter().map(BTreeMap::len).sum()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.classes.iter().all(BTreeMap::is_empty)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Pending> {
        self.classes.iter().flat_map(BTreeMap::values).map(Queued::pending)
    }

    /// The class whose turn it is.
    fn class(&self) -> Option<usize> {
        let has = |&class: &usize| !self.classes[class].is_empty();
        let due = (1..self.classes.len()).find(|class| has(class) && self.passed[*class] >= PATIENCE[*class]);
        due.or_else(|| (0..self.classes.len()).find(has))
    }

    /// The next image for which `lead` (given how many are behind it) leaves time. The others are given up, and count for
    /// no class.
    fn pop(&mut self, now: Instant, lead: impl Fn(usize) -> Duration, given_up: &mut Vec<Pending>) -> Option<T> {
        loop {
            let class = self.class()?;
            let (_, item) = self.classes[class].pop_first()?;
            if item.pending().is_expired(now, lead(self.len())) {
                given_up.push(item.into_pending());
                continue;
            }
            for other in 0..self.classes.len() {
                let waits = other != class && !self.classes[other].is_empty();
                self.passed[other] = if waits { self.passed[other].saturating_add(1) } else { 0 };
            }
            return Some(item);
        }
    }

    /// Gives up all for which nobody waits; linear.
    fn evict(&mut self, now: Instant, given_up: &mut Vec<Pending>) {
        for class in &mut self.classes {
            let expired = |item: &T| item.pending().is_expired(now, Duration::ZERO);
            if class.values().any(expired) {
                let (gone, kept) = std::mem::take(class).into_iter().partition(|(_, item)| expired(item));
                let gone: BTreeMap<_, T> = gone;
                *class = kept;
                given_up.extend(gone.into_values().map(Queued::into_pending));
            }
        }
    }

    fn drain(&mut self) -> impl Iterator<Item = Pending> + use<T> {
        std::mem::take(&mut self.classes).into_iter().flat_map(BTreeMap::into_values).map(Queued::into_pending)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    Open,
    Closing,
    Aborted,
}

/// What the thread that asks is able to do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Able {
    /// The worker's number; none for a decoder.
    pub(super) worker: Option<usize>,
    /// Decodes.
    pub(super) prepares: bool,
    /// Has an engine.
    pub(super) runs: bool,
    /// When a worker without an engine tries to open one again.
    pub(super) reopen_at: Option<Instant>,
}

/// What a thread does next.
#[derive(Debug)]
pub(super) enum Task {
    /// Decode this.
    Prepare(Entry),
    /// Run these together; `alone`: nothing else is under way or waits, so that one may have every core.
    Run { images: Vec<Prepared>, alone: bool },
    /// Open an engine again.
    Reopen,
    /// End.
    Stop,
}

/// What is decided for a thread.
#[derive(Debug)]
pub(super) enum Step {
    Do(Task),
    /// Nothing until something changes, or until that moment.
    Sleep(Option<Instant>),
}

/// What there is for a free engine.
enum Take {
    Batch(Vec<Prepared>),
    /// Nothing before that moment: the oldest image may wait for others until then.
    At(Instant),
    Nothing,
}

/// What sleeping threads could do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Demand {
    /// Engines could start so many batches.
    pub(super) batches: usize,
    /// If none now, then at that moment.
    pub(super) batch_at: Option<Instant>,
    /// When to look whether parked images have memory.
    pub(super) memory_at: Option<Instant>,
    /// So many images could be decoded.
    pub(super) images: usize,
    /// Everybody is to end.
    pub(super) over: bool,
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) phase: Phase,
    pub(super) raw: Line<Entry>,
    /// Images that wait for memory to be decoded in; large ones get it in the order in which they asked.
    pub(super) parked: Vec<Parked>,
    /// Images that a thread is decoding right now.
    pub(super) decoding: usize,
    pub(super) ready: Line<Prepared>,
    /// Images for which nobody waits any more, or that can't be done; whoever holds the lock answers them after it.
    pub(super) given_up: Vec<Pending>,
    pub(super) sequence: u64,
    pub(super) engines: usize,
    pub(super) failures: u32,
    pub(super) running: Vec<Option<Instant>>,
    /// Engine time per image under load, and decode plus resize time per image: moving averages.
    pub(super) run_cost: Duration,
    pub(super) prepare_cost: Duration,
    /// How much longer images really take.
    speed: Speed,
    /// Whether the queue is more than a burst.
    standing: Standing,
    /// When expired images were last looked for.
    evicted: Instant,
}

impl Queue {
    pub(super) fn new(workers: usize, now: Instant) -> Self {
        Self {
            phase: Phase::Open,
            raw: Line::new(),
            parked: Vec::new(),
            decoding: 0,
            ready: Line::new(),
            given_up: Vec::new(),
            sequence: 0,
            engines: 0,
            failures: 0,
            running: vec![None; workers],
            run_cost: Duration::ZERO,
            prepare_cost: Duration::ZERO,
            speed: Speed::new(),
            standing: Standing::default(),
            evicted: now,
        }
    }

    /// Whether new images are taken.
    pub(super) fn accepts(&self) -> Result<(), InferError> {
        match (self.phase, self.engines) {
            (Phase::Closing | Phase::Aborted, _) => Err(InferError::ShuttingDown),
            (Phase::Open, 0) => Err(InferError::NotReady),
            (Phase::Open, _) => Ok(()),
        }
    }

    /// When the longest-waiting image came.
    pub(super) fn oldest(&self) -> Option<Instant> {
        let parked = self.parked.iter().map(|parked| &parked.entry.pending);
        self.raw.iter().chain(parked).chain(self.ready.iter()).map(|pending| pending.arrived).min()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.raw.is_empty() && self.parked.is_empty() && self.ready.is_empty() && self.decoding == 0
    }

    /// What a thread does next. Sleep is the answer only when nothing that is waiting could be done by it: an image that is
    /// given up on the way makes the queue another one, and all is asked again.
    pub(super) fn next(&mut self, able: Able, now: Instant, options: &SchedulerOptions) -> Step {
        loop {
            let given_up = self.given_up.len();
            if self.phase == Phase::Aborted {
                self.give_up_all();
                return Step::Do(Task::Stop);
            }
            let mut wake = able.reopen_at;
            if able.runs {
                match self.take_batch(now, options) {
                    Take::Batch(images) => {
                        let alone = images.len() == 1 && self.is_empty() && self.running.iter().all(Option::is_none);
                        if let Some(worker) = able.worker {
                            self.running[worker] = Some(now);
                        }
                        return Step::Do(Task::Run { images, alone });
                    }
                    Take::At(time) => wake = Some(time),
                    Take::Nothing => {}
                }
            }
            if able.reopen_at.is_some_and(|at| at <= now) {
                return Step::Do(Task::Reopen);
            }
            if able.prepares && self.room_ahead(options) > 0 {
                if let Some(entry) = self.take_parked(now).or_else(|| self.take_raw(now, options)) {
                    self.decoding += 1;
                    return Step::Do(Task::Prepare(entry));
                }
                if !self.parked.is_empty() {
                    let look = now + MEMORY_PAUSE;
                    wake = Some(wake.map_or(look, |at| at.min(look)));
                }
            }
            if self.phase == Phase::Closing {
                // without an engine nobody else may ever look
                self.evict(now);
                if self.is_empty() {
                    return Step::Do(Task::Stop);
                }
            }
            if self.given_up.len() == given_up {
                if able.runs {
                    self.speed.idle();
                }
                return Step::Sleep(wake);
            }
        }
    }

    /// Whether one more image may wait behind the `used` ones that are admitted and not yet answered. If not, nothing was
    /// changed but that the refusal is remembered.
    pub(super) fn admits(
        &mut self,
        used: usize,
        deadline: Instant,
        now: Instant,
        options: &SchedulerOptions,
    ) -> Result<(), InferError> {
        // not the queue's fault: an empty one couldn't meet it either
        if deadline <= now {
            return Err(InferError::DeadlineExceeded);
        }
        let wait = self.drain_time(used, options);
        let bounds = bounds(options);
        self.standing.look(wait, now, bounds);
        let few = used < 2 * options.workers;
        if !few && wait > self.standing.limit(now, bounds) {
            return Err(self.refuses(wait, now));
        }
        // with few before it, there is nothing to lose by trying
        let ended = if few { wait } else { self.drain_time(used + 1, options) };
        if now.checked_add(ended).is_some_and(|ended| ended <= deadline) { Ok(()) } else { Err(busy(wait)) }
    }

    /// The refusal of an image because of those before it.
    pub(super) fn refuses(&mut self, wait: Duration, now: Instant) -> InferError {
        self.standing.refuse(now);
        busy(wait)
    }

    /// So many images are admitted and not yet answered.
    pub(super) fn holds(&mut self, used: usize, now: Instant, options: &SchedulerOptions) {
        let wait = self.drain_time(used, options);
        self.standing.look(wait, now, bounds(options));
    }

    /// So many images leave the threads, well or badly.
    pub(super) fn leave(&mut self, images: usize, now: Instant, options: &SchedulerOptions) {
        let reckoned = self.reckoned(images, options);
        // an engine that may wait for more images is busy only if it has that
        let each = if options.max_queue_delay.is_zero() { 1 } else { options.max_batch };
        let waiting = self.raw.len() + self.ready.len() + self.decoding;
        self.speed.leave(images, reckoned, now, waiting >= each * self.engines.max(1));
    }

    /// An engine run of so many images cost so much an image. A run without a backlog is of few images: a full one costs no
    /// more an image, and takes no less time, so what is known is moved between these two.
    pub(super) fn ran(&mut self, images: usize, cost: Duration, options: &SchedulerOptions) {
        let least = cost * images as u32 / options.max_batch.max(images) as u32;
        let cost = if self.speed.is_busy() { cost } else { self.run_cost.clamp(least, cost) };
        self.run_cost = smooth(self.run_cost, cost);
    }

    /// What those could do who sleep.
    pub(super) fn demand(&self, now: Instant, options: &SchedulerOptions) -> Demand {
        let over = self.phase == Phase::Aborted || (self.phase == Phase::Closing && self.is_empty());
        let room = self.room_ahead(options);
        let images = self.raw.len().min(room);
        let memory_at = (room > 0 && !self.parked.is_empty()).then(|| now + MEMORY_PAUSE);
        let (batches, batch_at) = match self.due(now, options) {
            _ if self.ready.is_empty() => (0, None),
            Due::AfterDecoding => (0, None),
            Due::At(time) => (0, Some(time)),
            Due::Now { share } => (self.ready.len().div_ceil(share), None),
        };
        Demand { batches, batch_at, memory_at, images, over }
    }

    /// How many more images may be decoded before engines have run some: decoders stop when the engines are well fed, as a
    /// decoded image is far bigger than an encoded one. Workers that decode feed themselves.
    fn room_ahead(&self, options: &SchedulerOptions) -> usize {
        match options.decoders {
            0 => usize::MAX,
            _ => (2 * options.workers * options.max_batch).saturating_sub(self.ready.len() + self.decoding),
        }
    }

    /// The first parked image for which there is memory now.
    fn take_parked(&mut self, now: Instant) -> Option<Entry> {
        let mut at = 0;
        while let Some(parked) = self.parked.get_mut(at) {
            if parked.entry.pending.is_expired(now, Duration::ZERO) {
                self.given_up.push(self.parked.remove(at).entry.pending);
            } else if let Some(share) = parked.claim.try_take() {
                return Some(Entry { memory: Memory::Held(share), ..self.parked.remove(at).entry });
            } else {
                at += 1;
            }
        }
        None
    }

    /// The next live image to decode.
    fn take_raw(&mut self, now: Instant, options: &SchedulerOptions) -> Option<Entry> {
        let cost = self.run_cost + self.prepare_cost;
        self.raw.pop(now, |behind| lead(behind, cost, options), &mut self.given_up)
    }

    /// When an engine runs what is ready.
    fn due(&self, now: Instant, options: &SchedulerOptions) -> Due {
        let waits = !options.max_queue_delay.is_zero();
        let undecoded = if options.decoders == 0 { self.raw.len() + self.decoding } else { 0 };
        let waiting = self.ready.len() + undecoded;
        let share =
            if waits { options.max_batch } else { waiting.div_ceil(self.engines.max(1)).min(options.max_batch) };
        if self.ready.len() < share {
            if options.decoders == 0 && !self.raw.is_empty() {
                return Due::AfterDecoding;
            }
            if waits && self.phase == Phase::Open {
                let oldest = self.ready.iter().map(|pending| pending.arrived).min();
                if let Some(until) = oldest.map(|oldest| oldest + options.max_queue_delay).filter(|&until| now < until)
                {
                    return Due::At(until);
                }
            }
        }
        Due::Now { share: share.max(1) }
    }

    /// What a free engine runs now: its fair share of what waits, so that a burst on an idle machine spreads over all
    /// engines and batches grow only with the queue.
    fn take_batch(&mut self, now: Instant, options: &SchedulerOptions) -> Take {
        if !options.max_queue_delay.is_zero() {
            // nobody waits for images that have gone
            self.ready.evict(now, &mut self.given_up);
        }
        if self.ready.is_empty() {
            return Take::Nothing;
        }
        let share = match self.due(now, options) {
            // this thread can
            Due::AfterDecoding => return Take::Nothing,
            Due::At(time) => return Take::At(time),
            Due::Now { share } => share,
        };
        let mut batch = Vec::with_capacity(share);
        let (undecoded, cost) = (self.raw.len(), self.run_cost);
        while batch.len() < share
            && let Some(prepared) =
                self.ready.pop(now, |behind| lead(behind + undecoded, cost, options), &mut self.given_up)
        {
            batch.push(prepared);
        }
        if batch.is_empty() { Take::Nothing } else { Take::Batch(batch) }
    }

    /// Whether expired images are to be looked for: at once if there is no room without, ten times a second otherwise.
    pub(super) fn evicts(&self, now: Instant, full: bool) -> bool {
        full || now.saturating_duration_since(self.evicted) >= Duration::from_millis(100)
    }

    /// Gives up images that nobody waits for, so that they keep neither room nor memory from others.
    pub(super) fn evict(&mut self, now: Instant) {
        self.evicted = now;
        self.raw.evict(now, &mut self.given_up);
        let expired = self.parked.extract_if(.., |parked| parked.entry.pending.is_expired(now, Duration::ZERO));
        self.given_up.extend(expired.map(|parked| parked.entry.pending));
        self.ready.evict(now, &mut self.given_up);
    }

    /// Gives up all that waits.
    pub(super) fn give_up_all(&mut self) {
        self.given_up.extend(self.raw.drain());
        self.given_up.extend(self.parked.drain(..).map(|parked| parked.entry.pending));
        self.given_up.extend(self.ready.drain());
    }

    /// What images are told that were given up.
    pub(super) fn reason(&self) -> InferError {
        if self.phase == Phase::Aborted { InferError::ShuttingDown } else { InferError::DeadlineExceeded }
    }

    /// How long `images` keep the threads busy, by the measured speed.
    pub(super) fn drain_time(&self, images: usize, options: &SchedulerOptions) -> Duration {
        let seconds = self.reckoned(images, options).as_secs_f64() * self.speed.factor();
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// The same by what its parts cost.
    fn reckoned(&self, images: usize, options: &SchedulerOptions) -> Duration {
        let engines = self.engines.max(1) as f64;
        let (run, prepare) = (self.run_cost.as_secs_f64(), self.prepare_cost.as_secs_f64());
        let each = match options.decoders {
            0 => (run + prepare) / engines,
            decoders => (run / engines).max(prepare / decoders as f64),
        };
        Duration::try_from_secs_f64(each * images as f64).unwrap_or(Duration::MAX)
    }
}

fn bounds(options: &SchedulerOptions) -> Bounds {
    Bounds { standing: options.standing_wait, burst: options.max_queue_wait }
}

fn busy(wait: Duration) -> InferError {
    InferError::Overloaded { retry_after: wait.clamp(Duration::from_millis(100), Duration::from_secs(60)) }
}

/// When what is ready is run.
enum Due {
    /// Threads that could run it decode first.
    AfterDecoding,
    At(Instant),
    /// In batches of so many.
    Now {
        share: usize,
    },
}

/// How long before its deadline an image is given up: under a backlog, work that would finish too late only makes the others
/// late; without one, there is nothing to lose by trying.
fn lead(behind: usize, cost: Duration, options: &SchedulerOptions) -> Duration {
    if behind >= options.workers { cost } else { Duration::ZERO }
}

/// Moving average over about ten values.
pub(super) fn smooth(average: Duration, value: Duration) -> Duration {
    if average.is_zero() { value } else { (average * 9 + value) / 10 }
}

/// Time stands still here but for where a test moves it: every decision takes the moment as an argument.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::infer::job::Invariance;
    use crate::metrics::Metrics;
    use crate::pixels::{DecodeMemory, Decoder};

    const MS: Duration = Duration::from_millis(1);

    struct Stage {
        queue: Queue,
        slots: Arc<Slots>,
        options: SchedulerOptions,
        start: Instant,
        replies: Vec<oneshot::Receiver<Result<Output, InferError>>>,
    }

    impl Stage {
        /// Two warm engines that take 10 ms an image.
        fn new(max_batch: usize, max_queue_delay: Duration) -> Self {
            let options = SchedulerOptions {
                workers: 2,
                decoders: 0,
                max_batch,
                max_queue_delay,
                queue_limit: 8,
                max_queue_wait: 1000 * MS,
                standing_wait: 100 * MS,
                decoder: Decoder::default(),
                decode_memory: DecodeMemory::new(DecodeMemory::DEFAULT),
                buckets: Vec::new(),
                invariance: Invariance::Off,
                one_by_one: false,
            };
            let mut queue = Queue::new(2, Instant::now());
            (queue.engines, queue.run_cost) = (2, 10 * MS);
            let slots = Arc::new(Slots::new(options.queue_limit, Metrics::new().model("m", 1, "fake")));
            // long ago enough for every deadline of a test to be still to come by the clock
            Self { queue, slots, options, start: Instant::now() + Duration::from_secs(3600), replies: Vec::new() }
        }

        fn at(&self, ms: u32) -> Instant {
            self.start + ms * MS
        }

        fn pending(&mut self, arrived: u32, deadline: u32, priority: u32) -> Pending {
            let (reply, receiver) = oneshot::channel();
            self.replies.push(receiver);
            self.queue.sequence += 1;
            Pending {
                reply: Some(reply),
                slot: self.slots.take(1, Class::of(priority)).and_then(|mut slots| slots.pop()),
                class: Class::of(priority),
                rank: (priority, self.queue.sequence),
                arrived: self.at(arrived),
                deadline: self.at(deadline),
            }
        }

        fn decoded(&mut self, arrived: u32, deadline: u32) {
            let pending = self.pending(arrived, deadline, 100);
            let prepared = Prepared { tensor: vec![], decode: Duration::ZERO, preprocess: Duration::ZERO, pending };
            self.queue.ready.push(prepared);
        }

        fn encoded(&mut self, arrived: u32, deadline: u32, priority: u32) {
            let pending = self.pending(arrived, deadline, priority);
            self.queue.raw.push(Entry { input: Input::Tensor(vec![]), pending, memory: Memory::Unasked });
        }

        /// Answers what was given up.
        fn answer(&mut self, ms: u32) {
            let (now, reason) = (self.at(ms), self.queue.reason());
            self.queue.given_up.drain(..).for_each(|pending| pending.answer(Err(reason.clone()), now));
        }

        fn evict(&mut self, ms: u32, full: bool) {
            if self.queue.evicts(self.at(ms), full) {
                self.queue.evict(self.at(ms));
            }
            self.answer(ms);
        }

        /// Images that a free engine takes at that moment; the moment it is to come back instead.
        fn take(&mut self, ms: u32) -> Result<usize, Option<Instant>> {
            let taken = self.queue.take_batch(self.at(ms), &self.options);
            self.answer(ms);
            match taken {
                Take::Batch(images) => Ok(images.len()),
                Take::At(time) => Err(Some(time)),
                Take::Nothing => Err(None),
            }
        }
    }

    #[test]
    fn a_batch_waits_for_company_from_its_oldest_image_on() {
        let mut stage = Stage::new(3, 20 * MS);
        stage.decoded(5, 10_000);
        assert_eq!(stage.take(6), Err(Some(stage.at(25))));
        stage.decoded(24, 10_000);
        assert_eq!(stage.take(24), Err(Some(stage.at(25))), "who comes later does not put it off");
        assert_eq!(stage.take(25), Ok(2));
        for arrived in [30, 31, 32, 33] {
            stage.decoded(arrived, 10_000);
        }
        assert_eq!(stage.take(33), Ok(3), "a full batch goes at once");
        assert_eq!(stage.take(33), Err(Some(stage.at(53))));
        stage.queue.phase = Phase::Closing;
        assert_eq!(stage.take(34), Ok(1), "nobody comes any more");
    }

    #[test]
    fn without_a_delay_an_engine_takes_its_share_at_once() {
        let mut stage = Stage::new(8, Duration::ZERO);
        for _ in 0..5 {
            stage.decoded(0, 10_000);
        }
        assert_eq!((stage.take(0), stage.take(0), stage.take(0)), (Ok(3), Ok(1), Ok(1)));
        assert_eq!(stage.take(0), Err(None));
    }

    #[test]
    fn what_would_end_too_late_is_given_up_only_under_a_backlog() {
        let mut stage = Stage::new(1, Duration::ZERO);
        // 5 ms are left and a run takes 10
        stage.decoded(0, 100);
        assert_eq!(stage.take(95), Ok(1), "with nobody behind it, there is nothing to lose");
        for deadline in [100, 10_000, 10_000] {
            stage.decoded(0, deadline);
        }
        assert_eq!(stage.take(95), Ok(1));
        let answers: Vec<_> = stage.replies.iter_mut().map(|reply| reply.try_recv()).collect();
        assert!(matches!(answers[1], Ok(Err(InferError::DeadlineExceeded))), "{answers:?}");
        assert_eq!(stage.queue.ready.len(), 1);
        // 20 ms are left, decoding takes 20 and a run 10
        stage.queue.prepare_cost = 20 * MS;
        for deadline in [100, 10_000, 10_000] {
            stage.encoded(0, deadline, 100);
        }
        let entry = stage.queue.take_raw(stage.start + 80 * MS, &stage.options).expect("two are in time");
        assert_eq!(entry.pending.deadline, stage.at(10_000));
        stage.answer(80);
    }

    #[test]
    fn priority_then_arrival() {
        let mut stage = Stage::new(1, Duration::ZERO);
        for (arrived, priority) in [(1, 100), (2, 300), (3, 1), (4, 100), (5, 1)] {
            stage.encoded(arrived, 10_000, priority);
        }
        let now = stage.at(6);
        let mut order = Vec::new();
        while let Some(entry) = stage.queue.take_raw(now, &stage.options) {
            order.push((entry.pending.arrived - stage.start).as_millis());
        }
        assert_eq!(order, [3, 5, 1, 4, 2], "one in four is of the default class, but there are only two before it");
    }

    #[test]
    fn the_expired_are_evicted_ten_times_a_second_or_when_room_is_needed() {
        let mut stage = Stage::new(1, Duration::ZERO);
        stage.queue.evicted = stage.at(0);
        stage.encoded(0, 50, 100);
        stage.decoded(0, 50);
        stage.encoded(0, 500, 100);
        stage.evict(49, true);
        assert_eq!(stage.slots.used(), 3, "nobody has left");
        stage.evict(99, false);
        assert_eq!(stage.slots.used(), 3, "there is room, and it was a moment ago");
        stage.evict(149, false);
        assert_eq!(stage.slots.used(), 1);
        stage.replies.clear();
        stage.evict(150, true);
        assert_eq!(stage.slots.used(), 0, "its client has gone");
    }

    #[test]
    fn the_wait_is_what_the_engines_need() {
        let mut stage = Stage::new(1, Duration::ZERO);
        assert_eq!(stage.queue.drain_time(6, &stage.options), 30 * MS);
        stage.queue.prepare_cost = 4 * MS;
        assert_eq!(stage.queue.drain_time(6, &stage.options), 42 * MS, "the same threads decode");
        stage.options.decoders = 1;
        assert_eq!(stage.queue.drain_time(6, &stage.options), 30 * MS, "others do, and are faster");
        stage.queue.prepare_cost = 40 * MS;
        assert_eq!(stage.queue.drain_time(6, &stage.options), 240 * MS, "others do, and are slower");
        for ms in (0..=1000).step_by(10) {
            let now = stage.at(ms);
            stage.queue.speed.leave(1, 5 * MS, now, true);
        }
        let wait = stage.queue.drain_time(6, &stage.options).as_millis();
        assert!((470..=490).contains(&wait), "images leave half as fast as their parts say: {wait}");
        assert_eq!(smooth(10 * MS, 20 * MS), 11 * MS);
    }

    /// Single images on an idle machine say little of batches, but not nothing.
    #[test]
    fn runs_without_a_backlog_move_the_cost_only_as_far_as_they_show() {
        let mut stage = Stage::new(4, Duration::ZERO);
        let mut after = |images, cost: u32| {
            (0..100).for_each(|_| stage.queue.ran(images, cost * MS, &stage.options));
            stage.queue.run_cost.as_millis()
        };
        assert_eq!(after(1, 30), 10, "a batch of four may take 40");
        assert!((18..=20).contains(&after(1, 80)), "it takes no less than 80");
        assert!((19..=20).contains(&after(2, 40)));
        assert!((3..=4).contains(&after(1, 3)), "nor more than 3 an image");
        // under a backlog a run is what it is
        let now = stage.at(0);
        (0..2).for_each(|_| stage.decoded(0, 10_000));
        stage.queue.leave(1, now, &stage.options);
        (0..100).for_each(|_| stage.queue.ran(1, 30 * MS, &stage.options));
        assert!((29..=30).contains(&stage.queue.run_cost.as_millis()));
    }

    #[test]
    fn an_image_has_all_cores_only_if_nothing_else_is_there() {
        let runs = |stage: &mut Stage| {
            let able = Able { worker: Some(0), prepares: false, runs: true, reopen_at: None };
            match stage.queue.next(able, stage.start, &stage.options) {
                Step::Do(Task::Run { images, alone }) => Some((images.len(), alone)),
                _ => None,
            }
        };
        let mut stage = Stage::new(1, Duration::ZERO);
        stage.decoded(0, 10_000);
        assert_eq!(runs(&mut stage), Some((1, true)));
        // now that worker is busy, for all that others know
        stage.decoded(0, 10_000);
        stage.queue.running = vec![None, Some(stage.start)];
        assert_eq!(runs(&mut stage), Some((1, false)), "another engine runs");
        stage.queue.running = vec![None, None];
        stage.decoded(0, 10_000);
        stage.decoded(0, 10_000);
        assert_eq!(runs(&mut stage), Some((1, false)), "another image waits");
        assert_eq!(runs(&mut stage), Some((1, false)), "its own last run is not over");
    }

    #[test]
    fn as_many_are_wanted_as_there_is_work_for() {
        let mut stage = Stage::new(1, Duration::ZERO);
        (0..3).for_each(|_| stage.encoded(0, 10_000, 100));
        let images = |stage: &Stage| stage.queue.demand(stage.start, &stage.options).images;
        assert_eq!(images(&stage), 3);
        // with decoders, no more than the engines want next
        stage.options.decoders = 2;
        assert_eq!(images(&stage), 3, "of four: two for each engine");
        stage.queue.decoding = 2;
        assert_eq!(images(&stage), 2);
        stage.decoded(0, 10_000);
        assert_eq!(images(&stage), 1);
        stage.queue.decoding = 0;
    }

    #[test]
    fn a_deadline_is_the_moment_at_which_nobody_waits_any_more() {
        let mut stage = Stage::new(1, Duration::ZERO);
        let image = stage.pending(0, 50, 100);
        assert!(!image.is_expired(stage.at(49), Duration::ZERO) && image.is_expired(stage.at(50), Duration::ZERO));
        assert!(!image.is_expired(stage.at(39), 10 * MS) && image.is_expired(stage.at(40), 10 * MS));
    }

    #[test]
    fn who_may_wait() {
        let mut stage = Stage::new(1, Duration::ZERO);
        let mut admits = |used, deadline, ms| {
            stage.queue.admits(used, stage.start + deadline * MS, stage.start + ms * MS, &stage.options).is_ok()
        };
        // two engines, 10 ms an image: 5 ms for each that waits
        assert!(admits(0, 1, 0) && admits(3, 15, 0), "few are before it, and it may be tried");
        assert!(!admits(3, 14, 0));
        assert!(admits(4, 25, 0) && !admits(4, 24, 0), "it is to be answered by then, not taken");
        assert!(admits(200, 10_000, 0), "a burst of a second");
        assert!(!admits(201, 10_000, 0));
        assert!(admits(20, 10_000, 600) && !admits(21, 10_000, 600), "it has stood for half a second");
        assert!(admits(3, 10_000, 600), "as always");
        let late = stage.queue.admits(0, stage.start, stage.start, &stage.options);
        assert!(matches!(late, Err(InferError::DeadlineExceeded)), "an idle server isn't busy: {late:?}");
    }

    /// Whoever floods, and with whatever priority, every class gets on as the documentation says.
    #[test]
    fn a_flood_leaves_the_other_classes_their_share() {
        use proptest::prelude::*;
        let priority = || prop_oneof![Just(1_u32), 1..=99_u32, Just(100), 101..=1000_u32];
        let config = ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() };
        proptest!(config, |(arrivals in prop::collection::vec(priority(), 20..200), flood in priority())| {
            let mut stage = Stage::new(1, Duration::ZERO);
            stage.slots = Arc::new(Slots::new(10_000, Metrics::new().model("m", 1, "fake")));
            for (i, &priority) in arrivals.iter().enumerate() {
                stage.encoded(i as u32, 100_000, priority);
            }
            let now = stage.at(1000);
            let mut waited = [0_usize; Class::ALL.len()];
            let mut gone: Vec<(u32, u64)> = Vec::new();
            while gone.len() < 200 {
                // there is always one more of the flood
                stage.encoded(900, 100_000, flood);
                let lines = |class: Class| !stage.queue.raw.classes[class as usize].is_empty();
                let waiting = Class::ALL.map(lines);
                let Some(entry) = stage.queue.take_raw(now, &stage.options) else { break };
                let class = entry.pending.class as usize;
                for other in 0..waiting.len() {
                    waited[other] = if waiting[other] && other != class { waited[other] + 1 } else { 0 };
                }
                prop_assert!(waited[Class::Default as usize] < 4, "one in 4 is of the default class");
                prop_assert!(waited[Class::Last as usize] < 16, "one in 16 is of the last class");
                prop_assert!(waited[Class::First as usize] < 3, "the first class goes first otherwise");
                gone.push(entry.pending.rank);
                entry.pending.answer(Err(InferError::ShuttingDown), now);
            }
            for class in Class::ALL {
                let of = |&&(priority, _): &&(u32, u64)| Class::of(priority) == class && priority != flood;
                let taken: Vec<_> = gone.iter().filter(of).collect();
                prop_assert!(taken.is_sorted(), "{:?}: by priority, then by arrival: {:?}", class, taken);
            }
        });
    }

    #[test]
    fn a_quarter_of_the_slots_is_for_those_who_name_no_priority() {
        let stage = Stage::new(1, Duration::ZERO);
        let take = |count, class| stage.slots.take(count, class);
        assert!(take(7, Class::First).is_none(), "of 8");
        let first = take(5, Class::First).expect("room");
        let last = take(1, Class::Last).expect("room");
        assert!(take(1, Class::First).is_none() && take(1, Class::Last).is_none());
        assert!(stage.slots.is_full(1, Class::Last) && !stage.slots.is_full(2, Class::Default));
        let default = take(2, Class::Default).expect("it is kept for them");
        assert!(take(1, Class::Default).is_none());
        assert_eq!(stage.slots.used(), 8);
        drop((first, last, default));
        assert_eq!(stage.slots.used(), 0);
        assert_eq!(take(8, Class::Default).map(|slots| slots.len()), Some(8));
        assert!(take(6, Class::Last).is_some(), "all is given back");
    }

    /// Taken out one by one from the middle of a vector, these would take minutes.
    #[test]
    fn a_million_images_expire_in_no_time() {
        let mut stage = Stage::new(1, Duration::ZERO);
        stage.slots = Arc::new(Slots::new(1_000_000, Metrics::new().model("m", 1, "fake")));
        for i in 0..1_000_000 {
            stage.encoded(0, if i % 2 == 0 { 10 } else { 1000 }, if i % 3 == 0 { 1 } else { 100 });
        }
        let started = Instant::now();
        stage.queue.evict(stage.at(500));
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
        stage.answer(500);
        assert_eq!((stage.queue.raw.len(), stage.slots.used()), (500_000, 500_000));
    }

    /// The lost wake-up of version 0.1: the only image to decode has expired, and a thread with something to run slept.
    #[test]
    fn a_thread_looks_again_after_it_gave_up_images() {
        let mut stage = Stage::new(8, Duration::ZERO);
        let able = Able { worker: Some(0), prepares: true, runs: true, reopen_at: None };
        stage.queue.engines = 1;
        stage.decoded(0, 10_000);
        stage.encoded(0, 5, 100);
        let step = stage.queue.next(able, stage.at(6), &stage.options);
        assert!(matches!(&step, Step::Do(Task::Run { images, alone: true }) if images.len() == 1), "{step:?}");
        // the same with the roles exchanged
        stage.decoded(6, 7);
        stage.encoded(6, 10_000, 100);
        stage.options.decoders = 1;
        let step = stage.queue.next(able, stage.at(8), &stage.options);
        assert!(matches!(&step, Step::Do(Task::Prepare(_))), "{step:?}");
    }
}
