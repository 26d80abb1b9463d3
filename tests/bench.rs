//! The benchmark as a user runs it: graphs in process, and load on servers whose behaviour is known.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use nfold::bench::load::schedule::Arrivals;
use nfold::pb::onnx::ModelProto;
use prost::Message as _;
use serde_json::Value;

use crate::golden::goldens_folder;
use crate::process::Server;

fn nfold(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nfold")).args(args).current_dir(folder).output().unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Two networks in two variants and a user's own file, timed against each other; all three files are written and agree.
#[test]
fn graphs_are_timed_against_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let goldens = goldens_folder();
    let (small, wide) = (goldens.join("nf_regnet_small"), goldens.join("resnet18_small"));
    let (small, wide) = (small.to_str().unwrap(), wide.to_str().unwrap());
    let fold = ["fold", small, "--repository", "r", "--size", "64"];
    assert!(nfold(folder.path(), &fold).status.success());
    let (light, heavy) = (format!("{small}@64"), format!("{wide}@160"));
    let unfolded = format!("{small}@64:unfolded");
    let args = ["bench", "engine", &light, &heavy, &unfolded, "--onnx", "r/nf_regnet_small/1/model.onnx"];
    let quick = ["--rounds", "5", "--turn", "5ms", "--warmup", "0s", "--batch", "1,2", "--report", "out"];
    let done = nfold(folder.path(), &[&args[..], &quick].concat());
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));

    let report = json(&folder.path().join("out/engine.json"));
    assert_eq!(report["schema"], "nfold-bench-engine/1");
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 8);
    let row = |label: &str, batch: u64| {
        rows.iter().find(|r| r["label"] == label && r["batch"] == batch).unwrap_or_else(|| panic!("{label} {batch}"))
    };
    let speed = |label: &str| row(label, 1)["speed"]["value"].as_f64().unwrap();
    assert_eq!(speed("nf_regnet_b0@64"), 1.0, "the first is the reference");
    assert!(speed("resnet18@160") < 1.0, "six times the pixels can't be faster");
    assert_eq!(row("model@64:onnx", 2)["height"], 64);
    for r in rows {
        let number = |key: &str| r[key].as_f64().unwrap();
        assert_eq!(r["rounds_ms"].as_array().unwrap().len(), 5);
        assert!(r["latency_ms"]["runs"].as_u64().unwrap() >= 5);
        assert!(
            (number("images_per_s") * r["latency_ms"]["median"].as_f64().unwrap() / 1e3 - number("batch")).abs() < 1e-6
        );
        let (low, high) = (r["speed"]["low"].as_f64().unwrap(), r["speed"]["high"].as_f64().unwrap());
        assert!(low <= high && low > 0.0);
    }
    let share = row("resnet18@160", 1)["peak_share"].as_f64().unwrap();
    assert!(share > 0.0 && share < 1.5, "{share}");

    let csv = std::fs::read_to_string(folder.path().join("out/engine.csv")).unwrap();
    assert_eq!(csv.lines().count(), 9);
    let columns = csv.lines().next().unwrap().split(',').count();
    assert!(csv.lines().all(|l| l.split(',').count() == columns), "{csv}");
    let page = std::fs::read_to_string(folder.path().join("out/index.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("resnet18@160") && !page.contains("<script"));
}

/// A model of the repository goes by its name, and a sentence says which network is faster.
#[test]
fn models_of_the_repository_are_timed_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let goldens = goldens_folder();
    let small = goldens.join("nf_regnet_small");
    let fold = ["fold", small.to_str().unwrap(), "--name", "mine", "--size", "64"];
    assert!(nfold(folder.path(), &fold).status.success());
    let wide = format!("{}@256", goldens.join("resnet18_small").display());
    let quick = ["--rounds", "5", "--turn", "5ms", "--warmup", "0s", "--report", "out"];
    let done = nfold(folder.path(), &[&["bench", "engine", "mine", &wide], &quick[..]].concat());
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let sentence = said.lines().find(|line| line.contains(" is the fastest, ")).unwrap_or_else(|| panic!("{said}"));
    assert!(sentence.starts_with("batch 1, threads ") && sentence.contains("mine@64 is the fastest"), "{sentence}");
    assert!(sentence.contains(" times as fast as resnet18@256 (95 %: "), "{sentence}");
    let again = nfold(folder.path(), &[&["bench", "engine", "mine", "mine"], &quick[..]].concat());
    let said = String::from_utf8_lossy(&again.stdout);
    let told = |line: &str| line.contains("can't be told apart") || line.contains(" (95 %: ");
    assert!(said.lines().any(told), "{said}{}", String::from_utf8_lossy(&again.stderr));
    let page = std::fs::read_to_string(folder.path().join("out/index.html")).unwrap();
    assert!(page.contains(":") && page.contains(" UTC<") && !page.contains("since 1970"), "a date");
}

