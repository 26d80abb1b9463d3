//! Fuzzes every parser of untrusted input (a door): images by format, checkpoints, manifests, forms, JSON, both
//! framings of the Open Inference Protocol, gRPC messages, heads of HTTP requests.
//!
//! Every door has seeds (real input), an oracle for the outcome, and one for memory: peak bytes and allocations,
//! measured by a counting allocator, relative to the input's length. Inputs are seeds, mutated and spliced by a seeded
//! generator; an input with a new outcome becomes a seed. That covers less than libFuzzer, but runs on stable Rust,
//! inside the crate, at doors that are private; so the smoke run is part of `make test`.
//!
//! `make fuzz TIME=60` runs each door for that many seconds. Failing inputs are written to `target/fuzz/DOOR`; once
//! fixed, they go to `tests/fuzz/found/DOOR/`, whose files are checked first in every run.

mod checkpoints;
mod pictures;

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use allocation_counter::AllocationInfo;

use crate::random::Random;

/// Mutated inputs of a smoke run, for each parser.
const SMOKE: usize = 2000;
/// Most seeds kept.
const POOL: usize = 2000;

/// A parser of untrusted input.
pub struct Door {
    /// Name of the test, and of the folder of inputs found.
    pub name: &'static str,
    /// Real input.
    pub seeds: Vec<Vec<u8>>,
    /// Tokens of the input's language.
    pub words: &'static [&'static str],
    /// Longest generated input.
    pub longest: usize,
}

/// The outcome of an input, and its cost.
pub struct Verdict {
    /// Outcomes that differ in more than numbers count as different.
    pub outcome: String,
    pub cost: AllocationInfo,
    /// Most bytes that may have been allocated at once, and most allocations.
    pub bytes: usize,
    pub allocations: usize,
}

impl Verdict {
    fn check(&self) {
        let AllocationInfo { bytes_max, count_total, .. } = self.cost;
        assert!(bytes_max <= self.bytes as u64, "{bytes_max} bytes held, {} are right: {}", self.bytes, self.outcome);
        let most = self.allocations;
        assert!(count_total <= most as u64, "{count_total} allocations, {most} are right: {}", self.outcome);
    }
}

/// Runs `work` and counts this thread's allocations meanwhile.
pub fn counted<T>(work: impl FnOnce() -> T) -> (T, AllocationInfo) {
    let mut done = None;
    let cost = allocation_counter::measure(|| done = Some(work()));
    (done.expect("it was run"), cost)
}

/// Whether a text for users and clients is neither empty nor a page long. (`printable` removes control characters where
/// it is shown.)
pub fn is_readable(text: &str) -> bool {
    !text.is_empty() && text.chars().count() <= 5000
}

/// A random length up to `most`, mostly small.
fn length(random: &mut Random, most: usize) -> usize {
    let bits = random.index(most.max(1).ilog2() as usize + 2);
    random.index(1 << bits).min(most)
}

const NUMBERS: [u64; 16] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 40,
    i64::MAX as u64,
    u64::MAX,
];

/// Changes an input in one to eight ways.
fn mutate(random: &mut Random, input: &mut Vec<u8>, pool: &[Vec<u8>], door: &Door) {
    for _ in 0..1 + random.index(8) {
        let at = random.index(input.len() + 1);
        let end = at + length(random, input.len() - at);
        match random.index(12) {
            0 | 1 if !input.is_empty() => {
                let at = random.index(input.len());
                input[at] ^= 1 << random.index(8);
            }
            2 if !input.is_empty() => {
                let at = random.index(input.len());
                input[at] = random.below(256) as u8;
            }
            3 | 4 => {
                // a number, in any width and order
                let bytes = NUMBERS[random.index(NUMBERS.len())].wrapping_sub(random.index(3) as u64 & 1).to_le_bytes();
                let mut bytes = bytes[..1 << random.index(4)].to_vec();
                if random.index(2) == 0 {
                    bytes.reverse();
                }
                let end = (at + bytes.len()).min(input.len());
                input.splice(at..end, bytes);
            }
            5 => {
                input.drain(at..end);
            }
            6 => {
                // repeat it, once or very often
                let part = input[at..end].to_vec();
                let times = if random.index(8) == 0 { 1 + random.index(2000) } else { 1 };
                let room = door.longest.saturating_sub(input.len()) / part.len().max(1);
                input.splice(at..at, part.repeat(times.min(room)));
            }
            7 | 8 if !door.words.is_empty() => {
                let word = door.words[random.index(door.words.len())].as_bytes();
                let end = if random.index(2) == 0 { at } else { end };
                input.splice(at..end, word.iter().copied());
            }
            9 => {
                // digits of a number
                if let Some(from) = input.iter().skip(at).position(u8::is_ascii_digit).map(|found| at + found) {
                    let digits = input[from..].iter().take_while(|b| b.is_ascii_digit()).count();
                    let number = NUMBERS[random.index(NUMBERS.len())];
                    input.splice(from..from + digits, number.to_string().into_bytes());
                }
            }
            10 => {
                let other = &pool[random.index(pool.len())];
                let from = random.index(other.len() + 1);
                let part = &other[from..from + length(random, other.len() - from)];
                input.splice(at..end, part.iter().copied());
            }
            _ => input.truncate(if random.index(4) == 0 { at } else { input.len() }),
        }
    }
    input.truncate(door.longest);
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|e| panic!("{variable} is no number: {e}")))
}

