//! The program as users run it: the real binary, its output, its exit codes, and the files it leaves.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

use crate::golden::goldens_folder;

pub fn nfold(args: &[&str], folder: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nfold"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("NFOLD_")) {
        command.env_remove(name);
    }
    command.args(args).current_dir(folder).output().unwrap()
}

/// Says on stderr why a test is skipped, bypassing the test harness, which captures the output of passing tests. `make
/// test` lists these lines.
pub fn skip(why: &str) {
    // in one write, since other tests write too
    std::io::stderr().write_all(format!("SKIP: {why}\n").as_bytes()).unwrap();
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn project(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path).display().to_string()
}

pub fn golden(name: &str) -> String {
    goldens_folder().join(name).display().to_string()
}

/// Asserts a proper failure: exit code 1, nothing on stdout, one line on stderr that says `what` and the next step.
pub fn refused(output: &Output, what: &str) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
    assert!(stderr.starts_with("error: ") && stderr.lines().count() == 1 && stderr.contains(what), "{what}: {stderr}");
}

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|e| text(e.unwrap().file_name().as_encoded_bytes())).collect();
    names.sort();
    names
}

#[test]
fn folds_reports_and_inspects() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let output = nfold(&["fold", &golden("nf_seresnet_small"), "--json"], here);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["model"], &report["version"]), (&"nf_seresnet_small".into(), &1.into()));
    let fold = &report["manifest"]["fold"];
    let verification = &fold["verification"];
    assert!(verification["max_abs_diff"].as_f64().unwrap() <= verification["tolerance"].as_f64().unwrap());
    assert_eq!(fold["blocks"].as_array().unwrap().len(), 5);
    assert_eq!(fold["gamma"], 1.7139588594436646);
    assert!(fold["parameters"].as_u64().unwrap() > 10_000 && fold["gmacs"].as_f64().unwrap() > 0.0);
    assert_eq!(entries(&here.join("repository/nf_seresnet_small/1")), ["manifest.json", "model.onnx"]);
    assert_eq!(entries(&here.join("repository")), ["nf_seresnet_small"]);

    // the same fold again changes nothing; a different one needs --replace
    // another checkpoint, or another precision, is known to differ before an engine is needed
    for other in [
        &[&golden("resnet18_small")[..], "--name", "nf_seresnet_small"][..],
        &[&golden("nf_seresnet_small"), "--precision", "fp16"],
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nfold"));
        let command = command.arg("fold").args(other).env("ORT_DYLIB_PATH", "nowhere.so").current_dir(here);
        refused(
            &command.output().unwrap(),
            "exists already; choose another --model-version, or replace it with --replace",
        );
    }
    let before = fs::read(here.join("repository/nf_seresnet_small/1/model.onnx")).unwrap();
    let again = nfold(&["fold", &golden("nf_seresnet_small")], here);
    assert!(again.status.success() && text(&again.stderr).contains("unchanged"), "{}", text(&again.stderr));
    refused(&nfold(&["fold", &golden("nf_seresnet_small"), "--size", "96"], here), "exists already");
    assert!(before == fs::read(here.join("repository/nf_seresnet_small/1/model.onnx")).unwrap());
    for extra in
        [&["--replace", "--size", "96x64"][..], &["--model-version", "3", "--size", "dynamic", "--precision", "fp16"]]
    {
        let output = nfold(&[&["fold", &golden("nf_seresnet_small")], extra].concat(), here);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    assert_eq!(entries(&here.join("repository/nf_seresnet_small")), ["1", "3"]);

    let inspected = nfold(&["inspect", "nf_seresnet_small"], here);
    assert!(text(&inspected.stdout).contains("version 3") && text(&inspected.stdout).contains("fp16"));
    for path in [
        "repository/nf_seresnet_small/3",
        "repository/nf_seresnet_small/3/",
        "repository/nf_seresnet_small",
        "repository/nf_seresnet_small/3/model.onnx",
    ] {
        let again = nfold(&["inspect", path], here);
        assert_eq!(text(&again.stdout), text(&inspected.stdout), "{path}");
    }
    let inspected = nfold(&["inspect", "repository/nf_seresnet_small/1", "--json"], here);
    let inspected: Value = serde_json::from_slice(&inspected.stdout).unwrap();
    assert_eq!(inspected["manifest"]["preprocessing"]["height"], 96);
    let checkpoint = nfold(&["inspect", &golden("resnet18_small")], here);
    // ten classes: no longer what the architecture's pretrained tag says
    let said = text(&checkpoint.stdout);
    assert!(said.contains("architecture   resnet18\n") && !said.contains("a1_in1k"), "{said}");
}

