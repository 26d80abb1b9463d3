//! Checkpoints from the model hub, with a hub of the tests' own: its routes, its cache, and everything that may fail.

mod commands;
mod server;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nfold::checkpoint::{Checkpoint, CheckpointError, OpenOptions};
use nfold::hub::{Event, HubError, HubId, HubOptions, Patience, Snapshot, Token, fetch};

use self::server::{Fault, Hub, REPOSITORY, etag};
use crate::cli::project;

/// Large enough to be cut several times.
const MEGABYTE: usize = 1 << 20;

fn noise(count: usize) -> Vec<u8> {
    (0..count as u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).take(count).collect()
}

fn config() -> Vec<u8> {
    fs::read(project("models/nf_regnet_cifar10/config.json")).unwrap()
}

/// A checkpoint's files; only the configuration is real.
fn files() -> [(&'static str, Vec<u8>); 2] {
    [("config.json", config()), ("model.safetensors", noise(3 * MEGABYTE + 7))]
}

fn options(hub: &Hub, cache: &Path) -> HubOptions {
    let patience = Patience {
        connect: Duration::from_secs(5),
        read: Duration::from_millis(500),
        response: Duration::from_secs(20),
        tries: 3,
        pause: Duration::from_millis(5),
        longest_pause: Duration::from_millis(50),
    };
    HubOptions { endpoint: hub.endpoint(), cache: cache.into(), token: None, offline: false, patience }
}

/// Fetches a model; also returns the notes.
fn fetched(id: &str, options: &HubOptions) -> (Result<Snapshot, HubError>, Vec<String>) {
    let mut notes = Vec::new();
    let check = |text: &[u8]| Checkpoint::check_config(text, &OpenOptions::default());
    let result = fetch(&HubId::parse(id).unwrap(), options, &check, &mut |event| {
        if let Event::Note(text) = event {
            notes.push(text.to_string());
        }
    });
    (result, notes)
}

fn error(id: &str, options: &HubOptions) -> String {
    let text = fetched(id, options).0.expect_err("fails").to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

/// Every file and link below a folder, by its path there.
pub fn below(folder: &Path) -> BTreeSet<String> {
    fn walk(root: &Path, folder: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_type().unwrap().is_dir() {
                walk(root, &entry.path(), found);
            } else {
                found.insert(entry.path().strip_prefix(root).unwrap().to_string_lossy().into_owned());
            }
        }
    }
    let mut found = BTreeSet::new();
    walk(folder, folder, &mut found);
    found
}

/// Asserts that the cache holds no content, only partial files and locks.
fn has_nothing(cache: &Path) {
    let left = below(cache);
    assert!(left.iter().all(|f| f.ends_with(".incomplete") || f.ends_with(".lock")), "{left:?}");
}

#[test]
fn a_checkpoint_is_laid_out_as_the_hubs_own_client_does() {
    let (hub, folder) = (Hub::start(&files()), tempfile::tempdir().unwrap());
    let cache = folder.path().join("hub");
    let mut options = options(&hub, &cache);
    options.token = Some(Token::new("hf_secret"));
    let (snapshot, notes) = fetched(REPOSITORY, &options);
    let snapshot = snapshot.unwrap();
    assert!(notes.is_empty(), "{notes:?}");
    let [config, weights] = files().map(|(name, bytes)| etag(name, &bytes));
    let (commit, model) = ("a".repeat(40), cache.join("models--timm--demo"));
    assert_eq!((snapshot.commit.as_str(), &snapshot.folder), (commit.as_str(), &model.join("snapshots").join(&commit)));
    let expected = [
        format!("blobs/{config}"),
        format!("blobs/{weights}"),
        "refs/main".into(),
        format!("snapshots/{commit}/config.json"),
        format!("snapshots/{commit}/model.safetensors"),
    ];
    assert_eq!(below(&model), expected.into());
    let link = fs::read_link(snapshot.folder.join("model.safetensors")).unwrap();
    assert_eq!(link, PathBuf::from(format!("../../blobs/{weights}")));
    assert_eq!(fs::read_to_string(model.join("refs/main")).unwrap(), commit);
    for (name, bytes) in files() {
        assert!(fs::read(snapshot.folder.join(name)).unwrap() == bytes, "{name}");
    }
    // the token is sent to the hub only
    let requests = hub.requests();
    assert!(requests.iter().any(|r| !r.at_hub));
    for request in requests {
        assert_eq!(request.headers.contains_key("authorization"), request.at_hub, "{request:?}");
    }

    // it is cached: one request online, none offline or for a commit
    assert_eq!(fetched(REPOSITORY, &options).0.unwrap(), snapshot);
    let again = hub.requests();
    assert!(
        again.iter().all(|r| r.method == "HEAD" && r.path.ends_with("config.json")) && again.len() <= 2,
        "{again:?}"
    );
    let by_commit = format!("{REPOSITORY}@{commit}");
    assert_eq!(fetched(&by_commit, &options).0.unwrap(), snapshot);
    let offline = HubOptions { offline: true, ..options.clone() };
    assert_eq!(fetched(REPOSITORY, &offline).0.unwrap(), snapshot);
    assert!(hub.requests().is_empty());

    // a branch with a slash in its name, and a new commit, of which only what has changed is fetched
    assert_eq!(fetched(&format!("{REPOSITORY}@refs/pr/1"), &options).0.unwrap(), snapshot);
    assert_eq!(fs::read_to_string(model.join("refs/refs/pr/1")).unwrap(), commit);
    hub.publish('b', &[&files()[..], &[("README.md", b"x".to_vec())]].concat());
    hub.requests();
    let newer = fetched(REPOSITORY, &options).0.unwrap();
    assert_eq!(newer.commit, "b".repeat(40));
    assert!(hub.requests().iter().all(|r| r.method == "HEAD" || r.path.ends_with("config.json")));
    assert!(snapshot.folder.join("model.safetensors").is_file(), "the old one stays");
}

#[test]
fn shards_and_pickles_are_fetched_where_there_is_nothing_better() {
    let folder = tempfile::tempdir().unwrap();
    let index = br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#.to_vec();
    let shards = [("model-1.safetensors", noise(1000)), ("model-2.safetensors", noise(2000))];
    let config = ("config.json", config());
    let sharded = [&[config.clone(), ("model.safetensors.index.json", index)][..], &shards].concat();
    let hub = Hub::start(&sharded);
    let snapshot = fetched(REPOSITORY, &options(&hub, folder.path())).0.unwrap();
    for (name, bytes) in sharded {
        assert!(fs::read(snapshot.folder.join(name)).unwrap() == bytes, "{name}");
    }
    hub.publish('b', &[config.clone(), ("pytorch_model.bin", noise(500))]);
    let snapshot = fetched(REPOSITORY, &options(&hub, folder.path())).0.unwrap();
    assert_eq!(fs::read(snapshot.folder.join("pytorch_model.bin")).unwrap(), noise(500));
    // hostile names of shards, and shards that are not there
    let evil = br#"{"weight_map": {"a": "../../evil"}}"#.to_vec();
    hub.publish('c', &[config.clone(), ("model.safetensors.index.json", evil)]);
    assert!(error(REPOSITORY, &options(&hub, folder.path())).contains("not a file beside it"));
    let gone = br#"{"weight_map": {"a": "gone.safetensors"}}"#.to_vec();
    hub.publish('d', &[config, ("model.safetensors.index.json", gone)]);
    assert!(error(REPOSITORY, &options(&hub, folder.path())).contains("no `gone.safetensors`"));
}

#[test]
fn downloads_go_on_where_they_broke_off() {
    let (hub, folder) = (Hub::start(&files()), tempfile::tempdir().unwrap());
    let options = options(&hub, folder.path());
    let weights = &files()[1].1;
    // three breaks with progress, and one server without range requests
    hub.fails("model.safetensors", [MEGABYTE, MEGABYTE / 2, MEGABYTE].map(Fault::Cut));
    let snapshot = fetched(REPOSITORY, &options).0.unwrap();
    assert!(fs::read(snapshot.folder.join("model.safetensors")).unwrap() == *weights);
    let ranges = |hub: &Hub| {
        let contents = hub.requests().into_iter().filter(|r| !r.at_hub && r.method == "GET");
        contents.map(|r| r.headers.get("range").cloned().unwrap_or_default()).collect::<Vec<_>>()
    };
    let at = |bytes: usize| format!("bytes={bytes}-");
    assert_eq!(ranges(&hub), [String::new(), at(MEGABYTE), at(3 * MEGABYTE / 2), at(5 * MEGABYTE / 2)]);

    // another process resumes it, too
    let folder = tempfile::tempdir().unwrap();
    let options = HubOptions { cache: folder.path().into(), ..options };
    hub.fails("model.safetensors", [Fault::Cut(1000), Fault::Cut(0), Fault::Cut(0), Fault::Cut(0)]);
    let text = error(REPOSITORY, &options);
    assert!(text.contains("broke off at 1000 of 3145735 bytes") && text.contains("goes on from it"), "{text}");
    has_nothing(folder.path());
    hub.requests();
    hub.fails("model.safetensors", []);
    assert!(fetched(REPOSITORY, &options).0.is_ok());
    assert_eq!(ranges(&hub), [at(1000)]);
    assert!(below(folder.path()).iter().all(|f| !f.ends_with(".incomplete")));

    // a partial file may be damaged or too long, or the server may not support ranges
    for (left, fault) in [
        (vec![7; 5000], None),
        (vec![7; 4 * MEGABYTE], None),
        (weights[..5000].to_vec(), Some(Fault::NoRange)),
        (weights.clone(), None),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let options = HubOptions { cache: folder.path().into(), ..options.clone() };
        let blobs = folder.path().join("models--timm--demo/blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("{}.incomplete", etag("model.safetensors", weights))), left).unwrap();
        hub.fails("model.safetensors", fault);
        let snapshot = fetched(REPOSITORY, &options).0.unwrap();
        assert!(fs::read(snapshot.folder.join("model.safetensors")).unwrap() == *weights);
    }
}

#[test]
fn what_is_not_as_announced_is_refused_and_not_kept() {
    let sent = |faults: &[Fault]| {
        let (hub, folder) = (Hub::start(&files()), tempfile::tempdir().unwrap());
        hub.fails("model.safetensors", faults.iter().cloned());
        let text = error(REPOSITORY, &options(&hub, folder.path()));
        has_nothing(folder.path());
        text
    };
    assert!(sent(&[Fault::Changed]).contains("another digest"));
    assert!(sent(&[Fault::Longer]).contains("longer than the 3145735 bytes"));
    assert!(sent(&[Fault::Page]).contains("a web page"));
    let slow = sent(&[Fault::Stall(9), Fault::Stall(0), Fault::Stall(0), Fault::Stall(0)]);
    assert!(slow.contains("broke off at 9 of"), "{slow}");
    assert!(sent(&[Fault::Status(403, "X-Error-Code: RepoNotFound\r\n")]).contains("answers 403"));

    let told = |header: &'static str, value: &str| {
        let (hub, folder) = (Hub::start(&files()), tempfile::tempdir().unwrap());
        hub.lies("model.safetensors", header, value);
        let text = error(REPOSITORY, &options(&hub, folder.path()));
        has_nothing(folder.path());
        text
    };
    assert!(told("X-Linked-Size", "99").contains("longer than the 99 bytes"));
    assert!(told("X-Linked-Size", "4000000").contains("broke off at"));
    let full = told("X-Linked-Size", "1000000000000000000");
    assert!(full.contains("make room") && full.contains("HF_HUB_CACHE"), "{full}");
    assert!(told("X-Linked-Size", "-1").contains("no size"));
    assert!(told("X-Linked-Etag", &format!("\"{}\"", "0".repeat(64))).contains("another digest"));
    assert!(told("X-Linked-Etag", "\"../../evil\"").contains("can't name a file"));
    assert!(told("Location", "file:///etc/passwd").contains("to no address"));

    // small files are verified as well
    let (hub, folder) = (Hub::start(&files()), tempfile::tempdir().unwrap());
    let options = options(&hub, folder.path());
    hub.fails("config.json", [Fault::Changed]);
    assert!(error(REPOSITORY, &options).contains("`config.json` has another digest"));
    has_nothing(folder.path());
    for (value, what) in [("nonsense", "no commit"), ("../../evil", "no commit"), ("", "no X-Repo-Commit")] {
        hub.lies("config.json", "X-Repo-Commit", value);
        assert!(error(REPOSITORY, &options).contains(what), "{value}");
    }
    has_nothing(folder.path());
}

#[test]
fn every_refusal_is_one_line_with_the_next_step() {
    let (hub, folder) = (Hub::start(&files()), tempfile::tempdir().unwrap());
    let options = options(&hub, folder.path());
    let mut said = vec![
        (error("timm/other", &options), ["no such model or hides it", "HF_TOKEN"]),
        (error("timm/demo@v9", &options), ["no revision `v9`", "/tree/main"]),
    ];
    hub.state().gated = Some("hf_good".into());
    said.push((error(REPOSITORY, &options), ["gated", "accept its terms"]));
    let with = |token: &str| HubOptions { token: Some(Token::new(token)), ..options.clone() };
    said.push((error(REPOSITORY, &with("hf_bad")), ["gated", "accept its terms"]));
    assert!(fetched(REPOSITORY, &with("hf_good")).0.is_ok());
    hub.state().gated = None;

    let folder = tempfile::tempdir().unwrap();
    let options = HubOptions { cache: folder.path().into(), ..options.clone() };
    let status = |status, headers| vec![Fault::Status(status, headers); 9];
    for (faults, texts) in [
        (status(403, ""), ["does not let this HF_TOKEN", "use a token"]),
        (status(429, "Retry-After: 0\r\n"), ["answers 429", "after 3 tries; try again later"]),
        (status(503, ""), ["answers 503", "after 3 tries"]),
        (status(418, "X-Error-Message: a teapot\r\n"), ["answers 418", "teapot"]),
        (vec![Fault::Page; 9], ["a web page", "does a proxy want a login?"]),
        (status(302, "Location: /loop/resolve/main/config.json\r\n"), ["redirects `config.json`", "more than 8 times"]),
    ] {
        hub.refuses("config.json", faults);
        said.push((error(REPOSITORY, &options), texts));
    }
    // temporary failures are retried
    hub.refuses("config.json", [Fault::Status(429, "Retry-After: 0\r\n"), Fault::Status(500, "")]);
    let offline = HubOptions { offline: true, ..options.clone() };
    said.push((error(REPOSITORY, &offline), ["not whole in the cache", "HF_HUB_OFFLINE forbids"]));
    let nobody = HubOptions { endpoint: "http://127.0.0.1:1".into(), ..options.clone() };
    said.push((error(REPOSITORY, &nobody), ["can't reach http://127.0.0.1:1", "HTTPS_PROXY"]));
    let nowhere = HubOptions { endpoint: "http://no-such-host.invalid".into(), ..options.clone() };
    said.push((error(REPOSITORY, &nowhere), ["can't reach http://no-such-host.invalid", "check the network"]));
    for bad in ["", "ftp://x", "huggingface.co", "http://"] {
        let options = HubOptions { endpoint: bad.into(), ..options.clone() };
        said.push((error(REPOSITORY, &options), ["HF_ENDPOINT", "is no address"]));
    }
    let not_writable = HubOptions { cache: "/proc/nowhere".into(), ..options.clone() };
    said.push((error(REPOSITORY, &not_writable), ["can't write", "set HF_HUB_CACHE"]));
    for (text, parts) in said {
        assert!(parts.iter().all(|part| text.contains(part)), "{text}: {parts:?}");
        assert!(!text.contains("signature=secret") && !text.contains("hf_good"), "{text}");
    }
    has_nothing(folder.path());
    assert!(fetched(REPOSITORY, &options).0.is_ok());

    // the hub fails or is unreachable: the cache is used, with a note
    hub.refuses("config.json", status(500, ""));
    let (snapshot, notes) = fetched(REPOSITORY, &options);
    assert_eq!(snapshot.unwrap().commit, "a".repeat(40));
    assert!(notes[0].contains("answers 500") && notes[0].contains("which is cached, is used"), "{notes:?}");
    let (snapshot, notes) = fetched(REPOSITORY, &nobody);
    assert!(snapshot.is_ok() && notes[0].contains("can't reach"), "{notes:?}");
    // but not if the hub refuses
    hub.refuses("config.json", status(403, ""));
    assert!(error(REPOSITORY, &options).contains("does not let"));
}

#[test]
fn a_network_that_cannot_be_folded_is_refused_before_its_weights_come() {
    let folder = tempfile::tempdir().unwrap();
    let other = br#"{"architecture": "vit_base_patch16_224", "num_classes": 10, "pretrained_cfg": {}}"#.to_vec();
    let hub = Hub::start(&[("config.json", other), ("model.safetensors", noise(1000))]);
    let mut options = options(&hub, folder.path());
    let text = error(REPOSITORY, &options);
    assert!(text.starts_with("`timm/demo`: ") && text.contains("vit_base_patch16_224"), "{text}");
    assert!(hub.requests().iter().all(|r| !r.path.contains("safetensors")));
    let transformers = br#"{"model_type": "bert", "architectures": ["BertModel"]}"#.to_vec();
    hub.publish('b', &[("config.json", transformers), ("model.safetensors", noise(1000))]);
    assert!(error(REPOSITORY, &options).contains("`architecture` is missing"));
    hub.publish('c', &[("config.json", config())]);
    assert!(error(REPOSITORY, &options).contains("has no model.safetensors"));
    hub.publish('d', &[("model.safetensors", noise(10))]);
    assert!(error(REPOSITORY, &options).contains("has no config.json"));
    hub.publish('e', &files());
    hub.lies("config.json", "ETag", "\"00000000000000000000000000000000000000ff\"");
    assert!(error(REPOSITORY, &options).contains("another digest"));
    options.offline = true;
    assert_eq!(below(folder.path()), BTreeSet::new());
    // two at once fetch it once
    hub.state().lies.clear();
    options.offline = false;
    hub.requests();
    let both: Vec<_> = (0..2)
        .map(|_| {
            let options = options.clone();
            std::thread::spawn(move || fetched(REPOSITORY, &options).0.is_ok())
        })
        .collect();
    assert!(both.into_iter().all(|thread| thread.join().unwrap()));
    assert_eq!(hub.requests().iter().filter(|r| r.method == "GET" && !r.at_hub).count(), 1);
}

/// The check is in the way of the first error only.
#[test]
fn the_check_sees_the_configuration() {
    let (hub, folder) = (Hub::start(&files()), tempfile::tempdir().unwrap());
    let refuse = |text: &[u8]| {
        assert!(text == config());
        Err(CheckpointError::Preprocessing("not this one".into()))
    };
    let id = HubId::parse(REPOSITORY).unwrap();
    let refused = fetch(&id, &options(&hub, folder.path()), &refuse, &mut |_| {});
    assert!(refused.unwrap_err().to_string().contains("not this one"));
    has_nothing(folder.path());
}
