//! How every command ends (signals, also as process 1; a full disk; a file size limit), and what it leaves: a complete
//! version or none, and no drafts.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::checkpoint::Copy;
use crate::cli::{golden, nfold, project, refused, skip, text, with_demo};
use crate::fakes::{SetOnDrop, eventually};

const NFOLD: &str = env!("CARGO_BIN_EXE_nfold");
/// Longest time to end after a signal: far below any grace period, far above what a busy machine needs.
const AT_ONCE: Duration = Duration::from_secs(5);

fn signal(name: &str, pid: u32) {
    assert!(Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap().success());
}

fn ends(child: &mut Child, within: Duration) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if started.elapsed() > within {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("still there after {within:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Names in a folder and below, without the files that `with_demo` made. What is removed meanwhile may be left out.
fn left(folder: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            let Ok(path) = entry.map(|entry| entry.path()) else { continue };
            names.push(path.file_name().unwrap().to_string_lossy().into_owned());
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
    names.sort();
    names
}

fn start(args: &[&str], folder: &Path) -> Child {
    let mut command = Command::new(NFOLD);
    command.args(args).current_dir(folder).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.env("TMPDIR", folder).spawn().unwrap()
}

/// Commands that would run for minutes, each with whether it creates a file in its folder that shows that it works.
fn long_runs(photographs: &str) -> Vec<(Vec<&str>, bool)> {
    vec![
        (vec!["classify", "--recursive", photographs, "--threads", "1", "--output", "answers.jsonl"], true),
        (vec!["classify", "-"], false),
        (vec!["gamma", "all", "--samples", "1000000000"], false),
        (vec!["init", "nf_resnet101", "--out", "made", "--model-args", r#"{"width_factor": 4.0}"#], true),
        (vec!["bench", "engine", "resnet18", "--turn", "10m"], false),
        (vec!["spp", "--arch", "nf_resnet101", "--count", "2000"], false),
    ]
}

#[test]
fn a_signal_ends_every_command_at_once_and_leaves_nothing() {
    let folder = with_demo();
    let here = folder.path();
    let many = here.join("many");
    std::fs::create_dir(&many).unwrap();
    for i in 0..20_000 {
        std::os::unix::fs::symlink(project("tests/data/cat.jpg"), many.join(format!("{i}.jpg"))).unwrap();
    }
    let before = left(here);
    let cases = [("TERM", 143), ("INT", 130), ("HUP", 129), ("QUIT", 131)];
    for (i, (args, writes)) in long_runs("many").into_iter().enumerate() {
        for (name, code) in [cases[0], cases[1], cases[2 + i % 2]] {
            let mut child = start(&args, here);
            if writes {
                let at_work = || left(here).len() > before.len();
                eventually("a draft is written", at_work);
            }
            std::thread::sleep(Duration::from_millis(200));
            assert_eq!(child.try_wait().unwrap(), None, "{args:?} does not run for long");
            signal(name, child.id());
            assert_eq!(ends(&mut child, AT_ONCE).code(), Some(code), "{args:?} {name}");
            assert_eq!(left(here), before, "{args:?} {name}");
        }
    }
}

/// The kernel gives process 1 no signal that it has no handler for.
#[test]
fn a_signal_ends_every_command_as_process_1() {
    let unshare = ["unshare", "--pid", "--fork", "--mount-proc"];
    let possible = Command::new(unshare[0]).args(&unshare[1..]).arg("true").status();
    if !possible.is_ok_and(|status| status.success()) {
        skip("no process can be process 1 here (unshare --pid needs root)");
        return;
    }
    let folder = with_demo();
    for (args, code) in [(&["classify", "-"][..], 143), (&["gamma", "all", "--samples", "1000000000"], 130)] {
        let mut outer = Command::new(unshare[0]);
        outer.args(&unshare[1..]).arg(NFOLD).args(args).current_dir(folder.path());
        let mut outer = outer.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", outer.id());
        let child = || std::fs::read_to_string(&children).unwrap_or_default().trim().parse::<u32>().ok();
        let runs =
            |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "nfold");
        eventually("it runs", || child().is_some_and(runs));
        let pid = child().unwrap();
        std::thread::sleep(Duration::from_millis(300));
        signal(if code == 143 { "TERM" } else { "INT" }, pid);
        assert_eq!(ends(&mut outer, AT_ONCE).code(), Some(code), "{args:?}");
    }
}

/// Whatever the loading threads do at that moment.
#[test]
fn a_signal_while_models_load_ends_the_server_with_0() {
    let folder = with_demo();
    let here = folder.path();
    for round in 0..24_u64 {
        let mut child = Command::new(NFOLD)
            .args(["serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
            .args(["--workers", "2", "--graph-cache", "cache"])
            .current_dir(here)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("admin port listens") {
            line.clear();
            assert!(lines.read_line(&mut line).unwrap() > 0, "the server ended");
        }
        std::thread::sleep(Duration::from_millis(round * 15));
        signal(if round.is_multiple_of(2) { "TERM" } else { "INT" }, child.id());
        let status = ends(&mut child, AT_ONCE);
        let mut said = String::new();
        let _ = lines.read_to_string(&mut said);
        assert_eq!((status.code(), status.signal()), (Some(0), None), "round {round}: {said}");
        let drafts: Vec<_> = left(here).into_iter().filter(|name| name.starts_with(".nfold-draft-")).collect();
        // in any round, a graph is cached completely or not at all
        if round.is_multiple_of(3) {
            let _ = std::fs::remove_dir_all(here.join("cache"));
        }
        assert!(drafts.is_empty(), "round {round}: {drafts:?}");
    }
}

/// Whether a version's files match its manifest.
fn is_whole(version: &Path) -> bool {
    let Ok(manifest) = std::fs::read(version.join("manifest.json")) else { return false };
    let Ok(manifest) = serde_json::from_slice::<Value>(&manifest) else { return false };
    let Ok(onnx) = std::fs::read(version.join("model.onnx")) else { return false };
    manifest["onnx_sha256"] == nfold::model::sha256(&onnx)
}

#[test]
fn a_version_is_there_at_any_instant_of_its_replacement() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let fold = |side: u64| {
        let size = if side.is_multiple_of(2) { "64" } else { "96" };
        ["fold".to_string(), golden("nf_regnet_small"), "--replace".into(), "--size".into(), size.into()]
    };
    let run = |side: u64| {
        let args = fold(side);
        let output = nfold(&args.each_ref().map(String::as_str), here);
        assert!(output.status.success(), "{}", text(&output.stderr));
    };
    run(0);
    let repository = here.join("repository");
    let (model, version) = (repository.join("nf_regnet_small"), repository.join("nf_regnet_small/1"));
    let (over, looks, missing) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    // drafts that are about to be exchanged
    let drafts = || -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&repository).unwrap().filter_map(|entry| Some(entry.ok()?.path()));
        entries.filter(|path| path.join("manifest.json").is_file()).collect()
    };
    let mut drafted = 0;
    std::thread::scope(|scope| {
        let _over = SetOnDrop(&over);
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                looks.fetch_add(1, Ordering::Relaxed);
                missing.fetch_add(usize::from(!version.join("manifest.json").is_file()), Ordering::Relaxed);
            }
        });
        for round in 0..24_u64 {
            let (args, before) = (fold(round + 1), drafts());
            let mut child = start(&args.each_ref().map(String::as_str), here);
            let is_drafted = || drafts().iter().any(|draft| !before.contains(draft));
            while child.try_wait().unwrap().is_none() && !is_drafted() {}
            drafted += usize::from(child.try_wait().unwrap().is_none());
            // the draft is synced, exchanged, and the old version removed: the kill hits each of these
            std::thread::sleep(Duration::from_micros(round * 150));
            let _ = child.kill();
            child.wait().unwrap();
            assert!(is_whole(&version), "round {round}: {:?}", left(here));
        }
        run(0);
    });
    println!("{drafted} of 24 folds were killed while their drafts were whole");
    assert!(drafted > 0);
    let (looks, missing) = (looks.into_inner(), missing.into_inner());
    assert!(looks > 1000 && missing == 0, "away in {missing} of {looks} looks");
    // drafts of killed processes are removed
    let mut names: Vec<_> = std::fs::read_dir(&repository).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.extend(std::fs::read_dir(&model).unwrap().map(|e| e.unwrap().file_name()));
    assert_eq!(names, ["nf_regnet_small", "1"]);
}