/// Switches accept the usual spellings of booleans in environment variables.
#[test]
fn switches_are_read_from_the_environment() {
    for (value, json) in [("1", true), ("true", true), ("yes", true), ("0", false), ("false", false), ("", false)] {
        let output = Command::new(env!("CARGO_BIN_EXE_nfold"))
            .args(["inspect", &golden("resnet18_small")])
            .env("NFOLD_JSON", value)
            .output()
            .unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&output.stdout).is_ok(), json, "NFOLD_JSON={value}");
    }
}

#[test]
fn fold_refuses_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    refused(&nfold(&["fold", "nowhere"], here), "nowhere");
    refused(&nfold(&["fold", &golden("nf_regnet_small"), "--name", "../up"], here), "can't be a model name");
    refused(
        &nfold(&["fold", &golden("nf_regnet_small"), "--size", "100000"], here),
        "height 100000 is outside 1..=4096",
    );
    let demo = project("models/nf_regnet_cifar10");
    for weights in [&demo, &format!("{demo}/model.safetensors"), &golden("resnet18_small")] {
        let unknown = nfold(&["fold", weights, "--arch", "nf_regnet_b7"], here);
        refused(&unknown, "`nf_regnet_b7` is not supported; the nearest that are: nf_regnet_b0, ");
        assert!(text(&unknown.stderr).contains("`nfold init --help` lists all"), "{}", text(&unknown.stderr));
        refused(&nfold(&["fold", weights, "--arch", "nf_regnet_b5"], here), "--arch nf_regnet_b5 contradicts `");
    }
    fs::write(here.join("file"), "").unwrap();
    refused(&nfold(&["fold", &golden("nf_regnet_small"), "--repository", "file"], here), "`file`");
    refused(&nfold(&["fold", &golden("nf_regnet_small"), "--repository", "/proc/nowhere"], here), "/proc/nowhere");
    let missing = Command::new(env!("CARGO_BIN_EXE_nfold"))
        .args(["fold", &golden("nf_regnet_small")])
        .env("ORT_DYLIB_PATH", "nowhere.so")
        .current_dir(here)
        .output()
        .unwrap();
    refused(&missing, "make ort");
    fs::write(here.join("no.so"), "not a library").unwrap();
    let broken = Command::new(env!("CARGO_BIN_EXE_nfold"))
        .args(["fold", &golden("nf_regnet_small")])
        .env("ORT_DYLIB_PATH", "no.so")
        .current_dir(here)
        .output()
        .unwrap();
    refused(&broken, "no.so");
    assert_eq!(entries(here), ["file", "no.so"]);
    assert_eq!(nfold(&["fold", "x", "--size", "big"], here).status.code(), Some(2));
    assert_eq!(nfold(&["unfold"], here).status.code(), Some(2));
}

