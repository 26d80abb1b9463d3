//! Signal propagation: the statements of Brock, De & Smith 2021 on networks at initialisation, timm's own activations
//! as oracle, and faulty checkpoints.

use std::f64::consts::PI;
use std::fs;

use nfold::checkpoint::Checkpoint;
use nfold::engine::Batch;
use nfold::fold::{FoldOptions, Size, fold};
use nfold::model::Precision;
use nfold::nets::activation::Activation;
use nfold::spp::health::{Limits, examine, largest_difference};
use nfold::spp::resnet_v2::{ResNetV2, Variant};
use nfold::spp::taps::{BlockFacts, Exposed};
use nfold::spp::{Profile, Signal};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::checkpoint::Copy;
use crate::cli::{golden, nfold, project, refused, text};
use crate::golden::goldens_folder;

/// 2 stages of 5 blocks, maps of 64 and 32 pixels a side: zero padding takes a few percent of the variance there.
fn net(variant: Variant) -> ResNetV2 {
    ResNetV2 {
        variant,
        activation: Activation::Relu,
        depth: 30,
        stages: 2,
        width: 0.5,
        alpha: 1.0,
        size: 256,
        images: 4,
        seed: 1,
    }
}

fn profile(net: &ResNetV2) -> Profile {
    net.profile("test", |_, _| {}).unwrap()
}

fn residual(s: &Signal) -> f64 {
    s.residual_variance.unwrap()
}

fn close(found: f64, expected: f64, relative: f64, what: &str) {
    assert!((found / expected - 1.0).abs() <= relative, "{what}: {found}, expected {expected} ± {relative}");
}

/// Section 3, figure 1: the variance grows by the branch's in every block and is reset by each transition; 0.68
/// (2·½(1 − 1/π)) with a mean that grows along for BN-ReLU-Conv, 1 without for ReLU-BN-Conv.
#[test]
fn batch_normalised_networks_grow_linearly_and_reset() {
    for (variant, branch) in [(Variant::BnReluConv, 0.6817), (Variant::ReluBnConv, 1.0)] {
        let p = profile(&net(variant));
        assert_eq!(p.blocks.len(), 10);
        for stage in p.blocks.chunks(5) {
            for (i, s) in stage.iter().enumerate() {
                close(residual(s), branch, 0.06, &s.block);
                close(s.variance, branch * (i as f64 + 2.0), 0.08, &s.block);
                match variant {
                    // each branch adds 1/π on average
                    Variant::BnReluConv => close(s.squared_mean, (i as f64 + 2.0) / PI, 0.3, &s.block),
                    _ => assert!(s.squared_mean < 0.02, "{s:?}"),
                }
            }
            assert!(stage[4].ends_stage && !stage[3].ends_stage);
        }
    }
}

/// Section 4, figure 2: with Scaled WS the variance is what the plan expects: α² a block, 1 + α² after a transition.
#[test]
fn scaled_weight_standardization_does_what_the_plan_expects() {
    for (activation, alpha) in [
        (Activation::Relu, 1.0),
        (Activation::Relu, 0.2),
        (Activation::Silu, 1.0),
        (Activation::Gelu, 0.5),
        (Activation::Identity, 1.0),
    ] {
        let p = profile(&ResNetV2 { activation, alpha, ..net(Variant::NfWs) });
        for (i, s) in p.blocks.iter().enumerate() {
            let expected = 1.0 + alpha * alpha * (i % 5 + 1) as f64;
            close(s.expected_variance.unwrap(), expected, 1e-12, &s.block);
            close(s.variance, expected, 0.12, &format!("{activation:?} {}", s.block));
            assert!((0.82..1.08).contains(&residual(s)), "{activation:?} {s:?}");
            assert!(s.squared_mean < 0.03 * s.variance, "{activation:?} {s:?}");
        }
    }
}

