//! Paces refusals: a client that retries at once after a 429 gets the next 429 with a delay.
//!
//! A refusal costs little, but a client that retries at once receives thousands of them per second, which takes CPU
//! time from requests that could be answered. So a client (a connection) that was refused and retries within a second
//! waits in a queue that sends a fixed number per second. The first refusal is never held, so that a load balancer
//! hears of it at once. Only the response is held: its request has been freed.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::metrics::IntGauge;

/// Refusals per second to clients that retry at once. Below that rate none is held.
const RATE: u32 = 200;
/// Longest that a refusal is held.
const LONGEST: Duration = Duration::from_secs(2);
/// A client that retries within this after a refusal retries at once; `retry-after` is never shorter.
const STRAIGHT: Duration = Duration::from_secs(1);
/// Refusals that wait in line at once, in quarters of the connections that a port may have open: refusals
/// beyond that are held briefly, so that their connections are soon free for images that could be answered.
const HELD_OF_FOUR: usize = 3;
/// Most refusals of a connection that wait in line: the rest of its HTTP/2 streams are held briefly.
const HELD_EACH: usize = 16;
/// How long a refusal is held that finds no room in the line: a dozen clients that are refused at once, again and again, take as much
/// processor time as all answers.
const BRIEFLY: Duration = Duration::from_millis(100);

/// The refusals of one connection.
#[derive(Debug, Clone)]
pub(super) struct Visits {
    /// When its last refusal was or will be sent; `None`: its last request was not refused.
    refused: Arc<Mutex<Option<Instant>>>,
    room: Arc<Semaphore>,
}

impl Default for Visits {
    fn default() -> Self {
        Self { refused: Arc::default(), room: Arc::new(Semaphore::new(HELD_EACH)) }
    }
}

impl Visits {
    fn set(&self, refused: Option<Instant>) -> Option<Instant> {
        std::mem::replace(&mut *self.refused.lock().unwrap_or_else(PoisonError::into_inner), refused)
    }

    /// Records that an image was admitted and answered.
    pub(super) fn welcome(&self) {
        self.set(None);
    }
}

/// The queue of held refusals.
#[derive(Debug)]
pub(super) struct Pace {
    /// When the next one may be sent.
    next: Mutex<Instant>,
    room: Arc<Semaphore>,
    held: IntGauge,
}

/// A held refusal.
#[derive(Debug, Clone)]
pub(super) struct Hold {
    pub(super) until: Instant,
    _counted: Arc<Counted>,
}

#[derive(Debug)]
struct Counted {
    held: IntGauge,
    _room: Option<[OwnedSemaphorePermit; 2]>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.held.dec();
    }
}

impl Pace {
    /// For a server that allows `connections` open per port.
    pub(super) fn new(connections: usize, held: IntGauge) -> Self {
        let most = (connections / 4).saturating_mul(HELD_OF_FOUR).clamp(1, Semaphore::MAX_PERMITS);
        Self { next: Mutex::new(Instant::now()), room: Arc::new(Semaphore::new(most)), held }
    }

    /// Decides how long to hold the refusal of a request with this deadline; `None`: send it at once.
    pub(super) fn hold(&self, visits: &Visits, now: Instant, deadline: Instant) -> Option<Hold> {
        let straight_back = visits.set(Some(now)).is_some_and(|refused| now < refused + STRAIGHT);
        if !straight_back {
            return None;
        }
        // at most half of the time left: sending the response takes time as well
        let latest = now + (deadline.saturating_duration_since(now) / 2).min(LONGEST);
        let room = self.room(visits);
        let until = if room.is_some() {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let until = (*next).clamp(now, latest);
            *next = ((*next).max(now) + Duration::from_secs(1) / RATE).min(now + LONGEST);
            until
        } else {
            (now + BRIEFLY).min(latest)
        };
        visits.set(Some(until));
        self.held.inc();
        let counted = Counted { held: self.held.clone(), _room: room };
        (until > now).then(|| Hold { until, _counted: Arc::new(counted) })
    }

    /// Room to wait in line, for this connection and among all.
    fn room(&self, visits: &Visits) -> Option<[OwnedSemaphorePermit; 2]> {
        let own = visits.room.clone().try_acquire_owned().ok()?;
        Some([own, self.room.clone().try_acquire_owned().ok()?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    const MS: Duration = Duration::from_millis(1);
    const CONNECTIONS: usize = 1200;
    const HELD: usize = 900;

    fn pace() -> (Pace, Metrics) {
        let metrics = Metrics::new();
        (Pace::new(CONNECTIONS, metrics.held_refusals.clone()), metrics)
    }

    #[test]
    fn who_comes_straight_back_waits_in_line() {
        let ((pace, metrics), start) = (pace(), Instant::now());
        let patient = start + Duration::from_secs(10);
        let clients: Vec<_> = (0..800).map(|_| Visits::default()).collect();
        assert!(clients.iter().all(|visits| pace.hold(visits, start, patient).is_none()), "the first is never held");
        let holds: Vec<_> = clients.iter().map(|visits| pace.hold(visits, start, patient)).collect();
        assert!(holds[0].is_none(), "nobody is before it");
        let until: Vec<_> = holds.iter().flatten().map(|hold| hold.until - start).collect();
        assert_eq!((until.len(), until[0], until[99]), (799, 5 * MS, 500 * MS));
        assert!(until[399..].iter().all(|&until| until == LONGEST));
        assert_eq!(metrics.held_refusals.get(), 799);
        drop(holds);
        assert_eq!((metrics.held_refusals.get(), pace.room.available_permits()), (0, HELD));
    }

    #[test]
    fn nobody_else_waits() {
        let ((pace, _), start) = (pace(), Instant::now());
        let patient = start + Duration::from_secs(10);
        let visits = Visits::default();
        let held =
            |visits: &Visits, ms: u32, deadline| pace.hold(visits, start + ms * MS, deadline).map(|hold| hold.until);
        for ms in [0, 1000, 2000] {
            assert_eq!(held(&visits, ms, patient), None, "it stays away for a second");
        }
        // as if the queue were long
        *pace.next.lock().expect("no panic under it") = start + 2800 * MS;
        assert_eq!(held(&visits, 2003, patient), Some(start + 2800 * MS));
        assert_eq!(held(&visits, 2100, start + 2500 * MS), Some(start + 2300 * MS), "half of its time");
        visits.welcome();
        assert_eq!(held(&visits, 2400, patient), None, "it was answered since");
        let hold = |visits: &Visits| {
            visits.set(Some(start));
            pace.hold(visits, start + 10 * MS, patient)
        };
        let of_one: Vec<_> = (0..HELD_EACH).map(|_| hold(&visits)).collect();
        assert!(of_one.iter().all(Option::is_some));
        let briefly = || hold(&visits).is_some_and(|hold| hold.until == start + 10 * MS + BRIEFLY);
        assert!(briefly(), "no more than {HELD_EACH} of one connection wait in line");
        drop(of_one);
        let holds: Vec<_> = (0..HELD).map(|_| hold(&Visits::default())).collect();
        assert!(holds.iter().all(Option::is_some));
        assert!(briefly(), "no more than {HELD} wait in line");
        drop(holds);
        assert_eq!(pace.room.available_permits(), HELD);
    }
}
