//! Waiting images, in the order in which they are dequeued.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::pending::Pending;
use super::request::{Class, Input};
use crate::pixels::{Claim, Share};

/// An image that waits to be decoded.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) input: Input,
    pub(super) pending: Pending,
    pub(super) memory: Memory,
}

/// Whether an image has its share of the decode memory.
#[derive(Debug)]
pub(super) enum Memory {
    /// Its header was not read yet.
    Unasked,
    /// It has this share.
    Held(Share),
}

/// An image that waits for decode memory.
#[derive(Debug)]
pub(super) struct Parked {
    pub(super) entry: Entry,
    pub(super) claim: Claim,
}

/// A decoded image that waits for an engine.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) tensor: Vec<f32>,
    pub(super) decode: Duration,
    pub(super) preprocess: Duration,
    pub(super) pending: Pending,
}

/// An element of a [`Line`].
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

/// How many images of other classes may pass a waiting image of this class; then the class is due.
pub(super) const PATIENCE: [u32; Class::ALL.len()] = [0, 3, 14];

/// How many images of a class may pass its oldest one; then that one is due.
const PATIENCE_IN_CLASS: u32 = 3;

/// Images of one class, dequeued by priority, then by arrival; but one in 4 is the oldest.
#[derive(Debug)]
struct Row<T> {
    images: BTreeMap<(u32, u64), T>,
    /// Their priorities by order of arrival.
    arrivals: BTreeMap<u64, u32>,
    /// Images dequeued since the oldest was last next.
    passed: u32,
}

impl<T> Default for Row<T> {
    fn default() -> Self {
        Self { images: BTreeMap::new(), arrivals: BTreeMap::new(), passed: 0 }
    }
}

impl<T: Queued> Row<T> {
    fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    fn push(&mut self, rank: (u32, u64), item: T) {
        self.arrivals.insert(rank.1, rank.0);
        self.images.insert(rank, item);
    }

    /// The rank of the image to dequeue next, and of the oldest.
    fn next(&self) -> Option<[(u32, u64); 2]> {
        let (&first, _) = self.images.first_key_value()?;
        let (&sequence, &priority) = self.arrivals.first_key_value()?;
        let oldest = (priority, sequence);
        Some([if self.passed < PATIENCE_IN_CLASS { first } else { oldest }, oldest])
    }

    fn pop(&mut self) -> Option<T> {
        let [rank, oldest] = self.next()?;
        self.passed = if rank == oldest { 0 } else { self.passed + 1 };
        self.arrivals.remove(&rank.1);
        self.images.remove(&rank)
    }

    /// Removes those that are `gone`, in linear time.
    fn evict(&mut self, gone: impl Fn(&T) -> bool) -> impl Iterator<Item = T> {
        let (out, kept) = std::mem::take(&mut self.images).into_iter().partition(|(_, item)| gone(item));
        self.images = kept;
        self.arrivals = self.images.keys().map(|&(priority, sequence)| (sequence, priority)).collect();
        let out: BTreeMap<_, T> = out;
        out.into_values()
    }
}

/// Waiting images of all classes. Within a class its [`Row`] decides; of the classes, the first that has images is
/// next, unless a later one is due. So one image in 4 is of the default class and one in 16 of the last, as long as
/// these have any, whatever arrives in the other classes.
#[derive(Debug)]
pub(super) struct Line<T> {
    classes: [Row<T>; Class::ALL.len()],
    /// Images of other classes dequeued while this class had any waiting.
    passed: [u32; Class::ALL.len()],
}

impl<T: Queued> Line<T> {
    pub(super) fn new() -> Self {
        Self { classes: Default::default(), passed: Default::default() }
    }

    pub(super) fn push(&mut self, item: T) {
        let Pending { class, rank, .. } = *item.pending();
        self.classes[class as usize].push(rank, item);
    }