#[test]
fn a_file_size_limit_is_an_error() {
    let folder = with_demo();
    let here = folder.path();
    let before = left(here);
    let photographs = project("tests/data/cifar10");
    for args in [
        &["fold", &project("models/nf_regnet_cifar10"), "--name", "other"][..],
        &["init", "nf_regnet_b0", "--out", "made"],
        &["classify", "--recursive", &photographs, "--output", "answers.jsonl"],
    ] {
        // in units of 512 or 1024 bytes, as the shell has it
        let script = format!("ulimit -f 50; exec {NFOLD} \"$@\"");
        let limited = Command::new("sh").args(["-c", &script, "sh"]).args(args).current_dir(here).output().unwrap();
        refused(&limited, "File too large");
        let made: Vec<_> = left(here).into_iter().filter(|name| !before.contains(name) && name != "other").collect();
        assert!(made.is_empty(), "{args:?}: {made:?}");
    }
}

#[test]
fn a_full_disk_is_an_error() {
    let folder = with_demo();
    let here = folder.path();
    std::fs::create_dir(here.join("small")).unwrap();
    let mount = "mount -t tmpfs -o size=300k tmpfs small";
    let possible = Command::new("unshare").args(["--mount", "sh", "-c", mount]).current_dir(here).status();
    if !possible.is_ok_and(|status| status.success()) {
        skip("no file system can be mounted here (unshare --mount needs root)");
        return;
    }
    let photographs = project("tests/data/cifar10");
    for args in [
        &["fold", &project("models/nf_regnet_cifar10"), "--repository", "small/repository"][..],
        &["init", "nf_regnet_b0", "--out", "small/made"],
        &["classify", "--recursive", &photographs, "--top-k", "10", "--output", "small/answers.jsonl"],
    ] {
        let script = format!("{mount}; {NFOLD} \"$@\"; code=$?; find small -type f; exit $code");
        let mut full = Command::new("unshare");
        let full = full.args(["--mount", "sh", "-c", &script, "sh"]).args(args).current_dir(here).output().unwrap();
        // and nothing is found
        refused(&full, "No space left on device");
    }
    // what is printed last may find no room either
    let output =
        Command::new(NFOLD).args(["gamma", "relu"]).stdout(std::fs::File::create("/dev/full").unwrap()).output();
    refused(&output.unwrap(), "No space left on device");
}

