//! Hours of mixed load in minutes: memory must not grow. A control, a client that does use memory, proves that growth
//! would be seen.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::cli::with_demo;
use crate::connections::{frame, hello, request};
use crate::fakes::{SetOnDrop, eventually};
use crate::process::{Server, ask, connect, data, exchange};
use crate::wall::calls::{self, gzip};

/// Runs clients of every kind, one thread each, until `over`. Counts the photographs answered.
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
        // half a photograph, no photograph, a client that leaves, a path that does not exist, a scrape
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

/// A server whose memory is watched.
struct Watched {
    server: Server,
    /// Where `heap_in_use.c` writes.
    in_use: PathBuf,
}

/// Bytes at a moment.
struct Sample {
    at_s: f64,
    /// Allocated and not freed.
    in_use: f64,
    /// Resident, which includes what the allocator keeps.
    resident: f64,
}

/// Growth in bytes per second.
#[derive(Debug)]
struct Growth {
    in_use: f64,
    resident: f64,
}

impl Watched {
    /// Starts it with the allocator's setting of the image and the systemd unit.
    fn start() -> Self {
        let folder = with_demo();
        let [library, in_use] = ["heap_in_use.so", "heap_in_use"].map(|name| folder.path().join(name));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/heap_in_use.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-O2", "-shared", "-fPIC", "-pthread", "-o"]).arg(&library).arg(source);
        assert!(compiler.status().unwrap().success(), "{compiler:?}");
        std::fs::write(&in_use, format!("{:020}", 0)).unwrap();
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let variables = [
            ("LD_PRELOAD", text(&library)),
            ("HEAP_IN_USE", text(&in_use)),
            ("MALLOC_MMAP_THRESHOLD_", "16777216".to_owned()),
            // blocks in threads' caches are free, but count as in use
            ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0".to_owned()),
        ];
        Self { server: Server::start_with(folder, &["--request-timeout", "1h"], &variables), in_use }
    }

    fn sample(&self, started: Instant) -> Sample {
        let in_use = std::fs::read_to_string(&self.in_use).unwrap().parse().unwrap();
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.server.pid())).unwrap();
        let resident = statm.split(' ').nth(1).unwrap().parse::<f64>().unwrap() * 4096.0;
        Sample { at_s: started.elapsed().as_secs_f64(), in_use, resident }
    }

    /// Samples for `seconds`, after a first fifth in which memory may grow.
    fn growth(&self, seconds: f64) -> Growth {
        std::thread::sleep(Duration::from_secs_f64(seconds / 5.0));
        let (started, mut samples) = (Instant::now(), Vec::new());
        while started.elapsed().as_secs_f64() < seconds {
            samples.push(self.sample(started));
            std::thread::sleep(Duration::from_millis(50));
        }
        Growth { in_use: rate(&samples, |sample| sample.in_use), resident: rate(&samples, |sample| sample.resident) }
    }

    /// Growth with the control: a client that leaves half a request of 64 KiB open twenty times a second, 1.3 MB/s and their buffers.
    fn growth_with_a_taker(&self) -> Growth {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _stop = SetOnDrop(&stop);
            scope.spawn(|| {
                let mut held = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let mut stream = connect(self.server.http).unwrap();
                    write!(stream, "POST /v1/classify HTTP/1.1\r\nhost: t\r\ncontent-length: 65537\r\n\r\n").unwrap();
                    stream.write_all(&[1; 65536]).unwrap();
                    held.push(stream);
                    std::thread::sleep(Duration::from_millis(50));
                }
            });
            self.growth(4.0)
        })
    }
}

