//! Files that `fold` and `serve` read, and that others may write: safetensors, torch.save's archives and pickles,
//! `config.json`, `manifest.json`.

use std::path::Path;

use super::{Door, Verdict, counted, files, is_readable, root, run};
use crate::checkpoint::config::Config;
use crate::checkpoint::{Checkpoint, OpenOptions};
use crate::model::ModelDir;

/// Opens a checkpoint in a file of this name: a network and the positions of its tensors, or an error.
fn weights(file: &Path, bytes: &[u8]) -> Verdict {
    std::fs::write(file, bytes).expect("a file");
    let options = OpenOptions { architecture: Some("nf_regnet_b0".into()), ..OpenOptions::default() };
    let (opened, cost) = counted(|| {
        let checkpoint = Checkpoint::open_with(file, &options)?;
        // more values than the file has bytes are a failure
        let reader = checkpoint.reader();
        let stem = reader.take("stem.conv.weight", &[32, 3, 3, 3]).map(|values| values.len());
        assert!(stem.as_ref().is_ok_and(|&count| count == 864) || stem.is_err());
        let preprocessing = checkpoint.preprocessing(None);
        assert!(preprocessing.is_ok_and(|(found, _)| found.check().is_ok()));
        Ok::<_, crate::checkpoint::CheckpointError>(checkpoint.labels.len())
    });
    let outcome = match opened {
        Ok(_) => "a checkpoint".to_string(),
        Err(error) => {
            let text = error.to_string();
            assert!(is_readable(&text), "{text:?}");
            text.replace(&file.display().to_string(), "FILE")
        }
    };
    // the network's plan and timm's settings need some hundred kilobytes for any file
    Verdict { outcome, cost, bytes: (2 << 20) + 64 * bytes.len(), allocations: 40_000 + 40 * bytes.len() }
}

fn door(name: &'static str, file: &str, seeds: Vec<Vec<u8>>, words: &'static [&'static str]) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join(file);
    run(&Door { name, seeds, words, longest: 192 * 1024 }, |bytes| weights(&file, bytes));
}

fn kept(extensions: &[&str]) -> Vec<Vec<u8>> {
    let all = files(&root().join("tests/data/checkpoint/files"), 192 * 1024);
    let wanted =
        |path: &Path| path.extension().is_some_and(|found| extensions.iter().any(|extension| *extension == found));
    all.into_iter().filter(|(path, _)| wanted(path)).map(|(_, bytes)| bytes).collect()
}

#[test]
fn safetensors() {
    let mut seeds = kept(&["safetensors"]);
    let header = br#"{"__metadata__":{"format":"pt"},"stem.conv.weight":{"dtype":"F32","shape":[32,3,3,3],"data_offsets":[0,3456]}}"#;
    seeds.push([&(header.len() as u64).to_le_bytes()[..], header, &[0; 3456]].concat());
    let words = &[
        "\"dtype\":",
        "\"shape\":",
        "\"data_offsets\":",
        "F64",
        "BF16",
        "F16",
        "I64",
        "F8_E4M3",
        "[",
        "]",
        "{",
        "}",
        ",",
        "1e308",
        "-1",
        "__metadata__",
        "18446744073709551615",
    ];
    door("safetensors", "model.safetensors", seeds, words);
}

#[test]
fn torch_files() {
    let words = &[
        "PK\u{1}\u{2}",
        "PK\u{3}\u{4}",
        "PK\u{5}\u{6}",
        "archive/data.pkl",
        "torch._utils\n_rebuild_tensor_v2\n",
        "collections\nOrderedDict\n",
        "torch\nFloatStorage\n",
        "(",
        ".",
        "}",
        "]",
        "q",
        "t",
        "R",
        "Q",
        "b",
        "u",
        "s",
        "\u{0}",
    ];
    door("torch", "model.pth", kept(&["pth", "pt", "tar", "ckpt"]), words);
}

#[test]
fn config_json() {
    let folder = root().join("tests/data/checkpoint/hub");
    let seeds: Vec<_> = files(&folder, 48 * 1024).into_iter().map(|(_, bytes)| bytes).collect();
    let words: &[&str] = &[
        "\"architecture\":",
        "\"pretrained_cfg\":",
        "\"model_args\":",
        "\"label_names\":",
        "\"label_descriptions\":",
        "\"mean\":",
        "\"std\":",
        "\"input_size\":",
        "\"crop_pct\":",
        "\"num_classes\":",
        "null",
        "true",
        "[",
        "]",
        "{",
        "}",
        ",",
        "1e400",
        "NaN",
        "\\u0000",
        "\u{1b}[31m",
    ];
    run(&Door { name: "config", seeds, words, longest: 64 * 1024 }, |bytes| {
        // as `Checkpoint` tells it
        let (parsed, cost) = counted(|| Config::parse(bytes).map_err(crate::printable::brief));
        let outcome = match parsed {
            Ok(_) => "a configuration".to_string(),
            Err(text) => {
                assert!(is_readable(&text), "{text:?}");
                text
            }
        };
        Verdict { outcome, cost, bytes: 256 * 1024 + 100 * bytes.len(), allocations: 1000 + 4 * bytes.len() }
    });
}

#[test]
fn manifest() {
    let seed = serde_json::json!({
        "format": 1, "producer": "test", "architecture": "nf_regnet_b0", "precision": "fp32", "classes": 3,
        "labels": ["first", "second", "third"],
        "preprocessing": { "height": 192, "width": 192, "crop_pct": 0.9, "crop_mode": "center",
            "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2] },
        "source_sha256": "00", "onnx_sha256": "11",
        "golden": { "input_sha256": "22", "logits": [0.5, -1.0, 2.0], "tolerance": 1e-4 },
        "fold": { "family": "nf", "activation": "relu", "parameters": 1, "folded_parameters": 1, "gmacs": 0.5,
                  "gate": "resize", "blocks": [] },
    });
    let words: &[&str] = &[
        "\"format\":",
        "\"classes\":",
        "\"labels\":",
        "\"preprocessing\":",
        "\"golden\":",
        "\"mean\":",
        "\"std\":",
        "\"height\":",
        "null",
        "[",
        "]",
        "{",
        "}",
        ",",
        "0",
        "1e400",
        "-0.0",
        "\\u0000",
        "\u{1b}[31m",
    ];
    let folder = tempfile::tempdir().expect("a folder");
    let version = folder.path().join("m/1");
    std::fs::create_dir_all(&version).expect("a folder");
    let file = version.join("manifest.json");
    let seeds = vec![serde_json::to_vec(&seed).expect("json")];
    run(&Door { name: "manifest", seeds, words, longest: 64 * 1024 }, |bytes| {
        std::fs::write(&file, bytes).expect("a file");
        let (opened, cost) = counted(|| ModelDir::open_version(folder.path(), "m", 1));
        let outcome = match opened {
            Ok(dir) => {
                let manifest = dir.manifest;
                assert!(manifest.classes > 0 && manifest.preprocessing.check().is_ok());
                assert!(manifest.labels.is_empty() || manifest.labels.len() == manifest.classes as usize);
                assert!(manifest.golden.is_none_or(|golden| golden.logits.len() == manifest.classes as usize));
                "a model".to_string()
            }
            Err(error) => {
                let text = error.to_string();
                assert!(is_readable(&text), "{text:?}");
                text.replace(&folder.path().display().to_string(), "FOLDER")
            }
        };
        Verdict { outcome, cost, bytes: 256 * 1024 + 100 * bytes.len(), allocations: 2000 + 4 * bytes.len() }
    });
}