/// One graph that answers with no numbers does not cost the others their figures; it is named, and the exit code says so.
#[test]
fn the_others_are_timed_without_one_that_fails() {
    let folder = tempfile::tempdir().unwrap();
    let small = goldens_folder().join("nf_regnet_small");
    let fold = ["fold", small.to_str().unwrap(), "--repository", "r", "--size", "64"];
    assert!(nfold(folder.path(), &fold).status.success());
    let onnx = std::fs::read(folder.path().join("r/nf_regnet_small/1/model.onnx")).unwrap();
    std::fs::write(folder.path().join("good.onnx"), &onnx).unwrap();
    let mut model = ModelProto::decode(onnx.as_slice()).unwrap();
    for tensor in &mut model.graph.as_mut().unwrap().initializer {
        if tensor.name.ends_with(".bias") {
            tensor.raw_data = vec![0xff; tensor.raw_data.len()].into();
        }
    }
    std::fs::write(folder.path().join("nan.onnx"), model.encode_to_vec()).unwrap();
    let files = ["--onnx", "nan.onnx@64", "--onnx", "good.onnx@64"];
    let quick = ["--rounds", "2", "--turn", "5ms", "--warmup", "0s", "--json"];
    let done = nfold(folder.path(), &[&["bench", "engine"], &files[..], &quick].concat());
    let error = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.code() == Some(1) && error.contains("not measured: `nan"), "{error}");
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert!(rows.len() == 1 && rows[0]["label"].as_str().unwrap().starts_with("good"), "{report:#}");
    assert!(report["failed"][0]["label"].as_str().unwrap().starts_with("nan"), "{report:#}");
    let alone = nfold(folder.path(), &[&["bench", "engine"], &files[..2], &quick].concat());
    assert!(alone.status.code() == Some(1) && alone.stdout.is_empty());
}

/// What can't be timed is refused by name.
#[test]
fn what_cannot_be_timed_is_named() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("bad.onnx"), b"not a graph").unwrap();
    for (args, what) in [
        (&["vit_base"][..], "`vit_base`"),
        (&["resnet18@0"], "`0` is no size"),
        (&["resnet18:int8"], "`int8` is no variant"),
        (&["--onnx", "nowhere.onnx"], "nowhere.onnx"),
        (&["--onnx", "bad.onnx"], "bad.onnx"),
        (&["test_nfnet@32", "--reference", "resnet50@224"], "`resnet50@224` is not measured"),
    ] {
        let done = nfold(folder.path(), &[&["bench", "engine"], args].concat());
        let error = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.code() == Some(1) && error.contains(what), "{args:?}: {error}");
    }
}

/// A server with one thread per connection; `answer` maps the time a request arrived to a status and a delay.
fn fake(answer: impl Fn(Instant) -> (u16, Duration) + Send + Sync + Clone + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (answer, stream) = (answer.clone(), stream.unwrap());
            thread::spawn(move || serve(stream, answer));
        }
    });
    address
}

fn serve(stream: TcpStream, answer: impl Fn(Instant) -> (u16, Duration)) -> Option<()> {
    let (mut reader, mut writer) = (BufReader::new(stream.try_clone().ok()?), stream);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            let lower = line.trim().to_ascii_lowercase();
            if let Some(value) = lower.strip_prefix("content-length:") {
                length = value.trim().parse().ok()?;
            }
            if lower.is_empty() {
                break;
            }
        }
        let came = Instant::now();
        reader.read_exact(&mut vec![0; length]).ok()?;
        let (status, think) = answer(came);
        thread::sleep(think);
        writer.write_all(format!("HTTP/1.1 {status} X\r\ncontent-length: 2\r\n\r\n{{}}").as_bytes()).ok()?;
    }
}

fn load(server: SocketAddr, flags: &[&str]) -> Value {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("photo"), b"bytes").unwrap();
    let server = server.to_string();
    let args =
        ["bench", "load", "--server", &server, "--image", "photo", "--warmup", "0s", "--max-lag", "5s", "--json"];
    let done = nfold(folder.path(), &[&args[..], flags].concat());
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&done.stdout).unwrap()
}

/// A server that stalls once for 600 ms per run: the open loop counts it for every request that was due meanwhile; the
/// closed loop (the positive control) hides all but one.
#[test]
fn a_stall_is_charged_for_everyone_who_waited() {
    let stalling = || {
        let start = Instant::now();
        fake(move |came| {
            let into = came.duration_since(start).as_millis() as u64 % 2000;
            let left = if (700..1300).contains(&into) { 1300 - into } else { 0 };
            (200, Duration::from_millis(left.max(1)))
        })
    };
    let open = load(stalling(), &["--rate", "100", "--arrivals", "constant", "--duration", "2s"]);
    let step = &open["steps"][0];
    assert_eq!(step["kind"], "open");
    let due = step["outcomes"]["ok"].as_u64().unwrap();
    assert!((195..=200).contains(&due), "{step}");
    // 60 of 200 requests were due in the stall, half of them waited for 300 ms or more: the 85th percentile
    let charged = step["percentiles_ms"][80].as_f64().unwrap();
    assert!(charged > 100.0, "{charged}: the stall is hidden");
    let good = step["goodput"].as_f64().unwrap();
    assert!(good < 0.85 * step["throughput"].as_f64().unwrap(), "{step}");

    let closed = load(stalling(), &["--connections", "1", "--duration", "2s"]);
    let hidden = closed["steps"][0]["percentiles_ms"][80].as_f64().unwrap();
    assert!(hidden < 50.0, "{hidden}");
}

