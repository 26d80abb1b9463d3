//! Admission, queue, batching and deadlines of one model: the handle on its threads.
//!
//! An image is admitted with a slot or refused at once: admission and queue (see `queue`) can't disagree. Compute
//! threads (see `worker`) ask what both share (see `shared`) for their next task. Knows no protocol, no labels and
//! nothing of how an engine works.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::error::InferError;
use super::job::{Job, SchedulerOptions, StartError};
use super::queue::Phase;
use super::request::{Input, Terms, Ticket};
pub use super::shared::Health;
use super::shared::Shared;
use super::worker::{self, Role};
use crate::engine::Extras;

/// The queue of one model and its compute threads.
#[derive(Debug)]
pub struct Scheduler {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Scheduler {
    /// Starts the threads; returns once every worker has opened its engine and warmed it up.
    pub fn start(job: Job, options: SchedulerOptions) -> Result<Self, StartError> {
        let shared = Arc::new(Shared::new(job, options));
        let (workers, decoders) = (shared.options.workers, shared.options.decoders);
        let one_by_one = shared.options.one_by_one;
        // dropped on failure, which stops the other threads
        let scheduler = Self { shared: shared.clone(), threads: Mutex::default() };
        let roles = (0..workers).map(Role::Worker).chain((0..decoders).map(|_| Role::Decoder));
        for (i, role) in roles.enumerate() {
            scheduler.spawn(i, role)?;
            if one_by_one && i < workers {
                shared.warmed()?;
            }
        }
        for _ in 0..if one_by_one { 0 } else { workers } {
            shared.warmed()?;
        }
        Ok(scheduler)
    }

    fn spawn(&self, thread: usize, role: Role) -> Result<(), StartError> {
        let shared = self.shared.clone();
        shared.begins();
        let name = format!("{}-{thread}", shared.job.what);
        let spawned = self.shared.system().spawn(name, Box::new(move || worker::main(&shared, thread, role)));
        let handle = spawned.map_err(|e| {
            self.shared.ended();
            StartError::Thread(e.to_string())
        })?;
        self.threads().extend(handle);
        Ok(())
    }

    /// Admits all images of a request or none. A refusal comes before any work.
    pub fn submit(&self, inputs: Vec<Input>, terms: impl Into<Terms>) -> Result<Vec<Ticket>, InferError> {
        self.submit_for(inputs, terms, Extras::NONE)
    }

    /// As [`submit`](Self::submit), for more than logits.
    pub fn submit_for(
        &self,
        inputs: Vec<Input>,
        terms: impl Into<Terms>,
        extras: Extras,
    ) -> Result<Vec<Ticket>, InferError> {
        let images = inputs.len();
        let admitted = self.shared.admit(inputs, terms.into(), extras);
        if let Err(error) = &admitted {
            self.shared.metrics().images(error.outcome(), images);
        }
        admitted
    }

    /// The error if no image would be admitted now; checked before a request's bytes are read. A refusal counts as one
    /// image. Success reserves nothing.
    pub fn has_room(&self, deadline: Instant) -> Result<(), InferError> {
        match self.shared.refuses(deadline) {
            None => Ok(()),
            Some(error) => {
                self.shared.metrics().images(error.outcome(), 1);
                Err(error)
            }
        }
    }

    /// Most images that can be admitted at once.
    pub fn queue_limit(&self) -> usize {
        self.shared.queue_limit()
    }

    /// How images are queued and batched.
    pub fn options(&self) -> &SchedulerOptions {
        &self.shared.options
    }

    /// Whether the engines work.
    pub fn health(&self) -> Health {
        self.shared.health()
    }

    /// Updates the gauges that are measured at each scrape.
    pub fn observe(&self) {
        self.shared.observe();
    }

    /// Refuses new images; queued ones are still answered, then the threads end.
    pub fn close(&self) {
        self.shared.end(Phase::Closing);
    }

    /// Answers everything queued with [`InferError::ShuttingDown`]; then the threads end.
    pub fn abort(&self) {
        self.shared.end(Phase::Aborted);
    }

    /// Waits for the threads until `deadline`; returns how many still run. Blocks: not for async threads.
    pub fn join(&self, deadline: Instant) -> usize {
        let left = self.shared.join(deadline);
        let mut threads = self.threads();
        for i in (0..threads.len()).rev() {
            // a hung engine's thread can't be joined; if none is left, each join returns at once
            if left == 0 || threads[i].is_finished() {
                let _ = threads.swap_remove(i).join();
            }
        }
        left
    }

    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.shared.held()
    }

    #[cfg(test)]
    pub(super) fn idle_beside_work(&self) -> Option<String> {
        self.shared.idle_beside_work()
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.abort();
    }
}
