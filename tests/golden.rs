//! Folded graphs compared with timm's logits, for every family: `tests/goldens/NAME/golden.safetensors` holds inputs,
//! and timm's logits in double and in single precision.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nfold::checkpoint::Checkpoint;
use nfold::engine::{self, Backend, Batch, EngineOptions, Fitted, Kernels, OrtBackend};
use nfold::fold::{FoldOptions, Size, fold};
use nfold::model::{Gate, Precision};
use prost::Message as _;
use safetensors::SafeTensors;

/// A network of every family.
pub const FAMILIES: [&str; 7] = [
    "nf_regnet_small",
    "nf_resnet_small",
    "eca_nfnet_l0_small",
    "dm_nfnet_f0_small",
    "resnet50_small",
    "regnety_small",
    "efficientnet_small",
];

pub fn goldens_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

fn goldens() -> Vec<PathBuf> {
    let mut all: Vec<_> = std::fs::read_dir(goldens_folder()).unwrap().map(|e| e.unwrap().path()).collect();
    all.retain(|p| p.is_dir());
    all.sort();
    assert!(all.len() >= 10);
    all
}

/// One input of a golden: batch, timm's float64 logits, timm's float32 logits.
struct Case {
    batch: Batch,
    wide: Vec<f64>,
    single: Vec<f64>,
}

