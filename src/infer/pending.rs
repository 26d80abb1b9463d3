//! One admitted image: its slot and its reply.
//!
//! An image owns its slot: dropping the image, wherever that happens, answers it and frees the slot.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::error::InferError;
use super::request::{Class, Output};
use crate::engine::Extras;
use crate::metrics::{ModelMetrics, Outcome};

/// Counts the images that are admitted and not yet answered, at most `limit`.
#[derive(Debug)]
pub(super) struct Slots {
    pub(super) limit: usize,
    pub(super) metrics: ModelMetrics,
    used: AtomicUsize,
    /// Of these, slots of images of the first and the last class.
    used_by_others: AtomicUsize,
}

impl Slots {
    pub(super) fn new(limit: usize, metrics: ModelMetrics) -> Self {
        Self { limit, metrics, used: AtomicUsize::new(0), used_by_others: AtomicUsize::new(0) }
    }

    /// Most slots that images of this class may have at once. A quarter is reserved for the default class.
    pub(super) fn limit_of(&self, class: Class) -> usize {
        match class {
            Class::Default => self.limit,
            Class::First | Class::Last => self.limit - self.limit / 4,
        }
    }

    /// Acquires `count` slots or none.
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
    /// Rank in its class: priority, then order of arrival.
    pub(super) rank: (u32, u64),
    /// When it was admitted.
    pub(super) arrived: Instant,
    pub(super) deadline: Instant,
    /// What is asked for beside logits.
    pub(super) extras: Extras,
}

impl Pending {
    /// Answers and counts the image. It is counted before its slot is freed, so that an empty queue has counted every
    /// image; both happen before the caller sees the answer, so that a caller who sends its next image at once finds a
    /// slot.
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
        // fails if the caller has dropped its ticket meanwhile
        let _ = reply.send(result);
    }

    /// Whether nobody waits for the answer, or nobody would when it came (`lead` from now).
    pub(super) fn is_expired(&self, now: Instant, lead: Duration) -> bool {
        self.deadline <= now + lead || self.reply.as_ref().is_none_or(oneshot::Sender::is_closed)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.end(Err(InferError::Internal("an image was dropped without an answer".into())), false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_quarter_of_the_slots_is_for_those_who_name_no_priority() {
        let slots = Arc::new(Slots::new(8, Metrics::new().model("m", 1, "fake")));
        let take = |count, class| slots.take(count, class);
        assert!(take(7, Class::First).is_none(), "of 8");
        let first = take(5, Class::First).expect("room");
        let last = take(1, Class::Last).expect("room");
        assert!(take(1, Class::First).is_none() && take(1, Class::Last).is_none());
        assert!(slots.is_full(1, Class::Last) && !slots.is_full(2, Class::Default));
        let default = take(2, Class::Default).expect("it is kept for them");
        assert!(take(1, Class::Default).is_none());
        assert_eq!(slots.used(), 8);
        drop((first, last, default));
        assert_eq!(slots.used(), 0);
        assert_eq!(take(8, Class::Default).map(|slots| slots.len()), Some(8));
        assert!(take(6, Class::Last).is_some(), "all is given back");
    }

    #[test]
    fn an_image_expires_at_its_deadline() {
        let (reply, _receiver) = oneshot::channel();
        let start = Instant::now();
        let at = |ms: u32| start + ms * MS;
        let (class, rank, arrived, deadline) = (Class::Default, (100, 0), at(0), at(50));
        let extras = Extras::NONE;
        let image = Pending { reply: Some(reply), slot: None, class, rank, arrived, deadline, extras };
        assert!(!image.is_expired(at(49), Duration::ZERO) && image.is_expired(at(50), Duration::ZERO));
        assert!(!image.is_expired(at(39), 10 * MS) && image.is_expired(at(40), 10 * MS));
    }
}
