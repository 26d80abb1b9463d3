//! Whether one more image may wait: how fast images really leave, and for how long the queue has been standing.
//!
//! Pure decisions: every one takes the moment as an argument. A queue is there to absorb bursts. One that never empties
//! absorbs nothing and only makes every answer late, so the longer the wait has been above a target, the less may wait, down
//! to the target itself; a burst that comes to a calm queue has all of it. The idea is CoDel's (RFC 8289, a *standing*
//! queue), applied where images come in: what is admitted is not thrown away.

use std::time::{Duration, Instant};

/// Images after which a measurement counts for a third.
const MEMORY: f64 = 32.0;
/// The warm-up's measurement has the weight of this many images.
const PRIOR: f64 = 8.0;
/// Bounds of [`Speed::factor`]: one odd measurement must neither stop the admission nor open it to everything.
const FACTOR: (f64, f64) = (0.5, 4.0);

/// How much longer images take than their parts cost: what other threads, other processes and the cores' clock do to them.
/// Measured from one departure to the next while the engines have enough to do, so that an idle moment, or the run of an
/// engine that has all cores of an idle machine, says nothing.
#[derive(Debug)]
pub(super) struct Speed {
    /// The time that passed, in images at the estimated cost, and the images that left in it; older ones count less.
    passed: f64,
    left: f64,
    /// When images left last; none: the engines have been idle since.
    since: Option<Instant>,
}

impl Speed {
    pub(super) fn new() -> Self {
        Self { passed: PRIOR, left: PRIOR, since: None }
    }

    /// So many images have left, reckoned to keep all threads busy for `reckoned`; `busy`: enough others wait.
    pub(super) fn leave(&mut self, images: usize, reckoned: Duration, now: Instant, busy: bool) {
        if let Some(since) = self.since
            && !reckoned.is_zero()
            && images > 0
        {
            let images = images as f64;
            let worth = now.saturating_duration_since(since).as_secs_f64() / reckoned.as_secs_f64() * images;
            let older = (1.0 - 1.0 / MEMORY).powf(images);
            self.passed = self.passed * older + worth;
            self.left = self.left * older + images;
        }
        self.since = busy.then_some(now);
    }

    /// Whether the engines have been busy since images left last.
    pub(super) fn is_busy(&self) -> bool {
        self.since.is_some()
    }

    /// An engine has nothing to do.
    pub(super) fn idle(&mut self) {
        self.since = None;
    }

    /// What reckoned times are to be multiplied with.
    pub(super) fn factor(&self) -> f64 {
        (self.passed / self.left).clamp(FACTOR.0, FACTOR.1)
    }
}

/// How long images may wait.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// In a standing queue.
    pub(super) standing: Duration,
    /// In a burst.
    pub(super) burst: Duration,
}

/// From the moment that the wait passes the target to the one from which it is held to it.
const FADE: Duration = Duration::from_millis(500);
/// The full wait for bursts is back once nothing was refused for this long.
const REST: Duration = Duration::from_millis(800);

/// Whether the queue stands.
#[derive(Debug, Default)]
pub(super) struct Standing {
    /// Since when the wait has been above the target, or images had to be refused again and again.
    since: Option<Instant>,
    /// When an image was last refused.
    refused: Option<Instant>,
}

impl Standing {
    /// The wait at this moment.
    pub(super) fn look(&mut self, wait: Duration, now: Instant, bounds: Bounds) {
        if wait > bounds.standing {
            self.since.get_or_insert(now);
        } else if self.refused.is_none_or(|refused| now.saturating_duration_since(refused) >= REST) {
            self.since = None;
        }
    }

    /// Notes that an image was refused because of those before it.
    pub(super) fn refuse(&mut self, now: Instant) {
        self.refused = Some(now);
    }

    /// Longest wait at which an image that arrives now is admitted.
    pub(super) fn limit(&self, now: Instant, Bounds { standing, burst }: Bounds) -> Duration {
        let Some(since) = self.since else { return burst };
        let left = 1.0 - now.saturating_duration_since(since).as_secs_f64() / FADE.as_secs_f64();
        let standing = standing.min(burst);
        standing + (burst - standing).mul_f64(left.max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const BOUNDS: Bounds = Bounds { standing: Duration::from_millis(100), burst: Duration::from_millis(1000) };

    #[test]
    fn a_burst_may_wait_long_and_a_standing_queue_may_not() {
        let (mut standing, start) = (Standing::default(), Instant::now());
        let at = |ms: u32| start + ms * MS;
        standing.look(100 * MS, at(0), BOUNDS);
        assert_eq!(standing.limit(at(0), BOUNDS), 1000 * MS, "the target itself is not above it");
        standing.look(101 * MS, at(0), BOUNDS);
        assert_eq!(standing.limit(at(0), BOUNDS), 1000 * MS);
        standing.look(900 * MS, at(250), BOUNDS);
        assert_eq!(standing.limit(at(250), BOUNDS), 550 * MS, "half of the time has passed");
        for ms in [500, 501, 90_000] {
            assert_eq!(standing.limit(at(ms), BOUNDS), 100 * MS);
        }
        // nothing was refused: as soon as it is short it is calm
        standing.look(100 * MS, at(600), BOUNDS);
        assert_eq!(standing.limit(at(600), BOUNDS), 1000 * MS);
    }

    #[test]
    fn it_stands_until_nobody_was_refused_for_a_while() {
        let (mut standing, start) = (Standing::default(), Instant::now());
        let at = |ms: u32| start + ms * MS;
        standing.look(200 * MS, at(0), BOUNDS);
        standing.refuse(at(600));
        standing.look(10 * MS, at(601), BOUNDS);
        assert_eq!(standing.limit(at(601), BOUNDS), 100 * MS, "a batch has left, and the next is at the door");
        standing.look(10 * MS, at(1399), BOUNDS);
        assert_eq!(standing.limit(at(1399), BOUNDS), 100 * MS);
        standing.look(10 * MS, at(1400), BOUNDS);
        assert_eq!(standing.limit(at(1400), BOUNDS), 1000 * MS);
        let short = Bounds { burst: 50 * MS, ..BOUNDS };
        standing.look(200 * MS, at(1400), short);
        assert_eq!(standing.limit(at(5000), short), 50 * MS, "the smaller of the two");
    }

    #[test]
    fn speed_is_measured_only_while_the_engines_are_busy() {
        let (mut speed, start) = (Speed::new(), Instant::now());
        let at = |ms: u32| start + ms * MS;
        assert_eq!(speed.factor(), 1.0);
        speed.leave(1, 10 * MS, at(0), true);
        assert_eq!(speed.factor(), 1.0, "nobody knows when it began");
        for i in 1..=100 {
            speed.leave(2, 20 * MS, at(30 * i), true);
        }
        assert!((speed.factor() - 1.5).abs() < 0.01, "{}", speed.factor());
        // an hour without load, whether the engines said so or the last to leave left nobody behind
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
}