/// Section 4: He initialisation without normalisation shifts the means, block by block, and the branches fade; it is
/// sound when the activation is removed, and explodes without α and β.
#[test]
fn he_initialisation_shifts_means_unless_nothing_is_rectified() {
    let he = profile(&net(Variant::NfHe));
    for stage in he.blocks.chunks(5) {
        assert!(stage.windows(2).all(|w| w[1].squared_mean > w[0].squared_mean), "{stage:?}");
        assert!(stage[4].squared_mean > stage[4].variance, "{stage:?}");
    }
    assert!(residual(&he.blocks[9]) < 0.4, "{:?}", he.blocks[9]);
    let linear = profile(&ResNetV2 { activation: Activation::Identity, ..net(Variant::NfHe) });
    for (i, s) in linear.blocks.iter().enumerate() {
        close(s.variance, (i % 5 + 2) as f64, 0.12, &s.block);
        assert!((0.82..1.08).contains(&residual(s)) && s.squared_mean < 0.03, "{s:?}");
    }
    let plain = profile(&ResNetV2 { depth: 90, ..net(Variant::Plain) });
    let problems = examine(&plain, &Limits::default());
    assert!(problems.len() == 1 && problems[0].kind == "exploding", "{problems:?}");
    assert!(examine(&he, &Limits::default()).is_empty());
}

#[test]
fn the_same_seed_gives_the_same_statistics() {
    let net = ResNetV2 { depth: 12, width: 0.25, ..net(Variant::BnReluConv) };
    let (once, again) = (profile(&net), profile(&net));
    assert_eq!(once.blocks, again.blocks);
    assert_ne!(once.blocks, profile(&ResNetV2 { seed: 2, ..net.clone() }).blocks);
    assert_eq!(net.blocks(), [2, 2]);
    assert_eq!(ResNetV2 { depth: 600, stages: 3, ..net }.blocks(), [67, 67, 66]);
}

/// A checkpoint's graph with its blocks exposed, run on one batch.
fn look(checkpoint: &Checkpoint, batch: &Batch, precision: Precision, unfolded: bool) -> Profile {
    let size = Size::Fixed(batch.height as u32, batch.width as u32);
    let options = FoldOptions { size, precision, unfolded, ..FoldOptions::default() };
    let folded = fold(checkpoint, &options).unwrap();
    let facts: Vec<BlockFacts> = (folded.manifest.fold.blocks.iter())
        .map(|b| BlockFacts {
            block: b.block.clone(),
            scale: b.alpha * b.skipinit_gain.unwrap_or(1.0),
            expected_variance: b.expected_variance,
        })
        .collect();
    let mut exposed = Exposed::open(&folded.onnx, "golden", &facts).unwrap();
    exposed.profile("its own input", [batch].into_iter()).unwrap()
}

