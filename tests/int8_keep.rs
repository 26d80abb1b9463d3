//! Layers of a network of integers that stay in single precision: the same bits everywhere, nearer to single precision, the same
//! to ONNX Runtime; by name, and found by themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Output;

use nfold::engine::{Backend as _, EngineOptions, Extras, MapBackend, MapView, OrtBackend};
use nfold::fold::SideOutputs;
use nfold::int8::lowering;
use nfold::int8::network::Work;
use nfold::int8::quantise::Plan;
use nfold::int8::ranges::Ranges;
use nfold::kernels::int8::processor::Processor;
use nfold::model::golden::{digest, images};
use nfold::model::{ModelDir, RangeMethod};

use crate::cli::{nfold, project, refused, text};
use crate::golden::FAMILIES;
use crate::int8::{SIDE, batch, bits, folded, photographs, same_ranges, session, two_answers};

/// Sets of layers, by name: the first, the last, every third, all but every third, and all but one.
fn sets(plan: &Plan) -> Vec<(&'static str, BTreeSet<String>)> {
    let layers: Vec<String> = plan.layers().map(str::to_string).collect();
    let every = |keep: fn(usize, usize) -> bool| {
        layers.iter().enumerate().filter(|(i, _)| keep(*i, layers.len())).map(|(_, layer)| layer.clone()).collect()
    };
    vec![
        ("first", every(|i, _| i == 0)),
        ("last", every(|i, count| i + 1 == count)),
        ("every third", every(|i, _| i % 3 == 1)),
        ("all but every third", every(|i, _| i % 3 != 1)),
        ("all but one", every(|i, count| i != count / 2)),
    ]
}

fn plan(name: &str) -> Plan {
    Plan::new(&folded(name, SideOutputs { features: true, map: true }), (-3.0, 3.0)).unwrap()
}

#[test]
fn logits_have_the_same_bits_on_every_machine() {
    let expected: BTreeMap<String, String> =
        serde_json::from_slice(&fs::read(project("tests/data/int8/kept.json")).unwrap()).unwrap();
    let mut found = BTreeMap::new();
    for name in FAMILIES {
        let mut plan = plan(name);
        let ranges = same_ranges(&plan);
        for (set, kept) in sets(&plan) {
            plan.keep(&kept);
            let onnx = plan.quantise(&ranges).unwrap();
            for processor in Processor::ALL.into_iter().filter(|processor| processor.is_here()) {
                let network = lowering::lower_for(&onnx, processor).unwrap_or_else(|e| panic!("{name}, {set}: {e}"));
                let floats = network.steps.iter().filter(|step| matches!(step.work, Work::FloatConv(_))).count();
                assert_eq!(floats, kept.len(), "{name}, {set}");
                let digest = digest(&two_answers(&network));
                let first = found.entry(format!("{name}, {set}")).or_insert(digest.clone());
                assert_eq!(*first, digest, "{name}, {set} by {processor:?}");
            }
        }
    }
    assert!(found == expected, "{}", serde_json::to_string_pretty(&found).unwrap());
}

#[test]
fn bits_depend_neither_on_the_batch_nor_on_threads() {
    let given: Vec<_> = images([3, SIDE, SIDE]).take(5).collect();
    for name in ["nf_regnet_small", "efficientnet_small", "eca_nfnet_l0_small"] {
        let mut plan = plan(name);
        let ranges = same_ranges(&plan);
        let (_, kept) = sets(&plan).swap_remove(2);
        plan.keep(&kept);
        let onnx = plan.quantise(&ranges).unwrap();
        let all = Extras { features: true, map: true };
        let answers = |threads: usize, given: &[Vec<f32>]| {
            let answers = session(&onnx, threads).run_with(&batch(given), all).unwrap();
            [bits(&answers.logits.data), bits(&answers.features), bits(&answers.map)]
        };
        let alone: Vec<_> = given.iter().map(|image| answers(1, std::slice::from_ref(image))).collect();
        for (threads, size) in [(1, 5), (2, 2), (3, 1), (3, 5)] {
            let together = answers(threads, &given[..size]);
            for (part, together) in together.iter().enumerate() {
                let alone: Vec<u32> = alone[..size].iter().flat_map(|parts| parts[part].clone()).collect();
                assert!(*together == alone, "{name}: {threads} threads, {size} images, output {part}");
            }
        }
    }
}

