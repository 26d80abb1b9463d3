//! The commands as users type them: `nfold fold ORG/NAME`, `nfold serve SOURCE…`, and those that never access the
//! network.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::below;
use super::server::{Hub, REPOSITORY};
use crate::cli::{golden, project, refused, text};
use crate::fakes::eventually;
use crate::process::Server;

const CAT: &str = "tests/data/cat.jpg";

/// The checkpoint of the demo, with names for its classes.
fn demo() -> Vec<(&'static str, Vec<u8>)> {
    let read = |name: &str| fs::read(project(&format!("models/nf_regnet_cifar10/{name}"))).unwrap();
    vec![("config.json", read("config.json")), ("model.safetensors", read("model.safetensors"))]
}

fn from(checkpoint: &str) -> Vec<(&'static str, Vec<u8>)> {
    let read = |name: &str| fs::read(Path::new(&golden(checkpoint)).join(name)).unwrap();
    vec![("config.json", read("config.json")), ("model.safetensors", read("model.safetensors"))]
}

/// Environment of a machine with empty caches.
fn empty_machine(endpoint: &str, home: &Path) -> Vec<(&'static str, String)> {
    let home = home.display().to_string();
    let none = ["HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_TOKEN", "HF_HUB_OFFLINE"];
    let mut variables: Vec<_> = none.into_iter().map(|name| (name, String::new())).collect();
    variables.extend([("HOME", home), ("HF_ENDPOINT", endpoint.to_string())]);
    variables
}