#[test]
fn init_refuses_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    refused(&nfold(&["init", "resnet51", "--out", "x"], here), "the nearest that are: resnet");
    refused(&nfold(&["init", "resnet18", "--out", "x", "--model-args", r#"{"depth":1}"#], here), "`depth`");
    assert!(entries(here).is_empty());
    let made = nfold(
        &["init", "nf_regnet_b0", "--out", "a/b", "--num-classes", "5", "--model-args", r#"{"width_factor":0.25}"#],
        here,
    );
    assert!(made.status.success(), "{}", text(&made.stderr));
    refused(&nfold(&["init", "resnet18", "--out", "a/b"], here), "exists already");
    let folded = nfold(&["fold", "a/b", "--size", "64"], here);
    assert!(folded.status.success(), "{}", text(&folded.stderr));
}

/// A repository with the demo model, folded by the program itself.
pub fn with_demo() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let version = folder.path().join("repository/nf_regnet_cifar10/1");
    fs::create_dir_all(&version).unwrap();
    for name in ["manifest.json", "model.onnx"] {
        fs::copy(folded_demo().join(name), version.join(name)).unwrap();
    }
    folder
}

/// The demo model's version folder. Many tests use it, so it is folded once per build of the program and kept beside
/// it.
fn folded_demo() -> &'static Path {
    static FOLDED: OnceLock<PathBuf> = OnceLock::new();
    FOLDED.get_or_init(|| {
        let checkpoint = project("models/nf_regnet_cifar10");
        let made = |path: &Path| {
            let at = fs::metadata(path).unwrap().modified().unwrap();
            at.duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos()
        };
        let weights = Path::new(&checkpoint).join("model.safetensors");
        let stamp = format!("demo-{}-{}", made(Path::new(env!("CARGO_BIN_EXE_nfold"))), made(&weights));
        let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let kept = parent.join(&stamp);
        if !kept.is_dir() {
            for old in fs::read_dir(parent)
                .unwrap()
                .flatten()
                .filter(|e| text(e.file_name().as_encoded_bytes()).starts_with("demo-"))
            {
                let _ = fs::remove_dir_all(old.path());
            }
            let fresh = tempfile::tempdir_in(parent).unwrap();
            let output = nfold(&["fold", &checkpoint], fresh.path());
            assert!(output.status.success(), "{}", text(&output.stderr));
            // fails if another process was faster
            let _ = fs::rename(fresh.path().join("repository"), &kept);
        }
        kept.join("nf_regnet_cifar10/1")
    })
}

#[test]
fn classify_answers_and_refuses() {
    let folder = with_demo();
    let here = folder.path();
    let cat = project("tests/data/cat.jpg");
    let output = nfold(&["classify", &cat], here);
    let lines: Vec<String> = text(&output.stdout).lines().map(String::from).collect();
    assert!(output.status.success() && lines.len() == 6 && lines[0] == cat, "{lines:?}");
    assert!(lines[1].contains(" %  █"), "{lines:?}");

    // a file, the same bytes on standard input, and the same file in a folder answer alike
    let from_file = nfold(&["classify", &cat, "--json", "-k", "3"], here);
    let mut child = Command::new(env!("CARGO_BIN_EXE_nfold"))
        .args(["classify", "-", "--json", "--top-k", "3"])
        .current_dir(here)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&fs::read(&cat).unwrap()).unwrap();
    let from_stdin = child.wait_with_output().unwrap();
    let predictions = |output: &Output| -> Value {
        let line: Value = serde_json::from_slice(&output.stdout).unwrap();
        line["predictions"].clone()
    };
    assert_eq!(predictions(&from_file), predictions(&from_stdin));
    assert_eq!(predictions(&from_file).as_array().unwrap().len(), 3);

    fs::create_dir_all(here.join("images/deep")).unwrap();
    fs::copy(&cat, here.join("images/deep/b.JPG")).unwrap();
    fs::write(here.join("images/a.png"), "no image at all").unwrap();
    fs::write(here.join("images/c.png"), "").unwrap();
    fs::write(here.join("images/notes.txt"), "not looked at").unwrap();
    refused(&nfold(&["classify", "images"], here), "--recursive");
    let mixed = nfold(&["classify", "images", "--recursive", "--json"], here);
    assert_eq!(mixed.status.code(), Some(1));
    let lines: Vec<Value> = text(&mixed.stdout).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 3);
    assert!(lines[0]["error"]["message"].is_string() && lines[1]["error"]["message"].is_string(), "{lines:?}");
    assert_eq!(lines[2]["predictions"].as_array().unwrap().len(), 5);

    for (args, what) in [
        (&["classify", "nowhere.jpg"][..], "nowhere.jpg"),
        (&["classify", "images/a.png"], "images/a.png"),
        (&["classify", "images/c.png"], "images/c.png"),
        (&["classify", "images/notes.txt"], "images/notes.txt"),
        (&["classify", &cat, "--model", "other"], "it has: nf_regnet_cifar10"),
        (&["classify", &cat, "--model-version", "7"], "no version 7"),
        (&["classify", &cat, "--repository", "elsewhere"], "nfold fold"),
    ] {
        refused(&nfold(args, here), what);
    }

    // a graph that is not the manifest's is not run
    let onnx = here.join("repository/nf_regnet_cifar10/1/model.onnx");
    let mut bytes = fs::read(&onnx).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&onnx, bytes).unwrap();
    refused(&nfold(&["classify", &cat], here), "sha256");
}

