//! The queue of one model: what a free thread does next.
//!
//! Pure decisions: each takes the current time as an argument. No locks, no threads, no engines (`shared` has them).
//! Images wait in two [`Line`]s, encoded and decoded; `estimate` says how long they take, `admission` whether one more
//! may wait. Expired images are collected in `given_up`, to be answered when the lock is released.

use std::time::{Duration, Instant};

use super::admission::Standing;
use super::error::InferError;
use super::estimate::Estimate;
use super::job::SchedulerOptions;
use super::line::{Entry, Line, Memory, Parked, Prepared};
use super::pending::Pending;

/// How often idle threads try to claim memory for a parked image: threads of any model may release it.
const MEMORY_PAUSE: Duration = Duration::from_millis(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    Open,
    Closing,
    Aborted,
}

/// What the asking thread can do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Able {
    /// The worker's number; `None` for a decoder.
    pub(super) worker: Option<usize>,
    /// Whether it decodes.
    pub(super) prepares: bool,
    /// Whether it has an engine.
    pub(super) runs: bool,
    /// When a worker without an engine tries to reopen it.
    pub(super) reopen_at: Option<Instant>,
    /// Whether its engine's warm-up goes on when nothing else is to do.
    pub(super) warms_up: bool,
}

/// What a thread does next.
#[derive(Debug)]
pub(super) enum Task {
    /// Decode this image.
    Prepare(Entry),
    /// Run these images as a batch; `alone`: nothing else runs or waits, so that the run may use every core.
    Run { images: Vec<Prepared>, alone: bool },
    /// Reopen the engine.
    Reopen,
    /// Go on with the warm-up.
    WarmUp,
    /// End.
    Stop,
}

/// The decision for a thread.
#[derive(Debug)]
pub(super) enum Step {
    Do(Task),
    /// Sleep until something changes, or until that moment.
    Sleep(Option<Instant>),
}

/// What a free engine runs.
enum Chosen {
    Batch(Vec<Prepared>),
    /// Nothing before that moment: until then the oldest image may wait for others.
    At(Instant),
    Nothing,
}