fn noise(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

/// ONNX Runtime reads the same file, and answers nearly the same; and both are the nearer to single precision the more stays.
#[test]
fn the_file_means_the_same_to_onnx_runtime_and_is_nearer_to_single_precision() {
    let vnni = [Processor::AvxVnni, Processor::Avx512Vnni].into_iter().any(Processor::is_here);
    let given: Vec<_> = images([3, SIDE, SIDE]).take(4).collect();
    for name in FAMILIES {
        let folded = folded(name, SideOutputs { features: true, map: true });
        let all = Extras { features: true, map: true };
        let single = session(&folded, 1).run_with(&batch(&given), all).unwrap();
        let mut plan = Plan::new(&folded, (-4.0, 4.0)).unwrap();
        let mut exposed = MapBackend::open(&plan.exposed(), name, &EngineOptions::default()).unwrap();
        let mut ranges = Ranges::new();
        for data in &given {
            let image = MapView { name: "input", shape: [1, 3, SIDE, SIDE], data };
            exposed.run(&[image], |map| ranges.add(map.name, map.data)).unwrap();
        }
        let ranges = ranges.choose(RangeMethod::MinMax, |_| None).unwrap();
        let integers = session(&plan.quantise(&ranges).unwrap(), 1).run_with(&batch(&given), all).unwrap();
        let before = noise(&integers.logits.data, &single.logits.data);
        for (set, kept) in sets(&plan) {
            plan.keep(&kept);
            let onnx = plan.quantise(&ranges).unwrap();
            let ours = session(&onnx, 1).run_with(&batch(&given), all).unwrap();
            let after = noise(&ours.logits.data, &single.logits.data);
            if kept.len() + 1 == plan.layers().count() {
                assert!(after < before, "{name}, {set}: {after:.3e} of {before:.3e}");
            }
            if !vnni {
                continue;
            }
            let mut theirs = OrtBackend::open(&onnx, name, &EngineOptions::default()).unwrap();
            let theirs = theirs.run_with(&batch(&given), all).unwrap();
            for (what, ours, theirs, single) in [
                ("logits", &ours.logits.data, &theirs.logits.data, &single.logits.data),
                ("features", &ours.features, &theirs.features, &single.features),
                ("map", &ours.map, &theirs.map, &single.map),
            ] {
                let (apart, theirs, signal) =
                    (noise(ours, theirs), noise(theirs, single), noise(single, &vec![0.0; single.len()]));
                assert!(
                    apart < 2.0 * theirs + 1e-3 * signal && apart < 0.2 * signal,
                    "{name}, {set}: {what} differ by {apart:.3e}, ONNX Runtime's from single precision by {theirs:.3e}, of {signal:.3e}"
                );
            }
        }
    }
    if !vnni {
        crate::cli::skip("without VNNI ONNX Runtime adds pairs of products up in 16 bits, which saturate");
    }
}

#[test]
fn layers_are_named() {
    let plan = plan("nf_regnet_small");
    let all: Vec<&str> = plan.layers().collect();
    let one = all[3];
    assert_eq!(plan.named(one).unwrap(), [one]);
    let stage = "stages.1";
    let below = plan.named(stage).unwrap();
    assert!(below.len() > 3 && below.iter().all(|layer| layer.starts_with("stages.1.")), "{below:?}");
    let nearest = plan.named("stages.l").unwrap_err();
    assert!(nearest.contains("stages.1"), "{nearest}");
    assert!(plan.named("stages.1.").is_err() && plan.named("").is_err() && plan.named("stage").is_err());
}

#[test]
fn layers_are_kept_by_name_and_found() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    photographs(&here.join("photographs"), 20);
    let demo = project("models/nf_regnet_cifar10");
    let int8 = |name: &str, extra: &[&str]| {
        let args = ["fold", &demo, "--name", name, "--precision", "int8", "--calibrate", "photographs"];
        nfold(&[&args[..], extra].concat(), here)
    };
    let fails = |output: &Output, due: &str| {
        let said = text(&output.stderr);
        assert!(!output.status.success() && said.contains(due), "{due}: {said}");
    };
    fails(
        &int8("a", &["--keep", "stages.0.0.conv9"]),
        "no layer `stages.0.0.conv9` to keep in single precision; the nearest are `stages.0.0.conv1`",
    );
    refused(&int8("a", &["--keep", "auto,stem"]), "--keep auto finds the layers");
    fails(&int8("a", &["--keep", "stem,final_conv,logits,stages"]), "all 52 layers would stay in single precision");
    refused(&nfold(&["fold", &demo, "--keep", "stem"], here), "--keep is for --precision int8");
    let theory = ["fold", &demo, "--precision", "int8", "--calibrate", "theory", "--keep", "auto"];
    refused(&nfold(&theory, here), "measures nothing that --keep auto could go by");
    assert!(!here.join("repository").exists(), "something was left");

    let kept = int8("named", &["--keep", "stem.conv,stages.3.0"]);
    let said = text(&kept.stderr);
    assert!(kept.status.success() && said.contains("stay in single precision: stem.conv, stages.3.0."), "{said}");
    let keep = |name: &str| {
        let model = ModelDir::open(&here.join("repository"), Some(name), None).unwrap();
        model.manifest.quantisation.unwrap().keep
    };
    let named = keep("named");
    assert!(
        named.len() == 7 && named[0] == "stem.conv" && named[1..].iter().all(|layer| layer.starts_with("stages.3.0."))
    );
    let eval = nfold(&["eval", "photographs", "--model", "named"], here);
    assert!(eval.status.success(), "{}", text(&eval.stderr));
    let inspected = text(&nfold(&["inspect", "named"], here).stdout);
    for due in [
        "integers       ranges by ",
        "of 80 held-out images keep the class of single precision",
        "kept in fp32   stem.conv, ",
    ] {
        assert!(inspected.contains(due), "{due}: {inspected}");
    }

    // one of these photographs changes its class in integers
    let strict = ["--range-method", "min_max", "--min-agreement", "100"];
    let without = int8("strict", &strict);
    let said = text(&without.stderr);
    assert!(!without.status.success(), "{said}");
    let ranked = said.lines().find(|line| line.starts_with("each layer alone in single precision: "));
    assert!(ranked.is_some_and(|line| line.ends_with(" layers")), "{said}");
    for due in ["layers that add most noise", "layers that could stay in single precision", "--keep auto, or --keep s"]
    {
        assert!(said.contains(due), "{due}: {said}");
    }
    assert!(!here.join("repository/strict").exists(), "something was left");
    let found = int8("strict", &[&strict[..], &["--keep", "auto"]].concat());
    let said = text(&found.stderr);
    assert!(found.status.success(), "{said}");
    for due in [
        "without layers in single precision, int8 keeps the class",
        "100.0 % of 80 held-out images",
        "layers stay in single precision",
    ] {
        assert!(said.contains(due), "{due}: {said}");
    }
    let found = keep("strict");
    assert!((1..=13).contains(&found.len()), "{found:?}");
}