/// What is named but isn't there is skipped as a broken image is: named in the output, counted, without failing the run.
#[test]
fn missing_images_are_skipped_like_broken_ones() {
    let folder = with_demo();
    let here = folder.path();
    let cat = project("tests/data/cat.jpg");
    fs::write(here.join("broken.jpg"), "no image").unwrap();
    let images = ["broken.jpg", &cat, "nowhere.jpg"];
    let strict = nfold(&[&["classify"], &images[..]].concat(), here);
    refused(&strict, "can't read `nowhere.jpg`: ");
    assert!(text(&strict.stderr).contains("--skip-broken"), "{}", text(&strict.stderr));
    let table = nfold(&[&["classify", "--skip-broken"], &images[..]].concat(), here);
    let said = text(&table.stderr);
    assert!(table.status.success() && text(&table.stdout).starts_with(&cat), "{said}");
    assert!(said.contains("error: `nowhere.jpg`: can't read it: No such file"), "{said}");
    assert!(said.contains("classified 1 of 3 images in ") && said.ends_with("; 2 could not be\n"), "{said}");
    let output = nfold(&[&["classify", "--skip-broken", "--json"], &images[..]].concat(), here);
    let lines: Vec<Value> = text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(output.status.success() && lines.len() == 3 && lines[1]["predictions"].is_array(), "{lines:?}");
    assert_eq!((&lines[2]["image"], &lines[2]["error"]["reason"]), (&"nowhere.jpg".into(), &"unreadable".into()));
    // alone, too
    let alone = nfold(&["classify", "--skip-broken", "nowhere.jpg"], here);
    assert!(alone.status.success() && text(&alone.stderr).contains("`nowhere.jpg`"), "{}", text(&alone.stderr));
}

/// A folder without images, or one that is not to be searched, is skipped as a missing one is.
#[test]
fn folders_are_skipped_like_broken_images() {
    let folder = with_demo();
    let here = folder.path();
    let cat = project("tests/data/cat.jpg");
    fs::create_dir_all(here.join("empty")).unwrap();
    fs::create_dir_all(here.join("photos")).unwrap();
    fs::write(here.join("empty/notes.txt"), "no image").unwrap();
    fs::copy(&cat, here.join("photos/cat.jpg")).unwrap();
    let recursive = ["empty", "gone", &cat, "photos"];
    let plain = ["photos", &cat];
    for (flags, images, strict, skipped) in [
        (
            &["--recursive"][..],
            &recursive[..],
            "folder `empty` holds no image file (looked for: jpg,",
            &[("empty", "the folder holds no image file (looked for: jpg,"), ("gone", "can't read it: ")][..],
        ),
        (
            &[],
            &plain,
            "`photos` is a folder; add --recursive",
            &[("photos", "it is a folder; add --recursive to classify the images in it")],
        ),
    ] {
        let run =
            |more: &[&str], images: &[&str]| nfold(&[&["classify", "--json"], flags, more, images].concat(), here);
        refused(&run(&[], images), strict);
        let output = run(&["--skip-broken"], images);
        let said = text(&output.stderr);
        assert!(output.status.success(), "{said}");
        let lines: Vec<Value> = text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), images.len(), "{lines:?}");
        for line in &lines {
            match skipped.iter().find(|(name, _)| line["image"] == *name) {
                Some((_, why)) => assert!(line["error"]["message"].as_str().unwrap().starts_with(why), "{line}"),
                None => assert!(line["predictions"].is_array(), "{line}"),
            }
        }
        let end = format!("; {} could not be\n", skipped.len());
        assert!(said.ends_with(&end), "{said}");
        // alone: as if all images were broken
        let alone = run(&["--skip-broken"], &[skipped[0].0]);
        assert!(alone.status.success() && text(&alone.stderr).contains(skipped[0].1), "{}", text(&alone.stderr));
    }
}