fn cases(folder: &Path) -> Vec<Case> {
    let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let single = |name: &str| -> Vec<f32> {
        let data = file.tensor(name).unwrap().data();
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    (0..)
        .map_while(|k| {
            let input = file.tensor(&format!("input.{k}")).ok()?;
            let &[images, _, height, width] = input.shape() else { panic!("{:?}", input.shape()) };
            let wide = file.tensor(&format!("logits.{k}")).unwrap().data();
            Some(Case {
                batch: Batch { images, height, width, data: single(&format!("input.{k}")) },
                wide: wide.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
                single: single(&format!("logits32.{k}")).into_iter().map(f64::from).collect(),
            })
        })
        .collect()
}

fn run(graph: &Fitted, batch: &Batch) -> Vec<f64> {
    let mut backend = OrtBackend::open_fitted(graph, "golden", &EngineOptions::default()).unwrap();
    backend.run(batch).unwrap().data.into_iter().map(f64::from).collect()
}

fn furthest(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// The graph as folded; padded as on machines with AVX-512; and as this machine runs it, if that differs.
pub fn ways_to_run(onnx: Vec<u8>) -> impl Iterator<Item = (Fitted, &'static str)> {
    let padded = Fitted::padded(onnx.clone().into(), 16);
    let laid_out = |kernels| Some(Fitted::for_this_cpu(onnx.clone(), kernels)).filter(Fitted::is_laid_out);
    let (own, laid_out) = (laid_out(Kernels::Own), laid_out(Kernels::Runtime));
    let named = |graph: Option<Fitted>, how| graph.map(|graph| (graph, how));
    std::iter::once((Fitted::as_it_is(onnx), ""))
        .chain(named(padded, ", in blocks of 16"))
        .chain(named(laid_out, ", laid out"))
        .chain(named(own, ", laid out for our kernels"))
}

/// |folded − timm64| ≤ 4·|timm32 − timm64| + 1e-6·span, every golden, every input, every emission.
#[test]
fn folded_graphs_agree_with_timm() {
    let mut worst = (0.0, String::new());
    let mut inputs = 0;
    for folder in goldens() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let checkpoint = Checkpoint::open(&folder).unwrap_or_else(|e| panic!("{name}: {e}"));
        for (k, case) in cases(&folder).iter().enumerate() {
            let fixed = Size::Fixed(case.batch.height as u32, case.batch.width as u32);
            let span =
                case.wide.iter().fold(f64::MIN, |a, b| a.max(*b)) - case.wide.iter().fold(f64::MAX, |a, b| a.min(*b));
            let allowed = 4.0 * furthest(&case.single, &case.wide) + 1e-6 * span;
            for (size, gate, unfolded) in [
                (fixed, Gate::Resize, false),
                (fixed, Gate::Broadcast, false),
                (Size::Dynamic, Gate::Broadcast, false),
                (fixed, Gate::Resize, true),
            ] {
                let options = FoldOptions { size, gate, unfolded, ..FoldOptions::default() };
                let folded = fold(&checkpoint, &options).unwrap_or_else(|e| panic!("{name}: {e}"));
                for (graph, how) in ways_to_run(folded.onnx) {
                    let error = furthest(&run(&graph, &case.batch), &case.wide);
                    let ratio = error / allowed;
                    println!(
                        "{name}.{k} {size:?} {gate:?} unfolded {unfolded}{how}: {error:.2e}, {ratio:.2} of {allowed:.2e}"
                    );
                    assert!(ratio <= 1.0, "{name}.{k} {options:?}{how}: {error:e} > {allowed:e}");
                    if !unfolded && ratio > worst.0 {
                        worst = (ratio, format!("{name}.{k}"));
                    }
                    inputs += 1;
                }
            }
        }
    }
    println!("worst ratio {:.3} at {} over {inputs} comparisons", worst.0, worst.1);
}

/// What is left in a folded graph: plain operators and nothing that computes on weights or carries a scalar.
#[test]
fn folded_graphs_hold_plain_operators_only() {
    for folder in goldens() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let folded = fold(&checkpoint, &FoldOptions::default()).unwrap();
        let graph = nfold::pb::onnx::ModelProto::decode(folded.onnx.as_slice()).unwrap().graph.unwrap();
        let constants: BTreeMap<&str, usize> =
            graph.initializer.iter().map(|t| (t.name.as_str(), t.dims.len())).collect();
        let mut census: BTreeMap<&str, usize> = BTreeMap::new();
        for node in &graph.node {
            *census.entry(node.op_type.as_str()).or_default() += 1;
            let constant_inputs = node.input.iter().filter(|i| constants.contains_key(i.as_str())).count();
            let expected = match node.op_type.as_str() {
                "Conv" if node.input.len() == 2 => 1,
                "Gemm" if node.input[2].contains(".term") => 1,
                "Conv" | "Gemm" => 2,
                "Resize" | "Reshape" => 1,
                // the gain of features, which the classifier's weights carry
                "Mul" if node.name == "features" => 1,
                "Clip" => 2,
                _ => 0,
            };
            assert_eq!(constant_inputs, expected, "{name}: {} `{}` reads constants", node.op_type, node.name);
        }
        let plain = "Add AveragePool Clip Concat Conv Elu Flatten Gelu Gemm GlobalAveragePool GlobalMaxPool HardSwish Identity LeakyRelu MaxPool Mul Relu \
                     Reshape Resize Selu Sigmoid Tanh";
        for op in census.keys() {
            assert!(plain.split_whitespace().any(|p| p == *op), "{name}: operator {op} in {census:?}");
        }
        println!("{name}: {census:?}");
    }
}

/// The same checkpoint gives the same bytes, which name their origin.
#[test]
fn folding_is_deterministic() {
    let checkpoint = Checkpoint::open(&goldens()[0]).unwrap();
    let again = Checkpoint::open(&goldens()[0]).unwrap();
    let (a, b) = (fold(&checkpoint, &FoldOptions::default()).unwrap(), fold(&again, &FoldOptions::default()).unwrap());
    assert!(a.onnx == b.onnx && a.manifest == b.manifest);
    let model = nfold::pb::onnx::ModelProto::decode(a.onnx.as_slice()).unwrap();
    let entry = |key: &str| model.metadata_props.iter().find(|p| p.key == key).unwrap().value.clone();
    assert_eq!(entry("source_sha256"), checkpoint.sha256);
    assert!(entry("preprocessing").contains("\"crop_pct\""));
}