#[test]
fn what_was_left_behind_by_a_kill_is_swept() {
    let folder = with_demo();
    let here = folder.path();
    let before = left(here);
    let mut child = start(&["init", "nf_resnet101", "--out", "made", "--model-args", r#"{"width_factor": 4.0}"#], here);
    eventually("a draft is written", || left(here).len() > before.len());
    child.kill().unwrap();
    child.wait().unwrap();
    let draft_of = |folder: &Path| left(folder).into_iter().find(|name| name.starts_with(".nfold-draft-"));
    let killed = draft_of(here);
    assert!(killed.is_some(), "a draft stays");
    // while another process writes, its draft stays
    let mut other =
        start(&["init", "nf_resnet101", "--out", "other", "--model-args", r#"{"width_factor": 4.0}"#], here);
    eventually("the first is swept", || draft_of(here).is_some_and(|found| Some(found) != killed));
    assert!(nfold(&["init", "nf_regnet_b0", "--out", "third"], here).status.success());
    assert!(draft_of(here).is_some(), "{:?}", left(here));
    signal("TERM", other.id());
    ends(&mut other, AT_ONCE);
    assert_eq!(draft_of(here), None);
}

/// Logits that overflow are no answer, so that their graph is nothing to serve.
#[test]
fn infinite_logits_are_not_published() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let copy = Copy::of("resnet18_small");
    copy.tensors(|t| {
        Some(if t.name == "fc.weight" {
            t.map32(safetensors::Dtype::F32, |w| (w * 3e38).to_le_bytes().to_vec())
        } else {
            t
        })
    });
    let checkpoint = copy.path("").display().to_string();
    let output = nfold(&["fold", &checkpoint, "--name", "overflows"], here);
    refused(&output, "nothing was written");
    assert!(text(&output.stderr).contains("logit "), "{}", text(&output.stderr));
    assert!(left(here).is_empty(), "{:?}", left(here));
}
