//! Checkpoints that are not a folder from the hub: every dialect of config.json as timm reads it, every kind of file,
//! and hostile ones. `tests/data/checkpoint/make_*.py` wrote the data, with timm and torch.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nfold::checkpoint::{Checkpoint, Config, LabelChoice, OpenOptions, labels, settings};
use nfold::fold::{FoldOptions, fold};
use nfold::pb::onnx::{GraphProto, ModelProto};
use prost::Message as _;
use serde_json::{Map, Value, json};

use crate::checkpoint::Copy;
use crate::cli::{nfold, refused, text};
use crate::golden::goldens_folder;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/checkpoint")
}

fn file(name: &str) -> PathBuf {
    data().join("files").join(name)
}

/// Every generated configuration, in every dialect: network, classes, names and preprocessing are timm's.
#[test]
fn configurations_are_read_as_timm_reads_them() {
    let cases: Value = serde_json::from_slice(&fs::read(data().join("configs.json")).unwrap()).unwrap();
    let cases = cases["cases"].as_array().unwrap();
    assert!(cases.len() >= 300);
    for case in cases {
        let (config, timm) = (&case["config"], &case["timm"]);
        let what = format!("{}: {config}", case["dialect"]);
        let read = Config::parse(config.to_string().as_bytes()).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(read.architecture, timm["architecture"].as_str().unwrap(), "{what}");
        assert_eq!(read.model_args["num_classes"], timm["num_classes"], "{what}");
        let (p, _) = settings::resolve(&read.layers, None, 3).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(json!([3, p.height, p.width]), timm["input_size"], "{what}");
        assert_eq!(json!([p.crop_mode, p.interpolation]), json!([timm["crop_mode"], timm["interpolation"]]), "{what}");
        assert_eq!(json!(p.crop_pct).as_f64(), timm["crop_pct"].as_f64(), "{what}");
        assert_eq!(json!([p.mean, p.std]), json!([timm["mean"], timm["std"]]), "{what}");
        let labels = read.labels.complete(timm["num_classes"].as_u64().unwrap() as usize).unwrap();
        assert_eq!(json!(labels), timm["labels"], "{what}");
    }
}

/// Options for a bare file of the golden network.
fn told() -> OpenOptions {
    let args = json!({"depths": [1, 1, 1, 1], "width_factor": 0.17, "num_features": 96, "act_layer": "tanh"});
    OpenOptions {
        architecture: Some("nf_regnet_b0".into()),
        model_args: args.as_object().unwrap().clone(),
        ..OpenOptions::default()
    }
}

fn graph(checkpoint: &Checkpoint) -> GraphProto {
    let folded = fold(checkpoint, &FoldOptions { size: nfold::fold::Size::Fixed(48, 48), ..FoldOptions::default() });
    ModelProto::decode(folded.unwrap().onnx.as_slice()).unwrap().graph.unwrap()
}

/// Every kind of file folds to the graph that the hub's folder folds to.
#[test]
fn every_file_folds_to_the_same_graph() {
    let golden = graph(&Checkpoint::open(&goldens_folder().join("nf_regnet_tanh")).unwrap());
    let rest = OpenOptions { architecture: None, ..told() };
    for (name, options) in [
        ("state.pth", told()),
        ("old.pth", told()),
        ("protocol4.pth", told()),
        ("parameters.pth", told()),
        ("channels_last.pth", told()),
        ("ddp.pth", told()),
        ("compiled.pth", told()),
        ("wrapped.pt", told()),
        ("net.pth", told()),
        ("lightning.ckpt", told()),
        ("wrapper.safetensors", told()),
        ("told.safetensors", rest),
        ("model_best.pth.tar", OpenOptions::default()),
        ("old.pth.tar", OpenOptions::default()),
    ] {
        let checkpoint = Checkpoint::open_with(&file(name), &options).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(graph(&checkpoint) == golden, "{name}");
    }
    let half = Checkpoint::open_with(&file("half.pth"), &told()).unwrap();
    assert!(graph(&half) != golden);
}