/// Half precision stays within what ten mantissa bits allow.
#[test]
fn half_precision_is_close() {
    for folder in goldens() {
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let case = &cases(&folder)[0];
        let size = Size::Fixed(case.batch.height as u32, case.batch.width as u32);
        let options = FoldOptions { size, precision: Precision::Fp16, ..FoldOptions::default() };
        let folded = fold(&checkpoint, &options).unwrap();
        let full = fold(&checkpoint, &FoldOptions { precision: Precision::Fp32, ..options }).unwrap();
        assert!(folded.onnx.len() * 10 < full.onnx.len() * 6);
        let span =
            case.wide.iter().fold(f64::MIN, |a, b| a.max(*b)) - case.wide.iter().fold(f64::MAX, |a, b| a.min(*b));
        let error = furthest(&run(&Fitted::as_it_is(folded.onnx), &case.batch), &case.wide) / span;
        println!("{}: {error:.1e} of the span", folder.display());
        assert!(error < 1e-2, "{}: {error}", folder.display());
    }
}

/// Every architecture has timm's number of parameters and tensors, and timm's evaluation settings.
#[test]
fn architectures_are_timms() {
    let path = goldens_folder().join("architectures.json");
    let table: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let timm = table.as_object().unwrap();
    let names = nfold::nets::architectures();
    for name in timm.keys().filter(|n| *n != "timm") {
        assert!(names.contains(&name.as_str()), "timm has {name}, nfold does not");
    }
    for name in names {
        let expected = timm.get(name).unwrap_or_else(|| panic!("nfold has {name}, timm does not"));
        let network = nfold::nets::Network::plan(name, &serde_json::Map::new()).unwrap();
        assert_eq!(network.parameters(), expected["parameters"].as_u64().unwrap(), "{name}");
        assert_eq!(network.tensors().len() as u64, expected["tensors"].as_u64().unwrap(), "{name}");
        let e = nfold::nets::evaluation(name).unwrap();
        let square = |side: Option<u32>| serde_json::json!(side.map(|s| [3, s, s]));
        assert_eq!(square(Some(e.input)), expected["input_size"], "{name}");
        assert_eq!(square(e.test_input), expected["test_input_size"], "{name}");
        assert_eq!(serde_json::json!(e.crop_pct), expected["crop_pct"], "{name}");
        assert_eq!(serde_json::json!(e.test_crop_pct), expected["test_crop_pct"], "{name}");
        assert_eq!(e.crop_mode, expected["crop_mode"].as_str().unwrap_or("center"), "{name}");
        assert_eq!(e.interpolation, expected["interpolation"], "{name}");
        assert_eq!(
            serde_json::json!([e.norm.mean(), e.norm.std()]),
            serde_json::json!([expected["mean"], expected["std"]]),
            "{name}"
        );
        assert_eq!(digest(&network), expected["digest"], "{name}: names or shapes of tensors");
    }
}

/// SHA-256 of every tensor's name and shape, in order of names, as make_more.py takes it.
fn digest(network: &nfold::nets::Network) -> String {
    let mut tensors: Vec<_> = network.tensors().into_iter().map(|t| format!("{} {:?}\n", t.name, t.shape)).collect();
    tensors.sort_by(|a, b| a.split(' ').next().cmp(&b.split(' ').next()));
    nfold::model::sha256(tensors.concat().as_bytes())
}

fn published() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/checkpoint/hub");
    let files = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let mut all: Vec<_> = files
        .map(|path| (path.file_stem().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()))
        .collect();
    all.sort();
    assert!(all.len() >= 19);
    all
}