/// Median growth from one tenth of the time to the next, in bytes per second: each tenth counts with its least sample, so
/// that requests under way do not count, and a single jump is no trend.
fn rate(samples: &[Sample], bytes: fn(&Sample) -> f64) -> f64 {
    let tenths = samples.chunks(samples.len().div_ceil(10));
    let least = tenths.map(|tenth| (tenth[0].at_s, tenth.iter().map(bytes).fold(f64::INFINITY, f64::min)));
    let least: Vec<(f64, f64)> = least.collect();
    let mut rates: Vec<f64> = least.windows(2).map(|pair| (pair[1].1 - pair[0].1) / (pair[1].0 - pair[0].0)).collect();
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// Asserts that memory grows by less than `limit` in bytes per second, and that a client that takes memory is seen.
fn assert_still(calm: &Growth, taken: &Growth, limit: f64) {
    println!("growth in bytes a second: {calm:.0?}; with a client that takes memory: {taken:.0?}");
    assert!(calm.in_use < limit, "memory in use grows: {calm:.0?}");
    // the allocator may still reach for a page now and then
    assert!(calm.resident < limit.max(10e3), "resident memory grows: {calm:.0?}");
    assert!(taken.in_use > 2.0 * limit, "the control is not seen: {taken:.0?}");
}

/// `limit` in bytes per second.
fn soak(seconds: f64, limit: f64) {
    let watched = Watched::start();
    let (over, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (calm, taken) = std::thread::scope(|scope| {
        let _over = SetOnDrop(&over);
        scope.spawn(|| load(&watched.server, &over, &answered));
        (watched.growth(seconds), watched.growth_with_a_taker())
    });
    let answered = answered.into_inner();
    println!("{answered} photographs answered");
    assert!(answered > 10, "{answered} photographs");
    assert_still(&calm, &taken, limit);
}

/// Sends malformed bytes, and reads the response for a moment.
fn insult(address: SocketAddr, bytes: &[u8]) {
    let mut stream = connect(address).unwrap();
    let _ = stream.set_read_timeout(Some(Duration::from_millis(200)));
    // fails if the server has refused early and closed the connection
    let _ = stream.write_all(bytes);
    let _ = stream.read(&mut [0; 4096]);
}

/// One attack of every kind: decompression bombs, unfinished requests, floods, damage. Each ends in a refusal or an
/// answer, and leaves nothing once its connection is closed.
fn attacks(server: &Server) -> Vec<Box<dyn Fn() + Send + Sync>> {
    let (http, grpc, admin, pid) = (server.http, server.grpc, server.admin, server.pid());
    let cat = data("cat.jpg");
    let refused = move |headers: &[(&str, &str)], body: &[u8]| {
        let answer = ask(http, "POST", "/v1/classify", headers, body).unwrap();
        assert!((400..500).contains(&answer.status), "{answer:?}");
    };
    const JSON: (&str, &str) = ("content-type", "application/json");
    const GZIP: (&str, &str) = ("content-encoding", "gzip");
    let images = gzip(format!("{{\"images\":[{}{{}}]}}", "{\"b64\":\"\"},".repeat(1_000_000)).as_bytes());
    let deep = gzip("{\"images\":".repeat(1_000_000).as_bytes());
    let zeros = gzip(&vec![0; 70 << 20]);
    let form = gzip(
        "--x\r\nContent-Disposition: form-data; name=\"a\"; filename=\"a\"\r\n\r\n\r\n".repeat(100_000).as_bytes(),
    );
    let flood = [hello(1 << 20), frame(6, 0, 0, &[0; 8]).repeat(20_000)].concat();
    let ask_and_reset = |i: u32| {
        let whole = request("GET", "/v2/health/live", "text/plain", b"");
        [frame(1, 5, 2 * i + 1, &whole[9..whole.len() - 9]), frame(3, 0, 2 * i + 1, &8_u32.to_be_bytes())].concat()
    };
    let resets = [hello(1 << 20), (0..500).flat_map(ask_and_reset).collect()].concat();
    let half = format!("POST /v1/classify HTTP/1.1\r\nhost: t\r\ncontent-length: {}\r\n\r\n", cat.len()).into_bytes();
    let half = [half, cat[..cat.len() / 2].to_vec()].concat();
    let damaged: Vec<Vec<u8>> = (0..50)
        .map(|i| {
            let mut cat = cat.clone();
            let at = 20 + i * (cat.len() - 40) / 50;
            cat[at..at + 8].copy_from_slice(&[0xff; 8]);
            cat
        })
        .collect();
    let message = calls::frame(&calls::ld(5, &[0; 100_000]));
    vec![
        Box::new(move || refused(&[JSON, GZIP], &images)),
        Box::new(move || refused(&[JSON, GZIP], &deep)),
        Box::new(move || refused(&[GZIP], &zeros)),
        Box::new(move || refused(&[("content-type", "multipart/form-data; boundary=x"), GZIP], &form)),
        Box::new(move || [http, grpc].into_iter().for_each(|door| insult(door, &flood))),
        Box::new(move || [http, grpc].into_iter().for_each(|door| insult(door, &resets))),
        Box::new(move || insult(http, &half)),
        Box::new(move || [http, grpc, admin].into_iter().for_each(|door| insult(door, &[0; 70_000]))),
        Box::new(move || {
            let head = format!("GET / HTTP/1.1\r\nhost: t\r\nx: {}\r\n\r\n", "y".repeat(100_000));
            [http, grpc, admin].into_iter().for_each(|door| insult(door, head.as_bytes()));
        }),
        Box::new(move || {
            for cat in &damaged {
                assert!(ask(http, "POST", "/v1/classify", &[], cat).unwrap().status <= 415, "a damaged photograph");
            }
        }),
        Box::new(move || {
            for path in [calls::INFER, calls::STREAM] {
                calls::call(grpc, path, &[], message.clone());
            }
        }),
        Box::new(move || {
            let silent: Vec<_> = (0..100).map(|_| connect(http).unwrap()).collect();
            // a connection is there for its client before the server has accepted it
            eventually("they are seen", || descriptors(pid) > silent.len() / 2);
        }),
    ]
}

fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// The same load with all attacks in a loop beside it. `limit` in bytes per second.
fn siege(seconds: f64, limit: f64) {
    let watched = Watched::start();
    let server = &watched.server;
    let [over, peace] = [const { AtomicBool::new(false) }; 2];
    let (answered, rounds) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let attacks = attacks(server);
    attacks.iter().for_each(|attack| attack());
    let (before, calm, taken) = std::thread::scope(|scope| {
        let _over = SetOnDrop(&over);
        scope.spawn(|| load(server, &over, &answered));
        std::thread::sleep(Duration::from_secs(1));
        let before = descriptors(server.pid());
        let attacking = scope.spawn(|| {
            while !peace.load(Ordering::Relaxed) {
                attacks.iter().for_each(|attack| attack());
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        let at_peace = SetOnDrop(&peace);
        let calm = watched.growth(seconds);
        drop(at_peace);
        attacking.join().unwrap();
        (before, calm, watched.growth_with_a_taker())
    });
    // connections that were left open on this side end within their time
    let (mut after, until) = (descriptors(server.pid()), Instant::now() + Duration::from_secs(40));
    while after > before && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(200));
        after = descriptors(server.pid());
    }
    let (answered, rounds) = (answered.into_inner(), rounds.into_inner());
    println!("{answered} photographs answered and {rounds} rounds of attacks");
    println!("descriptors: {before} before, {after} after");
    assert!(answered > 10 && rounds > 0, "{answered} photographs, {rounds} rounds");
    assert_still(&calm, &taken, limit);
    assert!(after <= before, "descriptors: {before} before, {after} after");
}

#[test]
#[ignore = "three minutes: make soak"]
fn a_siege_leaves_nothing_behind() {
    siege(180.0, 5e3);
}

#[test]
#[ignore = "ten minutes: make soak"]
fn a_long_siege_leaves_nothing_behind() {
    siege(600.0, 1e3);
}

#[test]
fn memory_does_not_grow() {
    soak(8.0, 100e3);
}

#[test]
#[ignore = "ten minutes: make soak"]
fn memory_does_not_grow_in_ten_minutes() {
    soak(600.0, 1e3);
}
