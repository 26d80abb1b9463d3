//! Untrusted checkpoints: damaged, hostile and contradictory ones are refused by name; half precision is read; new ones
//! fold.

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use nfold::checkpoint::init::{InitOptions, init};
use nfold::checkpoint::{Checkpoint, CheckpointError};
use nfold::engine::verify::{answers, compare};
use nfold::engine::{EngineOptions, OrtBackend};
use nfold::fold::{FoldError, FoldOptions, fold};
use nfold::graph::GraphError;
use proptest::prelude::*;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::golden::goldens_folder;

/// A copy of a golden checkpoint to damage.
pub struct Copy {
    folder: TempDir,
}

impl Copy {
    pub fn of(name: &str) -> Self {
        let copy = Self { folder: tempfile::tempdir().unwrap() };
        for file in ["config.json", "model.safetensors"] {
            fs::copy(goldens_folder().join(name).join(file), copy.path(file)).unwrap();
        }
        copy
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// The folder, for a command line.
    pub fn folder(&self) -> String {
        self.folder.path().display().to_string()
    }

    fn weights(&self) -> Vec<u8> {
        fs::read(self.path("model.safetensors")).unwrap()
    }

    fn set_weights(&self, bytes: &[u8]) {
        fs::write(self.path("model.safetensors"), bytes).unwrap();
    }

    pub fn config(&self, change: impl FnOnce(&mut Value)) {
        let mut config: Value = serde_json::from_slice(&fs::read(self.path("config.json")).unwrap()).unwrap();
        change(&mut config);
        fs::write(self.path("config.json"), config.to_string()).unwrap();
    }

    /// Rewrites every tensor: `change` may rename it, drop it, or give it other bytes, type or shape.
    pub fn tensors(&self, change: impl Fn(Tensor) -> Option<Tensor>) {
        let bytes = self.weights();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let kept: Vec<Tensor> = file
            .tensors()
            .into_iter()
            .filter_map(|(name, view)| {
                change(Tensor { name, dtype: view.dtype(), shape: view.shape().to_vec(), data: view.data().to_vec() })
            })
            .collect();
        let views = kept.iter().map(|t| (&t.name, TensorView::new(t.dtype, t.shape.clone(), &t.data).unwrap()));
        self.set_weights(&safetensors::serialize(views, None).unwrap());
    }

    fn error(&self) -> String {
        match Checkpoint::open(self.folder.path()) {
            Err(e) => e.to_string(),
            Ok(checkpoint) => fold(&checkpoint, &FoldOptions::default()).expect_err("must be refused").to_string(),
        }
    }
}

pub struct Tensor {
    pub name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl Tensor {
    pub fn map32(mut self, dtype: Dtype, convert: impl Fn(f32) -> Vec<u8>) -> Self {
        let values = self.data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        self.data = values.flat_map(convert).collect();
        self.dtype = dtype;
        self
    }
}

#[test]
fn missing_files_are_named() {
    let copy = Copy::of("nf_regnet_small");
    let error = Checkpoint::open(&copy.path("nowhere")).unwrap_err().to_string();
    assert!(error.contains("nowhere") && error.contains("model.safetensors"), "{error}");
    fs::remove_file(copy.path("model.safetensors")).unwrap();
    assert!(copy.error().contains("model.safetensors"));
}

#[test]
fn tensors_are_used_exactly_once() {
    let copy = Copy::of("nf_regnet_small");
    copy.tensors(|t| (t.name != "stages.1.0.conv2.gain").then_some(t));
    assert!(copy.error().contains("`stages.1.0.conv2.gain` is missing"), "{}", copy.error());

    let copy = Copy::of("nf_regnet_small");
    copy.tensors(|mut t| {
        t.name = t.name.replace("head.fc.bias", "head.fc.offset");
        Some(t)
    });
    assert!(copy.error().contains("`head.fc.bias` is missing"), "{}", copy.error());

    let copy = Copy::of("nf_regnet_small");
    copy.config(|c| c["model_args"]["depths"] = json!([1, 2, 3, 1]));
    let error = copy.error();
    assert!(error.contains("tensors are not part of `nf_regnet_b0`") && error.contains("`stages.3.1."), "{error}");

    let copy = Copy::of("nf_regnet_small");
    copy.config(|c| c["model_args"]["width_factor"] = json!(0.5));
    let error = copy.error();
    assert!(error.contains("has shape") && error.contains("`stem.conv.weight`"), "{error}");
}

#[test]
fn values_that_are_no_weights_are_refused() {
    for (bad, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let copy = Copy::of("resnet18_small");
        copy.tensors(|mut t| {
            if t.name == "layer2.0.conv1.weight" {
                t.data[40..44].copy_from_slice(&bad.to_le_bytes());
            }
            Some(t)
        });
        let error = copy.error();
        assert!(
            error.contains("`layer2.0.conv1.weight`") && error.contains(text) && error.contains("element 10"),
            "{error}"
        );
    }

    let copy = Copy::of("resnet18_small");
    copy.tensors(|t| Some(if t.name == "fc.bias" { Tensor { dtype: Dtype::I32, ..t } } else { t }));
    assert!(copy.error().contains("`fc.bias` has data type I32"), "{}", copy.error());

    let copy = Copy::of("resnet18_small");
    copy.tensors(|t| {
        let negative = t.name == "layer1.0.bn1.running_var";
        Some(if negative { t.map32(Dtype::F32, |v| (-v - 1.0).to_le_bytes().to_vec()) } else { t })
    });
    assert!(copy.error().contains("`layer1.0.bn1` has a negative running variance"), "{}", copy.error());
}

#[test]
fn weights_too_large_for_half_precision_are_named() {
    let copy = Copy::of("resnet18_small");
    copy.tensors(|t| {
        let large = t.name == "fc.bias";
        Some(if large { t.map32(Dtype::F32, |_| 1e6f32.to_le_bytes().to_vec()) } else { t })
    });
    let checkpoint = Checkpoint::open(copy.folder.path()).unwrap();
    let half = FoldOptions { precision: nfold::model::Precision::Fp16, ..FoldOptions::default() };
    let error = fold(&checkpoint, &half).unwrap_err();
    assert!(matches!(&error, FoldError::Graph(GraphError::Overflow { name, .. }) if name == "fc.bias"), "{error}");
}

#[test]
fn half_precision_checkpoints_are_read() {
    for dtype in [Dtype::F16, Dtype::BF16] {
        let round = |v: f32| if dtype == Dtype::F16 { f16::from_f32(v).to_f32() } else { bf16::from_f32(v).to_f32() };
        let narrow = |v: f32| match dtype {
            Dtype::F16 => f16::from_f32(v).to_le_bytes().to_vec(),
            _ => bf16::from_f32(v).to_le_bytes().to_vec(),
        };
        let (stored, rounded) = (Copy::of("nfnet_l0_small"), Copy::of("nfnet_l0_small"));
        stored.tensors(|t| Some(t.map32(dtype, narrow)));
        rounded.tensors(|t| Some(t.map32(Dtype::F32, |v| round(v).to_le_bytes().to_vec())));
        let graph = |copy: &Copy| {
            let checkpoint = Checkpoint::open(copy.folder.path()).unwrap();
            let mut emission = fold(&checkpoint, &FoldOptions::default()).unwrap();
            // the source digest is the only difference
            emission.manifest.source_sha256.clear();
            let digest = checkpoint.sha256.into_bytes();
            let at = emission.onnx.windows(64).position(|w| w == digest).unwrap();
            emission.onnx[at..at + 64].fill(0);
            emission.onnx
        };
        assert!(graph(&stored) == graph(&rounded), "{dtype:?}");
    }
}

/// A file with this header and `data` bytes behind it.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(vec![0; data]);
    bytes
}

#[test]
fn malformed_files_are_refused() {
    let copy = Copy::of("nf_regnet_small");
    let entry = |from: usize, to: usize| format!(r#"{{"dtype":"F32","shape":[4],"data_offsets":[{from},{to}]}}"#);
    let two = |a: String, b: String| file(&format!(r#"{{"a":{a},"b":{b}}}"#), 32);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("seven bytes", vec![0; 7]),
        ("no header", vec![0; 8]),
        ("2 GB header", [&2_000_000_000u64.to_le_bytes()[..], b"{}"].concat()),
        ("header of 2^64-1", [&u64::MAX.to_le_bytes()[..], b"{}"].concat()),
        ("not JSON", file("hello", 0)),
        ("not UTF-8", [&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat()),
        ("overlapping offsets", two(entry(0, 16), entry(8, 24))),
        ("out of range", two(entry(0, 16), entry(16, 4_000_000_000))),
        ("backwards", two(entry(16, 0), entry(16, 32))),
        ("a hole", two(entry(0, 16), entry(20, 36))),
        ("shape against offsets", two(entry(0, 8), entry(8, 32))),
        ("unknown type", file(r#"{"a":{"dtype":"F7","shape":[4],"data_offsets":[0,16]}}"#, 16)),
        (
            "overflowing shape",
            file(r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}"#, 16),
        ),
    ];
    for (what, bytes) in cases {
        copy.set_weights(&bytes);
        let error = Checkpoint::open(copy.folder.path()).expect_err(what);
        assert!(matches!(error, CheckpointError::Weights { .. }), "{what}: {error}");
        assert!(error.to_string().contains("model.safetensors"), "{what}: {error}");
    }
}

#[test]
fn truncation_anywhere_is_refused() {
    let copy = Copy::of("resnet18_small");
    let whole = copy.weights();
    for part in 0..20 {
        copy.set_weights(&whole[..whole.len() * part / 20]);
        let error = Checkpoint::open(copy.folder.path()).expect_err("truncated");
        assert!(matches!(error, CheckpointError::Weights { .. }), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// A damaged header or configuration gives a result or an error, never a panic.
    #[test]
    fn damaged_checkpoints_never_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), config in any::<bool>(),
    ) {
        let copy = Copy::of("nf_regnet_tanh");
        let name = if config { "config.json" } else { "model.safetensors" };
        let mut bytes = fs::read(copy.path(name)).unwrap();
        let reach = if config { bytes.len() } else { 8 + 4096.min(bytes.len() - 8) };
        for (at, value) in flips {
            bytes[at.index(reach)] = value;
        }
        fs::write(copy.path(name), bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(copy.folder.path()) {
            let _ = fold(&checkpoint, &FoldOptions::default());
        }
    }

    /// Random bytes are no checkpoint.
    #[test]
    fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let copy = Copy::of("nf_regnet_tanh");
        copy.set_weights(&bytes);
        prop_assert!(Checkpoint::open(copy.folder.path()).is_err());
    }
}

#[test]
fn contradictory_configurations_are_refused() {
    type Change = fn(&mut Value);
    let cases: [(&str, Change); 7] = [
        ("the nearest that are: ", |c| c["architecture"] = json!("vit_base_patch16")),
        ("`depth`", |c| c["model_args"]["depth"] = json!(3)),
        ("3 label_names for 10 classes", |c| c["label_names"] = json!(["a", "b", "c"])),
        ("num_classes is 11", |c| c["num_classes"] = json!(11)),
        ("`in_chans`", |c| c["model_args"]["in_chans"] = json!(17)),
        ("pretrained_cfg", |c| c["pretrained_cfg"]["std"] = json!([0.0, 0.1, 0.1])),
        ("pretrained_cfg", |c| c["pretrained_cfg"]["input_size"] = json!([3, 1_000_000, 64])),
    ];
    for (what, change) in cases {
        let copy = Copy::of("nf_regnet_small");
        copy.config(change);
        if what.contains("pretrained_cfg") {
            copy.config(|c| c["pretrained_cfg"]["test_input_size"] = Value::Null);
        }
        assert!(copy.error().contains(what), "{what}: {}", copy.error());
    }
}

/// A fresh checkpoint of every family reads back, folds, and its folded graph answers as its unfolded one.
#[test]
fn fresh_checkpoints_fold() {
    let folder = tempfile::tempdir().unwrap();
    let small = json!({"depths": [1, 1, 1, 1], "width_factor": 0.25});
    let narrow = json!({"depths": [1, 1, 1, 1], "channels": [16, 32, 32, 48], "stem_chs": 16, "group_size": 8, "num_features": 64});
    let plain = json!({"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24]});
    for (architecture, args) in [
        ("nf_regnet_b1", &small),
        ("nf_ecaresnet26", &narrow),
        ("dm_nfnet_f0", &narrow),
        ("test_nfnet", &json!({})),
        ("resnet18d", &plain),
        ("resnet50", &plain),
        ("regnety_008", &json!({})),
        ("efficientnet_b0", &json!({})),
    ] {
        let options =
            InitOptions { architecture: architecture.into(), seed: 1, model_args: args.as_object().unwrap().clone() };
        let out = folder.path().join(architecture);
        let network = init(&out, &options).unwrap();
        assert!(matches!(init(&out, &options), Err(CheckpointError::Exists(_))));
        let twin = folder.path().join("twin");
        init(&twin, &options).unwrap();
        assert!(read(&out) == read(&twin), "{architecture}: the same seed gives the same bytes");
        fs::remove_dir_all(&twin).unwrap();

        let checkpoint = Checkpoint::open(&out).unwrap();
        assert_eq!(checkpoint.network, network);
        let options = FoldOptions { size: nfold::fold::Size::Fixed(64, 64), ..FoldOptions::default() };
        let folded = fold(&checkpoint, &options).unwrap();
        let unfolded = fold(&checkpoint, &FoldOptions { unfolded: true, ..options }).unwrap();
        let dropped = folded.manifest.fold.blocks.iter().filter(|b| b.dropped).count();
        assert_eq!(dropped, if architecture == "dm_nfnet_f0" { 4 } else { 0 }, "{architecture}");
        let open = |onnx: &[u8]| OrtBackend::open(onnx, architecture, &EngineOptions::default()).unwrap();
        let logits = |onnx: &[u8]| answers(&mut open(onnx), 1, [3, 64, 64]).unwrap();
        let found = compare(&logits(&unfolded.onnx), &logits(&folded.onnx));
        assert!(found.max_abs_diff <= 1e-5 * found.logit_span, "{architecture}: {found:?}");
    }
}

fn read(folder: &Path) -> Vec<u8> {
    fs::read(folder.join("model.safetensors")).unwrap()
}