/// What sleeping threads could do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Demand {
    /// Batches that engines could start.
    pub(super) batches: usize,
    /// If none now, when the next one could start.
    pub(super) batch_at: Option<Instant>,
    /// When to check whether parked images can have memory.
    pub(super) memory_at: Option<Instant>,
    /// Images that could be decoded.
    pub(super) images: usize,
    /// Whether all threads are to end.
    pub(super) over: bool,
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) phase: Phase,
    pub(super) raw: Line<Entry>,
    /// Images that wait for decode memory; large ones get it in the order in which they asked.
    pub(super) parked: Vec<Parked>,
    /// Images that threads are decoding now.
    pub(super) decoding: usize,
    pub(super) ready: Line<Prepared>,
    /// Images that expired or can't be computed. They are answered once the lock is released.
    pub(super) given_up: Vec<Pending>,
    pub(super) sequence: u64,
    pub(super) engines: usize,
    /// Images in the largest batch that is warm.
    pub(super) warm: usize,
    /// Images in the largest batch that no engine failed with.
    pub(super) largest: usize,
    pub(super) failures: u32,
    pub(super) running: Vec<Option<Instant>>,
    /// How long images take.
    pub(super) estimate: Estimate,
    /// Whether the queue is more than a burst.
    standing: Standing,
    /// When expired images were last evicted.
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
            warm: usize::MAX,
            largest: usize::MAX,
            failures: 0,
            running: vec![None; workers],
            estimate: Estimate::new(),
            standing: Standing::default(),
            evicted: now,
        }
    }

    /// Fails unless new images are admitted.
    pub(super) fn accepts(&self) -> Result<(), InferError> {
        match (self.phase, self.engines) {
            (Phase::Closing | Phase::Aborted, _) => Err(InferError::ShuttingDown),
            (Phase::Open, 0) => Err(InferError::NotReady),
            (Phase::Open, _) => Ok(()),
        }
    }

    /// When the longest-waiting image arrived.
    pub(super) fn oldest(&self) -> Option<Instant> {
        let parked = self.parked.iter().map(|parked| &parked.entry.pending);
        self.raw.iter().chain(parked).chain(self.ready.iter()).map(|pending| pending.arrived).min()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.raw.is_empty() && self.parked.is_empty() && self.ready.is_empty() && self.decoding == 0
    }

    /// What a thread does next. It sleeps only if it can do nothing of what waits: if an image expired on the way, the
    /// queue has changed, and everything is checked again.
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
                    Chosen::Batch(images) => {
                        let alone = images.len() == 1 && self.is_empty() && self.running.iter().all(Option::is_none);
                        if let Some(worker) = able.worker {
                            self.running[worker] = Some(now);
                        }
                        return Step::Do(Task::Run { images, alone });
                    }
                    Chosen::At(time) => wake = Some(time),
                    Chosen::Nothing => {}
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
                // without an engine, no other thread may ever evict
                self.evict(now);
                if self.is_empty() {
                    return Step::Do(Task::Stop);
                }
            }
            if self.given_up.len() == given_up {
                if able.runs {
                    self.estimate.idle();
                }
                // a batch that is due at a moment does not wait for a run that answers nobody; the thread comes back then
                if able.warms_up && wake.is_none() && self.phase == Phase::Open {
                    return Step::Do(Task::WarmUp);
                }
                return Step::Sleep(wake);
            }
        }
    }

    /// Most images in a batch now.
    pub(super) fn max_batch(&self, options: &SchedulerOptions) -> usize {
        options.max_batch.min(self.warm).min(self.largest)
    }

    /// How long `images` images keep the threads busy, by the measured speed.
    fn drain_time(&self, images: usize, options: &SchedulerOptions) -> Duration {
        self.estimate.drain_time(images, self.engines, options)
    }

    /// Whether one more image may wait behind the `used` ones that are admitted and not yet answered.
    pub(super) fn admits(
        &mut self,
        used: usize,
        deadline: Instant,
        now: Instant,
        options: &SchedulerOptions,
    ) -> Result<(), InferError> {
        let drain_time = |images| self.estimate.drain_time(images, self.engines, options);
        self.standing.admits(used, deadline, now, drain_time, options)
    }

    /// The refusal of an image because of the `used` ones before it.
    pub(super) fn refuse(&mut self, used: usize, now: Instant, options: &SchedulerOptions) -> InferError {
        let wait = self.drain_time(used, options);
        self.standing.refuse(wait, now)
    }

    /// Records that `used` images are admitted and not yet answered.
    pub(super) fn holds(&mut self, used: usize, now: Instant, options: &SchedulerOptions) {
        let wait = self.drain_time(used, options);
        self.standing.holds(wait, now, options);
    }

    /// Records that a thread ends decoding an image, which took `took`; nothing is left of one that failed.
    pub(super) fn prepared(&mut self, prepared: Option<Prepared>, took: Duration) {
        self.decoding -= 1;
        // a failed image says nothing about costs and speed
        if let Some(prepared) = prepared {
            if took > Duration::ZERO {
                self.estimate.prepared(took);
            }
            self.ready.push(prepared);
        }
    }

    /// Records that an engine run of `images` images ended, successfully or not (`ok`), and took `cost` for each image, if that is
    /// typical. The images of a larger batch that failed are run again, one by one.
    pub(super) fn ran(
        &mut self,
        images: usize,
        ok: bool,
        cost: Option<Duration>,
        now: Instant,
        options: &SchedulerOptions,
    ) {
        if ok || images == 1 {
            if let Some(cost) = cost.filter(|_| ok) {
                self.estimate.ran(images, cost, options);
            }
            self.leave(images, now, options);
        }
        self.failures = if ok { 0 } else { self.failures.saturating_add(1) };
    }

    /// Records that `images` images leave the threads, answered or not.
    pub(super) fn leave(&mut self, images: usize, now: Instant, options: &SchedulerOptions) {
        // an engine that may wait for more images is busy only if a full batch waits
        let each = if options.max_queue_delay.is_zero() { 1 } else { self.max_batch(options) };
        let waiting = self.raw.len() + self.ready.len() + self.decoding;
        self.estimate.leave(images, self.engines, waiting >= each * self.engines.max(1), now, options);
    }

    /// What the sleeping threads could do.
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

    /// How many more images may be decoded before engines run some. Decoders stop when enough images are ready, as a
    /// decoded image is far larger than an encoded one; workers that decode have no such limit.
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

    /// The next image to decode that has not expired.
    fn take_raw(&mut self, now: Instant, options: &SchedulerOptions) -> Option<Entry> {
        self.raw.pop(now, |behind| self.estimate.decode_lead(behind, options), &mut self.given_up)
    }

    /// When an engine runs what is ready.
    fn due(&self, now: Instant, options: &SchedulerOptions) -> Due {
        let waits = !options.max_queue_delay.is_zero();
        let undecoded = if options.decoders == 0 { self.raw.len() + self.decoding } else { 0 };
        let waiting = self.ready.len() + undecoded;
        let most = self.max_batch(options);
        let share = if waits { most } else { waiting.div_ceil(self.engines.max(1)).min(most) };
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

    /// What a free engine runs now: an equal share of what waits, so that a burst on an idle machine spreads over all
    /// engines, and batches grow only with the queue.
    fn take_batch(&mut self, now: Instant, options: &SchedulerOptions) -> Chosen {
        if !options.max_queue_delay.is_zero() {
            // a batch does not wait for expired images
            self.ready.evict(now, &mut self.given_up);
        }
        if self.ready.is_empty() {
            return Chosen::Nothing;
        }
        let share = match self.due(now, options) {
            // this thread can decode
            Due::AfterDecoding => return Chosen::Nothing,
            Due::At(time) => return Chosen::At(time),
            Due::Now { share } => share,
        };
        let mut batch = Vec::with_capacity(share);
        let undecoded = self.raw.len();
        let lead = |behind: usize| self.estimate.run_lead(behind + undecoded, options);
        while batch.len() < share
            && let Some(prepared) = self.ready.pop(now, lead, &mut self.given_up)
        {
            batch.push(prepared);
        }
        if batch.is_empty() { Chosen::Nothing } else { Chosen::Batch(batch) }
    }

    /// Whether to look for expired images: at once if the queue is full, ten times a second otherwise.
    pub(super) fn evicts(&self, now: Instant, full: bool) -> bool {
        full || now.saturating_duration_since(self.evicted) >= Duration::from_millis(100)
    }

    /// Evicts expired images, so that they keep neither slots nor memory from others.
    pub(super) fn evict(&mut self, now: Instant) {
        self.evicted = now;
        self.raw.evict(now, &mut self.given_up);
        let expired = self.parked.extract_if(.., |parked| parked.entry.pending.is_expired(now, Duration::ZERO));
        self.given_up.extend(expired.map(|parked| parked.entry.pending));
        self.ready.evict(now, &mut self.given_up);
    }

    /// Evicts everything that waits.
    pub(super) fn give_up_all(&mut self) {
        self.given_up.extend(self.raw.drain());
        self.given_up.extend(self.parked.drain(..).map(|parked| parked.entry.pending));
        self.given_up.extend(self.ready.drain());
    }

    /// The error of evicted images.
    pub(super) fn reason(&self) -> InferError {
        if self.phase == Phase::Aborted { InferError::ShuttingDown } else { InferError::DeadlineExceeded }
    }
}

