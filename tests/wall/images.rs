//! Images of a few kilobytes and many millions of pixels, from many callers at once.

use std::time::{Duration, Instant};

use super::{MIB, under_attack};
use crate::bombs::{Bomb, bombs};
use crate::fakes::eventually;
use crate::process::{Server, ask};

/// Callers at once.
const CALLERS: usize = 64;

/// Whatever comes: memory stays within `--decode-memory`, and other callers are served between the large images.
#[test]
fn many_large_images_wait_for_each_other() {
    let bombs = bombs(8000);
    let server = Server::start(&["--request-timeout", "20s"]);
    let cat = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/cat.jpg")).unwrap();
    let post = |body: &[u8]| ask(server.http, "POST", "/v1/classify", &[], body).map(|answer| answer.status);
    post(&cat).unwrap();
    let ((statuses, slowest), cost) = under_attack(&server, || {
        std::thread::scope(|scope| {
            let callers: Vec<_> = (0..CALLERS)
                .map(|i| {
                    let Bomb { what, bytes, accepted } = &bombs[i % bombs.len()];
                    scope.spawn(move || (*what, *accepted, post(bytes).unwrap_or(0)))
                })
                .collect();
            // a small image needs little memory, which large ones leave it
            let mut slowest = Duration::ZERO;
            while callers.iter().any(|caller| !caller.is_finished()) {
                let asked = Instant::now();
                let status = post(&cat).unwrap();
                assert!(matches!(status, 200 | 429), "a small image was answered {status}");
                slowest = slowest.max(asked.elapsed());
                std::thread::sleep(Duration::from_millis(50));
            }
            let statuses: Vec<_> = callers.into_iter().map(|caller| caller.join().unwrap()).collect();
            (statuses, slowest)
        })
    });
    println!("{statuses:?}\nslowest small image {slowest:?}, {cost:?}");
    for (what, accepted, status) in &statuses {
        // late, or more than the queue takes: never broken
        let expected: &[u16] = if *accepted { &[200, 429, 504] } else { &[413, 429, 504] };
        assert!(expected.contains(status), "{what}: {status}");
    }
    assert!(statuses.iter().any(|(_, accepted, status)| *accepted && *status == 200));
    assert!(statuses.iter().any(|(_, accepted, status)| !accepted && *status == 413));
    // 256 MiB to decode in, the bodies themselves, and what the allocator keeps
    assert!(cost.growth < (256 + 64) * MIB, "{cost:?}");
    assert_eq!(cost.failed, 0, "{cost:?}");
    assert!(slowest < Duration::from_secs(10), "{slowest:?}");
    let none_left = || {
        let metrics = ask(server.admin, "GET", "/metrics", &[], b"").unwrap();
        metrics.body.contains("\nnfold_decode_memory_bytes 0\n")
    };
    eventually("all memory is given back", none_left);
}