/// Refusals and failures are counted as what they are, and are no throughput.
#[test]
fn outcomes_are_told_apart() {
    let turn = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let address = fake(move |_| {
        let n = turn.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        (if n == 0 { 200 } else { [200, 429, 503, 504, 400, 500][n % 6] }, Duration::from_millis(1))
    });
    let report = load(address, &["--rate", "300", "--duration", "1s", "--seed", "4"]);
    let outcomes = report["steps"][0]["outcomes"].as_object().unwrap();
    let of = |name: &str| outcomes[name].as_u64().unwrap();
    let all: u64 = outcomes.values().map(|v| v.as_u64().unwrap()).sum();
    let due = nfold::bench::load::schedule::draw(Arrivals::Poisson, 300.0, Duration::from_secs(1), 4).len() as u64;
    assert_eq!(all, due, "every request due ends somewhere");
    assert!(of("refused").abs_diff(2 * of("ok")) <= 4, "{outcomes:?}");
    assert!(of("deadline") > 0 && of("client_error") > 0 && of("server_error") > 0, "{outcomes:?}");
    assert!(report["steps"][0]["throughput"].as_f64().unwrap() <= of("ok") as f64);
}

/// A server that is not there, or refuses, is named before anything is measured.
#[test]
fn servers_that_do_not_serve_are_named() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("photo"), b"bytes").unwrap();
    let refuses = fake(|_| (404, Duration::ZERO)).to_string();
    for (args, what) in [
        (&["--server", "127.0.0.1:1", "--image", "photo"][..], "127.0.0.1:1"),
        (&["--server", &refuses, "--image", "photo"], "404"),
        (&["--server", &refuses], "--image"),
        (&["--server", &refuses, "--protocol", "oip-http"], "--model"),
        (&["--server", &refuses, "--protocol", "oip-http", "--model", "m"], "404"),
    ] {
        let done = nfold(folder.path(), &[&["bench", "load", "--timeout", "5s"], args].concat());
        let error = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.code() == Some(1) && error.contains(what), "{args:?}: {error}");
    }
}

/// The demo model behind `nfold serve`, loaded over the network: a sweep's report with its histograms.
#[test]
fn the_demo_is_loaded_end_to_end() {
    let server = Server::start(&[]);
    let folder = server.folder();
    let (http, grpc) = (server.http.to_string(), server.grpc.to_string());
    let photos = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/cifar10");
    let args = ["bench", "load", "--server", &http, "--image", photos.to_str().unwrap()];
    let flags = ["--connections", "2", "--rate", "20", "--duration", "1s", "--warmup", "200ms", "--report", "out"];
    let done = nfold(folder, &[&args[..], &flags, &["--max-lag", "5s", "--bodies", "10"]].concat());
    let tensors = |server: &str, protocol: &str| {
        let args = ["bench", "load", "--server", server, "--protocol", protocol, "--model", "nf_regnet_cifar10"];
        let flags =
            ["--rate", "20", "--duration", "1s", "--warmup", "0s", "--max-lag", "5s", "--bodies", "3", "--json"];
        nfold(folder, &[&args[..], &flags].concat())
    };
    let others = [("oip_http", tensors(&http, "oip-http")), ("oip_grpc", tensors(&grpc, "oip-grpc"))];
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    for (protocol, done) in others {
        assert!(done.status.success(), "{protocol}: {}", String::from_utf8_lossy(&done.stderr));
        let report: Value = serde_json::from_slice(&done.stdout).unwrap();
        assert_eq!((&report["plan"]["protocol"], &report["payloads"]), (&protocol.into(), &3.into()));
        let outcomes = report["steps"][0]["outcomes"].as_object().unwrap();
        assert!(outcomes.len() == 1 && outcomes["ok"].as_u64().unwrap() > 5, "{protocol}: {outcomes:?}");
    }
    let report = json(&folder.join("out/load.json"));
    assert_eq!(report["payloads"], 10);
    let steps = report["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 2);
    for step in steps {
        assert_eq!(step["outcomes"].as_object().unwrap().keys().collect::<Vec<_>>(), ["ok"], "{step}");
        assert!(step["server_ms"]["inference"].as_f64().unwrap() > 0.0, "{step}");
    }
    let log = std::fs::read_to_string(folder.join("out/load.hlog")).unwrap();
    assert!(log.contains("Tag=step0,") && log.contains("Tag=step1,"), "{log}");
    let csv = std::fs::read_to_string(folder.join("out/load.csv")).unwrap();
    assert_eq!(csv.lines().count(), 3);
    assert!(std::fs::read_to_string(folder.join("out/index.html")).unwrap().contains("closed, 2 connections"));
}
