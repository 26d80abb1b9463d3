//! Budget of memory for images that are being decoded, over all threads of the process.
//!
//! Limits on one image can't bound the sum, since every thread may decode one. An image's need is known from its header
//! (see `Decoder::needs`), so it is claimed before anything is allocated, and released when the pixels have become a
//! tensor. Large images that don't fit together are admitted in order of arrival; small images have a reserve that
//! large ones can't use, and overtake them. Knows no format and no queue.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// An image is small if it needs at most this fraction of the memory: 1 / `SMALL`.
const SMALL: u64 = 16;
/// Fraction of the memory that is reserved for small images: 1 / `RESERVE`.
const RESERVE: u64 = 8;

/// The budget, shared by all threads that decode.
#[derive(Debug)]
pub struct DecodeMemory {
    total: u64,
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    small: u64,
    large: u64,
    /// Turns of waiting large images, first come, first served.
    waiting: VecDeque<u64>,
    next_turn: u64,
}

impl DecodeMemory {
    /// Default of `nfold serve` and `nfold classify`: 256 MiB.
    pub const DEFAULT: u64 = 256 << 20;

    /// A budget of `bytes`.
    pub fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self { total: bytes.max(RESERVE), state: Mutex::default(), freed: Condvar::new() })
    }

    /// Most bytes that one image may need; a larger one could never be decoded.
    pub fn largest(&self) -> u64 {
        self.total - self.total / RESERVE
    }

    /// Bytes claimed now.
    pub fn used(&self) -> u64 {
        let state = self.lock();
        state.small + state.large
    }

    /// A claim on `bytes`, capped at [`largest`](Self::largest). It holds no memory yet.
    pub fn claim(self: &Arc<Self>, bytes: u64) -> Claim {
        Claim { memory: self.clone(), bytes: bytes.min(self.largest()), turn: None }
    }

    fn is_small(&self, bytes: u64) -> bool {
        bytes <= self.total / SMALL
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // no code that can panic runs under the lock, so a poisoned state is sound
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory that an image needs but doesn't hold yet. Dropping the claim gives up its turn.
#[derive(Debug)]
pub struct Claim {
    memory: Arc<DecodeMemory>,
    bytes: u64,
    /// A large image's turn, if it waits.
    turn: Option<u64>,
}

impl Claim {
    /// Takes the memory if it fits and no other large image is ahead; otherwise a large image keeps its turn.
    pub fn try_take(&mut self) -> Option<Share> {
        let memory = self.memory.clone();
        let mut state = memory.lock();
        self.try_claim(&mut state)
    }

    /// Takes the memory, blocking until it fits.
    pub fn wait(mut self) -> Share {
        let memory = self.memory.clone();
        let mut state = memory.lock();
        loop {
            match self.try_claim(&mut state) {
                Some(share) => return share,
                None => state = memory.freed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn try_claim(&mut self, state: &mut State) -> Option<Share> {
        let (total, bytes) = (self.memory.total, self.bytes);
        let small = self.memory.is_small(bytes);
        let fits = if small {
            // while a large image waits, small ones are limited to their reserve, so that it isn't starved
            let limit = if state.waiting.is_empty() { total - state.large } else { total / RESERVE };
            state.small + bytes <= limit
        } else {
            let turn = match self.turn {
                Some(turn) => turn,
                None => {
                    let turn = state.next_turn;
                    state.next_turn += 1;
                    state.waiting.push_back(turn);
                    *self.turn.insert(turn)
                }
            };
            let first = state.waiting.front() == Some(&turn);
            first && state.large + bytes <= self.memory.largest() && state.small + state.large + bytes <= total
        };
        if !fits {
            return None;
        }
        if small {
            state.small += bytes;
        } else {
            state.large += bytes;
            state.waiting.pop_front();
            self.turn = None;
            // the next one may fit too
            self.memory.freed.notify_all();
        }
        Some(Share { memory: self.memory.clone(), bytes })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let Some(turn) = self.turn else { return };
        self.memory.lock().waiting.retain(|&other| other != turn);
        self.memory.freed.notify_all();
    }
}

/// Memory that an image holds; released on drop.
#[derive(Debug)]
pub struct Share {
    memory: Arc<DecodeMemory>,
    bytes: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = self.memory.lock();
        if self.memory.is_small(self.bytes) {
            state.small -= self.bytes;
        } else {
            state.large -= self.bytes;
        }
        drop(state);
        self.memory.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn large_images_wait_in_line_and_small_ones_pass() {
        let memory = DecodeMemory::new(256 * MIB);
        let first = memory.claim(200 * MIB).try_take().expect("there is room");
        let mut second = memory.claim(100 * MIB);
        let mut third = memory.claim(20 * MIB);
        assert!(second.try_take().is_none());
        assert!(third.try_take().is_none(), "it would fit, but the second came before");
        let small: Vec<Share> = (0..4).map(|_| memory.claim(8 * MIB).try_take().expect("there is room")).collect();
        assert!(memory.claim(MIB).try_take().is_none(), "small images have their part while a large one waits");
        assert_eq!(memory.used(), 232 * MIB);
        drop(first);
        assert!(third.try_take().is_none());
        let second = second.try_take().expect("there is room");
        let third = third.try_take().expect("there is room");
        assert_eq!(memory.used(), 152 * MIB);
        drop((second, third, small));
        assert_eq!(memory.used(), 0);
    }

    #[test]
    fn an_image_that_just_fits_is_served_and_a_byte_more_waits() {
        let memory = DecodeMemory::new(256 * MIB);
        let all = memory.claim(1000 * MIB).try_take().expect("what needs more has all that one image may have");
        assert_eq!(memory.used(), 224 * MIB);
        let mut next = memory.claim(20 * MIB);
        assert!(next.try_take().is_none());
        let small = [16, 16].map(|mib| memory.claim(mib * MIB).try_take().expect("a sixteenth is small, and passes"));
        drop((all, next));
        assert!(memory.claim(224 * MIB + 1).try_take().is_some(), "beside the part for small ones");
        let small = [small, [16, 16].map(|mib| memory.claim(mib * MIB).try_take().expect("nobody waits"))];
        assert!(memory.claim(192 * MIB + 1).try_take().is_none(), "small ones may have more than their part");
        let large = memory.claim(192 * MIB).try_take().expect("there is room");
        drop(small);
        assert!(memory.claim(32 * MIB + 1).try_take().is_none(), "there is room, but it is for small ones");
        assert!(memory.claim(32 * MIB).try_take().is_some());
        drop(large);
    }

    #[test]
    fn who_leaves_the_line_holds_up_nobody() {
        let memory = DecodeMemory::new(256 * MIB);
        let held = memory.claim(200 * MIB).try_take().expect("there is room");
        let mut gone = memory.claim(224 * MIB);
        let mut next = memory.claim(20 * MIB);
        assert!(gone.try_take().is_none() && next.try_take().is_none());
        drop(gone);
        assert!(next.try_take().is_some());
        drop(held);
    }

    #[test]
    fn threads_share_what_there_is() {
        let memory = DecodeMemory::new(100 * MIB);
        let threads: Vec<_> = (0..16u64)
            .map(|i| {
                let memory = memory.clone();
                std::thread::spawn(move || {
                    for n in 0..200 {
                        let share = memory.claim((1 + (i * 31 + n * 7) % 87) * MIB).wait();
                        assert!(memory.used() <= 100 * MIB);
                        drop(share);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().expect("no thread fails"));
        assert_eq!(memory.used(), 0);
    }
}