/// The outcome with its digits masked.
fn shape(outcome: &str) -> String {
    let mut shape = String::new();
    for c in outcome.chars().take(200) {
        let c = if c.is_ascii_digit() { '0' } else { c };
        if !(c == '0' && shape.ends_with('0')) {
            shape.push(c);
        }
    }
    shape
}

/// The files of a folder, sorted by name; none if there is no folder.
pub fn files(folder: &Path, largest: usize) -> Vec<(PathBuf, Vec<u8>)> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<_> =
        entries.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_file()).collect();
    paths.sort();
    let read = |path: PathBuf| (path.clone(), std::fs::read(path).expect("a file"));
    paths.into_iter().map(read).filter(|(_, bytes)| bytes.len() <= largest).collect()
}

/// The crate's root folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

/// Checks the inputs found before, the seeds, and then mutations of them.
pub fn run(door: &Door, judge: impl Fn(&[u8]) -> Verdict) {
    let started = Instant::now();
    let time = number("NFOLD_FUZZ_SECONDS").map(Duration::from_secs);
    let mut random = Random::new(number("NFOLD_FUZZ_SEED").unwrap_or(1));
    let mut seen = HashSet::new();
    let mut hardest = (0, 0);
    let mut try_one = |input: &[u8], whence: &dyn std::fmt::Display| -> bool {
        let judged = catch_unwind(AssertUnwindSafe(|| {
            let verdict = judge(input);
            verdict.check();
            verdict
        }));
        match judged {
            Ok(verdict) => {
                hardest = (hardest.0.max(verdict.cost.bytes_max), hardest.1.max(verdict.cost.count_total));
                seen.len() < POOL && seen.insert(shape(&verdict.outcome))
            }
            Err(panic) => {
                let folder = root().join("target/fuzz");
                std::fs::create_dir_all(&folder).expect("a folder");
                let kept = folder.join(door.name);
                std::fs::write(&kept, input).expect("a file");
                let said = crate::panics::message(panic.as_ref());
                panic!("{} ({whence}), kept as {}: {said}", door.name, kept.display());
            }
        }
    };
    for (path, bytes) in files(&root().join("tests/fuzz/found").join(door.name), usize::MAX) {
        try_one(&bytes, &path.display());
    }
    for (i, seed) in door.seeds.iter().enumerate() {
        try_one(seed, &format_args!("seed {i}"));
    }
    assert!(!door.seeds.is_empty(), "{} has no seeds", door.name);
    let mut pool = door.seeds.clone();
    let mut count = 0;
    let over = |count: usize| time.map_or(count >= SMOKE, |time| started.elapsed() >= time);
    while !over(count) {
        let mut input = pool[random.index(pool.len())].clone();
        mutate(&mut random, &mut input, &pool, door);
        count += 1;
        if try_one(&input, &format_args!("execution {count}")) {
            pool.push(input);
        }
    }
    println!(
        "fuzz {}: {count} executions in {:.1} s, {} outcomes, at most {} bytes held and {} allocations",
        door.name,
        started.elapsed().as_secs_f64(),
        seen.len(),
        hardest.0,
        hardest.1
    );
}