/// When ready images are run.
enum Due {
    /// Once threads that could run them have decoded.
    AfterDecoding,
    At(Instant),
    /// In batches of this size.
    Now {
        share: usize,
    },
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::oneshot;

    use super::*;
    use crate::infer::job::Invariance;
    use crate::infer::pending::Slots;
    use crate::infer::request::{Class, Input, Output};
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
        /// Two warm engines that take 10 ms per image.
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
                ready_at_one: false,
            };
            let mut queue = Queue::new(2, Instant::now());
            (queue.engines, queue.estimate.run_cost) = (2, 10 * MS);
            let slots = Arc::new(Slots::new(options.queue_limit, Metrics::new().model("m", 1, "fake")));
            // late enough that every deadline of a test is still ahead
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
                extras: crate::engine::Extras::NONE,
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

        /// Answers the evicted images.
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

        /// Images that a free engine runs at that moment, or else when it should ask again.
        fn take(&mut self, ms: u32) -> Result<usize, Option<Instant>> {
            let taken = self.queue.take_batch(self.at(ms), &self.options);
            self.answer(ms);
            match taken {
                Chosen::Batch(images) => Ok(images.len()),
                Chosen::At(time) => Err(Some(time)),
                Chosen::Nothing => Err(None),
            }
        }
    }

    #[test]
    fn a_batch_waits_for_more_images_from_its_oldest_on() {
        let mut stage = Stage::new(3, 20 * MS);
        stage.decoded(5, 10_000);
        assert_eq!(stage.take(6), Err(Some(stage.at(25))));
        stage.decoded(24, 10_000);
        assert_eq!(stage.take(24), Err(Some(stage.at(25))), "a later image does not put it off");
        assert_eq!(stage.take(25), Ok(2));
        for arrived in [30, 31, 32, 33] {
            stage.decoded(arrived, 10_000);
        }
        assert_eq!(stage.take(33), Ok(3), "a full batch goes at once");
        assert_eq!(stage.take(33), Err(Some(stage.at(53))));
        stage.queue.phase = Phase::Closing;
        assert_eq!(stage.take(34), Ok(1), "no more images come");
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
        stage.queue.estimate.prepare_cost = 20 * MS;
        for deadline in [100, 10_000, 10_000] {
            stage.encoded(0, deadline, 100);
        }
        let entry = stage.queue.take_raw(stage.start + 80 * MS, &stage.options).expect("two are in time");
        assert_eq!(entry.pending.deadline, stage.at(10_000));
        stage.answer(80);
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
    fn an_image_has_all_cores_only_if_nothing_else_is_there() {
        let runs = |stage: &mut Stage| {
            let able = Able { worker: Some(0), prepares: false, runs: true, reopen_at: None, warms_up: true };
            match stage.queue.next(able, stage.start, &stage.options) {
                Step::Do(Task::Run { images, alone }) => Some((images.len(), alone)),
                _ => None,
            }
        };
        let mut stage = Stage::new(1, Duration::ZERO);
        stage.decoded(0, 10_000);
        assert_eq!(runs(&mut stage), Some((1, true)));
        // now the queue counts that worker as busy
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
    fn a_thread_warms_up_when_nothing_waits_and_batches_are_no_larger_than_is_warm() {
        let able = Able { worker: Some(0), prepares: true, runs: true, reopen_at: None, warms_up: true };
        for delay in [Duration::ZERO, 20 * MS] {
            let mut stage = Stage::new(4, delay);
            let next = |stage: &mut Stage| match stage.queue.next(able, stage.start + 50 * MS, &stage.options) {
                Step::Do(Task::Run { images, .. }) => images.len(),
                Step::Do(Task::WarmUp) => 0,
                step => panic!("{step:?}"),
            };
            assert_eq!(next(&mut stage), 0);
            (0..8).for_each(|_| stage.decoded(0, 10_000));
            stage.queue.warm = 1;
            assert_eq!(next(&mut stage), 1);
            stage.queue.warm = 3;
            assert_eq!(next(&mut stage), 3);
            stage.queue.warm = usize::MAX;
            assert_eq!(next(&mut stage), if delay.is_zero() { 2 } else { 4 });
            while next(&mut stage) > 0 {}
            (0..8).for_each(|_| stage.decoded(0, 10_000));
            stage.queue.largest = 2;
            assert_eq!(next(&mut stage), 2, "an engine failed with three");
            while next(&mut stage) > 0 {}
            if !delay.is_zero() {
                stage.decoded(40, 10_000);
                let step = stage.queue.next(able, stage.start + 50 * MS, &stage.options);
                assert!(matches!(step, Step::Sleep(Some(until)) if until == stage.at(60)), "a batch is due: {step:?}");
                assert_eq!(stage.queue.ready.len(), 1);
                let step = stage.queue.next(able, stage.start + 60 * MS, &stage.options);
                assert!(matches!(step, Step::Do(Task::Run { .. })), "{step:?}");
            }
            stage.queue.phase = Phase::Closing;
            stage.queue.decoding = 1;
            let step = stage.queue.next(able, stage.start, &stage.options);
            assert!(matches!(step, Step::Sleep(None)), "another thread's image is still to come: {step:?}");
            stage.queue.decoding = 0;
            let step = stage.queue.next(able, stage.start, &stage.options);
            assert!(matches!(step, Step::Do(Task::Stop)), "{step:?}");
        }
    }

    #[test]
    fn the_measured_speed_follows_runs_beside_which_others_wait() {
        // two engines need 5 ms for an image; one leaves every 20 ms
        let after = |images: usize, ok: bool, waiting: usize| {
            let mut stage = Stage::new(1, Duration::ZERO);
            (0..waiting).for_each(|_| stage.decoded(0, 100_000));
            (1..=200).for_each(|i| stage.queue.ran(images, ok, None, stage.at(20 * i), &stage.options));
            stage.queue.drain_time(1, &stage.options)
        };
        let slow = after(1, true, 8);
        assert!(slow > 15 * MS, "{slow:?}");
        assert_eq!(after(1, false, 8), slow, "a failed run takes as long");
        assert_eq!(after(2, false, 8), 5 * MS, "a failed batch leaves nothing: its images are run again");
        assert_eq!(after(1, true, 0), 5 * MS, "a run after which nothing waits says nothing about the speed");
    }

    #[test]
    fn decoding_costs_what_it_took() {
        let mut stage = Stage::new(1, Duration::ZERO);
        let mut decoded = |image: bool, took: Duration| {
            let pending = stage.pending(0, 10_000, 100);
            let prepared = Prepared { tensor: vec![], decode: Duration::ZERO, preprocess: Duration::ZERO, pending };
            stage.queue.decoding += 1;
            stage.queue.prepared(image.then_some(prepared), took);
            (stage.queue.estimate.prepare_cost, stage.queue.ready.len(), stage.queue.decoding)
        };
        let (first, ..) = decoded(true, 10 * MS);
        assert!(first > Duration::ZERO);
        assert_eq!(decoded(true, Duration::ZERO), (first, 2, 0), "a tensor has nothing to decode");
        assert_eq!(decoded(false, 50 * MS), (first, 2, 0), "an image that failed");
    }

    #[test]
    fn as_many_are_wanted_as_there_is_work_for() {
        let mut stage = Stage::new(1, Duration::ZERO);
        (0..3).for_each(|_| stage.encoded(0, 10_000, 100));
        let images = |stage: &Stage| stage.queue.demand(stage.start, &stage.options).images;
        assert_eq!(images(&stage), 3);
        // with decoders, no more than the engines need next
        stage.options.decoders = 2;
        assert_eq!(images(&stage), 3, "of four: two for each engine");
        stage.queue.decoding = 2;
        assert_eq!(images(&stage), 2);
        stage.decoded(0, 10_000);
        assert_eq!(images(&stage), 1);
        stage.queue.decoding = 0;
    }

    /// Removed one by one from the middle of a vector, these would take minutes.
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

    /// A lost wake-up of version 0.1: the only image to decode had expired, and a thread with something to run slept.
    #[test]
    fn a_thread_looks_again_after_it_gave_up_images() {
        let mut stage = Stage::new(8, Duration::ZERO);
        let able = Able { worker: Some(0), prepares: true, runs: true, reopen_at: None, warms_up: false };
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
