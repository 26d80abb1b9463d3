//! Pickles of any bytes: plain nodes, or an error that a person may read; no panic, no recursion, bounded memory.
//!
//! `cargo +nightly fuzz run pickle -- -max_total_time=600 -rss_limit_mb=512`
#![no_main]

use libfuzzer_sys::fuzz_target;
use nfold::checkpoint::pickle;

fuzz_target!(|bytes: &[u8]| {
    let mut budget = pickle::LARGEST;
    match pickle::read(&mut &bytes[..], &mut budget) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok((arena, root)) => {
            assert!(arena.nodes().len() <= bytes.len());
            let _ = arena.get(root);
        }
    }
});
