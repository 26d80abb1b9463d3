//! Estimates how long images take: their recent cost, and the factor by which they really take longer.
//!
//! Pure arithmetic: the current time and the number of engines are arguments.

use std::time::{Duration, Instant};

use super::job::SchedulerOptions;

/// A measurement's weight falls to a third after this many images.
const MEMORY: f64 = 32.0;
/// Weight of the warm-up's measurement, in images.
const PRIOR: f64 = 8.0;
/// Bounds of [`Speed::factor`]: one odd measurement must neither stop admission nor admit everything.
const FACTOR: (f64, f64) = (0.5, 4.0);

/// By which factor images take longer than decoding and running cost, because of other threads, other processes and the
/// clock rate of the cores. Measured between departures while the engines have enough to do, so that neither an idle
/// moment nor a run with all cores of an idle machine counts.
#[derive(Debug)]
struct Speed {
    /// Time between departures, in units of the estimated cost of an image, and images that left in it; older ones
    /// weigh less.
    passed: f64,
    left: f64,
    /// When images last left; `None`: the engines have been idle since.
    since: Option<Instant>,
}

impl Speed {
    fn new() -> Self {
        Self { passed: PRIOR, left: PRIOR, since: None }
    }

    /// Records that `images` images have left, expected to keep all threads busy for `expected`; `busy`: enough others
    /// wait.
    fn leave(&mut self, images: usize, expected: Duration, now: Instant, busy: bool) {
        if let Some(since) = self.since
            && !expected.is_zero()
            && images > 0
        {
            let images = images as f64;
            let worth = now.saturating_duration_since(since).as_secs_f64() / expected.as_secs_f64() * images;
            let older = (1.0 - 1.0 / MEMORY).powf(images);
            self.passed = self.passed * older + worth;
            self.left = self.left * older + images;
        }
        self.since = busy.then_some(now);
    }

    /// Whether the engines have been busy since images last left.
    fn is_busy(&self) -> bool {
        self.since.is_some()
    }

    /// Records that an engine has nothing to do.
    fn idle(&mut self) {
        self.since = None;
    }

    /// The factor on expected times.
    fn factor(&self) -> f64 {
        (self.passed / self.left).clamp(FACTOR.0, FACTOR.1)
    }
}

/// The measured cost of images.
#[derive(Debug)]
pub(super) struct Estimate {
    /// Engine time per image under load: a moving average.
    pub(super) run_cost: Duration,
    /// Decode plus resize time per image: a moving average.
    pub(super) prepare_cost: Duration,
    /// By which factor images really take longer.
    speed: Speed,
}

impl Estimate {
    pub(super) fn new() -> Self {
        Self { run_cost: Duration::ZERO, prepare_cost: Duration::ZERO, speed: Speed::new() }
    }

    /// Sets the costs that a worker's warm-up measured; the largest of all workers' count.
    pub(super) fn warmed(&mut self, run_cost: Duration, prepare_cost: Duration) {
        self.run_cost = self.run_cost.max(run_cost);
        self.prepare_cost = self.prepare_cost.max(prepare_cost);
    }

    /// Records that an image was decoded and resized in `took`.
    pub(super) fn prepared(&mut self, took: Duration) {
        self.prepare_cost = smooth(self.prepare_cost, took);
    }

    /// Records an engine run of `images` images that took `cost` for each. A run without a backlog has few images: a
    /// full batch costs no more per image, and takes no less time in all. So such a run moves the estimate only as far
    /// as these two bounds.
    pub(super) fn ran(&mut self, images: usize, cost: Duration, options: &SchedulerOptions) {
        let least = cost * images as u32 / options.max_batch.max(images) as u32;
        let cost = if self.speed.is_busy() { cost } else { self.run_cost.clamp(least, cost) };
        self.run_cost = smooth(self.run_cost, cost);
    }

    /// Records that `images` images left the threads, answered or not; `busy`: the engines have enough others to do.
    pub(super) fn leave(
        &mut self,
        images: usize,
        engines: usize,
        busy: bool,
        now: Instant,
        options: &SchedulerOptions,
    ) {
        let expected = self.expected(images, engines, options);
        self.speed.leave(images, expected, now, busy);
    }

    /// Records that an engine has nothing to do.
    pub(super) fn idle(&mut self) {
        self.speed.idle();
    }

    /// How long before its deadline an encoded image expires, with `behind` others after it.
    pub(super) fn decode_lead(&self, behind: usize, options: &SchedulerOptions) -> Duration {
        lead(behind, self.run_cost + self.prepare_cost, options)
    }

    /// How long before its deadline a decoded image expires, with `behind` others after it.
    pub(super) fn run_lead(&self, behind: usize, options: &SchedulerOptions) -> Duration {
        lead(behind, self.run_cost, options)
    }

