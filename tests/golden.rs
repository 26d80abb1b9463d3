//! Folded graphs against timm's own answers, for every family: `tests/goldens/NAME/golden.safetensors` holds inputs,
//! timm's logits in double precision and in single precision.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nfold::checkpoint::Checkpoint;
use nfold::fold::{FoldOptions, Size, fold};
use nfold::infer::engine::{Backend, Batch, EngineOptions, OrtBackend};
use nfold::model::{Gate, Precision};
use prost::Message as _;
use safetensors::SafeTensors;

pub fn goldens() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let mut all: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
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
            let &[images, 3, height, width] = input.shape() else { panic!("{:?}", input.shape()) };
            let wide = file.tensor(&format!("logits.{k}")).unwrap().data();
            Some(Case {
                batch: Batch { images, height, width, data: single(&format!("input.{k}")) },
                wide: wide.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
                single: single(&format!("logits32.{k}")).into_iter().map(f64::from).collect(),
            })
        })
        .collect()
}

fn run(onnx: &[u8], batch: &Batch) -> Vec<f64> {
    let mut backend = OrtBackend::open(onnx, "golden", &EngineOptions::default()).unwrap();
    backend.run(batch).unwrap().data.into_iter().map(f64::from).collect()
}

fn furthest(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
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
                let options = FoldOptions { size, gate, unfolded, precision: Precision::Fp32 };
                let folded = fold(&checkpoint, &options).unwrap_or_else(|e| panic!("{name}: {e}"));
                let error = furthest(&run(&folded.onnx, &case.batch), &case.wide);
                let ratio = error / allowed;
                println!("{name}.{k} {size:?} {gate:?} unfolded {unfolded}: {error:.2e}, {ratio:.2} of {allowed:.2e}");
                assert!(ratio <= 1.0, "{name}.{k} {options:?}: {error:e} > {allowed:e}");
                if !unfolded && ratio > worst.0 {
                    worst = (ratio, format!("{name}.{k}"));
                }
                inputs += 1;
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
                "Conv" | "Gemm" => 2,
                "Resize" | "Reshape" => 1,
                _ => 0,
            };
            assert_eq!(constant_inputs, expected, "{name}: {} `{}` reads constants", node.op_type, node.name);
        }
        let plain = [
            "Add",
            "AveragePool",
            "Conv",
            "Flatten",
            "Gelu",
            "Gemm",
            "GlobalAveragePool",
            "MaxPool",
            "Mul",
            "Relu",
            "Reshape",
            "Resize",
            "Sigmoid",
        ];
        for op in census.keys() {
            assert!(plain.contains(op), "{name}: operator {op} in {census:?}");
        }
        println!("{name}: {census:?}");
    }
}

/// The same checkpoint gives the same bytes, and the bytes say where they come from.
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
        let error = furthest(&run(&folded.onnx, &case.batch), &case.wide) / span;
        println!("{}: {error:.1e} of the span", folder.display());
        assert!(error < 1e-2, "{}: {error}", folder.display());
    }
}
