//! Hours of mixed load in minutes: memory must not grow. What would show it if it did is tried on a client that really
//! takes memory, or a silent test would prove nothing.

use std::io::Write as _;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::process::{Server, ask, connect, data, exchange};

/// Clients of every kind, one thread each, until `over`. Counts the photographs answered.
fn load(server: &Server, over: &AtomicBool, answered: &AtomicUsize) {
    let cat = data("cat.jpg");
    let (http, admin, cat) = (server.http, server.admin, &cat);
    let until_over = |mut once: Box<dyn FnMut() + Send>| {
        move || {
            while !over.load(Ordering::Relaxed) {
                once();
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let mut kept = connect(http).unwrap();
            scope.spawn(until_over(Box::new(move || {
                let answer = exchange(&mut kept, "POST", "/v1/classify", &[], cat).unwrap();
                assert_eq!(answer.status, 200);
                answered.fetch_add(1, Ordering::Relaxed);
            })));
        }
        // half a photograph, no photograph, a client that leaves, a path that does not exist, a look at the metrics
        scope.spawn(until_over(Box::new(move || {
            assert_eq!(ask(http, "POST", "/v1/classify", &[], &cat[..cat.len() / 2]).unwrap().status, 400);
            assert_eq!(ask(http, "POST", "/v1/classify", &[], b"no photograph").unwrap().status, 415);
            let mut leaver = TcpStream::connect(http).unwrap();
            write!(leaver, "POST /v1/classify HTTP/1.1\r\nhost: t\r\ncontent-length: {}\r\n\r\n", cat.len()).unwrap();
            leaver.write_all(&cat[..1000]).unwrap();
            drop(leaver);
            assert_eq!(ask(http, "GET", "/nowhere", &[], b"").unwrap().status, 404);
            assert_eq!(ask(admin, "GET", "/metrics", &[], b"").unwrap().status, 200);
        })));
    });
}

fn resident(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    text.split(' ').nth(1).unwrap().parse::<f64>().unwrap() * 4096.0
}

/// Median of the slopes between the first and the second half of the samples, bytes a second: one jump is no trend.
fn slope(samples: &[(f64, f64)]) -> f64 {
    let (first, second) = samples.split_at(samples.len() / 2);
    let mut slopes: Vec<f64> =
        first.iter().zip(second).map(|((t0, bytes0), (t1, bytes1))| (bytes1 - bytes0) / (t1 - t0)).collect();
    slopes.sort_by(f64::total_cmp);
    slopes[slopes.len() / 2]
}

/// Watches the server's memory for `seconds`, after a first fifth in which it may grow.
fn watch(server: &Server, seconds: f64) -> f64 {
    std::thread::sleep(Duration::from_secs_f64(seconds / 5.0));
    let (started, mut samples) = (Instant::now(), Vec::new());
    while started.elapsed().as_secs_f64() < seconds {
        samples.push((started.elapsed().as_secs_f64(), resident(server.pid())));
        std::thread::sleep(Duration::from_millis(50));
    }
    slope(&samples)
}

/// `limit` in bytes a second.
fn soak(seconds: f64, limit: f64) {
    let server = Server::start(&["--request-timeout", "1h"]);
    let (over, stop, answered) = (AtomicBool::new(false), AtomicBool::new(false), AtomicUsize::new(0));
    let (calm, taken) = std::thread::scope(|scope| {
        let loading = scope.spawn(|| load(&server, &over, &answered));
        let calm = watch(&server, seconds);
        // the control: a client that leaves half a request of 64 KiB open twenty times a second, 1.3 MB/s
        let taker = scope.spawn(|| {
            let mut held = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let mut stream = connect(server.http).unwrap();
                write!(stream, "POST /v1/classify HTTP/1.1\r\nhost: t\r\ncontent-length: 65537\r\n\r\n").unwrap();
                stream.write_all(&[1; 65536]).unwrap();
                held.push(stream);
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let taken = watch(&server, 4.0);
        stop.store(true, Ordering::Relaxed);
        over.store(true, Ordering::Relaxed);
        taker.join().unwrap();
        loading.join().unwrap();
        (calm, taken)
    });
    let answered = answered.into_inner();
    println!("{answered} photographs answered; memory grew by {:.1} KB/s, control {:.0} KB/s", calm / 1e3, taken / 1e3);
    assert!(answered > 10, "{answered} photographs");
    assert!(calm < limit, "memory grows by {calm:.0} bytes a second");
    assert!(taken > 2.0 * limit, "the control is not seen: {taken:.0} bytes a second");
}

#[test]
fn memory_does_not_grow() {
    soak(8.0, 300e3);
}

#[test]
#[ignore = "ten minutes"]
fn memory_does_not_grow_in_ten_minutes() {
    soak(600.0, 10e3);
}
