//! What waits for one model, in which order, and what a free thread takes from it.
//!
//! An image is in the house by its slot, which its queue entry owns: dropping the entry, wherever that happens, frees it.
//! No locks, no threads, no engines: the scheduler's.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::error::InferError;
use super::job::SchedulerOptions;
use super::request::{Input, Output};
use crate::metrics::{ModelMetrics, Outcome};

/// Images admitted and not yet answered, at most `limit`.
#[derive(Debug)]
pub(super) struct Slots {
    free: Arc<Semaphore>,
    pub(super) limit: usize,
    pub(super) metrics: ModelMetrics,
}

impl Slots {
    pub(super) fn new(limit: usize, metrics: ModelMetrics) -> Self {
        Self { free: Arc::new(Semaphore::new(limit)), limit, metrics }
    }

    /// Takes `count` slots or none.
    pub(super) fn take(self: &Arc<Self>, count: usize) -> Option<Vec<Slot>> {
        let mut permits = self.free.clone().try_acquire_many_owned(u32::try_from(count).ok()?).ok()?;
        let slot = |permit| {
            self.metrics.queue_depth.inc();
            Slot { slots: self.clone(), _permit: permit }
        };
        Some((0..count).filter_map(|_| permits.split(1)).map(slot).collect())
    }

    pub(super) fn used(&self) -> usize {
        self.limit.saturating_sub(self.free.available_permits())
    }
}

/// The right of one image to be in the house. Not `Clone`: released once, by drop.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Arc<Slots>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.metrics.queue_depth.dec();
    }
}

/// The scheduler's end of one admitted image.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) reply: Option<oneshot::Sender<Result<Output, InferError>>>,
    pub(super) slot: Option<Slot>,
    /// Its place in the queue: priority first, then the order of arrival.
    pub(super) place: (u32, u64),
    /// When it was admitted.
    pub(super) arrived: Instant,
    pub(super) deadline: Instant,
}

impl Pending {
    /// Answers and counts the image. It is counted before its slot is free, so that an empty house has counted all, and
    /// both before the caller can see the answer, so that a caller who sends its next image at once finds room.
    pub(super) fn answer(mut self, result: Result<Output, InferError>) {
        self.end(result);
    }

    fn end(&mut self, result: Result<Output, InferError>) {
        let (Some(slot), Some(reply)) = (self.slot.take(), self.reply.take()) else { return };
        let ended = match (&result, reply.is_closed()) {
            (Ok(_), false) => Outcome::Ok,
            (Err(error), false) => error.outcome(),
            (_, true) if self.deadline <= Instant::now() => Outcome::DeadlineExceeded,
            (_, true) => Outcome::Cancelled,
        };
        slot.slots.metrics.images(ended, 1);
        drop(slot);
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    Open,
    Closing,
    Aborted,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) phase: Phase,
    pub(super) raw: VecDeque<Entry>,
    /// Images that a thread is decoding right now.
    pub(super) decoding: usize,
    pub(super) ready: VecDeque<Prepared>,
    pub(super) sequence: u64,
    pub(super) engines: usize,
    pub(super) failures: u32,
    pub(super) running: Vec<Option<Instant>>,
    /// Engine time per image, and decode plus resize time per image: moving averages.
    pub(super) run_cost: Duration,
    pub(super) prepare_cost: Duration,
    /// When those whom nobody waits for were last removed.
    buried: Instant,
}

/// What there is for a free engine.
pub(super) enum Take {
    /// Images to run together; `alone`: nothing else is under way or waits, so that one may have every core.
    Batch {
        images: Vec<Prepared>,
        alone: bool,
    },
    /// Nothing before that moment: the oldest image may wait for company until then.
    At(Instant),
    Nothing,
}

impl State {
    pub(super) fn new(workers: usize) -> Self {
        Self {
            phase: Phase::Open,
            raw: VecDeque::new(),
            decoding: 0,
            ready: VecDeque::new(),
            sequence: 0,
            engines: 0,
            failures: 0,
            running: vec![None; workers],
            run_cost: Duration::ZERO,
            prepare_cost: Duration::ZERO,
            buried: Instant::now(),
        }
    }