    /// How long `images` images keep the threads busy, by the measured speed.
    pub(super) fn drain_time(&self, images: usize, engines: usize, options: &SchedulerOptions) -> Duration {
        let seconds = self.expected(images, engines, options).as_secs_f64() * self.speed.factor();
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// The same, from the costs alone.
    fn expected(&self, images: usize, engines: usize, options: &SchedulerOptions) -> Duration {
        let engines = engines.max(1) as f64;
        let (run, prepare) = (self.run_cost.as_secs_f64(), self.prepare_cost.as_secs_f64());
        let each = match options.decoders {
            0 => (run + prepare) / engines,
            decoders => (run / engines).max(prepare / decoders as f64),
        };
        Duration::try_from_secs_f64(each * images as f64).unwrap_or(Duration::MAX)
    }
}

/// How long before its deadline an image expires. Under a backlog, work that would finish too late only delays the
/// others; without one, nothing is lost by trying.
fn lead(behind: usize, cost: Duration, options: &SchedulerOptions) -> Duration {
    if behind >= options.workers { cost } else { Duration::ZERO }
}

/// Moving average over about ten values.
fn smooth(average: Duration, value: Duration) -> Duration {
    if average.is_zero() { value } else { (average * 9 + value) / 10 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// An engine takes 10 ms per image.
    fn warm(max_batch: usize) -> (Estimate, SchedulerOptions) {
        let mut estimate = Estimate::new();
        estimate.warmed(10 * MS, Duration::ZERO);
        (estimate, SchedulerOptions { workers: 2, max_batch, ..SchedulerOptions::default() })
    }

    #[test]
    fn the_slowest_workers_warm_up_counts() {
        let mut estimate = Estimate::new();
        for (run, prepare) in [(5, 3), (4, 7), (6, 1)] {
            estimate.warmed(run * MS, prepare * MS);
        }
        assert_eq!((estimate.run_cost, estimate.prepare_cost), (6 * MS, 7 * MS));
    }

    #[test]
    fn speed_is_measured_only_while_the_engines_are_busy() {
        let (mut speed, start) = (Speed::new(), Instant::now());
        let at = |ms: u32| start + ms * MS;
        assert_eq!(speed.factor(), 1.0);
        speed.leave(1, 10 * MS, at(0), true);
        assert_eq!(speed.factor(), 1.0, "it is not known when it began");
        for i in 1..=100 {
            speed.leave(2, 20 * MS, at(30 * i), true);
        }
        assert!((speed.factor() - 1.5).abs() < 0.01, "{}", speed.factor());
        // an hour without load, whether the engines reported idle or the last image left nobody behind
        speed.idle();
        speed.leave(1, 10 * MS, at(3_600_000), false);
        speed.leave(1, 10 * MS, at(7_200_000), true);
        assert!((speed.factor() - 1.5).abs() < 0.01, "{}", speed.factor());
        for i in 1..=100 {
            speed.leave(2, 20 * MS, at(7_200_000 + 20 * i), true);
        }
        assert!((speed.factor() - 1.0).abs() < 0.01, "{}", speed.factor());
        for i in 1..=100 {
            speed.leave(1, 10 * MS, at(8_000_000 + 1000 * i), true);
        }
        assert_eq!(speed.factor(), 4.0, "within bounds");
        speed.leave(1, Duration::ZERO, at(9_000_000), true);
        assert!(speed.factor().is_finite());
    }

    #[test]
    fn the_wait_is_what_the_engines_need() {
        let (mut estimate, mut options) = warm(1);
        assert_eq!(estimate.drain_time(6, 2, &options), 30 * MS);
        estimate.prepare_cost = 4 * MS;
        assert_eq!(estimate.drain_time(6, 2, &options), 42 * MS, "the same threads decode");
        options.decoders = 1;
        assert_eq!(estimate.drain_time(6, 2, &options), 30 * MS, "others do, and are faster");
        estimate.prepare_cost = 40 * MS;
        assert_eq!(estimate.drain_time(6, 2, &options), 240 * MS, "others do, and are slower");
        let start = Instant::now();
        for ms in (0..=1000).step_by(10) {
            estimate.speed.leave(1, 5 * MS, start + ms * MS, true);
        }
        let wait = estimate.drain_time(6, 2, &options).as_millis();
        assert!((470..=490).contains(&wait), "images leave half as fast as their parts say: {wait}");
        assert_eq!(smooth(10 * MS, 20 * MS), 11 * MS);
    }

    /// Single images on an idle machine say little about batches, but not nothing.
    #[test]
    fn runs_without_a_backlog_move_the_cost_only_as_far_as_they_show() {
        let (mut estimate, options) = warm(4);
        let mut after = |images, cost: u32| {
            (0..100).for_each(|_| estimate.ran(images, cost * MS, &options));
            estimate.run_cost.as_millis()
        };
        assert_eq!(after(1, 30), 10, "a batch of four may take 40");
        assert!((18..=20).contains(&after(1, 80)), "it takes no less than 80");
        assert!((19..=20).contains(&after(2, 40)));
        assert!((3..=4).contains(&after(1, 3)), "nor more than 3 an image");
        // under a backlog, a run's cost is taken as it is
        estimate.leave(1, 2, true, Instant::now(), &options);
        (0..100).for_each(|_| estimate.ran(1, 30 * MS, &options));
        assert!((29..=30).contains(&estimate.run_cost.as_millis()));
    }
}