/// train.py's record: architecture, arguments and preprocessing come from it, the averaged weights with --use-ema.
#[test]
fn a_training_record_tells_what_it_was_told() {
    let open = |options: &OpenOptions| Checkpoint::open_with(&file("model_best.pth.tar"), options).unwrap();
    let checkpoint = open(&OpenOptions::default());
    assert_eq!((checkpoint.architecture.as_str(), checkpoint.name.as_str()), ("nf_regnet_b0", "model_best"));
    let (p, source) = checkpoint.preprocessing(None).unwrap();
    assert_eq!(
        (p.height, p.width, p.crop_pct, p.mean, p.std),
        (96, 96, 0.8, vec![0.5, 0.4, 0.3], vec![0.2, 0.2, 0.25])
    );
    let origin = |name: &str| source.settings.iter().find(|s| s.setting == name).unwrap().origin.clone();
    assert_eq!(origin("size"), "args.img_size in model_best.pth.tar");
    assert_eq!(origin("crop_mode"), "timm's settings of nf_regnet_b0");
    assert_eq!(source.unused, ["epoch", "optimizer", "version", "state_dict_ema", "metric"]);
    assert!(source.warnings.iter().any(|w| w.contains("`state_dict_ema`") && w.contains("--use-ema")), "{source:?}");

    let bias = |checkpoint: &Checkpoint| checkpoint.reader().take("head.fc.bias", &[7]).unwrap();
    let averaged = open(&OpenOptions { use_ema: true, ..OpenOptions::default() });
    let (plain, averaged) = (bias(&checkpoint), bias(&averaged));
    assert!(plain.iter().zip(&averaged).all(|(a, b)| (a * 1.25 - b).abs() < 1e-6), "{plain:?} {averaged:?}");
    let error = Checkpoint::open_with(&file("state.pth"), &OpenOptions { use_ema: true, ..told() });
    assert!(error.unwrap_err().to_string().contains("--use-ema"));
}

/// Options override the checkpoint, and the report says so.
#[test]
fn options_override_the_checkpoint() {
    let names = tempfile::NamedTempFile::new().unwrap();
    fs::write(names.path(), "a\nb\nc\nd\ne\nf\ng\n").unwrap();
    let options = OpenOptions {
        settings: settings::Settings {
            input_size: Some([3, 40, 60]),
            mean: Some(vec![0.25]),
            ..settings::Settings::default()
        },
        labels: Some(LabelChoice::File(names.path().into())),
        ..OpenOptions::default()
    };
    let checkpoint = Checkpoint::open_with(&goldens_folder().join("nf_regnet_tanh"), &options).unwrap();
    assert_eq!(checkpoint.labels, ["a", "b", "c", "d", "e", "f", "g"]);
    let (p, source) = checkpoint.preprocessing(None).unwrap();
    assert_eq!((p.height, p.width, p.mean, p.crop_pct), (40, 60, vec![0.25; 3], 0.9));
    let from: Vec<&str> = source.settings.iter().map(|s| s.origin.as_str()).collect();
    assert!(from.contains(&"--img-size") && from.contains(&"--mean"), "{from:?}");
    assert!(from.contains(&"pretrained_cfg.crop_pct in config.json"), "{from:?}");

    let imagenet =
        OpenOptions { labels: Some(LabelChoice::ImageNet(labels::ImageNet::In1k)), ..OpenOptions::default() };
    let error = Checkpoint::open_with(&goldens_folder().join("nf_regnet_tanh"), &imagenet).unwrap_err().to_string();
    assert!(error.contains("1000 names for 7 classes"), "{error}");
    let other = OpenOptions { architecture: Some("nf_regnet_b1".into()), ..OpenOptions::default() };
    let error = Checkpoint::open_with(&goldens_folder().join("nf_regnet_tanh"), &other).unwrap_err().to_string();
    assert!(error.contains("--arch nf_regnet_b1 contradicts"), "{error}");
}