    /// Puts an image to be decoded in its place.
    pub(super) fn push_raw(&mut self, entry: Entry) {
        let behind = self.raw.iter().rev().take_while(|e| e.pending.place > entry.pending.place).count();
        self.raw.insert(self.raw.len() - behind, entry);
    }

    /// Puts an image to be run in its place: decoding may finish out of order.
    pub(super) fn push_ready(&mut self, prepared: Prepared) {
        let behind = self.ready.iter().rev().take_while(|p| p.pending.place > prepared.pending.place).count();
        self.ready.insert(self.ready.len() - behind, prepared);
    }

    /// When the longest-waiting image came.
    pub(super) fn oldest(&self) -> Option<Instant> {
        let ready = self.ready.iter().map(|p| p.pending.arrived);
        self.raw.iter().map(|e| e.pending.arrived).chain(ready).min()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.raw.is_empty() && self.ready.is_empty() && self.decoding == 0
    }

    /// The next live image to decode.
    pub(super) fn take_raw(&mut self, now: Instant, options: &SchedulerOptions) -> Option<Entry> {
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
    pub(super) fn take_batch(&mut self, now: Instant, options: &SchedulerOptions) -> Take {
        let Some(oldest) = self.ready.iter().map(|p| p.pending.arrived).min() else { return Take::Nothing };
        let waits = !options.max_queue_delay.is_zero();
        let undecoded = if options.decoders == 0 { self.raw.len() + self.decoding } else { 0 };
        let waiting = self.ready.len() + undecoded;
        let share =
            if waits { options.max_batch } else { waiting.div_ceil(self.engines.max(1)).min(options.max_batch) };
        if self.ready.len() < share {
            if options.decoders == 0 && !self.raw.is_empty() {
                return Take::Nothing; // decode first, this thread can
            }
            let until = oldest + options.max_queue_delay;
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
        if batch.is_empty() {
            return Take::Nothing;
        }
        let alone = batch.len() == 1 && self.is_empty() && self.running.iter().all(Option::is_none);
        Take::Batch { images: batch, alone }
    }

    /// How long before its deadline an image is given up: under a backlog, work that would finish too late only makes
    /// the others late; without one, there is nothing to lose by trying.
    fn lead(&self, behind: usize, cost: Duration, options: &SchedulerOptions) -> Duration {
        if behind >= options.workers { cost } else { Duration::ZERO }
    }

    /// Removes images that nobody waits for, so that they keep neither room nor memory from others: at once if `full`,
    /// ten times a second otherwise.
    pub(super) fn bury(&mut self, now: Instant, full: bool) {
        if !full && now.saturating_duration_since(self.buried) < Duration::from_millis(100) {
            return;
        }
        self.buried = now;
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

    pub(super) fn answer_all(&mut self) {
        for entry in self.raw.drain(..) {
            entry.pending.answer(Err(InferError::ShuttingDown));
        }
        for prepared in self.ready.drain(..) {
            prepared.pending.answer(Err(InferError::ShuttingDown));
        }
    }

    /// How long `images` keep the threads busy, by the measured costs.
    pub(super) fn drain_time(&self, images: usize, options: &SchedulerOptions) -> Duration {
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
pub(super) fn smooth(average: Duration, value: Duration) -> Duration {
    if average.is_zero() { value } else { (average * 9 + value) / 10 }
}

/// Time stands still here but for where a test moves it: every decision takes the moment as an argument.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::infer::job::Invariance;
    use crate::metrics::Metrics;
    use crate::pixels::ImageLimits;

    const MS: Duration = Duration::from_millis(1);

    struct Stage {
        state: State,
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
                image_limits: ImageLimits::default(),
                jpeg_decoder: Default::default(),
                buckets: Vec::new(),
                invariance: Invariance::Off,
                one_by_one: false,
            };
            let mut state = State::new(2);
            (state.engines, state.run_cost) = (2, 10 * MS);
            let slots = Arc::new(Slots::new(options.queue_limit, Metrics::new().model("m", 1, "fake")));
            // long ago enough for every deadline of a test to be still to come by the clock
            Self { state, slots, options, start: Instant::now() + Duration::from_secs(3600), replies: Vec::new() }
        }

        fn at(&self, ms: u32) -> Instant {
            self.start + ms * MS
        }

        fn pending(&mut self, arrived: u32, deadline: u32, priority: u32) -> Pending {
            let (reply, receiver) = oneshot::channel();
            self.replies.push(receiver);
            self.state.sequence += 1;
            Pending {
                reply: Some(reply),
                slot: self.slots.take(1).and_then(|mut slots| slots.pop()),
                place: (priority, self.state.sequence),
                arrived: self.at(arrived),
                deadline: self.at(deadline),
            }
        }

        fn decoded(&mut self, arrived: u32, deadline: u32) {
            let pending = self.pending(arrived, deadline, 100);
            let prepared = Prepared { tensor: vec![], decode: Duration::ZERO, preprocess: Duration::ZERO, pending };
            self.state.push_ready(prepared);
        }

        fn encoded(&mut self, arrived: u32, deadline: u32, priority: u32) {
            let pending = self.pending(arrived, deadline, priority);
            self.state.push_raw(Entry { input: Input::Tensor(vec![]), pending });
        }

        /// Images that a free engine takes at that moment; the moment it is to come back instead.
        fn take(&mut self, ms: u32) -> Result<usize, Option<Instant>> {
            match self.state.take_batch(self.at(ms), &self.options) {
                Take::Batch { images, .. } => Ok(images.len()),
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
        stage.state.phase = Phase::Closing;
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
        assert_eq!(stage.state.ready.len(), 1);
    }

    #[test]
    fn priority_then_arrival() {
        let mut stage = Stage::new(1, Duration::ZERO);
        for (arrived, priority) in [(1, 100), (2, 300), (3, 1), (4, 100), (5, 1)] {
            stage.encoded(arrived, 10_000, priority);
        }
        let now = stage.at(6);
        let mut order = Vec::new();
        while let Some(entry) = stage.state.take_raw(now, &stage.options) {
            order.push((entry.pending.arrived - stage.start).as_millis());
        }
        assert_eq!(order, [3, 5, 1, 4, 2]);
    }

    #[test]
    fn the_dead_are_buried_ten_times_a_second_or_when_room_is_needed() {
        let mut stage = Stage::new(1, Duration::ZERO);
        stage.state.buried = stage.at(0);
        stage.encoded(0, 50, 100);
        stage.decoded(0, 50);
        stage.encoded(0, 500, 100);
        stage.state.bury(stage.at(49), true);
        assert_eq!(stage.slots.used(), 3, "nobody is dead");
        stage.state.bury(stage.at(99), false);
        assert_eq!(stage.slots.used(), 3, "there is room, and it was a moment ago");
        stage.state.bury(stage.at(149), false);
        assert_eq!(stage.slots.used(), 1);
        stage.replies.clear();
        stage.state.bury(stage.at(150), true);
        assert_eq!(stage.slots.used(), 0, "its client has gone");
    }

    #[test]
    fn the_wait_is_what_the_engines_need() {
        let mut stage = Stage::new(1, Duration::ZERO);
        assert_eq!(stage.state.drain_time(6, &stage.options), 30 * MS);
        stage.state.prepare_cost = 4 * MS;
        assert_eq!(stage.state.drain_time(6, &stage.options), 42 * MS, "the same threads decode");
        stage.options.decoders = 1;
        assert_eq!(stage.state.drain_time(6, &stage.options), 30 * MS, "others do, and are faster");
        assert_eq!(smooth(10 * MS, 20 * MS), 11 * MS);
    }
}