fn run(args: &[&str], folder: &Path, variables: &[(&str, String)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nfold"));
    command.args(args).current_dir(folder).envs(variables.iter().map(|(name, value)| (*name, value.as_str())));
    command.output().unwrap()
}

#[test]
fn a_name_on_the_hub_is_folded() {
    let (hub, folder) = (Hub::start(&demo()), tempfile::tempdir().unwrap());
    let here = folder.path();
    let machine = empty_machine(&hub.endpoint(), here);
    let output = run(&["fold", REPOSITORY], here, &machine);
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("fetched model.safetensors (8.6 MB)"), "{said}");
    // its origin in at most five lines, no tables, and the next command
    assert!(said.contains(&format!("checkpoint: {REPOSITORY} at commit aaaa")), "{said}");
    assert!(said.lines().filter(|line| line.starts_with("  from")).count() <= 5, "{said}");
    assert!(!said.contains("skip gain") && said.ends_with("next: nfold serve\n"), "{said}");
    let manifest = fs::read(here.join("repository/demo/1/manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    assert_eq!(manifest["source"]["settings"][0]["setting"], "checkpoint");
    assert!(below(&here.join(".cache/huggingface/hub")).contains("models--timm--demo/refs/main"));

    // a version that is there is known before a second machine fetches anything
    hub.state().down = true;
    let second = empty_machine(&hub.endpoint(), &here.join("second"));
    let int8 = run(&["fold", REPOSITORY, "--precision", "int8", "--calibrate", "."], here, &second);
    refused(&int8, "exists already; choose another --model-version");

    // the same from the cache, without the network; with --verbose; the next command depends on the folder
    let offline = [&machine[..], &[("HF_HUB_OFFLINE", "1".to_string())]].concat();
    hub.state().down = true;
    let again = run(&["fold", REPOSITORY, "--verbose"], here, &offline);
    let said = text(&again.stderr);
    assert!(again.status.success() && said.contains("unchanged") && said.contains("skip gain"), "{said}");
    let other = run(&["fold", REPOSITORY, "--name", "other", "--repository", "a b"], here, &offline);
    assert!(text(&other.stderr).ends_with("next: nfold serve --repository 'a b'\n"), "{}", text(&other.stderr));
    let third = run(&["fold", REPOSITORY, "--name", "third"], here, &offline);
    assert!(text(&third.stderr).ends_with("next: nfold serve --default-model third\n"), "{}", text(&third.stderr));
}

#[test]
fn what_is_no_checkpoint_leaves_nothing() {
    let vit = br#"{"architecture": "vit_base_patch16_224"}"#.to_vec();
    let (hub, folder) =
        (Hub::start(&[("config.json", vit), ("model.safetensors", vec![1; 99])]), tempfile::tempdir().unwrap());
    let here = folder.path();
    let machine = empty_machine(&hub.endpoint(), here);
    for (given, what) in [
        ("./x", "`./x` is not here"),
        ("x/y/z", "no name on the model hub (ORG/NAME or ORG/NAME@REVISION)"),
        ("hf://x", "it is not ORG/NAME"),
        ("timm/other", "no file or folder here, and"),
        ("timm/demo@nowhere", "no revision `nowhere`"),
        (REPOSITORY, "vit_base_patch16_224"),
        ("folder/model.pth", "is not here"),
    ] {
        refused(&run(&["fold", given], here, &machine), what);
        let output = run(&["serve", given, "--check"], here, &machine);
        let said = text(&output.stderr);
        let last = said.lines().last().unwrap_or_default();
        assert!(output.status.code() == Some(1) && last.starts_with("error: ") && last.contains(what), "{said}");
    }
    let left = below(here);
    assert!(left.is_empty(), "{left:?}");
    // a file whose name is also a name on the hub
    fs::create_dir_all(here.join("timm")).unwrap();
    fs::write(here.join(REPOSITORY), "no checkpoint").unwrap();
    refused(&run(&["fold", REPOSITORY], here, &machine), "neither a file of torch.save nor safetensors");
}

/// Classifies a photograph; returns the model's name and the best label.
fn best(server: &Server, query: &str) -> (String, String) {
    let answer = server.post(&format!("/v1/classify{query}"), &[], &fs::read(project(CAT)).unwrap());
    let json = answer.json();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    (text(&json["model"]), text(&json["results"][0]["predictions"][0]["label"]))
}

fn serve(machine: &[(&str, String)], flags: &[&str]) -> Server {
    Server::start_with(tempfile::tempdir().unwrap(), flags, machine)
}

/// From empty caches: one command leads to a correct, labelled answer. Twice offline after that.
#[test]
fn one_command_answers() {
    let (hub, home) = (Hub::start(&demo()), tempfile::tempdir().unwrap());
    let machine = empty_machine(&hub.endpoint(), home.path());
    let started = Instant::now();
    let server = serve(&machine, &[REPOSITORY]);
    assert_eq!(best(&server, ""), ("demo".to_string(), "cat".to_string()));
    let first = started.elapsed();
    drop(server);
    hub.state().down = true;
    let offline = [&machine[..], &[("HF_HUB_OFFLINE", "1".to_string())]].concat();
    for _ in 0..2 {
        let started = Instant::now();
        let server = serve(&offline, &[REPOSITORY]);
        assert_eq!(best(&server, ""), ("demo".to_string(), "cat".to_string()));
        assert!(!server.before_ready("is folded already").is_empty());
        eprintln!("from an empty machine {first:.1?}, again {:.1?}", started.elapsed());
        drop(server);
    }
    // without the variable: the hub is unreachable, and the cache is used
    let server = serve(&machine, &[REPOSITORY]);
    assert!(!server.before_ready("which is cached, is used").is_empty());
    // with other options it is another model
    drop(server);
    let names = home.path().join("names.txt");
    fs::write(&names, (0..10).map(|n| format!("class {n}\n")).collect::<String>()).unwrap();
    let server = serve(&offline, &[REPOSITORY, "--labels", &names.display().to_string()]);
    assert_eq!(best(&server, "").1, "class 3");
    drop(server);
    // a damaged one is folded again
    let folded = home.path().join(".cache/nfold/folded");
    for model in below(&folded).iter().filter(|f| f.ends_with("model.onnx")) {
        fs::write(folded.join(model), "damaged").unwrap();
    }
    let server = serve(&offline, &[REPOSITORY]);
    assert!(!server.before_ready("folded and verified").is_empty());
    assert_eq!(best(&server, "").1, "cat");
}

/// Several sources, one with a name of the user's; SIGHUP brings changes, and keeps the models of sources that fail.
#[test]
fn sources_are_looked_at_again() {
    let (hub, home) = (Hub::start(&demo()), tempfile::tempdir().unwrap());
    let machine = empty_machine(&hub.endpoint(), home.path());
    let local = golden("nf_regnet_small");
    let flags = [REPOSITORY, &format!("small={local}"), "--default-model", "small", "--watch", "100ms"];
    let server = serve(&machine, &flags);
    assert_eq!(best(&server, "").0, "small");
    assert_eq!(best(&server, "?model=demo"), ("demo".to_string(), "cat".to_string()));
    hub.requests();
    std::thread::sleep(Duration::from_millis(500));
    assert!(hub.requests().is_empty(), "--watch asks nobody");

    // unreachable: both stay
    hub.state().down = true;
    server.signal("-HUP");
    eventually("the hub is found away", || !server.logged("which is cached, is used").is_empty());
    assert_eq!(best(&server, "?model=demo").1, "cat");
    // another commit, of another network
    hub.state().down = false;
    hub.publish('b', &from("nf_seresnet_small"));
    server.signal("-HUP");
    eventually("the new commit serves", || best(&server, "?model=demo").1 != "cat");
    assert_eq!(best(&server, "").0, "small");
    // one that can't be folded
    hub.publish('c', &[("config.json", b"{}".to_vec())]);
    server.signal("-HUP");
    eventually("it is refused", || !server.logged("not loaded, what was served stays").is_empty());
    assert_eq!(best(&server, "?model=demo").0, "demo");
}

/// A folder that is a checkpoint itself, as KServe mounts it, and requests that name no model while another is added.
#[test]
fn a_mounted_checkpoint_is_a_repository() {
    let home = tempfile::tempdir().unwrap();
    let machine = empty_machine("http://127.0.0.1:1", home.path());
    let mounted = project("models/nf_regnet_cifar10");
    let server = serve(&machine, &["--repository", &mounted]);
    assert_eq!(best(&server, ""), ("nf_regnet_cifar10".to_string(), "cat".to_string()));
    drop(server);
    let named = serve(&machine, &["--repository", &mounted, "--default-model", "classifier"]);
    assert_eq!(best(&named, "").0, "classifier");
    drop(named);
    // the same name twice
    let twice = run(&["serve", &mounted, &mounted, "--check"], home.path(), &machine);
    assert!(text(&twice.stderr).contains("two sources are called `nf_regnet_cifar10`"), "{}", text(&twice.stderr));
    // a repository with two models
    let folder = tempfile::tempdir().unwrap();
    for (checkpoint, name) in [(mounted.as_str(), "b"), (&golden("nf_regnet_small"), "a")] {
        assert!(run(&["fold", checkpoint, "--name", name], folder.path(), &machine).status.success());
    }
    let none = run(&["serve", "--default-model", "c", "--check"], folder.path(), &machine);
    assert!(
        text(&none.stderr).contains("the default model `c` is not among the models (a, b)"),
        "{}",
        text(&none.stderr)
    );
    let server = Server::start_with(folder, &["--default-model", "b"], &machine);
    assert_eq!(best(&server, "").0, "b");
    assert_eq!(best(&server, "?model=a").0, "a");
}

/// If no permanent folder is writable, folded models go to a temporary folder, with a warning.
#[test]
fn a_cache_that_can_not_be_written_is_replaced_by_a_temporary_one() {
    let hub = Hub::start(&demo());
    let machine = empty_machine(&hub.endpoint(), Path::new("/proc"));
    let server = serve(&machine, &[REPOSITORY]);
    assert_eq!(best(&server, "").1, "cat");
    assert!(!server.before_ready("--cache names a folder that stays").is_empty());
    drop(server);
    let named = run(&["serve", REPOSITORY, "--cache", "/proc/x", "--check"], Path::new("/"), &machine);
    assert!(text(&named.stderr).contains("name one with --cache"), "{}", text(&named.stderr));
}

/// Only `fold` and `serve SOURCE` access the network: every other command runs with a hub and proxies that would record
/// it.
#[test]
fn nothing_else_calls_out() {
    let (hub, folder) = (Hub::start(&demo()), tempfile::tempdir().unwrap());
    let here = folder.path();
    let mut machine = empty_machine(&hub.endpoint(), here);
    for proxy in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"] {
        machine.push((proxy, hub.endpoint()));
    }
    let photo = project(CAT);
    let demo = project("models/nf_regnet_cifar10");
    assert!(run(&["fold", &demo], here, &machine).status.success());
    assert!(run(&["init", "nf_regnet_b0", "--out", "fresh", "--num-classes", "3"], here, &machine).status.success());
    for args in [
        &["classify", &photo][..],
        &["classify", "--model", REPOSITORY, &photo],
        &["eval", &demo],
        &["serve", "--check"],
        &["inspect", "nf_regnet_cifar10"],
        &["inspect", REPOSITORY],
        &["inspect", "hf://timm/demo"],
        &["gamma", "silu"],
        &["spp", REPOSITORY],
        &["spp", "--arch", "nf_regnet_b0", "--json"],
        &["bench", "engine", REPOSITORY],
        &["healthcheck", "--admin", "127.0.0.1:1", "--timeout", "100ms"],
        &["completions", "bash"],
        &["man", "man"],
    ] {
        run(args, here, &machine);
    }
    let server = Server::start_with(folder, &[], &machine);
    assert_eq!(best(&server, "").1, "cat");
    server.signal("-HUP");
    assert_eq!(best(&server, "").1, "cat");
    let seen = hub.requests();
    assert!(seen.is_empty(), "{seen:?}");
}

/// A repository that nfold 0.1 wrote, whose manifests lack newer fields: it is served, and gives the logits of today's
/// fold of the same checkpoint.
#[test]
fn a_repository_of_version_0_1_still_loads() {
    let folder = tempfile::tempdir().unwrap();
    let kept = project("tests/data/repository-0.1");
    let machine = empty_machine("http://127.0.0.1:1", folder.path());
    assert!(run(&["fold", &golden("nf_resnet_deep_pool")], folder.path(), &machine).status.success());
    let probabilities = |repository: &str| {
        let photo = project(CAT);
        let output = run(
            &["classify", "--repository", repository, "--format", "jsonl", "--top-k", "7", &photo],
            folder.path(),
            &machine,
        );
        assert!(output.status.success(), "{}", text(&output.stderr));
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        let image = if answer.is_array() { answer[0].clone() } else { answer };
        let predictions = image["predictions"].as_array().unwrap_or_else(|| panic!("{image}")).clone();
        let pair = |p: &Value| (p["index"].as_u64().unwrap_or_default(), p["score"].as_f64().unwrap());
        let mut pairs: Vec<(u64, f64)> = predictions.iter().map(pair).collect();
        pairs.sort_by_key(|(index, _)| *index);
        pairs
    };
    let (old, new) = (probabilities(&kept), probabilities("repository"));
    assert_eq!(old.len(), 7);
    for (a, b) in old.iter().zip(&new) {
        assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-5, "{old:?} {new:?}");
    }
    let inspected =
        text(&run(&["inspect", "nf_resnet_deep_pool", "--repository", &kept], folder.path(), &machine).stdout);
    assert!(inspected.contains("architecture   nf_resnet26"), "{inspected}");
    let server = Server::start_with(tempfile::tempdir().unwrap(), &["--repository", &kept], &machine);
    let answer = server.post("/v1/classify", &[], &fs::read(project(CAT)).unwrap());
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(server.get("/v2/models/nf_resnet_deep_pool").json()["versions"][0], "1");
}