/// The file of timm 0.4 to 0.6, against the nested one of the same weights.
#[test]
fn a_flat_configuration_is_read_whole() {
    let copy = Copy::of("nf_regnet_tanh");
    copy.config(|c| {
        let args = c["model_args"].clone();
        *c = json!({"architecture": "nf_regnet_b0", "num_classes": 7, "num_features": 960, "input_size": [3, 128, 128],
            "pool_size": [4, 4], "crop_pct": 0.95, "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5], "first_conv": "stem.conv", "classifier": "head.fc", "model_args": args,
            "labels": ["ant", "bee", "cow", "dog", "elk", "fox", "gnu"]});
    });
    let here = tempfile::tempdir().unwrap();
    let folded = nfold(&["fold", &copy.folder(), "--name", "old", "--size", "64"], here.path());
    assert!(folded.status.success(), "{}", text(&folded.stderr));
    let manifest = manifest(here.path(), "old");
    let p = &manifest["preprocessing"];
    assert_eq!(
        json!([p["crop_pct"], p["interpolation"], p["mean"], p["std"]]),
        json!([0.95, "bilinear", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
    );
    assert_eq!(manifest["labels"][4], "elk");
    let inspected = nfold(&["inspect", "old"], here.path());
    let inspected = text(&inspected.stdout);
    assert!(inspected.contains("ant, bee") && inspected.contains("mean: mean in config.json"), "{inspected}");
}

fn manifest(here: &Path, name: &str) -> Value {
    serde_json::from_slice(&fs::read(here.join("repository").join(name).join("1/manifest.json")).unwrap()).unwrap()
}

/// A dictionary of labels, at the top, inside `pretrained_cfg`, and where transformers keeps it.
#[test]
fn names_in_a_dictionary_are_served_in_either_place() {
    for place in ["label_names", "pretrained_cfg.label_names", "id2label"] {
        let copy = Copy::of("nf_regnet_tanh");
        copy.config(|c| {
            let names = json!({"0": "cat", "2": "emu"});
            match place.split_once('.') {
                Some((outer, inner)) => c[outer][inner] = names,
                None => c[place] = names,
            }
        });
        let checkpoint = Checkpoint::open(Path::new(&copy.folder())).unwrap();
        assert_eq!(checkpoint.labels, ["cat", "1", "emu", "3", "4", "5", "6"], "{place}");
    }
}

#[test]
fn imagenets_names_come_with_its_tag() {
    let copy = Copy::of("nf_regnet_tanh");
    let set = |classes: usize| {
        copy.config(|c| {
            c["model_args"]["num_classes"] = Value::Null;
            c["num_classes"] = json!(classes);
            c["pretrained_cfg"]["tag"] = json!("ra2_in1k");
        });
    };
    set(1000);
    let checkpoint = Checkpoint::open(Path::new(&copy.folder())).unwrap();
    assert_eq!(checkpoint.labels, labels::ImageNet::In1k.labels());
    assert_eq!(checkpoint.architecture, "nf_regnet_b0.ra2_in1k");
    // other classes: no names of ImageNet, no tag in the name, and a warning
    set(7);
    let checkpoint = Checkpoint::open(Path::new(&copy.folder())).unwrap();
    assert!(checkpoint.labels.is_empty());
    assert_eq!(checkpoint.architecture, "nf_regnet_b0");
    let (_, source) = checkpoint.preprocessing(None).unwrap();
    assert!(source.warnings.iter().any(|w| w.contains("--labels FILE")), "{source:?}");
    assert!(source.warnings.iter().any(|w| w.contains("trained further for 7 classes")), "{source:?}");
}

/// One channel has timm's settings for one; colours' become their average; more channels than are served are named.
#[test]
fn channels_are_named() {
    let copy = Copy::of("nf_regnet_grey");
    let open = || Checkpoint::open(Path::new(&copy.folder())).map_err(|e| e.to_string());
    let (p, _) = open().unwrap().preprocessing(None).unwrap();
    assert_eq!((p.height, p.mean, p.std), (256, vec![0.449], vec![0.226]));
    copy.config(|c| {
        c["pretrained_cfg"]["mean"] = json!([0.25, 0.5, 0.75]);
    });
    let (p, source) = open().unwrap().preprocessing(None).unwrap();
    assert_eq!(p.mean, [0.5]);
    assert!(source.settings.iter().any(|s| s.origin.contains("averaged over colours")), "{source:?}");
    copy.config(|c| c["pretrained_cfg"]["std"] = json!([0.5, 0.5]));
    let error = open().unwrap_err();
    assert!(error.contains("std has 2 values for 1 channels"), "{error}");
    copy.config(|c| c["model_args"]["in_chans"] = json!(17));
    let here = tempfile::tempdir().unwrap();
    refused(&nfold(&["fold", &copy.folder()], here.path()), "`in_chans` = 17 can't be used");
}

#[test]
fn shards_are_read_with_their_index() {
    let copy = Copy::of("nf_regnet_tanh");
    let golden = graph(&Checkpoint::open(Path::new(&copy.folder())).unwrap());
    let whole = fs::read(copy.path("model.safetensors")).unwrap();
    let names: Vec<String> =
        safetensors::SafeTensors::deserialize(&whole).unwrap().names().into_iter().map(String::from).collect();
    let shard = |part: usize| {
        let tensors = safetensors::SafeTensors::deserialize(&whole).unwrap();
        let mine =
            names.iter().enumerate().filter(|(i, _)| i % 2 == part).map(|(_, n)| (n, tensors.tensor(n).unwrap()));
        safetensors::serialize(mine, None).unwrap()
    };
    let file = |part: usize| format!("model-0000{}-of-00002.safetensors", part + 1);
    for part in 0..2 {
        fs::write(copy.path(&file(part)), shard(part)).unwrap();
    }
    fs::remove_file(copy.path("model.safetensors")).unwrap();
    let index = |change: &dyn Fn(&mut Map<String, Value>)| {
        let mut map: Map<String, Value> =
            names.iter().enumerate().map(|(i, n)| (n.clone(), file(i % 2).into())).collect();
        change(&mut map);
        fs::write(copy.path("model.safetensors.index.json"), json!({"metadata": {}, "weight_map": map}).to_string())
            .unwrap();
    };
    index(&|_| {});
    let opened = Checkpoint::open(Path::new(&copy.folder())).unwrap();
    assert!(graph(&opened) == golden);
    let error = || Checkpoint::open(Path::new(&copy.folder())).unwrap_err().to_string();
    index(&|map| drop(map.insert("head.fc.bias".into(), "../config.json".into())));
    assert!(error().contains("is not a file beside it"), "{}", error());
    index(&|map| drop(map.insert("more".into(), file(0).into())));
    assert!(error().contains("`more`"), "{}", error());
    index(&|map| drop(map.remove("head.fc.bias")));
    assert!(error().contains("`head.fc.bias`"), "{}", error());
    fs::write(copy.path("model.safetensors.index.json"), "[]").unwrap();
    assert!(error().contains("index"), "{}", error());
}

/// Files without weights are named for what they are.
#[test]
fn other_files_are_named_for_what_they_are() {
    let here = tempfile::tempdir().unwrap();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n".as_bytes();
    for (name, bytes, what) in [
        ("model.safetensors", pointer, "git lfs pull"),
        ("w.pth", pointer, "git lfs pull"),
        ("w.h5", b"\x89HDF\r\n\x1a\n", "HDF5"),
        ("w.pth", b"<!DOCTYPE html><html>", "web page"),
        ("w.tar.gz", b"\x1f\x8b\x08\x00", "unpack"),
        ("w.pth", b"", "neither"),
        ("w.pth", b"\x80\x04N.", "plain pickle"),
        ("w.safetensors", b"", "not a sound safetensors file"),
    ] {
        let path = here.path().join(name);
        fs::write(&path, bytes).unwrap();
        let error = Checkpoint::open_with(&path, &told()).unwrap_err().to_string();
        assert!(error.contains(what) && error.contains(name) && !error.contains('\n'), "{error}");
    }
    // a device without end
    let error = Checkpoint::open_with(Path::new("/dev/zero"), &told()).unwrap_err().to_string();
    assert!(error.contains("/dev/zero"), "{error}");
    fs::copy(file("state.pth"), here.path().join("bare.pth")).unwrap();
    let error = Checkpoint::open(&here.path().join("bare.pth")).unwrap_err().to_string();
    assert!(error.contains("--arch"), "{error}");
    fs::write(here.path().join("config.json"), pointer).unwrap();
    let error = Checkpoint::open(here.path()).unwrap_err().to_string();
    assert!(error.contains("git lfs pull"), "{error}");
}

/// An archive as torch writes it, of these entries.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in entries {
        zip.start_file(*name, stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// Runs `nfold fold` with a limit on its address space, in MiB.
fn confined(path: &Path, here: &Path) -> Output {
    let command = format!("ulimit -v {}; exec \"$0\" fold \"$1\" --arch nf_regnet_b0", 600 << 10);
    Command::new("sh").args(["-c", &command, env!("CARGO_BIN_EXE_nfold")]).arg(path).current_dir(here).output().unwrap()
}

/// Pickles with code, bombs, malicious archives: one line, nothing written, little memory.
#[test]
fn hostile_files_are_refused_in_one_line() {
    let here = tempfile::tempdir().unwrap();
    let global = |name: &str| [b"\x80\x02c", name.as_bytes(), b"\nX\x04\x00\x00\x00true\x85R."].concat();
    let packed = |pickle: &[u8]| archive(&[("m/data.pkl", pickle), ("m/version", b"3\n")]);
    let mut squeezed = packed(b"\x80\x02}.");
    for (signature, at) in [(b"PK\x03\x04", 8), (b"PK\x01\x02", 10)] {
        let found = squeezed.windows(4).position(|w| w == signature).unwrap();
        squeezed[found + at] = 8;
    }
    let storage = |key: &str, count: u32, shape: u32, stride: u8| {
        let tensor = [
            b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX",
            &(key.len() as u32).to_le_bytes()[..],
            key.as_bytes(),
            b"X\x03\x00\x00\x00cpuJ",
            &count.to_le_bytes(),
            b"tQK\x00J",
            &shape.to_le_bytes(),
            b"\x85K",
            &[stride],
            b"\x85\x89}tRs.",
        ];
        tensor.concat()
    };
    let laughs = [b"\x80\x02]q\x00".as_slice(), &b"](h\x00h\x00h\x00h\x00eq\x00".repeat(100_000), b"."].concat();
    let many = [b"\x80\x02".as_slice(), &b"N0".repeat(16 << 20), b"."].concat();
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("system", packed(&global("os\nsystem")), "`os.system`"),
        ("eval", packed(&global("builtins\neval")), "`builtins.eval`"),
        ("model", packed(&global("timm.models.nfnet\nNormFreeNet")), "model.state_dict()"),
        ("old system", global("posix\nsystem"), "`posix.system`"),
        ("laughs", packed(&laughs), "no state dictionary"),
        ("too many", packed(&many), "more than"),
        ("up", archive(&[("../../evil/data.pkl", b"\x80\x02}.")]), "points out of it"),
        ("root", archive(&[("/etc/data.pkl", b"\x80\x02}.")]), "points out of it"),
        ("compressed", squeezed, "compressed"),
        ("no pickle", archive(&[("m/other", b"x")]), "without `data.pkl`"),
        (
            "program",
            archive(&[("m/data.pkl", b"\x80\x02}."), ("m/constants.pkl", b"\x80\x02)."), ("m/code/a.py", b"")]),
            "TorchScript",
        ),
        ("no storage", packed(&storage("0", 4, 4, 1)), "`w` does not lie in the file"),
        (
            "outside",
            archive(&[("m/data.pkl", &storage("0", 4, 1 << 30, 1)), ("m/data/0", &[0; 16])]),
            "`w` does not lie",
        ),
        (
            "spread",
            archive(&[("m/data.pkl", &storage("0", 4, 1 << 30, 0)), ("m/data/0", &[0; 16])]),
            "`w` does not lie",
        ),
        ("key", packed(&storage("../../../etc/passwd", 4, 4, 1)), "`w` does not lie"),
        ("big-endian", archive(&[("m/data.pkl", b"\x80\x02}."), ("m/byteorder", b"big")]), "big-endian"),
    ];
    for (what, bytes, reason) in cases {
        let path = here.path().join("hostile.pth");
        fs::write(&path, bytes).unwrap();
        let output = confined(&path, here.path());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{what}: {said}");
        assert!(said.starts_with("error: ") && said.trim_end().lines().count() == 1, "{what}: {said}");
        assert!(said.contains(reason), "{what}: {said}");
        assert!(!here.path().join("repository").exists(), "{what} wrote something");
    }
}

/// Files of torch.save, cut at every twentieth, are refused.
#[test]
fn truncated_files_are_refused() {
    let here = tempfile::tempdir().unwrap();
    for name in ["state.pth", "old.pth", "model_best.pth.tar", "told.safetensors"] {
        let whole = fs::read(file(name)).unwrap();
        for part in 0..20 {
            let path = here.path().join(name);
            fs::write(&path, &whole[..whole.len() * part / 20]).unwrap();
            let opened = Checkpoint::open_with(&path, &told());
            let error =
                opened.and_then(|c| c.reader().take("head.fc.bias", &[7]).map(drop)).expect_err(name).to_string();
            assert!(!error.contains('\n'), "{name} at {part}/20: {error}");
        }
    }
}

/// Damage anywhere gives a result or an error.
#[test]
fn damaged_files_never_panic() {
    use rand::{Rng as _, SeedableRng as _};
    let here = tempfile::tempdir().unwrap();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    for name in ["state.pth", "old.pth.tar", "model_best.pth.tar"] {
        let whole = fs::read(file(name)).unwrap();
        let root = whole.windows(8).position(|w| w == b"data.pkl").unwrap_or(0);
        let end = whole.len();
        for _ in 0..60 {
            let mut bytes = whole.clone();
            for _ in 0..rng.random_range(1..4) {
                // the pickle, or the directory at the end
                let at = if rng.random_bool(0.7) {
                    root + rng.random_range(0..3000)
                } else {
                    end - rng.random_range(1..4000)
                };
                bytes[at.min(end - 1)] = rng.random();
            }
            let path = here.path().join(name);
            fs::write(&path, bytes).unwrap();
            if let Ok(checkpoint) = Checkpoint::open_with(&path, &told()) {
                let _ = fold(&checkpoint, &FoldOptions::default());
            }
        }
    }
}

/// docs/folding.md's table of what can be folded, row by row.
#[test]
fn the_table_of_sources_is_true() {
    let copy = |change: &dyn Fn(&mut Value)| {
        let copy = Copy::of("nf_regnet_tanh");
        copy.config(|c| change(c));
        copy
    };
    let flat = copy(&|c| {
        let mut flat = c["pretrained_cfg"].clone();
        for key in ["architecture", "num_classes", "model_args"] {
            flat[key] = c[key].clone();
        }
        flat["labels"] = json!(["a", "b", "c", "d", "e", "f", "g"]);
        *c = flat;
    });
    let nested = copy(&|_| {});
    let dictionary = copy(&|c| c["label_names"] = json!({"0": "a", "6": "g"}));
    let wrapper = copy(&|c| {
        c["model_type"] = json!("timm_wrapper");
        c["id2label"] = json!({"0": "a", "1": "b"});
    });
    let bin = Copy::of("nf_regnet_tanh");
    fs::remove_file(bin.path("model.safetensors")).unwrap();
    fs::copy(file("state.pth"), bin.path("pytorch_model.bin")).unwrap();
    let at = |copy: &Copy| PathBuf::from(copy.folder());
    let none = OpenOptions::default();
    let ema = OpenOptions { use_ema: true, ..none.clone() };
    let rows: [(&str, PathBuf, OpenOptions); 17] = [
        ("folder: config.json with `pretrained_cfg`, model.safetensors", at(&nested), none.clone()),
        ("folder: flat config.json (timm ≤ 0.6), `labels`", at(&flat), none.clone()),
        ("folder: `label_names` as a dictionary with gaps", at(&dictionary), none.clone()),
        ("folder: transformers' TimmWrapper, `id2label`", at(&wrapper), none.clone()),
        ("folder: config.json, pytorch_model.bin", at(&bin), none.clone()),
        ("timm's train.py: model_best.pth.tar", file("model_best.pth.tar"), none.clone()),
        ("the same, `--use-ema`", file("model_best.pth.tar"), ema),
        ("the same, torch before 1.6", file("old.pth.tar"), none.clone()),
        ("state dictionary: .pth, `--arch`", file("state.pth"), told()),
        ("state dictionary: .pth, no `--arch`", file("state.pth"), none.clone()),
        ("a script's own `{\"net\": …}`, `--arch`", file("net.pth"), told()),
        ("DDP's `module.`, `--arch`", file("ddp.pth"), told()),
        ("torch.compile's `_orig_mod.`, `--arch`", file("compiled.pth"), told()),
        ("Lightning's .ckpt, `--arch`", file("lightning.ckpt"), told()),
        ("half precision, `--arch`", file("half.pth"), told()),
        (
            ".safetensors with `architecture` in its metadata",
            file("told.safetensors"),
            OpenOptions { architecture: None, ..told() },
        ),
        (".safetensors with `timm_model.`, `--arch`", file("wrapper.safetensors"), told()),
    ];
    let document = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/folding.md")).unwrap();
    let mut missing = String::new();
    for (what, path, options) in rows {
        let result = match Checkpoint::open_with(&path, &options) {
            Err(error) => format!("refused: {}", error.to_string().replace(&path.display().to_string(), "FILE")),
            Ok(checkpoint) => {
                fold(&checkpoint, &FoldOptions::default()).unwrap();
                let (p, source) = checkpoint.preprocessing(None).unwrap();
                let size = source.settings.iter().find(|s| s.setting == "size").unwrap();
                let names = match checkpoint.labels.as_slice() {
                    [] => "no names".to_string(),
                    [first, second, ..] => format!("names {first}, {second}, …"),
                    [one] => format!("name {one}"),
                };
                format!("folds: {}x{} ({}), {names}", p.height, p.width, size.origin)
            }
        };
        let row = format!("| {what} | {result} |\n");
        if !document.contains(&row) {
            missing += &row;
        }
    }
    assert!(missing.is_empty(), "docs/folding.md lacks:\n{missing}");
}

/// A network whose feature maps overflow half precision is refused, even if this machine computes half precision in
/// single.
#[test]
fn half_precision_that_overflows_is_refused() {
    let here = tempfile::tempdir().unwrap();
    let copy = Copy::of("nf_resnet_small");
    let fold = |copy: &Copy, name: &str| {
        nfold(&["fold", &copy.folder(), "--name", name, "--precision", "fp16", "--size", "64", "--json"], here.path())
    };
    let fine = fold(&copy, "fine");
    assert!(fine.status.success(), "{}", text(&fine.stderr));
    let report: Value = serde_json::from_slice(&fine.stdout).unwrap();
    let headroom = report["manifest"]["fold"]["verification"]["headroom"].as_f64().unwrap();
    assert!((10.0..65_504.0).contains(&headroom), "{headroom}");
    // the stem's gain times 2^16: weights fit still, maps don't
    copy.tensors(|t| {
        let stem = t.name == "stem.conv.gain";
        Some(if stem { t.map32(safetensors::Dtype::F32, |v| (v * 65_536.0).to_le_bytes().to_vec()) } else { t })
    });
    let output = fold(&copy, "far");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("overflows") && text(&output.stderr).contains("--precision fp32"),
        "{}",
        text(&output.stderr)
    );
    assert!(!here.path().join("repository/far").exists());
}

/// Folding needs at most three times the checkpoint's size in memory, beside the runtime's own.
#[test]
#[cfg(target_os = "linux")]
fn folding_takes_little_memory() {
    let here = tempfile::tempdir().unwrap();
    let peak = |architecture: &str, args: &str| {
        let made = nfold(&["init", architecture, "--out", architecture, "--model-args", args], here.path());
        assert!(made.status.success(), "{}", text(&made.stderr));
        let size = fs::metadata(here.path().join(architecture).join("model.safetensors")).unwrap().len();
        let mut child = Command::new(env!("CARGO_BIN_EXE_nfold"))
            .args(["fold", architecture, "--size", "64"])
            .current_dir(here.path())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut peak = 0;
        loop {
            let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
            let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
            let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok());
            peak = peak.max(kib.unwrap_or(0) << 10);
            if let Some(status) = child.try_wait().unwrap() {
                assert!(status.success());
                return (peak, size);
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    };
    let (base, _) = peak("resnet18", r#"{"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}"#);
    let (large, size) = peak("nf_resnet50", "{}");
    let times = (large - base) as f64 / size as f64;
    println!(
        "{:.0} MB above {:.0} MB for a checkpoint of {:.0} MB: {times:.2} times",
        (large - base) as f64 / 1e6,
        base as f64 / 1e6,
        size as f64 / 1e6
    );
    assert!(times <= 3.0, "{times:.2} times the checkpoint");
}