/// Shards partition the images, and together give the results of one process.
#[test]
fn shards_are_a_partition() {
    let folder = with_demo();
    let here = folder.path();
    let photographs = project("tests/data/cifar10/cat");
    fs::create_dir(here.join("broken")).unwrap();
    fs::write(here.join("broken/a.jpg"), "no image").unwrap();
    let classify = |more: &[&str]| nfold(&[&["classify", "--recursive", &photographs, "broken"], more].concat(), here);
    let whole = classify(&["--json"]);
    assert_eq!(whole.status.code(), Some(1), "a broken image fails the run");
    let mut expected: Vec<String> = text(&whole.stdout).lines().map(String::from).collect();
    let mut found = Vec::new();
    for index in 0..3 {
        let (shard, file) = (format!("--shard={index}/3"), format!("{index}.jsonl"));
        let output = classify(&[&shard, "--skip-broken", "--output", &file]);
        assert!(output.status.success() && output.stdout.is_empty(), "{}", text(&output.stderr));
        let lines = fs::read_to_string(here.join(&file)).unwrap();
        assert!(lines.lines().count().abs_diff(expected.len() / 3) <= 1, "shards are even");
        found.extend(lines.lines().map(String::from));
    }
    expected.sort();
    found.sort();
    assert_eq!(expected, found);
    // a shard without an image is an empty file, not a failure
    let empty = nfold(&["classify", &project("tests/data/cat.jpg"), "--shard", "1/2", "--output", "empty.jsonl"], here);
    assert!(empty.status.success() && fs::read(here.join("empty.jsonl")).unwrap().is_empty());
    refused(&nfold(&["classify", &project("tests/data/cat.jpg"), "--output", "nowhere/x.jsonl"], here), "--output");
    assert!(!entries(here).iter().any(|name| name.starts_with(".classify")), "{:?}", entries(here));
}

/// End to end on real photographs: the folded demo model is as accurate as timm on the same files.
#[test]
fn the_demo_is_as_accurate_as_timm() {
    let folder = with_demo();
    let reference: Value = serde_json::from_slice(&fs::read(project("tests/data/cifar10.json")).unwrap()).unwrap();
    let photographs = project("tests/data/cifar10");
    let output = nfold(&["classify", "--recursive", &photographs], folder.path());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let (mut right, mut agree, mut all) = (0, 0, 0);
    for line in text(&output.stdout).lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let path = Path::new(line["image"].as_str().unwrap());
        let name = path.strip_prefix(&photographs).unwrap();
        let top = &line["predictions"][0];
        let key = name.to_string_lossy().into_owned();
        right += usize::from(top["label"] == name.parent().unwrap().to_string_lossy().as_ref());
        agree += usize::from(top["index"] == reference["images"][&key]["top1"]);
        all += 1;
    }
    let (accuracy, timm) = (f64::from(right as u32) / f64::from(all), reference["accuracy"].as_f64().unwrap());
    println!("accuracy {accuracy:.4} on {all} photographs, timm {timm:.4}; same class on {agree}");
    assert!(all >= 500 && (accuracy - timm).abs() <= 0.003, "accuracy {accuracy}, timm {timm}");
    assert!(agree * 100 >= all as usize * 98, "{agree} of {all}");
}

#[test]
fn gamma_four_ways() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let output = nfold(&["gamma", "relu", "--json", "--samples", "200000"], here);
    let relu: Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |path: &str| relu.pointer(path).and_then(Value::as_f64).unwrap();
    let exact = 1.712_858_550_449_663_2;
    assert!((number("/closed_form") - exact).abs() < 1e-14 && (number("/quadrature/gamma") - exact).abs() < 1e-12);
    let (simulated, error) = (number("/simulation/gamma"), number("/simulation/standard_error"));
    assert!(error > 1e-3 && error < 1e-2 && (simulated - exact).abs() < 5.0 * error, "{relu}");
    assert!((number("/timm_relative_difference") - 6.4237e-4).abs() < 1e-7, "{relu}");
    assert!(text(&nfold(&["gamma", "mish"], here).stdout).contains("none known"));
    assert!(text(&nfold(&["gamma", "se"], here).stdout).contains("factor          1.99"));
    assert_eq!(text(&nfold(&["gamma", "all", "--samples", "1000"], here).stdout).lines().count(), 20);
    refused(&nfold(&["gamma", "softmax"], here), "known are celu");
}