/// What noise measures is no measure: a manifest says nothing of it.
#[test]
fn theory_records_no_agreement() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let demo = project("models/nf_regnet_cifar10");
    let args = ["fold", &demo, "--name", "theory", "--precision", "int8", "--calibrate", "theory", "--keep", "stem"];
    let folded = nfold(&args, here);
    assert!(folded.status.success(), "{}", text(&folded.stderr));
    let manifest = fs::read(here.join("repository/theory/1/manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let said = manifest["quantisation"].as_object().unwrap();
    assert_eq!((&said["theory"], &said["keep"]), (&true.into(), &serde_json::json!(["stem.conv"])));
    for absent in ["agreement", "agreement_interval", "tried", "held_out", "top1"] {
        assert!(!said.contains_key(absent), "{absent}: {}", said[absent]);
    }
    // the same again, by a name that means the same layers
    let again = nfold(&[&args[..9], &["stem.conv"]].concat(), here);
    assert!(again.status.success() && text(&again.stderr).contains("unchanged: "), "{}", text(&again.stderr));
    for keep in [&[][..], &["--keep", "stem,final_conv"], &["--keep", "logits"]] {
        refused(&nfold(&[&args[..8], keep].concat(), here), "exists already; choose another --model-version");
    }
    let inspected = text(&nfold(&["inspect", "theory"], here).stdout);
    assert!(inspected.contains("images of noise") && inspected.contains("agreement      not measured"), "{inspected}");
}