/// Every published checkpoint plans from its exact configuration, with timm's names and shapes of tensors.
#[test]
fn published_checkpoints_plan() {
    let timm: serde_json::Value =
        serde_json::from_slice(&std::fs::read(goldens_folder().join("hub.json")).unwrap()).unwrap();
    for (name, text) in published() {
        let config = nfold::checkpoint::Config::parse(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(format!("{}.{}", config.architecture, config.tag.as_deref().unwrap()), name);
        let network = nfold::nets::Network::plan(&config.architecture, &config.model_args).unwrap();
        assert_eq!(digest(&network), timm[&name]["digest"], "{name}");
        assert_eq!(network.parameters(), timm[&name]["parameters"].as_u64().unwrap(), "{name}");
    }
}

/// Fresh weights under a published configuration, folded; returns the manifest.
fn fold_published(name: &str, text: &[u8]) -> nfold::model::Manifest {
    let config = nfold::checkpoint::Config::parse(text).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join(name);
    let options = nfold::checkpoint::init::InitOptions {
        architecture: config.architecture,
        seed: 1,
        model_args: config.model_args,
    };
    nfold::checkpoint::init::init_active(&out, &options).unwrap();
    std::fs::write(out.join("config.json"), text).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert_eq!(checkpoint.architecture, name);
    assert_eq!(checkpoint.labels.len(), 1000, "{name}");
    nfold::fold::fold_to_file(&checkpoint, &FoldOptions::default(), &folder.path().join("model.onnx")).unwrap().manifest
}

/// The small ones of the published checkpoints fold; `published_checkpoints_fold_all` does up to 80 million parameters.
#[test]
fn published_checkpoints_fold() {
    for (name, text) in published() {
        if ["test_nfnet", "efficientnet_b1", "nf_regnet_b1"].iter().any(|small| name.starts_with(small)) {
            let manifest = fold_published(&name, &text);
            assert!(manifest.fold.folded_parameters > 100_000, "{name}");
        }
    }
}

#[test]
#[ignore = "a minute: make check-all"]
fn published_checkpoints_fold_all() {
    for (name, text) in published() {
        let config = nfold::checkpoint::Config::parse(&text).unwrap();
        let network = nfold::nets::Network::plan(&config.architecture, &config.model_args).unwrap();
        if network.parameters() <= 80_000_000 {
            println!("{name}: {:.2} GMACs", fold_published(&name, &text).fold.gmacs);
        }
    }
}

/// What really runs on the CPU: every convolution of a map in the blocked layout, entered once and left once. With AVX2
/// the block is 8 channels, with AVX-512 it is 16 and channels are padded to it; other machines don't block.
#[test]
#[cfg(target_arch = "x86_64")]
fn optimized_graphs_stay_in_the_blocked_layout() {
    if !is_x86_feature_detected!("avx2") {
        crate::cli::skip("this processor has no blocked layout");
        return;
    }
    let block = engine::channel_block();
    let padded = block.is_some();
    let folder = tempfile::tempdir().unwrap();
    for name in [
        "nf_regnet_small",
        "nf_resnet_small",
        "nf_seresnet_small",
        "eca_nfnet_l0_small",
        "resnet50_small",
        "efficientnet_small",
    ] {
        let checkpoint = Checkpoint::open(&goldens_folder().join(name)).unwrap();
        let folded = fold(&checkpoint, &FoldOptions::default()).unwrap();
        let path = folder.path().join(name);
        let graph = block.and_then(|block| Fitted::padded(folded.onnx.clone().into(), block));
        engine::write_optimized(&graph.unwrap_or_else(|| Fitted::as_it_is(folded.onnx)), name, &path).unwrap();
        let model = nfold::pb::onnx::ModelProto::decode(std::fs::read(&path).unwrap().as_slice()).unwrap();
        let mut census: BTreeMap<String, usize> = BTreeMap::new();
        for node in model.graph.unwrap().node {
            *census.entry(node.op_type).or_default() += 1;
        }
        println!("{name}: {census:?}");
        let of = |op: &str| census.get(op).copied().unwrap_or(0);
        // an ECA gate leaves for its 1-D convolution and re-enters; where nothing is padded, the small golden's first
        // convolution has too few channels (4) to enter at once, and of EfficientNet's squeezed maps (1x1 pixels) six
        // have too few to stay
        let expected = match name {
            _ if name.starts_with("eca") => (5, if padded { 6 } else { 7 }),
            "efficientnet_small" if !padded => (0, 7),
            _ => (0, 1),
        };
        assert_eq!((of("ReorderInput"), of("ReorderOutput")), expected, "{name}: {census:?}");
        assert_eq!(of("ReduceMean") + of("Sub") + of("Div") + of("Sqrt") + of("BatchNormalization"), 0, "{name}");
    }
}
