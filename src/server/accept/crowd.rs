//! The open connections of one port, and which of them has to go when the port is full.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::activity::Activity;

/// Connections by number.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    open: Mutex<Numbered>,
}

#[derive(Debug, Default)]
struct Numbered {
    next: u64,
    by_number: HashMap<u64, Arc<Activity>>,
}

impl Crowd {
    /// A connection is open as long as the member lives.
    pub(super) fn join(self: &Arc<Self>, activity: Arc<Activity>) -> Member {
        let mut open = self.open();
        let number = open.next;
        open.next += 1;
        open.by_number.insert(number, activity);
        Member { crowd: self.clone(), number }
    }

    /// Asks the connection to end that has done nothing useful for the longest, and for `least` at least. A connection
    /// with a request in work counts only once it was silent for `longest_work`: nothing here computes for longer.
    pub(super) fn evict(&self, least: Duration, longest_work: Duration) -> bool {
        let open = self.open();
        let quiet = open.by_number.values().filter_map(|activity| {
            let (quiet, works) = (activity.quiet_for()?, activity.works());
            (quiet >= if works { longest_work.max(least) } else { least }).then_some((!works, quiet, activity))
        });
        let longest = quiet.max_by_key(|&(waits, quiet, _)| (waits, quiet));
        longest.inspect(|(_, _, activity)| activity.evict()).is_some()
    }

    /// Cuts the connections for which most is kept, until all of them together keep no more than `limit` bytes.
    pub(super) fn cut_heaviest(&self, limit: usize) {
        let open = self.open();
        let mut held: Vec<_> =
            open.by_number.values().filter_map(|activity| Some((activity.held()?, activity))).collect();
        let mut sum: usize = held.iter().map(|(bytes, _)| bytes).sum();
        held.sort_unstable_by_key(|&(bytes, _)| bytes);
        while sum > limit {
            let Some((bytes, activity)) = held.pop() else { break };
            sum -= bytes;
            activity.cut();
        }
    }

    fn open(&self) -> MutexGuard<'_, Numbered> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One open connection among the others.
#[derive(Debug)]
pub(super) struct Member {
    crowd: Arc<Crowd>,
    number: u64,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.crowd.open().by_number.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::super::held;
    use super::*;

    #[test]
    fn who_keeps_most_is_cut_and_only_as_many_as_must_be() {
        let (crowd, port) = (Arc::new(Crowd::default()), Arc::new(held::Port::new(1)));
        let activities: Vec<_> = (0..3).map(|_| Arc::new(Activity::new(port.clone()))).collect();
        let _members: Vec<_> = activities.iter().map(|activity| crowd.join(activity.clone())).collect();
        let starving = |count, activity: &Arc<Activity>| (0..count).map(|_| activity.starves()).collect::<Vec<_>>();
        let (_little, much, more) =
            (starving(10, &activities[0]), starving(600, &activities[1]), starving(700, &activities[2]));
        let cut = || activities.iter().map(|activity| activity.held().is_none()).collect::<Vec<_>>();
        crowd.cut_heaviest(port.limit());
        assert_eq!(cut(), [false, false, true], "1310 of 16 KiB are more than 16 MiB");
        // what is on its way out counts no more
        crowd.cut_heaviest(port.limit());
        assert_eq!(cut(), [false, false, true]);
        let _again = starving(500, &activities[1]);
        crowd.cut_heaviest(port.limit());
        assert_eq!(cut(), [false, true, true]);
        drop((much, more));
    }
}