#[test]
fn fold_records_whether_images_are_turned_upright() {
    let folder = tempfile::tempdir().unwrap();
    let upright = |flags: &[&str]| {
        let checkpoint = project("tests/goldens/resnet18_small");
        let output = nfold(&[&["fold", &checkpoint, "--replace", "--json"], flags].concat(), folder.path());
        assert!(output.status.success(), "{}", text(&output.stderr));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["manifest"]["golden"]["logits"].as_array().unwrap().len(), 10);
        report["manifest"]["preprocessing"]["exif_orientation"].clone()
    };
    assert_eq!(upright(&[]), false);
    assert_eq!(upright(&["--exif-orientation"]), true);
}

/// Labels, names and paths are untrusted: a terminal shows them, but does not obey their control characters.
#[test]
fn control_characters_stay_out_of_terminals() {
    let copy = crate::checkpoint::Copy::of("nf_regnet_small");
    let labels: Vec<String> =
        (0..10).map(|i| format!("\u{1b}[2J\u{1b}]0;evil\u{7}\r\nerror: \u{9b}\u{202e}{i}")).collect();
    copy.config(|c| {
        c["label_names"] = labels.clone().into();
        c["architecture"] =
            format!("{}.\u{1b}[31mred\n", c["architecture"].as_str().unwrap().split('.').next().unwrap()).into();
    });
    let checkpoint = copy.path("").display().to_string();
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let is_plain = |bytes: &[u8]| text(bytes).chars().all(|c| c == '\n' || !(c.is_control() || c == '\u{202e}'));
    let folded = nfold(&["fold", &checkpoint, "--name", "red", "--size", "64"], here);
    assert!(folded.status.success() && is_plain(&folded.stderr), "{}", text(&folded.stderr));
    let photo = "\u{1b}[31m.jpg";
    fs::copy(project("tests/data/cat.jpg"), here.join(photo)).unwrap();
    fs::write(here.join("\u{1b}c.png"), "no image").unwrap();
    for args in [
        &["inspect", "red"][..],
        &["inspect", &checkpoint],
        &["classify", photo, "\u{1b}c.png"],
        &["classify", "\u{1b}[2J"],
        // what is wrong is told by the library that reads the command line
        &["\u{1b}[31m"],
        &["fold", "\u{1b}[31m"],
        &["fold", "a", "\u{1b}[31m"],
        &["classify", "--\u{1b}]0;evil\u{7}"],
        &["classify", "a", "--shard", "\u{1b}[2J\r\n\u{202e}"],
        &["serve", "--http", "\u{1b}[2J:1"],
        &["serve", "--model", "a:\u{1b}[2J"],
        &["serve", "--log-format", "\u{1b}[2J"],
        &["serve", "--log", "\u{1b}[2J=="],
        &["inspect", "\u{1b}[2J"],
        &["spp", "--arch", "\u{1b}[2J"],
        &["init", "\u{1b}[2J", "--out", "made"],
        &["gamma", "\u{1b}[2J"],
        &["bench", "engine", "\u{1b}[2J"],
        &["completions", "\u{1b}[2J"],
        &["healthcheck", "--admin", "\u{1b}[2J"],
    ] {
        let output = nfold(args, here);
        assert!(is_plain(&output.stdout) && is_plain(&output.stderr), "{args:?}: {output:?}");
        assert!(text(&[output.stdout, output.stderr].concat()).contains("\\u{1b}"), "{args:?}");
    }
    for variable in ["NFOLD_HTTP", "NFOLD_LOG_FORMAT", "NFOLD_MODEL"] {
        let mut serve = Command::new(env!("CARGO_BIN_EXE_nfold"));
        let output =
            serve.args(["serve", "--repository", "nowhere"]).env(variable, "\u{1b}[2J\u{7}:x").output().unwrap();
        assert!(!output.status.success() && is_plain(&output.stderr), "{variable}: {output:?}");
        assert!(text(&output.stderr).contains(variable), "{variable}: {output:?}");
    }
    // machine-readable output is not escaped
    let output = nfold(&["classify", photo, "--json", "-k", "1"], here);
    let line: Value = serde_json::from_slice(&output.stdout).unwrap();
    let label = line["predictions"][0]["label"].as_str().unwrap();
    assert!(labels.iter().any(|l| l == label) && line["image"] == photo, "{line}");
}

