//! What the simulation checks in a model's shared state: slots in use, and threads that sleep although there is work.

use std::sync::PoisonError;
use std::time::Instant;

use super::{Pending, Phase, Shared, Sleeper, State};

impl Shared {
    pub(in crate::infer) fn held(&self) -> usize {
        self.slots.used()
    }

    /// Describes a thread that sleeps although there is work for it, found independently of the code that wakes
    /// threads. Called when every thread is parked or delayed; `None` while a woken sleeper has not run yet.
    pub(in crate::infer) fn idle_beside_work(&self) -> Option<String> {
        let now = self.now();
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { queue, sleepers, .. } = &*state;
        let on_its_way = |sleeper: &Sleeper| sleeper.woken || sleeper.until.is_some_and(|until| until <= now);
        if sleepers.iter().any(on_its_way) {
            return None;
        }
        let live =
            |pending: &&Pending| pending.deadline > now && pending.reply.as_ref().is_some_and(|r| !r.is_closed());
        let options = &self.options;
        let fed = options.decoders > 0 && queue.ready.len() + queue.decoding >= 2 * options.workers * options.max_batch;
        let raw = queue.raw.iter().any(|pending| live(&pending)) && !fed;
        let oldest = queue.ready.iter().filter(live).map(|pending| pending.arrived).min();
        let runs_at =
            oldest.map(|oldest| if queue.phase == Phase::Open { oldest + options.max_queue_delay } else { now });
        let over = queue.phase == Phase::Aborted || (queue.phase == Phase::Closing && queue.is_empty());
        let full = queue.ready.iter().filter(live).count() >= queue.max_batch(options);
        let what = format!(
            "{} ({} to decode, {} being decoded, {} ready, {} engines, {:?})",
            self.job.what,
            queue.raw.len(),
            queue.decoding,
            queue.ready.len(),
            queue.engines,
            queue.phase
        );
        for Sleeper { thread, able, .. } in sleepers {
            if over {
                return Some(format!("thread {thread} of {what} sleeps although all is over"));
            }
            if raw && able.prepares {
                return Some(format!("thread {thread} of {what} sleeps beside an image to decode"));
            }
            if able.runs && runs_at.is_some_and(|at| at <= now || full) {
                return Some(format!("thread {thread} of {what} sleeps beside an image to run"));
            }
        }
        let runners: Vec<_> = sleepers.iter().filter(|sleeper| sleeper.able.runs).collect();
        let timed = |at: Instant| runners.iter().any(|sleeper| sleeper.until.is_some_and(|until| until <= at));
        let untimed = |at| !runners.is_empty() && !timed(at);
        runs_at.is_some_and(untimed).then(|| format!("nobody's timer is set for an image of {what}"))
    }
}
