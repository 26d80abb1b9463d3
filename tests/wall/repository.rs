//! Untrusted repositories: links, pipes, odd names, broken and hostile models. What can't be served is named once, and
//! the rest is served.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nfold::model::{self, ModelDir};
use nfold::pb::onnx::{DataLocation, ModelProto, NodeProto, StringStringEntryProto, TensorProto};
use prost::Message as _;
use serde_json::{Value, json};

use super::{MIB, under_attack};
use crate::cli::{nfold, project, refused, text, with_demo};
use crate::fakes::eventually;
use crate::process::{Answer, Server, data};

const MODEL: &str = "nf_regnet_cifar10";
const WATCH: [&str; 6] = ["--watch", "200ms", "--workers", "1", "--elastic-threads", "0"];

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in ["model.onnx", "manifest.json"] {
        fs::copy(from.join(file), to.join(file)).unwrap();
    }
}

fn pipe(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// The version that answers for `model`.
fn version(server: &Server, model: &str) -> Value {
    let answer = server.post(&format!("/v1/classify?model={model}"), &[], &data("cat.jpg"));
    if answer.status == 200 { answer.json()["version"].clone() } else { json!(answer.status) }
}

/// Long enough for several checks of the repository.
fn looks() {
    std::thread::sleep(Duration::from_millis(1500));
}

/// Edits a version's manifest.
fn edit(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("manifest.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    manifest["onnx_sha256"] = nfold::model::sha256(&fs::read(folder.join("model.onnx")).unwrap()).into();
    manifest.as_object_mut().unwrap().remove("golden");
    change(&mut manifest);
    fs::write(path, manifest.to_string()).unwrap();
}

#[test]
fn odd_folders_are_named_once_and_the_rest_is_served() {
    let folder = with_demo();
    let repository = folder.path().join("repository");
    let good = repository.join(MODEL).join("1");
    let at = |path: &str| repository.join(path);
    for odd in ["other/01", "other/+2", "other/v3", "my model/1", "a+b/1", "newest/20261126105959", "newest/7"] {
        copy(&good, &at(odd));
    }
    symlink("nowhere", at("dangling")).unwrap();
    symlink("loop", at("loop")).unwrap();
    symlink(at("loop"), at("newest/8")).unwrap();
    fs::create_dir_all(at("newest/9")).unwrap();
    fs::create_dir_all(at("newest/10")).unwrap();
    pipe(&at("newest/10/manifest.json"));
    fs::create_dir_all(at("newest/11/manifest.json")).unwrap();
    fs::create_dir_all(at("empty")).unwrap();
    fs::create_dir_all(at("..data/m/1")).unwrap();
    fs::write(at("README.md"), "about").unwrap();
    fs::write(at("newest/README.md"), "about").unwrap();
    let left_out = [
        "other/01",
        "other/+2",
        "other/v3",
        "my model",
        "a+b",
        "dangling",
        "loop",
        "newest/8",
        "newest/9",
        "newest/10",
        "newest/11",
        "empty",
    ];
    let log = folder.path().join("log");
    let program = env!("CARGO_BIN_EXE_nfold");
    let ports = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
    let mut child = Command::new(program)
        .arg("serve")
        .args(ports)
        .args(WATCH)
        .current_dir(folder.path())
        .stderr(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let said = || fs::read_to_string(&log).unwrap();
    eventually("it is ready", || said().contains("ready"));
    looks();
    let hung_up = Command::new("kill").args(["-HUP", &child.id().to_string()]).status().unwrap();
    assert!(hung_up.success());
    looks();
    let said = said();
    child.kill().unwrap();
    child.wait().unwrap();
    let lines: Vec<&str> = said.lines().filter(|line| line.contains("left out of what is served")).collect();
    for folder in left_out {
        let named = lines.iter().filter(|line| line.contains(&format!("served: `{folder}`"))).count();
        assert_eq!(named, 1, "{folder}: {said}");
    }
    assert_eq!(lines.len(), left_out.len(), "{said}");
    for warm in ["nf_regnet_cifar10 version 1", "newest version 7", "newest version 20261126105959"] {
        assert!(said.contains(&format!("model {warm} is warm")), "{said}");
    }
}

#[test]
fn what_would_block_or_fill_memory_fails_alone_and_is_said_once() {
    let server = Server::start(&WATCH);
    let model = server.folder().join("repository").join(MODEL);
    let good = model.join("1");
    let wrong = server.folder().join("wrong");
    let mut socket = None;
    for (number, kind) in ["pipe", "folder", "socket", "zeros", "sparse", "short"].into_iter().enumerate() {
        let version = model.join((number + 2).to_string());
        let (_, cost) = under_attack(&server, || {
            // by a rename, so that it appears whole
            copy(&good, &wrong);
            let onnx = wrong.join("model.onnx");
            let whole = fs::read(&onnx).unwrap();
            fs::remove_file(&onnx).unwrap();
            match kind {
                "pipe" => pipe(&onnx),
                "folder" => fs::create_dir(&onnx).unwrap(),
                "socket" => socket = Some(UnixListener::bind(&onnx).unwrap()),
                "zeros" => symlink("/dev/zero", &onnx).unwrap(),
                "sparse" => fs::File::create(&onnx).and_then(|file| file.set_len(1 << 40)).unwrap(),
                _ => fs::write(&onnx, &whole[..whole.len() / 2]).unwrap(),
            }
            fs::rename(&wrong, &version).unwrap();
            looks();
        });
        assert!(cost.growth < 64 * MIB && cost.failed == 0, "{kind}: {cost:?}");
        assert_eq!(self::version(&server, MODEL), 1, "{kind}");
        let said = server.logged("not loaded, what was served stays");
        assert_eq!(said.len(), number + 1, "{kind}: {said:?}");
    }
    let metrics = crate::process::ask(server.admin, "GET", "/metrics", &[], &[]).unwrap().body;
    assert!(metrics.contains("nfold_models_skipped 6"), "{metrics}");
    // and none of it prevents a good one
    copy(&good, &wrong);
    fs::rename(&wrong, model.join("99")).unwrap();
    eventually("the good one is served", || version(&server, MODEL) == 99);
    server.signal("-TERM");
    assert!(server.wait().success());
}

#[test]
fn links_are_followed_under_the_name_that_they_have_here() {
    let folder = with_demo();
    let at = |path: &str| folder.path().join(path);
    let good = at("repository").join(MODEL).join("1");
    // versions elsewhere, as git-sync lays them out; links of single files, as in a ConfigMap
    for store in ["store/xyz/7", "worktrees/a/m/1", "worktrees/b/m/2"] {
        copy(&good, &at(store));
    }
    copy(&good, &at("repository/config/3/..2026_11_26"));
    symlink("..2026_11_26", at("repository/config/3/..data")).unwrap();
    for file in ["model.onnx", "manifest.json"] {
        symlink(Path::new("..data").join(file), at("repository/config/3").join(file)).unwrap();
    }
    symlink(at("store/xyz/7"), at("repository").join(MODEL).join("2")).unwrap();
    symlink(at("worktrees/a/m"), at("repository/synced")).unwrap();
    let server = Server::start_in(folder, &WATCH);
    looks();
    for (model, expected) in [(MODEL, 2), ("config", 3), ("synced", 1)] {
        assert_eq!(version(&server, model), expected, "{model}");
    }
    let moved = server.logged("is warm").len() + server.logged("no longer served").len();
    assert_eq!(moved, 0, "nothing comes and goes");
    // the next commit: the link is replaced in one step
    let repository = server.folder().join("repository");
    symlink(server.folder().join("worktrees/b/m"), repository.join("synced.new")).unwrap();
    fs::rename(repository.join("synced.new"), repository.join("synced")).unwrap();
    eventually("the next one is served", || version(&server, "synced") == 2);
    eventually("the last one is not", || {
        let answer = server.post("/v1/classify?model=synced&version=1", &[], &data("cat.jpg"));
        answer.status == 404
    });
    assert_eq!(version(&server, MODEL), 2);
}

#[test]
fn what_clients_load_and_unload_stays_so_until_the_folder_changes() {
    let folder = with_demo();
    let repository = folder.path().join("repository");
    copy(&repository.join(MODEL).join("1"), &repository.join("other/1"));
    let flags = [&WATCH[..], &["--model-control", "--model", MODEL]].concat();
    let server = Server::start_in(folder, &flags);
    let control = |model: &str, call: &str, body: &str| -> Answer {
        let headers = [("content-type", "application/json")];
        server.post(&format!("/v2/repository/models/{model}/{call}"), &headers, body.as_bytes())
    };
    let ready = || crate::process::ask(server.admin, "GET", "/readyz", &[], &[]).unwrap();
    assert_eq!(version(&server, "other"), 404, "it is not asked for");
    for body in [
        r#"{"parameters":{"config":"{}"}}"#,
        r#"{"parameters":{"file:1/model.onnx":"AAAA"}}"#,
        r#"{"parameters":{"config":"{}","file:1/model.onnx":"AAAA"}}"#,
        r#"{"config":"{}"}"#,
        "[",
    ] {
        let answer = control("other", "load", body);
        assert_eq!((answer.status, &answer.json()["code"]), (400, &json!("invalid_request")), "{answer:?}");
        assert_eq!(version(&server, "other"), 404, "{body}");
    }
    for body in ["", "{}", "null", r#"{"parameters":{}}"#] {
        assert_eq!(control("other", "load", body).status, 200, "{body}");
    }
    looks();
    assert_eq!(version(&server, "other"), 1, "and watching does not undo it");
    // many at once don't delay other requests
    let clients: Vec<_> = (0..40)
        .map(|_| {
            let http = server.http;
            std::thread::spawn(move || {
                crate::process::ask(http, "POST", "/v2/repository/models/other/load", &[], b"").unwrap().status
            })
        })
        .collect();
    assert_eq!(version(&server, MODEL), 1);
    assert!(clients.into_iter().all(|client| client.join().unwrap() == 200));
    let body = r#"{"parameters":{"unload_dependents":true}}"#;
    assert_eq!(control("other", "unload", body).status, 200);
    assert_eq!(ready().status, 200);
    assert_eq!(control(MODEL, "unload", "").status, 200);
    let answer = ready();
    assert!(answer.status == 503 && answer.body.contains("no model is loaded"), "{answer:?}");
    looks();
    server.signal("-HUP");
    looks();
    assert_eq!((version(&server, MODEL), ready().status), (json!(404), 503), "nobody brings it back");
    // a model that is not there, and names that lead elsewhere
    for model in ["nothing", "..%2Foutside", "%2Fetc", "other%2F1", "..", "%1B%5B31m"] {
        let answer = control(model, "load", "");
        assert_eq!(answer.status, 404, "{model}: {answer:?}");
        assert!(!answer.body.contains(server.folder().to_str().unwrap()), "{answer:?}");
    }
    let metrics = crate::process::ask(server.admin, "GET", "/metrics", &[], &[]).unwrap().body;
    assert!(!metrics.contains("model=\"nothing\""), "made-up names make no metrics");
    let repository = server.folder().join("repository");
    copy(&repository.join(MODEL).join("1"), &server.folder().join("next"));
    fs::rename(server.folder().join("next"), repository.join(MODEL).join("2")).unwrap();
    eventually("its folder has changed: it is served again", || version(&server, MODEL) == 2);
    assert_eq!(ready().status, 200);
    assert_eq!(version(&server, "other"), 404);
}

/// Changes the graph of version 1 of `model`.
fn make(repository: &Path, model: &str, change: impl FnOnce(&mut ModelProto)) {
    let folder = repository.join(model).join("1");
    copy(&repository.join(MODEL).join("1"), &folder);
    let onnx = fs::read(folder.join("model.onnx")).unwrap();
    let mut graph = ModelProto::decode(&onnx[..]).unwrap();
    change(&mut graph);
    fs::write(folder.join("model.onnx"), graph.encode_to_vec()).unwrap();
    edit(&folder, |_| {});
}

fn largest(model: &mut ModelProto) -> &mut TensorProto {
    model.graph.as_mut().unwrap().initializer.iter_mut().max_by_key(|tensor| tensor.raw_data.len()).unwrap()
}

#[test]
fn hostile_graphs_fail_their_model_and_no_other() {
    let folder = with_demo();
    let repository = folder.path().join("repository");
    fs::write(folder.path().join("secret"), vec![7; 1 << 20]).unwrap();
    let outside = |location: &str| {
        let entry = |key: &str, value: &str| StringStringEntryProto { key: key.into(), value: value.into() };
        let location = location.to_string();
        move |model: &mut ModelProto| {
            let tensor = largest(model);
            let length = std::mem::take(&mut tensor.raw_data).len().to_string();
            tensor.data_location = DataLocation::External.into();
            tensor.external_data = vec![entry("location", &location), entry("offset", "0"), entry("length", &length)];
        }
    };
    make(&repository, "outside-1", outside("secret"));
    make(&repository, "outside-2", outside("../../../../../etc/passwd"));
    make(&repository, "outside-3", outside("/dev/zero"));
    make(&repository, "outside-4", outside("*/_ORT_MEM_ADDR_/*"));
    make(&repository, "shape-1", |model| largest(model).dims[0] = 1 << 40);
    make(&repository, "shape-2", |model| largest(model).dims[0] = -1);
    make(&repository, "shape-3", |model| largest(model).dims = vec![i64::MAX; 4]);
    make(&repository, "shape-4", |model| largest(model).dims = vec![1; 1000]);
    make(&repository, "operator", |model| {
        let node: &mut NodeProto = &mut model.graph.as_mut().unwrap().node[0];
        (node.op_type, node.domain) = ("Nope".into(), "evil".into());
    });
    make(&repository, "nothing", |model| *model = ModelProto::default());
    let garbage = repository.join("garbage/1");
    copy(&repository.join(MODEL).join("1"), &garbage);
    fs::write(
        garbage.join("model.onnx"),
        (0..10_000_u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect::<Vec<_>>(),
    )
    .unwrap();
    edit(&garbage, |_| {});
    let manifest = repository.join("manifest/1");
    copy(&repository.join(MODEL).join("1"), &manifest);
    fs::write(manifest.join("manifest.json"), "[".repeat(100_000)).unwrap();
    let hostile = [
        "outside-1",
        "outside-2",
        "outside-3",
        "outside-4",
        "shape-1",
        "shape-2",
        "shape-3",
        "shape-4",
        "operator",
        "nothing",
        "garbage",
        "manifest",
    ];
    // a rollout must not succeed with a broken model
    let ports = ["serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
    let asked = [&ports[..], &["--model", MODEL, "--model", "shape-1", "--workers", "1", "--log", "error"]].concat();
    let output = nfold(&asked, folder.path());
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.lines().last().is_some_and(|line| line.contains("shape-1")), "{stderr}");
    let started = Instant::now();
    let flags = [&WATCH[..], &["--skip-broken-models"]].concat();
    let server = Server::start_in(folder, &flags);
    assert!(started.elapsed() < Duration::from_secs(60));
    assert_eq!(version(&server, MODEL), 1);
    for model in hostile {
        assert_eq!(version(&server, model), 404, "{model}");
    }
    let metrics = crate::process::ask(server.admin, "GET", "/metrics", &[], &[]).unwrap().body;
    assert!(metrics.contains(&format!("nfold_models_skipped {}", hostile.len())), "{metrics}");
    looks();
    let again = server.logged("not loaded");
    assert!(again.is_empty(), "what has not changed is not tried again at every look: {again:?}");
    let (_, cost) = under_attack(&server, || {
        server.signal("-HUP");
        eventually("tried again, once each", || server.logged("not loaded").len() == hostile.len());
    });
    assert!(cost.growth < 128 * MIB && cost.failed == 0, "{cost:?}");
    assert_eq!(version(&server, MODEL), 1);
    // all broken is as good as nothing
    let folder = tempfile::tempdir().unwrap();
    copy(&server.folder().join("repository/shape-1/1"), &folder.path().join("repository/shape-1/1"));
    let asked = [&ports[..], &["--skip-broken-models", "--log", "off"]].concat();
    refused(&nfold(&asked, folder.path()), "none of 1 models");
}

#[test]
fn a_pipe_in_the_graph_cache_is_as_good_as_no_graph() {
    let server = Server::start(&["--graph-cache", "cache"]);
    let cache = server.folder().join("cache");
    let graphs: Vec<_> = fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!graphs.is_empty());
    let mut kept = tempfile::tempdir().unwrap();
    for (number, graph) in graphs.iter().enumerate() {
        for entry in fs::read_dir(graph).unwrap() {
            let file = entry.unwrap().path();
            let is_graph = file.file_name().unwrap() == "graph";
            if is_graph == (number % 2 == 0) {
                fs::remove_file(&file).unwrap();
                pipe(&file);
            }
        }
    }
    copy(
        &server.folder().join("repository").join(MODEL).join("1"),
        &kept.path().join("repository").join(MODEL).join("1"),
    );
    fs::rename(&cache, kept.path().join("cache")).unwrap();
    drop(server);
    let server =
        Server::start_in(std::mem::replace(&mut kept, tempfile::tempdir().unwrap()), &["--graph-cache", "cache"]);
    assert_eq!(version(&server, MODEL), 1);
}

/// A reader of a version that is being replaced gets the old one or the new one, not a mix.
#[test]
fn a_version_that_is_replaced_between_its_files_is_read_again() {
    let folder = with_demo();
    let repository = folder.path().join("repository");
    let before = ModelDir::open_version(&repository, MODEL, 1).unwrap();
    let fold = ["fold", &project("models/nf_regnet_cifar10"), "--replace", "--size", "96"];
    let folded = nfold(&fold, folder.path());
    assert!(folded.status.success(), "{}", text(&folded.stderr));
    let (now, onnx) = before.clone().with_onnx().unwrap();
    assert_eq!((before.manifest.preprocessing.height, now.manifest.preprocessing.height), (64, 96));
    assert_eq!(model::sha256(&onnx), now.manifest.onnx_sha256);
    // what fits to no manifest is still refused
    fs::write(before.onnx(), "no graph").unwrap();
    let broken = [before.with_onnx(), now.with_onnx()].map(|read| read.unwrap_err().to_string());
    assert!(broken.iter().all(|error| error.contains("`model.onnx` has sha256")), "{broken:?}");
}

/// Its warm-up would need gigabytes, before the first request.
#[test]
fn a_model_with_a_huge_input_fails_alone() {
    let server = Server::start(&WATCH);
    let fold =
        ["fold", &project("models/nf_regnet_cifar10"), "--name", "huge", "--repository", "away", "--size", "dynamic"];
    let folded = nfold(&fold, server.folder());
    assert!(folded.status.success(), "{}", text(&folded.stderr));
    let huge = server.folder().join("away/huge/1");
    edit(&huge, |manifest| {
        manifest["preprocessing"]["height"] = 4096.into();
        manifest["preprocessing"]["width"] = 4096.into();
    });
    let (_, cost) = under_attack(&server, || {
        fs::rename(server.folder().join("away/huge"), server.folder().join("repository/huge")).unwrap();
        eventually("it is refused", || !server.logged("4096x4096, more than the 1048576 pixels").is_empty());
    });
    assert!(cost.growth < 64 * MIB && cost.failed == 0, "{cost:?}");
    assert_eq!(version(&server, MODEL), 1);
    // and the start of a server that is to serve it
    let any = "127.0.0.1:0";
    let serve = ["serve", "--model", "huge", "--http", any, "--grpc", any, "--admin", any];
    let start = nfold(&serve, server.folder());
    assert_eq!(start.status.code(), Some(1));
    assert!(text(&start.stderr).contains("--max-input-pixels"), "{}", text(&start.stderr));
}