    pub(super) fn len(&self) -> usize {
        self.classes.iter().map(|row| row.images.len()).sum()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.classes.iter().all(Row::is_empty)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Pending> {
        self.classes.iter().flat_map(|row| row.images.values()).map(Queued::pending)
    }

    /// The class to dequeue from.
    fn class(&self) -> Option<usize> {
        let has = |&class: &usize| !self.classes[class].is_empty();
        let due = (1..self.classes.len()).find(|class| has(class) && self.passed[*class] >= PATIENCE[*class]);
        due.or_else(|| (0..self.classes.len()).find(has))
    }

    /// Dequeues the next image whose deadline is at least `lead` (a function of how many are behind it) from now.
    /// Expired images on the way go to `given_up` and don't count for their class.
    pub(super) fn pop(
        &mut self,
        now: Instant,
        lead: impl Fn(usize) -> Duration,
        given_up: &mut Vec<Pending>,
    ) -> Option<T> {
        loop {
            let class = self.class()?;
            let item = self.classes[class].pop()?;
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

    /// Evicts all expired images, in linear time.
    pub(super) fn evict(&mut self, now: Instant, given_up: &mut Vec<Pending>) {
        let expired = |item: &T| item.pending().is_expired(now, Duration::ZERO);
        for row in &mut self.classes {
            if row.images.values().any(expired) {
                given_up.extend(row.evict(expired).map(Queued::into_pending));
            }
        }
    }

    pub(super) fn drain(&mut self) -> impl Iterator<Item = Pending> + use<T> {
        std::mem::take(&mut self.classes).into_iter().flat_map(|row| row.images.into_values()).map(Queued::into_pending)
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::infer::error::InferError;
    use crate::infer::request::Output;

    /// A line of encoded images that don't expire.
    struct Stage {
        line: Line<Entry>,
        now: Instant,
        replies: Vec<oneshot::Receiver<Result<Output, InferError>>>,
    }

    impl Stage {
        fn new() -> Self {
            Self { line: Line::new(), now: Instant::now(), replies: Vec::new() }
        }

        /// The image's number is the second part of its rank, counted from 1.
        fn push(&mut self, priority: u32) {
            let (reply, receiver) = oneshot::channel();
            self.replies.push(receiver);
            let pending = Pending {
                reply: Some(reply),
                slot: None,
                class: Class::of(priority),
                rank: (priority, self.replies.len() as u64),
                arrived: self.now,
                deadline: self.now + Duration::from_secs(3600),
                extras: crate::engine::Extras::NONE,
            };
            self.line.push(Entry { input: Input::Tensor(vec![]), pending, memory: Memory::Unasked });
        }

        fn pop(&mut self) -> Option<Entry> {
            self.line.pop(self.now, |_| Duration::ZERO, &mut Vec::new())
        }
    }

    #[test]
    fn priority_then_arrival() {
        let mut stage = Stage::new();
        for priority in [100, 300, 1, 100, 1] {
            stage.push(priority);
        }
        let order: Vec<_> = std::iter::from_fn(|| stage.pop()).map(|entry| entry.pending.rank.1).collect();
        assert_eq!(order, [3, 5, 1, 4, 2], "one in four is of the default class, but there are only two before it");
    }

    /// A flood of any priority leaves every class the share that the documentation promises.
    #[test]
    fn a_flood_leaves_the_other_classes_their_share() {
        use proptest::prelude::*;
        let priority = || prop_oneof![Just(1_u32), 1..=99_u32, Just(100), 101..=1000_u32];
        let config = ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() };
        proptest!(config, |(arrivals in prop::collection::vec(priority(), 20..200), flood in priority())| {
            let mut stage = Stage::new();
            for &priority in &arrivals {
                stage.push(priority);
            }
            let now = stage.now;
            let mut waited = [0_usize; Class::ALL.len()];
            let mut passed = [0_usize; Class::ALL.len()];
            for _ in 0..200 {
                // the flood never ends
                stage.push(flood);
                let waiting = Class::ALL.map(|class| !stage.line.classes[class as usize].is_empty());
                let ranks = |class: Class| stage.line.classes[class as usize].images.keys().copied().collect::<Vec<_>>();
                let ranks = Class::ALL.map(ranks);
                let Some(entry) = stage.pop() else { break };
                let class = entry.pending.class as usize;
                for other in 0..waiting.len() {
                    waited[other] = if waiting[other] && other != class { waited[other] + 1 } else { 0 };
                }
                prop_assert!(waited[Class::Default as usize] < 4, "one in 4 is of the default class");
                prop_assert!(waited[Class::Last as usize] < 16, "one in 16 is of the last class");
                prop_assert!(waited[Class::First as usize] < 3, "the first class goes first otherwise");
                let (rank, ranks) = (entry.pending.rank, &ranks[class]);
                let oldest = *ranks.iter().min_by_key(|(_, sequence)| sequence).expect("there");
                prop_assert!(rank == ranks[0] || rank == oldest, "by priority, or the one that came first: {:?}", rank);
                passed[class] = if rank == oldest { 0 } else { passed[class] + 1 };
                prop_assert!(passed[class] <= 3, "one in 4 of a class is the one that came first");
                entry.pending.answer(Err(InferError::ShuttingDown), now);
            }
        });
    }
}
