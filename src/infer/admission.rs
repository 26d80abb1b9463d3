//! Admission: whether one more image may wait, by how long it would wait, and by how long the queue has been standing.
//!
//! Pure decisions: each takes the current time as an argument. A queue exists to absorb bursts. One that never empties
//! absorbs nothing and only delays every answer. So the longer the wait has been above a target, the fewer images may
//! wait, down to the target itself; a burst that meets an empty queue may use all of it. The idea is CoDel's (RFC 8289,
//! a *standing* queue), applied at admission: an admitted image is not dropped for it.

use std::time::{Duration, Instant};

use super::error::InferError;
use super::job::SchedulerOptions;

/// Longest waits.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// In a standing queue: the target.
    standing: Duration,
    /// In a burst.
    burst: Duration,
}

impl From<&SchedulerOptions> for Bounds {
    fn from(options: &SchedulerOptions) -> Self {
        Self { standing: options.standing_wait, burst: options.max_queue_wait }
    }
}

/// How long the allowed wait takes to fall from the burst's to the target, once the wait is above the target.
const FADE: Duration = Duration::from_millis(500);
/// The full wait for bursts is allowed again once nothing was refused for this long.
const REST: Duration = Duration::from_millis(800);

/// Decides by whether the queue is standing.
#[derive(Debug, Default)]
pub(super) struct Standing {
    /// Since when the wait is above the target, or images are refused repeatedly.
    since: Option<Instant>,
    /// When an image was last refused.
    refused: Option<Instant>,
}

impl Standing {
    /// Whether one more image may wait behind the `used` ones that are admitted and not yet answered. `drain_time` is
    /// how long a number of images takes. A refusal is recorded.
    pub(super) fn admits(
        &mut self,
        used: usize,
        deadline: Instant,
        now: Instant,
        drain_time: impl Fn(usize) -> Duration,
        options: &SchedulerOptions,
    ) -> Result<(), InferError> {
        // the queue is not the reason: an empty one could not meet the deadline either
        if deadline <= now {
            return Err(InferError::DeadlineExceeded);
        }
        let wait = drain_time(used);
        self.holds(wait, now, options);
        let few = used < 2 * options.workers;
        if !few && wait > self.limit(now, options.into()) {
            return Err(self.refuse(wait, now));
        }
        // with few images before it, nothing is lost by trying
        let ended = if few { wait } else { drain_time(used + 1) };
        if now.checked_add(ended).is_some_and(|ended| ended <= deadline) { Ok(()) } else { Err(overloaded(wait)) }
    }

    /// Records that the admitted images take `wait` from now.
    pub(super) fn holds(&mut self, wait: Duration, now: Instant, options: &SchedulerOptions) {
        self.look(wait, now, options.into());
    }

    /// Updates the state with the current wait.
    fn look(&mut self, wait: Duration, now: Instant, bounds: Bounds) {
        if wait > bounds.standing {
            self.since.get_or_insert(now);
        } else if self.refused.is_none_or(|refused| now.saturating_duration_since(refused) >= REST) {
            self.since = None;
        }
    }

    /// Records and returns the refusal of an image because of the queue.
    pub(super) fn refuse(&mut self, wait: Duration, now: Instant) -> InferError {
        self.refused = Some(now);
        overloaded(wait)
    }

    /// Longest wait at which an image that arrives now is admitted.
    fn limit(&self, now: Instant, Bounds { standing, burst }: Bounds) -> Duration {
        let Some(since) = self.since else { return burst };
        let left = 1.0 - now.saturating_duration_since(since).as_secs_f64() / FADE.as_secs_f64();
        let standing = standing.min(burst);
        standing + (burst - standing).mul_f64(left.max(0.0))
    }
}

fn overloaded(wait: Duration) -> InferError {
    InferError::Overloaded { retry_after: wait.clamp(Duration::from_millis(100), Duration::from_secs(60)) }
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
        // nothing was refused: the queue is no longer standing once the wait is short
        standing.look(100 * MS, at(600), BOUNDS);
        assert_eq!(standing.limit(at(600), BOUNDS), 1000 * MS);
    }

    #[test]
    fn it_stands_until_nobody_was_refused_for_a_while() {
        let (mut standing, start) = (Standing::default(), Instant::now());
        let at = |ms: u32| start + ms * MS;
        standing.look(200 * MS, at(0), BOUNDS);
        standing.refuse(200 * MS, at(600));
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
    fn an_image_is_admitted_if_its_wait_and_deadline_allow() {
        let (mut standing, start) = (Standing::default(), Instant::now());
        let options = SchedulerOptions { workers: 2, max_queue_wait: 1000 * MS, ..SchedulerOptions::default() };
        // two engines, 10 ms per image: 5 ms for each that waits
        let drain_time = |images: usize| images as u32 * 5 * MS;
        let mut admits = |used, deadline, ms| {
            standing.admits(used, start + deadline * MS, start + ms * MS, drain_time, &options).is_ok()
        };
        assert!(admits(0, 1, 0) && admits(3, 15, 0), "few are before it, and it may be tried");
        assert!(!admits(3, 14, 0));
        assert!(admits(4, 25, 0) && !admits(4, 24, 0), "it is to be answered by then, not taken");
        assert!(admits(200, 10_000, 0), "a burst of a second");
        assert!(!admits(201, 10_000, 0));
        assert!(admits(20, 10_000, 600) && !admits(21, 10_000, 600), "it has stood for half a second");
        assert!(admits(3, 10_000, 600), "as always");
        let late = standing.admits(0, start, start, drain_time, &options);
        assert!(matches!(late, Err(InferError::DeadlineExceeded)), "an idle server isn't busy: {late:?}");
    }
}
