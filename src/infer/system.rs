//! The interface between scheduling and the operating system: the time, threads, and waiting.
//!
//! Scheduling reads no clock and blocks only through this interface, so that a simulation can replace the system,
//! decide which thread runs next and let time pass as it likes. A thread that waits for a condition leaves its
//! [`Waker`] under the lock that guards it, releases the lock, and parks; whoever makes the condition true removes the
//! waker under the same lock and wakes it. A wake-up between the two is kept, as by [`std::thread::park`], and spurious
//! ones are allowed: every wait is a loop.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// Time, threads and waiting.
pub trait System: Send + Sync + std::fmt::Debug {
    /// The current time.
    fn now(&self) -> Instant;

    /// Starts a thread; returns its handle if there is one to join.
    fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> std::io::Result<Option<JoinHandle<()>>>;

    /// Wakes the calling thread from [`park`](Self::park).
    fn current(&self) -> Waker;

    /// Blocks the calling thread until it is woken or until that moment; may return early.
    fn park(&self, until: Option<Instant>);

    /// Blocks the calling thread for that long.
    fn sleep(&self, duration: Duration);

    /// Called before a lock is acquired, and during long work: other threads may run first.
    fn step(&self) {}
}

/// The real operating system.
#[derive(Debug, Clone, Copy, Default)]
pub struct Os;

/// A parked thread.
struct Parked(Thread);

impl Wake for Parked {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl System for Os {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> std::io::Result<Option<JoinHandle<()>>> {
        std::thread::Builder::new().name(name).spawn(body).map(Some)
    }

    fn current(&self) -> Waker {
        Arc::new(Parked(std::thread::current())).into()
    }

    fn park(&self, until: Option<Instant>) {
        match until {
            None => std::thread::park(),
            Some(until) => std::thread::park_timeout(until.saturating_duration_since(Instant::now())),
        }
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}

/// A fair lock that may be held for seconds and across blocking calls: threads get it in order of arrival.
#[derive(Debug)]
pub struct Turns {
    system: Arc<dyn System>,
    state: Mutex<Turn>,
}

#[derive(Debug, Default)]
struct Turn {
    /// The number for the next thread that waits, and the number whose turn it is.
    next: u64,
    now: u64,
    waiting: VecDeque<Waker>,
}

/// Guard of [`Turns`]; released on drop, also by a panic.
#[derive(Debug)]
pub struct MyTurn<'a>(&'a Turns);

impl Turns {
    /// An unlocked lock.
    pub fn new(system: Arc<dyn System>) -> Self {
        Self { system, state: Mutex::default() }
    }

    /// Blocks until all threads that came before are done.
    pub fn wait(&self) -> MyTurn<'_> {
        let mut state = self.lock();
        let mine = state.next;
        state.next += 1;
        while state.now != mine {
            state.waiting.push_back(self.system.current());
            drop(state);
            self.system.park(None);
            state = self.lock();
        }
        MyTurn(self)
    }

    fn lock(&self) -> MutexGuard<'_, Turn> {
        self.system.step();
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for MyTurn<'_> {
    fn drop(&mut self) {
        // without `step`: a thread that unwinds also runs this
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.now += 1;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        // there are few waiters: each checks whether it is its turn
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_the_turn_and_a_panic_ends_it() {
        let turns = Turns::new(Arc::new(Os));
        let inside = Mutex::new(());
        std::thread::scope(|scope| {
            for i in 0..8 {
                let (turns, inside) = (&turns, &inside);
                scope.spawn(move || {
                    for round in 0..100 {
                        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                            let _mine = turns.wait();
                            let _alone = inside.try_lock().unwrap_or_else(|e| match e {
                                std::sync::TryLockError::Poisoned(poisoned) => poisoned.into_inner(),
                                std::sync::TryLockError::WouldBlock => panic!("two at once"),
                            });
                            if i == 0 && round % 10 == 0 {
                                std::panic::resume_unwind(Box::new(()));
                            }
                        }));
                    }
                });
            }
        });
        let state = turns.state.lock().unwrap_or_else(PoisonError::into_inner);
        assert_eq!((state.next, state.now), (800, 800));
    }
}