/// `spp.json` holds what timm computes in double precision.
#[test]
fn statistics_are_those_of_timm() {
    let reference: Value = serde_json::from_slice(&fs::read(project("tests/data/spp.json")).unwrap()).unwrap();
    for (name, blocks) in reference["goldens"].as_object().unwrap() {
        let folder = goldens_folder().join(name);
        let bytes = fs::read(folder.join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let input = file.tensor("input.0").unwrap();
        let &[images, 3, height, width] = input.shape() else { panic!("{:?}", input.shape()) };
        let data = input.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let batch = Batch { images, height, width, data };
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let unfolded = look(&checkpoint, &batch, Precision::Fp32, true);
        let folded = look(&checkpoint, &batch, Precision::Fp32, false);
        let half = look(&checkpoint, &batch, Precision::Fp16, false);
        for p in [&unfolded, &folded] {
            let blocks = blocks.as_array().unwrap();
            assert_eq!(p.blocks.len(), blocks.len(), "{name}");
            for (s, timm) in p.blocks.iter().zip(blocks) {
                assert_eq!(timm["block"], s.block.as_str(), "{name}");
                let number = |kind: &str, i: usize| timm[kind][i].as_f64().unwrap();
                let what = format!("{name} {}", s.block);
                close(s.squared_mean, number("output", 0), 2e-5, &what);
                close(s.variance, number("output", 1), 2e-5, &what);
                close(s.residual_squared_mean.unwrap(), number("residual", 0), 2e-5, &what);
                close(residual(s), number("residual", 1), 2e-5, &what);
            }
            assert_eq!(p.finite_logits, Some(true));
        }
        let (rounding, block) = largest_difference(&unfolded, &folded).unwrap();
        assert!(rounding < 1e-5, "{name}: {rounding} at {block}");
        let (rounding, block) = largest_difference(&unfolded, &half).unwrap();
        assert!(rounding > 0.0 && rounding < 1e-2, "{name}: {rounding} at {block}");
    }
}

#[test]
fn the_program_tells_in_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let photographs = project("tests/data/cifar10");
    let demo = project("models/nf_regnet_cifar10");
    let output = nfold(&["spp", &demo, "--images", &photographs, "--count", "10", "--json", "--csv", "a.csv"], here);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["profiles"].as_array().unwrap().len(), 3);
    assert_eq!((&report["profiles"][0]["images"], &report["problems"]), (&10.into(), &Value::Array(vec![])));
    assert!(report["comparisons"][0]["largest_relative_difference"].as_f64().unwrap() < 1e-5);
    let csv = fs::read_to_string(here.join("a.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + 3 * 9);

    let arguments = ["--depth", "12", "--width", "0.25", "--size", "64", "--count", "2", "--svg", "a.svg"];
    let networks = ["spp", "--arch", "nf-ws:alpha=0.5,act=silu", "--arch", "bn-relu-conv", "--arch", "nf_regnet_b0"];
    let output = nfold(&[&networks[..], &arguments].concat(), here);
    let table = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(table.contains("nf-ws:alpha=0.5,act=silu: 4 blocks, 2 images of 64x64") && table.contains('█'), "{table}");
    let svg = fs::read_to_string(here.join("a.svg")).unwrap();
    for part in ["Average channel squared mean", "Residual average channel variance", "nf_regnet_b0", "bn-relu-conv"] {
        assert!(svg.contains(part), "{part}");
    }
    assert_eq!(fs::read_dir(here).unwrap().count(), 2, "nothing half written");

    // timm starts every branch at zero; here they are at full strength
    let output = nfold(&["spp", "--arch", "nf_regnet_b0:act=gelu,width=0.25", "--size", "64", "--json"], here);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let blocks = report["profiles"][0]["blocks"].as_array().unwrap();
    assert_eq!(blocks.len(), 16);
    assert!(blocks.iter().all(|b| b["residual_variance"].as_f64().unwrap() > 1e-4), "{blocks:?}");

    for (args, what) in [
        (&["spp"][..], "--arch"),
        (&["spp", "--arch", "resnet51"], "bn-relu-conv"),
        (&["spp", "--arch", "nf-ws:depth=2"], "3 layers"),
        (&["spp", "--arch", "nf-ws", "--size", "8"], "pixels"),
        (&["spp", "--arch", "nf-ws:colour=red"], "`colour`"),
        (&["spp", "--arch", "nf-ws:act=softmax"], "`softmax`"),
        (&["spp", "nowhere"], "nfold fold"),
        (&["spp", &demo, "--images", "."], "no image file"),
        (&["spp", &demo, "--count", "0"], "--count"),
    ] {
        refused(&nfold(args, here), what);
    }
}

/// A stem that is 20,000 times too strong: single precision carries it, half precision does not.
#[test]
fn sick_checkpoints_fail() {
    let copy = Copy::of("nf_resnet_small");
    let scaled = |factor: f32| {
        move |t: crate::checkpoint::Tensor| {
            let stem = t.name.starts_with("stem") && (t.name.ends_with("gain") || t.name.ends_with("bias"));
            Some(if stem { t.map32(Dtype::F32, |v| (v * factor).to_le_bytes().to_vec()) } else { t })
        }
    };
    copy.tensors(scaled(2e4));
    let folder = copy.path(".").display().to_string();
    let output = nfold(&["spp", &folder, "--size", "64", "--count", "2", "--json"], copy.path(".").as_path());
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let found: Vec<(&str, &str)> = (report["problems"].as_array().unwrap().iter())
        .map(|p| (p["network"].as_str().unwrap().split_once(' ').unwrap().1, p["kind"].as_str().unwrap()))
        .collect();
    for expected in [("unfolded", "exploding"), ("folded", "exploding"), ("folded fp16", "not_finite")] {
        assert!(found.contains(&expected), "{found:?}");
    }
    assert!(!found.contains(&("folded", "differs")) && found.contains(&("folded fp16", "differs")), "{found:?}");
    let message = text(&output.stderr);
    assert!(message.starts_with("error: ") && message.contains("`stages.0.0`"), "{message}");

    let mended = nfold(&["spp", &golden("nf_resnet_small"), "--size", "64", "--count", "2"], copy.path(".").as_path());
    assert!(mended.status.success(), "{}", text(&mended.stderr));
}