/// A folder as macOS, Windows and network drives produce it.
#[cfg(target_os = "linux")]
#[test]
fn side_files_are_left_out_and_what_cannot_be_read_is_named() {
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::symlink;
    let folder = with_demo();
    let here = folder.path();
    let cat = project("tests/data/cat.jpg");
    let photos = here.join("photos");
    for side in [".thumbnails", "@eaDir/a.jpg", "__MACOSX", "album"] {
        fs::create_dir_all(photos.join(side)).unwrap();
    }
    let strange = std::ffi::OsStr::from_bytes(b"caf\xe9.jpg");
    for name in ["a.jpg", "b.jfif", ".thumbnails/a.jpg", "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "album/c.JPEG"] {
        fs::copy(&cat, photos.join(name)).unwrap();
    }
    fs::copy(&cat, photos.join(strange)).unwrap();
    fs::write(photos.join("._a.jpg"), "Mac OS X").unwrap();
    fs::write(photos.join("__MACOSX/._a.jpg"), "Mac OS X").unwrap();
    fs::write(photos.join("list.txt"), "").unwrap();
    symlink("/nowhere", photos.join("gone.jpg")).unwrap();
    symlink("loop.jpg", photos.join("loop.jpg")).unwrap();
    symlink(".", photos.join("again")).unwrap();
    assert!(Command::new("mkfifo").arg(photos.join("pipe.jpg")).status().unwrap().success());

    let output = nfold(&["classify", "--recursive", "photos", "--json", "-k", "1"], here);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("note: left out 4 hidden names and system folders (.") && stderr.contains("--hidden"),
        "{stderr}"
    );
    assert!(stderr.contains("1 link to a folder (again)") && stderr.contains("(list.txt)"), "{stderr}");
    assert!(stderr.lines().last().unwrap().starts_with("error: 3 of 7 images could not be classified"), "{stderr}");
    let lines: Vec<Value> = text(&output.stdout).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let good: Vec<_> = lines.iter().filter(|l| l["predictions"].is_array()).collect();
    assert_eq!(
        good.iter().map(|l| l["image"].as_str().unwrap()).collect::<Vec<_>>(),
        ["photos/a.jpg", "photos/album/c.JPEG", "photos/b.jfif", "photos/caf\u{fffd}.jpg"]
    );
    // the bytes of a name that is no text find its file again
    use base64::Engine as _;
    let name = base64::prelude::BASE64_STANDARD.decode(good[3]["image_b64"].as_str().unwrap()).unwrap();
    assert!(here.join(std::ffi::OsStr::from_bytes(&name)).is_file());
    assert!(good[0].get("image_b64").is_none());
    for (name, why) in [("gone.jpg", "No such file"), ("loop.jpg", "symbolic links"), ("pipe.jpg", "no file")] {
        let line = lines.iter().find(|l| l["image"] == format!("photos/{name}")).unwrap();
        assert!(line["error"]["message"].as_str().unwrap().contains(why), "{line}");
    }
    let all = nfold(&["classify", "--recursive", "photos", "--hidden", "--format", "csv", "-k", "1"], here);
    let csv = all.stdout;
    assert!(csv.starts_with(b"image,model,version,rank,index,label,score,error\n"), "{}", text(&csv));
    assert!(csv.windows(9).any(|w| w == b"/caf\xe9.jpg"), "a name stays as it is");
    assert!(
        text(&csv).contains("SYNOPHOTO") && text(&csv).contains("photos/._a.jpg,nf_regnet_cifar10,1,,,,,"),
        "{}",
        text(&csv)
    );
    // as a shell does, a table escapes bytes that are not UTF-8
    let table = nfold(&["classify", "--recursive", "photos", "--format", "table"], here);
    assert!(text(&table.stdout).contains("photos/caf\\xe9.jpg\n"), "{}", text(&table.stdout));
}

