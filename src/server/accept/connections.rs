//! The open connections of one port, and which of them to evict when the port is full.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::activity::Activity;

/// Open connections by number.
#[derive(Debug, Default)]
pub(super) struct Connections {
    open: Mutex<Numbered>,
}

#[derive(Debug, Default)]
struct Numbered {
    next: u64,
    by_number: HashMap<u64, Arc<Activity>>,
}

impl Connections {
    /// Registers a connection until the guard is dropped.
    pub(super) fn join(self: &Arc<Self>, activity: Arc<Activity>) -> Registered {
        let mut open = self.open();
        let number = open.next;
        open.next += 1;
        open.by_number.insert(number, activity);
        Registered { connections: self.clone(), number }
    }

    /// Evicts the connection that has been quiet the longest, and for `least` at least; false if there is none. A
    /// connection with a request in work is evicted only once it was quiet for `longest_work`, the longest that any
    /// request computes.
    pub(super) fn evict(&self, least: Duration, longest_work: Duration) -> bool {
        let open = self.open();
        let quiet = open.by_number.values().filter_map(|activity| {
            let (quiet, works) = (activity.quiet_for()?, activity.works());
            (quiet >= if works { longest_work.max(least) } else { least }).then_some((!works, quiet, activity))
        });
        let longest = quiet.max_by_key(|&(waits, quiet, _)| (waits, quiet));
        longest.inspect(|(_, _, activity)| activity.evict()).is_some()
    }

    /// Cuts the connections that keep the most memory, until all others together keep at most `limit` bytes.
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

/// Guard: keeps a connection registered.
#[derive(Debug)]
pub(super) struct Registered {
    connections: Arc<Connections>,
    number: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.connections.open().by_number.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::super::held;
    use super::*;

    #[test]
    fn the_heaviest_connections_are_cut_and_no_more_than_needed() {
        let (connections, port) = (Arc::new(Connections::default()), Arc::new(held::Port::new(1)));
        let activities: Vec<_> = (0..3).map(|_| Arc::new(Activity::new(port.clone()))).collect();
        let _members: Vec<_> = activities.iter().map(|activity| connections.join(activity.clone())).collect();
        let starving = |count, activity: &Arc<Activity>| (0..count).map(|_| activity.starves()).collect::<Vec<_>>();
        let (_little, much, more) =
            (starving(10, &activities[0]), starving(600, &activities[1]), starving(700, &activities[2]));
        let cut = || activities.iter().map(|activity| activity.held().is_none()).collect::<Vec<_>>();
        connections.cut_heaviest(port.limit());
        assert_eq!(cut(), [false, false, true], "1310 of 16 KiB are more than 16 MiB");
        // connections cut already no longer count
        connections.cut_heaviest(port.limit());
        assert_eq!(cut(), [false, false, true]);
        let _again = starving(500, &activities[1]);
        connections.cut_heaviest(port.limit());
        assert_eq!(cut(), [false, true, true]);
        drop((much, more));
    }
}
