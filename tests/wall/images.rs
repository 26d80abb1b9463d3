//! Images of a few kilobytes and many millions of pixels, from many clients at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{MIB, alone, peak, under_attack};
use crate::bombs::{Bomb, bombs};
use crate::cli::project;
use crate::fakes::eventually;
use crate::process::{Server, ask};

/// Concurrent clients.
const CALLERS: usize = 64;

/// Memory stays within `--decode-memory`, and other clients are served between the large images.
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
        // timed out or refused, but never broken
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

/// The container's memory limit in bytes and the flags of its variables, from the Kubernetes manifests.
fn pod() -> (u64, Vec<String>) {
    let read = |file| std::fs::read_to_string(project(&format!("deploy/kubernetes/base/{file}"))).unwrap();
    let (deployment, env) = (read("deployment.yaml"), read("nfold.env"));
    let (_, container) = deployment.split_once("args: [serve]").unwrap();
    let between = |line: &str, from: &str, to: &str| -> Option<String> {
        Some(line.split_once(from)?.1.split_once(to)?.0.to_string())
    };
    let limit = container.lines().find_map(|line| between(line, "limits: { memory: ", "Gi }")).unwrap();
    let mut variables: Vec<(String, String)> =
        env.lines().filter_map(|line| line.split_once('=')).map(|(name, value)| (name.into(), value.into())).collect();
    let of_container = |line| Some((between(line, "{ name: ", ",")?, between(line, "value: \"", "\"")?));
    variables.extend(container.lines().filter_map(of_container));
    // where it is
    let elsewhere = ["NFOLD_REPOSITORY", "NFOLD_HTTP", "NFOLD_GRPC", "NFOLD_ADMIN", "NFOLD_LOG_FORMAT"];
    variables.retain(|(name, _)| name.starts_with("NFOLD_") && !elsewhere.contains(&name.as_str()));
    assert!(variables.len() > 5, "{variables:?}");
    let flag = |name: &str| name.replacen("NFOLD_", "--", 1).replace('_', "-").to_lowercase();
    let flags = variables.into_iter().flat_map(|(name, value)| [flag(&name), value]).collect();
    (limit.parse::<u64>().unwrap() << 30, flags)
}

/// Clients of each worst kind at once, beside uploads that use most of the body budget: the pod is not killed.
#[test]
fn whatever_comes_fits_into_the_pod() {
    let _alone = alone();
    let (limit, flags) = pod();
    let server = Server::start(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    let json = [("content-type", "application/json")];
    let upload = format!("{{\"images\":[{{\"b64\":\"{}\"}}]}}", "A".repeat(60 << 20));
    for Bomb { what, bytes, accepted } in bombs(8000) {
        let (statuses, cost) = under_attack(&server, || {
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        while !over.load(Ordering::Relaxed) {
                            let _ = ask(server.http, "POST", "/v1/classify", &json, upload.as_bytes());
                        }
                    });
                }
                let call = || ask(server.http, "POST", "/v1/classify", &[], &bytes).map_or(0, |answer| answer.status);
                let callers: Vec<_> = (0..CALLERS).map(|_| scope.spawn(call)).collect();
                let statuses: Vec<u16> = callers.into_iter().map(|caller| caller.join().unwrap()).collect();
                over.store(true, Ordering::Relaxed);
                statuses
            })
        });
        let peak = peak(server.pid());
        println!("{what}: {} MiB at most, {cost:?}, {statuses:?}", peak / MIB);
        assert!(peak < limit, "{what}: {} MiB of {}, {cost:?}", peak / MIB, limit / MIB);
        assert_eq!(cost.failed, 0, "{what}: {cost:?}");
        let expected: &[u16] = if accepted { &[200, 429, 504] } else { &[413, 429, 504] };
        assert!(statuses.iter().all(|status| expected.contains(status)), "{what}: {statuses:?}");
    }
}
