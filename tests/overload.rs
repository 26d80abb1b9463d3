//! Far more load than capacity: the server still answers as many requests as it can, in time, refuses the rest at once,
//! and recovers as soon as the load is gone.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use nfold::bench::load::answer::Outcome;
use nfold::bench::load::protocol::{self, Protocol};
use nfold::bench::load::record::Step;
use nfold::bench::load::schedule::Arrivals;
use nfold::bench::load::{self, Plan};
use nfold::infer::job::SchedulerOptions;
use nfold::server::Options;

use crate::fakes::{eventually, options};
use crate::serve::{TestServer, ask, local, png, start};

/// Longest a request may take.
const DEADLINE: Duration = Duration::from_secs(1);
/// One image per engine run: two engines answer at most 100 per second.
const RUN: Duration = Duration::from_millis(20);

fn measure(server: &TestServer, connections: &[usize], rates: &[f64], window_s: f64) -> Vec<Step> {
    let plan = Plan {
        server: server.http.to_string(),
        protocol: Protocol::Classify,
        tensors: protocol::Tensors::default(),
        model: None,
        connections: connections.to_vec(),
        rates: rates.to_vec(),
        sweep: false,
        arrivals: Arrivals::Poisson,
        warmup_s: 0.5,
        window_s,
        timeout_s: 20.0,
        slo_ms: DEADLINE.as_secs_f64() * 1e3,
        max_lag_ms: 1000.0,
        seed: 1,
    };
    let payloads = protocol::classify(vec![png(1), png(2)], None).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(load::run(&plan, payloads, |_| {})).steps
}

fn overload(window_s: f64) {
    let scheduler = SchedulerOptions { max_queue_wait: Duration::from_millis(300), ..options(2, 1, 256) };
    let server = start(Options { request_timeout: DEADLINE, ..local() }, scheduler);
    *server.strings.delay.lock().unwrap() = RUN;
    let most = measure(&server, &[8], &[], window_s).remove(0).goodput;
    assert!(most > 50.0, "{most}/s where 100/s are possible: this machine is too busy to measure on");
    for multiple in [2.0, 5.0, 10.0] {
        // other load on the machine can only worsen a result, so the best of three counts
        let mut tries = (0..3).map(|_| measure(&server, &[], &[multiple * most], window_s).remove(0));
        let step = tries.find(|step| step.goodput >= 0.95 * most);
        let step =
            step.unwrap_or_else(|| panic!("less than 0.95 times {most}/s at {multiple} times that load, thrice"));
        let [p50, p99] = [50, 99].map(|p| step.percentiles_ms[p]);
        println!(
            "{multiple} times {most:.0}/s: goodput {:.0}/s, p50 {p50:.0} ms, p99 {p99:.0} ms, {:?}",
            step.goodput, step.outcomes
        );
        assert!(p99 <= DEADLINE.as_secs_f64() * 1e3, "{multiple}: {step:?}");
        assert!(
            step.outcomes.keys().all(|o| matches!(o, Outcome::Ok | Outcome::Refused)),
            "{multiple}: nothing but answers and refusals: {step:?}"
        );
        assert!(step.outcomes[&Outcome::Refused] > 0, "{multiple}: it was no overload: {step:?}");
        // within a second it is as if nothing had been
        eventually("the queue is empty", || server.depth() == 0);
        let after = measure(&server, &[], &[0.3 * most], 1.0).remove(0);
        assert_eq!(after.outcomes.keys().collect::<Vec<_>>(), [&Outcome::Ok], "{after:?}");
        assert!(after.latency_ms.as_ref().unwrap().p50 < 3.0 * RUN.as_secs_f64() * 1e3, "{after:?}");
    }
    server.end().unwrap();
}

#[test]
fn under_overload_as_many_are_answered_as_can_be_and_in_time() {
    overload(1.5);
}

#[test]
#[ignore = "three minutes: make soak"]
fn long_overload() {
    overload(30.0);
}

#[test]
fn bodies_share_a_bounded_memory_and_give_it_back() {
    const MIB: usize = 1 << 20;
    let server = Options { body_limit: 2 * MIB, body_memory: 3 * MIB, ..local() };
    let server = start(server, options(1, 1, 16));
    let big = vec![b'x'; MIB];
    // two bodies stop just before their end
    let head = |length: usize| format!("POST /v1/classify HTTP/1.1\r\nhost: t\r\ncontent-length: {length}\r\n\r\n");
    let mut halves: Vec<_> = (0..2)
        .map(|_| {
            let mut stream = std::net::TcpStream::connect(server.http).unwrap();
            stream.write_all(head(MIB + 1).as_bytes()).unwrap();
            stream.write_all(&big).unwrap();
            stream
        })
        .collect();
    let refused = |length: usize| ask(server.http, "POST /v1/classify", &[], &vec![b'x'; length]);
    eventually("their bytes are in", || server.metrics.body_bytes.get() == 2 * MIB as i64);
    let answer = refused(MIB + MIB / 2);
    assert_eq!(answer.error(), (429, "overloaded".into()));
    assert!(answer.headers.contains_key("retry-after") && answer.body.contains("--body-memory"), "{answer:?}");
    // a body that does not say its length is stopped on its way
    let mut chunked = std::net::TcpStream::connect(server.http).unwrap();
    chunked.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    chunked.write_all(b"POST /v1/classify HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n").unwrap();
    let _ = chunked.write_all(format!("{MIB:x}\r\n").as_bytes()).and_then(|()| chunked.write_all(&big));
    let _ = chunked.write_all(format!("\r\n{MIB:x}\r\n").as_bytes()).and_then(|()| chunked.write_all(&big));
    let mut said = [0; 12];
    chunked.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"HTTP/1.1 429");
    // small requests are still accepted
    assert_eq!(server.classify("", &[], &png(255)).status, 200);
    // the budget is released, by an answer or when the client disconnects
    halves[0].write_all(b"x").unwrap();
    let mut said = [0; 12];
    halves[0].read_exact(&mut said).unwrap();
    assert_eq!(&said, b"HTTP/1.1 415", "it is no image");
    drop(halves);
    eventually("all of it is back", || server.metrics.body_bytes.get() == 0);
    assert_eq!(refused(2 * MIB).error(), (415, "unsupported_media_type".into()));
    assert_eq!(refused(2 * MIB + 1).error(), (413, "body_too_large".into()));
    server.end().unwrap();
}

/// A client that is still sending is told at once that there is no room, however large its body is.
#[test]
fn refusals_do_not_wait_for_their_bodies() {
    let server = start(local(), options(1, 1, 2));
    *server.strings.delay.lock().unwrap() = Duration::from_secs(2);
    let body = png(1);
    let busy: Vec<_> = (0..2)
        .map(|_| {
            let (http, body) = (server.http, body.clone());
            std::thread::spawn(move || ask(http, "POST /v1/classify", &[], &body).status)
        })
        .collect();
    eventually("the queue is full", || server.depth() == 2);
    for path in ["/v1/classify", "/v2/models/m/infer"] {
        let mut stream = std::net::TcpStream::connect(server.http).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // with `Expect: 100-continue`, so that nothing is discarded before the refusal
        let head =
            format!("POST {path} HTTP/1.1\r\nhost: t\r\nexpect: 100-continue\r\ncontent-length: 1000000\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        let mut said = [0; 12];
        stream.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"HTTP/1.1 429", "{path}");
    }
    assert_eq!(server.metrics.body_bytes.get() as usize, 2 * body.len());
    for client in busy {
        assert_eq!(client.join().unwrap(), 200);
    }
    server.end().unwrap();
}