/// Output formats, chosen by the flag or by the file's extension.
#[test]
fn answers_have_three_formats() {
    let folder = with_demo();
    let here = folder.path();
    let cat = project("tests/data/cat.jpg");
    for (file, start) in [("a.csv", "image,model,"), ("a.jsonl", "{\""), ("a.txt", &cat), ("a.other", "{\"")] {
        let output = nfold(&["classify", &cat, "--output", file], here);
        assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
        assert!(fs::read_to_string(here.join(file)).unwrap().starts_with(start), "{file}");
    }
    // the flag wins over the name
    assert!(nfold(&["classify", &cat, "--output", "b.csv", "--format", "jsonl"], here).status.success());
    assert!(fs::read_to_string(here.join("b.csv")).unwrap().starts_with('{'));
    refused(&nfold(&["classify", &cat, "--json", "--format", "csv"], here), "contradicts");
    let zero = nfold(&["classify", &cat, "--top-k", "0"], here);
    assert!(zero.status.code() == Some(2) && text(&zero.stderr).contains("--top-k"), "{}", text(&zero.stderr));
    let two = nfold(&["classify", &cat, &cat], here);
    assert!(text(&two.stderr).starts_with("classified 2 images in "), "{}", text(&two.stderr));
    // a device is written to, not replaced
    assert!(nfold(&["classify", &cat, "--output", "/dev/null"], here).status.success());
    assert!(!Path::new("/dev/null").is_file());
}

/// A single logit is a binary classifier's: a sigmoid.
#[test]
fn one_output_is_a_sigmoids() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let width = r#"{"width_factor": 0.25}"#;
    assert!(
        nfold(&["init", "nf_regnet_b0", "--out", "one", "--num-classes", "1", "--model-args", width], here)
            .status
            .success()
    );
    let folded = nfold(&["fold", "one", "--size", "64", "--json"], here);
    assert!(text(&folded.stderr).contains("warning: the network has one output"), "{}", text(&folded.stderr));
    let answer = nfold(&["classify", &project("tests/data/cat.jpg"), "--json"], here);
    let answer: Value = serde_json::from_slice(&answer.stdout).unwrap();
    let score = answer["predictions"][0]["score"].as_f64().unwrap();
    assert!(score > 0.0 && score < 1.0, "{answer}");
}

/// An empty variable counts as not set, and an error names its variable.
#[test]
fn variables_may_be_empty_and_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let serve = |name: &str, value: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nfold"));
        command.args(["serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
        text(&command.env(name, value).current_dir(folder.path()).output().unwrap().stderr)
    };
    for name in [
        "WATCH",
        "MODEL",
        "TLS_CERT",
        "API_KEY_FILE",
        "BATCH_BUCKETS",
        "CORS_ORIGIN",
        "QUEUE_LIMIT",
        "DRAIN_HOLD",
        "LOG_FORMAT",
        "LOG",
        "MODEL_CONTROL",
        "PROVIDER",
    ] {
        // so far, that there is no repository here
        let said = serve(&format!("NFOLD_{name}"), "");
        assert!(said.contains("model repository `repository` does not exist"), "{name}: {said}");
    }
    // Kubernetes sets this for a Service called nfold
    assert!(serve("NFOLD_PORT", "tcp://10.0.0.1:8000").contains("does not exist"));
    for (name, value) in
        [("NFOLD_WATCH", "soon"), ("NFOLD_QUEUE_LIMIT", "-1"), ("NFOLD_PORT", "70000"), ("NFOLD_TLS_CERT", "cert.pem")]
    {
        let said = serve(name, value);
        assert!(said.contains("error: ") && said.contains(&format!("environment: {name}")), "{said}");
    }
    let typed = nfold(&["serve", "--watch", "soon"], folder.path());
    assert!(!text(&typed.stderr).contains("environment"), "{}", text(&typed.stderr));
}

/// Outside a clone of the project, messages don't suggest `make`.
#[test]
fn messages_fit_where_the_program_is() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let installed = here.join("nfold");
    fs::copy(env!("CARGO_BIN_EXE_nfold"), &installed).unwrap();
    let fold = |program: &Path| {
        let mut command = Command::new(program);
        text(
            &command
                .args(["fold", &golden("nf_regnet_small")])
                .env("ORT_DYLIB_PATH", "nowhere.so")
                .current_dir(here)
                .output()
                .unwrap()
                .stderr,
        )
    };
    let (there, clone) = (fold(&installed), fold(Path::new(env!("CARGO_BIN_EXE_nfold"))));
    assert!(there.contains("pip install onnxruntime") && !there.contains("make ort"), "{there}");
    assert!(clone.contains("make ort"), "{clone}");
}
