//! Time, threads and waiting, driven by a seed.
//!
//! A thread is a coroutine; one runs at a time, and yields only where the scheduler would lock, park or sleep. The next
//! one is chosen at random. Time passes only when no thread can run, or when a thread is delayed at random (as by
//! decoding, page faults, or load of other processes). So a schedule is a function of its seed.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Wake, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use generator::{Generator, Gn};

use crate::infer::system::System;
use crate::random::Random;

/// Longest delay of a thread at a time.
pub const HOLD_UP: Duration = Duration::from_millis(3);

/// More turns than this without time passing mean an endless loop.
const CIRCLES: usize = 20_000;

/// Size of a thread's stack, in words.
const STACK: usize = 0x4000;

type Body = Box<dyn FnOnce() + Send>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Ready,
    /// Until it is woken, or until that moment.
    Parked(Option<Duration>),
    Asleep(Duration),
    Ended,
}

#[derive(Debug)]
struct Task {
    name: String,
    status: Status,
    /// A wake-up that arrived before it parked.
    token: bool,
}

struct State {
    now: Duration,
    tasks: Vec<Task>,
    current: usize,
    random: Random,
    /// Threads that were started and have not run yet.
    born: Vec<(usize, Body)>,
    panics: Vec<String>,
}

/// The system of one schedule.
pub struct Simulated {
    start: Instant,
    state: Mutex<State>,
    myself: Weak<Self>,
}

impl std::fmt::Debug for Simulated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Simulated")
    }
}

struct ToWake {
    system: Weak<Simulated>,
    task: usize,
}

impl Wake for ToWake {
    fn wake(self: Arc<Self>) {
        let Some(system) = self.system.upgrade() else { return };
        let mut state = system.lock();
        let task = &mut state.tasks[self.task];
        match task.status {
            Status::Parked(_) => task.status = Status::Ready,
            _ => task.token = true,
        }
    }
}

impl Simulated {
    pub fn new(seed: u64) -> Arc<Self> {
        let state = State {
            now: Duration::ZERO,
            tasks: Vec::new(),
            current: 0,
            random: Random::new(seed),
            born: Vec::new(),
            panics: Vec::new(),
        };
        Arc::new_cyclic(|myself| Self { start: Instant::now(), state: Mutex::new(state), myself: myself.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time since the beginning.
    pub fn elapsed(&self) -> Duration {
        self.lock().now
    }

    /// Starts a thread.
    pub fn start(&self, name: impl Into<String>, body: impl FnOnce() + Send + 'static) {
        let mut state = self.lock();
        let task = state.tasks.len();
        state.tasks.push(Task { name: name.into(), status: Status::Ready, token: false });
        state.born.push((task, Box::new(body)));
    }

    /// Runs all threads to their end, until no thread waits for time, or until that moment. Calls `at_rest` whenever no
    /// thread can run, before time passes. Returns the names of the threads that have not ended.
    pub fn run(&self, until: Duration, mut at_rest: impl FnMut() -> Result<(), String>) -> Result<Vec<String>, String> {
        let mut threads: BTreeMap<usize, Generator<'static, (), ()>> = BTreeMap::new();
        let mut turns = 0;
        let outcome = loop {
            for (task, body) in std::mem::take(&mut self.lock().born) {
                let (system, run) = (self.myself.clone(), move || {
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(body)) {
                        return Some(crate::panics::message(panic.as_ref()));
                    }
                    None
                });
                let body = move || {
                    let panicked = run();
                    let Some(system) = system.upgrade() else { return };
                    let mut state = system.lock();
                    state.tasks[task].status = Status::Ended;
                    let name = state.tasks[task].name.clone();
                    state.panics.extend(panicked.map(|text| format!("{name} panicked: {text}")));
                };
                threads.insert(task, Gn::<()>::new_opt(STACK, body));
            }
            let mut state = self.lock();
            if let Some(panic) = state.panics.pop() {
                break Err(panic);
            }
            let ready: Vec<usize> =
                (0..state.tasks.len()).filter(|&task| state.tasks[task].status == Status::Ready).collect();
            if !ready.is_empty() {
                turns += 1;
                if turns > CIRCLES {
                    let names: Vec<&str> = ready.iter().map(|&task| state.tasks[task].name.as_str()).collect();
                    break Err(format!("in circles, at {:?}: {}", state.now, names.join(", ")));
                }
                let chosen = ready[state.random.below(ready.len() as u64) as usize];
                state.current = chosen;
                drop(state);
                if let Some(thread) = threads.get_mut(&chosen) {
                    thread.resume();
                    if thread.is_done() {
                        threads.remove(&chosen);
                    }
                }
                continue;
            }
            drop(state);
            if let Err(error) = at_rest() {
                break Err(error);
            }
            let mut state = self.lock();
            let wakes = |task: &Task| match task.status {
                Status::Parked(until) => until,
                Status::Asleep(until) => Some(until),
                Status::Ready | Status::Ended => None,
            };
            let Some(next) = state.tasks.iter().filter_map(wakes).min().filter(|&next| next <= until) else {
                let left = state.tasks.iter().filter(|task| task.status != Status::Ended);
                break Ok(left.map(|task| task.name.clone()).collect());
            };
            state.now = state.now.max(next);
            turns = 0;
            for task in &mut state.tasks {
                if wakes(task).is_some_and(|at| at <= next) {
                    task.status = Status::Ready;
                }
            }
        };
        // stuck coroutines can't be unwound: the panic would be caught in the worker, which would continue
        threads.into_values().for_each(std::mem::forget);
        outcome
    }

    /// Lets other threads run; the calling thread continues once `status` allows.
    fn give_way(&self, status: Status) {
        let mut state = self.lock();
        let current = state.current;
        state.tasks[current].status = status;
        drop(state);
        // the recommended `scope` would have to be passed through the scheduler
        #[expect(deprecated)]
        generator::yield_with(());
    }

    /// Whether the caller is one of the threads, and able to yield.
    fn is_thread() -> bool {
        generator::is_generator() && !std::thread::panicking()
    }
}

impl System for Simulated {
    fn now(&self) -> Instant {
        self.start + self.lock().now
    }

    fn spawn(&self, name: String, body: Body) -> std::io::Result<Option<JoinHandle<()>>> {
        self.start(name, body);
        Ok(None)
    }

    fn current(&self) -> Waker {
        Arc::new(ToWake { system: self.myself.clone(), task: self.lock().current }).into()
    }

    fn park(&self, until: Option<Instant>) {
        let mut state = self.lock();
        let current = state.current;
        // one wake-up in 16 is spurious
        if std::mem::take(&mut state.tasks[current].token) || state.random.below(16) == 0 || !Self::is_thread() {
            return;
        }
        drop(state);
        self.give_way(Status::Parked(until.map(|until| until.saturating_duration_since(self.start))));
    }

    fn sleep(&self, duration: Duration) {
        if Self::is_thread() {
            let until = self.elapsed() + duration;
            self.give_way(Status::Asleep(until));
        }
    }

    fn step(&self) {
        if !Self::is_thread() {
            return;
        }
        let mut state = self.lock();
        let (lot, now) = (state.random.below(32), state.now);
        let held_up = HOLD_UP.mul_f64(state.random.below(100) as f64 / 100.0);
        drop(state);
        match lot {
            0 => self.give_way(Status::Asleep(now + held_up)),
            1..=12 => self.give_way(Status::Ready),
            _ => {}
        }
    }
}
