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
