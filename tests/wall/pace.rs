//! Clients that come straight back after a refusal, by the hundred: those that are answered don't pay for them.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::{MIB, metric, under_attack};
use crate::process::{Server, connect, data, exchange};

/// Many more clients than an engine can answer, each of which tries again at once, whatever it is told.
fn crowd(server: &Server, clients: usize, time: Duration) -> (usize, usize, Duration) {
    let (over, answered, refused) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let (cat, http) = (&data("cat.jpg"), server.http);
    let mut slowest = Duration::ZERO;
    std::thread::scope(|scope| {
        let client = || {
            let mut kept = connect(http).unwrap();
            let mut slowest = Duration::ZERO;
            while !over.load(Ordering::Relaxed) {
                let asked = Instant::now();
                let answer = exchange(&mut kept, "POST", "/v1/classify", &[], cat).unwrap();
                match answer.status {
                    200 => answered.fetch_add(1, Ordering::Relaxed),
                    429 => {
                        assert!(answer.header("retry-after").is_some());
                        slowest = slowest.max(asked.elapsed());
                        refused.fetch_add(1, Ordering::Relaxed)
                    }
                    other => panic!("{other}: {}", answer.body),
                };
            }
            slowest
        };
        let clients: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        std::thread::sleep(time);
        over.store(true, Ordering::Relaxed);
        for client in clients {
            slowest = slowest.max(client.join().unwrap());
        }
    });
    (answered.into_inner(), refused.into_inner(), slowest)
}

#[test]
fn who_comes_straight_back_waits_a_moment() {
    const CLIENTS: usize = 200;
    const TIME: Duration = Duration::from_secs(4);
    // a queue of four: nearly everybody is refused
    let server = Server::start(&["--workers", "1", "--elastic-threads", "0", "--queue-limit", "4"]);
    let ((answered, refused, slowest), cost) = under_attack(&server, || crowd(&server, CLIENTS, TIME));
    println!("{answered} answered, {refused} refused, the slowest after {slowest:?}; {cost:?}");
    assert!(answered > 20, "{answered}");
    // the first refusal of each goes out at once, then 200 a second do
    let most = CLIENTS + 200 * (TIME.as_secs() as usize + 2);
    assert!((CLIENTS..most).contains(&refused), "{refused} refused, of {most}");
    assert!(slowest < Duration::from_secs(5), "{slowest:?}: held for a second at most, on a busy machine");
    assert!(cost.growth < 64 * MIB, "{cost:?}");
    assert_eq!(cost.failed, 0, "{cost:?}");
    crate::fakes::eventually("nothing is held", || metric(server.admin, "nfold_held_refusals") == 0);
}
