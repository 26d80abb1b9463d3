//! Networks of integers: the same bits on every machine, in every batch and with any number of threads; what `docs/int8.md`
//! says; what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use nfold::checkpoint::Checkpoint;
use nfold::engine::{Backend, Batch, EngineOptions, Extras, Fitted, Kernels, MapBackend, MapView, OrtBackend};
use nfold::fold::{FoldOptions, SideOutputs, Size, fold};
use nfold::int8::lowering::lower;
use nfold::int8::network::{Answers, Memory, Network, one_by_one};
use nfold::int8::quantise::Plan;
use nfold::int8::ranges::Ranges;
use nfold::int8::{Int8Error, lowering};
use nfold::kernels::int8::conv_shape::ConvShape;
use nfold::kernels::int8::processor::Processor;
use nfold::kernels::int8::{Band, Conv, Output, Pool, SLACK, ToBytes, reference};
use nfold::model::golden::{digest, images};
use nfold::model::{Gate, ModelDir, RangeMethod};
use nfold::pb::onnx::{GraphProto, ModelProto, NodeProto};
use prost::Message as _;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::cli::{nfold, project, refused, text};
use crate::golden::{FAMILIES, goldens_folder};

pub const SIDE: usize = 64;

pub fn folded(name: &str, outputs: SideOutputs) -> Vec<u8> {
    let checkpoint = Checkpoint::open(&goldens_folder().join(name)).unwrap();
    let size = Size::Fixed(SIDE as u32, SIDE as u32);
    fold(&checkpoint, &FoldOptions { size, gate: Gate::Broadcast, outputs, ..FoldOptions::default() }).unwrap().onnx
}

/// A network of integers whose maps all have the same range, which no machine measured.
fn try_quantised(name: &str) -> Result<Vec<u8>, Int8Error> {
    let plan = Plan::new(&folded(name, SideOutputs { features: true, map: true }), (-3.0, 3.0))?;
    plan.quantise(&same_ranges(&plan))
}

/// Ranges that no machine measured.
pub fn same_ranges(plan: &Plan) -> BTreeMap<String, (f32, f32)> {
    let mut ranges: BTreeMap<_, _> = plan.measured().map(|map| (map.to_string(), (-4.0, 6.0))).collect();
    for map in plan.never_negative() {
        ranges.insert(map.into(), (0.0, 6.0));
    }
    ranges
}

fn quantised(name: &str) -> Vec<u8> {
    try_quantised(name).unwrap_or_else(|e| panic!("{name}: {e}"))
}

pub fn session(onnx: &[u8], intra_threads: usize) -> OrtBackend {
    let graph = Fitted::for_this_cpu(onnx.to_vec(), Kernels::Own);
    OrtBackend::open_fitted(&graph, "int8", &EngineOptions { intra_threads, ..EngineOptions::default() }).unwrap()
}

pub fn batch(images: &[Vec<f32>]) -> Batch {
    Batch { images: images.len(), height: SIDE, width: SIDE, data: images.concat() }
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Logits of two images, as the digests have them.
pub fn two_answers(network: &Network) -> Vec<f32> {
    let mut logits = vec![0.0; 2 * network.classes];
    let mut memory = Memory::default();
    for (image, logits) in images(network.shape).zip(logits.chunks_exact_mut(network.classes)) {
        let mut features = network.features.map(|width| vec![0.0; width]);
        let mut map = network.map.map(|map| vec![0.0; map.iter().product()]);
        let answers = Answers { logits, features: features.as_deref_mut(), map: map.as_deref_mut() };
        network.run(&image, &mut memory, answers, (1, &one_by_one), &mut |_| {});
    }
    logits
}

/// The promise itself, for every network that is compared with timm: a digest that differs on some machine is a bug there, not
/// noise. Networks that int8 doesn't cover say why.
#[test]
fn logits_have_the_same_bits_on_every_machine() {
    let expected: BTreeMap<String, String> =
        serde_json::from_slice(&fs::read(project("tests/data/int8/digests.json")).unwrap()).unwrap();
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(goldens_folder()).unwrap() {
        let path = entry.unwrap().path();
        if !path.is_dir() {
            continue;
        }
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let digest = match try_quantised(&name).and_then(|onnx| Ok((lower(&onnx)?.shape, onnx))) {
            Ok((shape, onnx)) => {
                let images: Vec<_> = images(shape).take(2).collect();
                let logits = session(&onnx, 1).run(&batch(&images)).unwrap();
                assert!(logits.row(0) != logits.row(1), "{name}: images must differ");
                digest(&logits.data)
            }
            Err(error) => error.to_string(),
        };
        found.insert(name, digest);
    }
    assert!(found == expected, "{}", serde_json::to_string_pretty(&found).unwrap());
    // and of all kernels that this machine can run
    for name in FAMILIES {
        let onnx = quantised(name);
        for processor in Processor::ALL.into_iter().filter(|processor| processor.is_here()) {
            let network = lowering::lower_for(&onnx, processor).unwrap();
            let logits = two_answers(&network);
            assert_eq!(digest(&logits), expected[name], "{name} by {processor:?}");
        }
    }
    assert!(found.values().filter(|digest| digest.len() == 64).count() >= 40);
}

/// The demo model on photographs, with the ranges that were measured once.
#[test]
fn photographs_have_the_same_bits_on_every_machine() {
    let checkpoint = Checkpoint::open(Path::new(&project("models/nf_regnet_cifar10"))).unwrap();
    let folded = fold(&checkpoint, &FoldOptions { gate: Gate::Broadcast, ..FoldOptions::default() }).unwrap();
    let ranges: BTreeMap<String, (f32, f32)> =
        serde_json::from_slice(&fs::read(project("tests/data/int8/ranges.json")).unwrap()).unwrap();
    let quantised = Plan::new(&folded.onnx, (-2.2, 2.7)).unwrap().quantise(&ranges).unwrap();
    assert!(3 * quantised.len() < folded.onnx.len(), "{} of {}", quantised.len(), folded.onnx.len());
    let preprocessor = nfold::pixels::Preprocessor::new(&folded.manifest.preprocessing);
    let mut images = Vec::new();
    for class in ["airplane", "cat", "ship"] {
        let folder = project(&format!("tests/data/cifar10/{class}"));
        let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        for file in files.into_iter().take(4) {
            let bytes = fs::read(file).unwrap();
            let decoder = nfold::pixels::Decoder::default();
            let image = decoder.decode(&bytes, false, |width, height| preprocessor.resized(width, height)).unwrap();
            let mut tensor = vec![0.0; 3 * SIDE * SIDE];
            preprocessor.apply(&image, &mut tensor);
            images.push(tensor);
        }
    }
    let integers = session(&quantised, 1).run(&batch(&images)).unwrap();
    let single = session(&folded.onnx, 1).run(&batch(&images)).unwrap();
    let class = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
    let same = (0..images.len()).filter(|&i| class(integers.row(i)) == class(single.row(i))).count();
    assert!(same >= 11, "{same} of 12 keep their class");
    assert_eq!(digest(&integers.data), DEMO);
}

/// What sessions share is the weights as kernels read them, and nothing that they were made of. (Those of AVX2 have 16 bits.)
#[test]
fn weights_are_held_once() {
    let most = if Processor::here() == Processor::Avx2 { 0.56 } else { 0.3 };
    let checkpoint = Checkpoint::open(Path::new(&project("models/nf_regnet_cifar10"))).unwrap();
    let single = fold(&checkpoint, &FoldOptions { gate: Gate::Broadcast, ..FoldOptions::default() }).unwrap().onnx;
    let plan = Plan::new(&single, (-2.2, 2.7)).unwrap();
    let quantised = plan.quantise(&same_ranges(&plan)).unwrap();
    let held = Fitted::for_this_cpu(quantised.clone(), Kernels::Own).bytes();
    let share = |bytes: usize| bytes as f64 / single.len() as f64;
    assert!(share(held) <= most && share(quantised.len()) <= 0.3, "{} {}", share(held), share(quantised.len()));
    // and not less than there are
    assert!(share(held) > 0.2, "{}", share(held));
}

/// SHA-256 of its logits.
const DEMO: &str = "f88251f14ef33466857ea87261025862628d909b422fca76333175be8f4a66f0";

#[test]
fn bits_depend_neither_on_the_batch_nor_on_threads() {
    let given: Vec<_> = images([3, SIDE, SIDE]).take(5).collect();
    for name in ["nf_regnet_small", "efficientnet_small"] {
        let onnx = quantised(name);
        let mut alone = session(&onnx, 1);
        let expected: Vec<_> = given
            .iter()
            .map(|image| {
                let answers =
                    alone.run_with(&batch(std::slice::from_ref(image)), Extras { features: true, map: true }).unwrap();
                [bits(&answers.logits.data), bits(&answers.features), bits(&answers.map)]
            })
            .collect();
        for threads in [1, 2, 3] {
            let mut session = session(&onnx, threads);
            for size in [1, 2, 4, 5] {
                let answers = session.run_with(&batch(&given[..size]), Extras { features: true, map: true }).unwrap();
                let together = [bits(&answers.logits.data), bits(&answers.features), bits(&answers.map)];
                for (part, together) in together.iter().enumerate() {
                    let alone: Vec<u32> = expected[..size].iter().flat_map(|parts| parts[part].clone()).collect();
                    assert!(*together == alone, "{name}: {threads} threads, {size} images, output {part}");
                }
            }
        }
    }
}

/// ONNX Runtime reads the same file, and answers nearly the same.
#[test]
fn the_file_means_the_same_to_onnx_runtime() {
    if ![Processor::AvxVnni, Processor::Avx512Vnni].into_iter().any(Processor::is_here) {
        crate::cli::skip("without VNNI ONNX Runtime adds pairs of products up in 16 bits, which saturate");
        return;
    }
    let given: Vec<_> = images([3, SIDE, SIDE]).take(4).collect();
    for name in FAMILIES {
        let folded = folded(name, SideOutputs { features: true, map: true });
        let all = Extras { features: true, map: true };
        let single = session(&folded, 1).run_with(&batch(&given), all).unwrap();
        let plan = Plan::new(&folded, (-4.0, 4.0)).unwrap();
        let mut exposed = MapBackend::open(&plan.exposed(), name, &EngineOptions::default()).unwrap();
        let mut ranges = Ranges::new();
        for data in &given {
            let image = MapView { name: "input", shape: [1, 3, SIDE, SIDE], data };
            exposed.run(&[image], |map| ranges.add(map.name, map.data)).unwrap();
        }
        let onnx = plan.quantise(&ranges.choose(RangeMethod::MinMax, |_| None).unwrap()).unwrap();
        let ours = session(&onnx, 1).run_with(&batch(&given), Extras { features: true, map: true }).unwrap();
        let mut theirs = OrtBackend::open(&onnx, name, &EngineOptions::default()).unwrap();
        let theirs = theirs.run_with(&batch(&given), Extras { features: true, map: true }).unwrap();
        for (what, ours, theirs, single) in [
            ("logits", &ours.logits.data, &theirs.logits.data, &single.logits.data),
            ("features", &ours.features, &theirs.features, &single.features),
            ("map", &ours.map, &theirs.map, &single.map),
        ] {
            assert_eq!(ours.len(), theirs.len());
            let power = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
            let noise = |a: &[f32], b: &[f32]| power(&mut a.iter().zip(b).map(|(a, b)| a - b));
            let (apart, theirs) = (noise(ours, theirs), noise(theirs, single));
            let signal = power(&mut single.iter().copied());
            // two roundings of one network are no further apart than either is from the network
            assert!(
                apart < 2.0 * theirs + 1e-3 * signal && apart < 0.1 * signal,
                "{name}: {what} differ by {apart:.3e}, ONNX Runtime's from single precision by {theirs:.3e}, of {signal:.3e}"
            );
        }
    }
}

#[test]
fn an_image_that_is_not_finite_has_no_logits_and_others_have_theirs() {
    let mut given: Vec<_> = images([3, SIDE, SIDE]).take(3).collect();
    let mut session = session(&quantised("nf_resnet_small"), 1);
    let before = session.run(&batch(&given)).unwrap();
    given[1][77] = f32::INFINITY;
    let after = session.run(&batch(&given)).unwrap();
    assert_eq!((bits(before.row(0)), bits(before.row(2))), (bits(after.row(0)), bits(after.row(2))));
    assert!(after.row(1).iter().all(|logit| logit.is_nan()));
}

/// A convolution by its definition: over real pixels alone, zero points subtracted.
fn by_definition(conv: &Conv, weight: impl Fn(usize) -> i64, bias: &[i64], x: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let depth = conv.shape.depth();
    for row in 0..conv.shape.out_size[0] {
        for column in 0..conv.shape.out_size[1] {
            for (filter, &bias) in bias.iter().enumerate() {
                let group = filter / (conv.shape.filters / conv.shape.groups);
                let mut acc = bias;
                for ky in 0..conv.shape.kernel[0] {
                    for kx in 0..conv.shape.kernel[1] {
                        let y = (row * conv.shape.stride[0] + ky * conv.shape.dilation[0]) as i64
                            - conv.shape.pads[0] as i64;
                        let x_at = (column * conv.shape.stride[1] + kx * conv.shape.dilation[1]) as i64
                            - conv.shape.pads[1] as i64;
                        if y < 0 || x_at < 0 || y >= conv.shape.size[0] as i64 || x_at >= conv.shape.size[1] as i64 {
                            continue;
                        }
                        for d in 0..depth {
                            let pixel = (y as usize * conv.shape.size[1] + x_at as usize) * conv.shape.channels
                                + group * depth
                                + d;
                            let tap = ((filter * conv.shape.kernel[0] + ky) * conv.shape.kernel[1] + kx) * depth + d;
                            acc += weight(tap) * (i64::from(x[pixel]) - i64::from(conv.zero));
                        }
                    }
                }
                let scaled = (acc as f32 * conv.factor[filter]).round_ties_even() as i64;
                let Output::Bytes(to) = &conv.output else { panic!("bytes") };
                out.push((scaled + i64::from(to.zero)).clamp(0, 255) as u8);
            }
        }
    }
    out
}

#[test]
fn padding_adds_nothing_and_zero_points_fold_into_the_bias() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for _ in 0..60 {
        let groups = rng.random_range(1..4);
        let (channels, filters) = (groups * rng.random_range(1..4), groups * rng.random_range(1..4));
        let kernel = [rng.random_range(1..4), rng.random_range(1..4)];
        let (stride, dilation) = ([rng.random_range(1..3), rng.random_range(1..3)], [rng.random_range(1..3), 1]);
        let (size, pads) =
            ([rng.random_range(5..9), rng.random_range(5..9)], [rng.random_range(0..2), rng.random_range(0..2)]);
        let out = |i: usize| (size[i] + 2 * pads[i] - dilation[i] * (kernel[i] - 1) - 1) / stride[i] + 1;
        let zero: u8 = rng.random();
        let weight: Vec<i8> =
            (0..filters * kernel[0] * kernel[1] * channels / groups).map(|_| rng.random_range(-127..=127)).collect();
        let bias: Vec<i64> = (0..filters).map(|_| rng.random_range(-5000..5000)).collect();
        let taps = weight.len() / filters;
        let folded = |filter: usize| {
            let sum: i64 = weight[filter * taps..(filter + 1) * taps].iter().map(|&w| i64::from(w)).sum();
            (bias[filter] - i64::from(zero) * sum) as i32
        };
        let conv = Conv {
            shape: ConvShape {
                channels,
                size,
                filters,
                out_size: [out(0), out(1)],
                groups,
                kernel,
                stride,
                dilation,
                pads,
            },
            zero,
            bias: (0..filters).map(folded).collect(),
            factor: (0..filters).map(|_| rng.random_range(1e-4..5e-3)).collect(),
            output: Output::Bytes(ToBytes { zero: rng.random(), table: None }),
            weight: weight.clone(),
        };
        let mut x: Vec<u8> = (0..size[0] * size[1] * channels).map(|_| rng.random()).collect();
        let expected = by_definition(&conv, |tap| weight[tap].into(), &bias, &x);
        // what is behind the image changes nothing
        x.extend((0..SLACK).map(|_| rng.random::<u8>()));
        let mut found = vec![0; expected.len()];
        let rows = 0..conv.shape.out_size[0];
        let band = Band { rows, input: &x, addend: None, sums: None, bytes: Some(&mut found), singles: None };
        reference::conv(&conv, band);
        assert_eq!(found, expected);
    }
}

#[test]
fn halves_are_rounded_to_even() {
    assert_eq!([1, 3, 5, -1, -3].map(|acc| reference::scaled(acc, 0.5)), [0, 2, 2, 0, -2]);
    assert_eq!([40_000, -40_000].map(|value| reference::sum(value, 0, false)), [i16::MAX, i16::MIN]);
    assert_eq!([-5, 5].map(|value| reference::sum(value, 1, true)), [0, 6]);
    // averages of windows, whose zero point is odd: 2.5 and 3.5 above it
    let pool = Pool {
        channels: 1,
        size: [2, 2],
        out_size: [1, 1],
        kernel: [2, 2],
        stride: [2, 2],
        pads: [0, 0],
        largest: false,
        counts_padding: false,
        zero: 7,
    };
    for (x, expected) in [([9, 9, 10, 10], 9), ([10, 10, 11, 11], 11), ([0, 0, 0, 1], 0)] {
        let mut y = [0];
        reference::pool(&pool, &x, &mut y);
        assert_eq!(y, [expected], "{x:?}");
    }
}

/// Files that are no networks of integers are refused by name, and never run.
#[test]
fn damaged_networks_are_refused() {
    let onnx = quantised("resnet18_small");
    let mut plan = Plan::new(&folded("nf_regnet_small", SideOutputs::default()), (-3.0, 3.0)).unwrap();
    let ranges = same_ranges(&plan);
    let kept = plan.layers().step_by(3).map(str::to_string).collect();
    plan.keep(&kept);
    let mixed = plan.quantise(&ranges).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for i in 0..600 {
        let mut damaged = if i % 2 == 0 { onnx.clone() } else { mixed.clone() };
        // the graph's structure is at its end and start, weights in between
        let at = match rng.random_range(0..3) {
            0 => rng.random_range(0..2000),
            1 => damaged.len() - 1 - rng.random_range(0..2000),
            _ => rng.random_range(0..damaged.len()),
        };
        damaged[at] ^= 1 << rng.random_range(0..8);
        if let Ok(network) = lower(&damaged) {
            let image: usize = network.shape.iter().product();
            if image > 3 * SIDE * SIDE || network.classes > 10_000 {
                continue;
            }
            let (mut logits, mut memory) = (vec![0.0; network.classes], Memory::default());
            let answers = Answers { logits: &mut logits, features: None, map: None };
            network.run(&vec![0.0; image], &mut memory, answers, (1, &one_by_one), &mut |_| {});
        }
    }
    assert!(matches!(lower(&onnx[..onnx.len() / 2]), Err(Int8Error::Unreadable(_))));
    assert!(lowering::lower_if_quantised(&folded("resnet18_small", SideOutputs::default()).into()).is_none());
}

/// A name is of one map: a graph that makes it twice is refused with both who do, where two operators do and where one makes
/// what is there already.
#[test]
fn maps_that_are_made_twice_are_named() {
    let twice = |change: &dyn Fn(&mut GraphProto)| {
        let mut model = ModelProto::decode(&quantised("nf_regnet_small")[..]).unwrap();
        change(model.graph.as_mut().unwrap());
        lower(&model.encode_to_vec()).unwrap_err().to_string()
    };
    let convolutions = |graph: &GraphProto| -> Vec<usize> {
        (0..graph.node.len()).filter(|&i| graph.node[i].op_type == "Conv" && graph.node[i].input.len() == 3).collect()
    };
    let model = ModelProto::decode(&quantised("nf_regnet_small")[..]).unwrap();
    let graph = model.graph.unwrap();
    let [first, second] = [convolutions(&graph)[1], convolutions(&graph)[2]];
    let (one, other) = (&graph.node[first], &graph.node[second]);
    let error = twice(&|graph| graph.node[second].output[0] = one.output[0].clone());
    let due =
        format!("`{}` is made twice, by `Conv` at `{}` and by `Conv` at `{}`", one.output[0], one.name, other.name);
    assert!(error.contains(&due), "{error}");
    // the same operator again, and a map in u8
    let error = twice(&|graph| graph.node.push(graph.node[first].clone()));
    assert!(error.contains(&format!("`{}` is made twice", one.output[0])), "{error}");
    let quantised = graph.node.iter().rposition(|node| node.op_type == "QuantizeLinear").unwrap();
    let error = twice(&|graph| graph.node[quantised].output[0] = one.output[0].clone());
    assert!(error.contains("by `Conv` at ") && error.contains("by `QuantizeLinear` at "), "{error}");
    for (name, first) in [(&graph.input[0].name, "the input"), (&graph.initializer[0].name, "a constant")] {
        let error = twice(&|graph| graph.node[second].output[0] = name.clone());
        let due = format!("`{name}` is made twice, by {first} and by `Conv` at `{}`", other.name);
        assert!(error.contains(&due), "{error}");
    }
    let error = twice(&|graph| graph.initializer.push(graph.initializer[0].clone()));
    assert!(error.contains("by a constant and by a constant"), "{error}");
    // in single precision, ONNX Runtime refuses it
    let mut model = ModelProto::decode(&folded("nf_regnet_small", SideOutputs::default())[..]).unwrap();
    let graph = model.graph.as_mut().unwrap();
    let [first, second] = [convolutions(graph)[1], convolutions(graph)[2]];
    graph.node[second].output[0] = graph.node[first].output[0].clone();
    let fitted = Fitted::for_this_cpu(model.encode_to_vec(), Kernels::Own);
    assert!(OrtBackend::open_fitted(&fitted, "twice", &EngineOptions::default()).is_err());
}

/// What a file may repeat is bounded: neither memory nor an error grows with the number of maps times the length of a name.
#[test]
fn long_names_and_many_outputs_are_refused_in_few_words() {
    let refusal = |change: &dyn Fn(&mut GraphProto)| {
        let mut model = ModelProto::decode(&quantised("nf_regnet_small")[..]).unwrap();
        change(model.graph.as_mut().unwrap());
        let error = lower(&model.encode_to_vec()).unwrap_err().to_string();
        assert!(error.len() < 2000, "{} bytes: {}", error.len(), error.chars().take(2000).collect::<String>());
        error
    };
    let relu = |name: &str, input: &str, output: Vec<String>| NodeProto {
        name: name.into(),
        op_type: "Relu".into(),
        input: vec![input.into()],
        output,
        ..NodeProto::default()
    };
    let numbered = || (0..20_000).map(|i| format!("o{i}")).collect();
    let long = "a".repeat(1 << 20);
    // each output times the name would be 20 GB
    let error = refusal(&|graph| graph.node.push(relu(&long, "input", numbered())));
    assert!(error.contains("a name in it has 1048576 bytes, at most 512 are read"), "{error}");
    let error = refusal(&|graph| graph.node.push(relu("many", "input", numbered())));
    assert!(error.contains("`Relu` at `many`: it has not one output"), "{error}");
    let twice = || vec!["o".to_string(); 20_000];
    let error = refusal(&|graph| graph.node.push(relu("many", "input", twice())));
    assert!(error.contains("`o` is made twice, by `Relu` at `many` and by `Relu` at `many`"), "{error}");
    // as would be a map that many operators read by a short name
    for change in [
        &|graph: &mut GraphProto| graph.node[0].input[0].clone_from(&long),
        &|graph: &mut GraphProto| graph.node[0].output[0].clone_from(&long),
        &|graph: &mut GraphProto| graph.node[0].op_type.clone_from(&long),
        &|graph: &mut GraphProto| graph.input[0].name.clone_from(&long),
        &|graph: &mut GraphProto| graph.output[0].name.clone_from(&long),
        &|graph: &mut GraphProto| graph.initializer[0].name.clone_from(&long),
    ] as [&dyn Fn(&mut GraphProto); 6]
    {
        assert!(refusal(change).contains("a name in it has 1048576 bytes"));
    }
    // in single precision, ONNX Runtime's error repeats the name: a log would drop a line of that length
    let mut model = ModelProto::decode(&folded("nf_regnet_small", SideOutputs::default())[..]).unwrap();
    model.graph.as_mut().unwrap().node.push(relu(&long, "input", numbered()));
    let fitted = Fitted::for_this_cpu(model.encode_to_vec(), Kernels::Own);
    let error = OrtBackend::open_fitted(&fitted, "long", &EngineOptions::default()).err().unwrap().to_string();
    assert!(error.len() < 2000 && error.contains("aaa"), "{} bytes", error.len());
}

/// An output or input without a name is one that is left out, not one map that many share.
#[test]
fn outputs_without_a_name_are_left_out() {
    let onnx = quantised("nf_regnet_small");
    let changed = |change: &dyn Fn(&mut GraphProto)| {
        let mut model = ModelProto::decode(&onnx[..]).unwrap();
        change(model.graph.as_mut().unwrap());
        lower(&model.encode_to_vec())
    };
    let image = images([3, SIDE, SIDE]).next().unwrap();
    let logits = |network: &Network| {
        let (mut logits, mut memory) = (vec![0.0; network.classes], Memory::default());
        let answers = Answers { logits: &mut logits, features: None, map: None };
        network.run(&image, &mut memory, answers, (1, &one_by_one), &mut |_| {});
        logits
    };
    let with_more = changed(&|graph| {
        graph.node.iter_mut().filter(|node| node.op_type == "Conv").for_each(|node| node.output.push(String::new()));
    });
    assert_eq!(logits(&with_more.unwrap()), logits(&lower(&onnx).unwrap()));
    let convolution = |graph: &GraphProto| graph.node.iter().position(|node| node.op_type == "Conv").unwrap();
    let nothing = changed(&|graph| {
        let at = convolution(graph);
        graph.node[at].output[0].clear();
    });
    assert!(nothing.unwrap_err().to_string().contains("it has not one output"));
    let unnamed = changed(&|graph| {
        let at = convolution(graph);
        graph.node[at].input[0].clear();
    });
    assert!(unnamed.unwrap_err().to_string().contains("an input is missing"));
}

#[test]
fn what_int8_does_not_cover_is_named() {
    let checkpoint = Checkpoint::open(&goldens_folder().join("nf_regnet_small")).unwrap();
    let onnx = fold(&checkpoint, &FoldOptions { size: Size::Dynamic, ..FoldOptions::default() }).unwrap().onnx;
    let error = Plan::new(&onnx, (-3.0, 3.0)).unwrap_err().to_string();
    assert!(
        error.contains("`input`") && error.contains("size isn't fixed") && error.contains("--precision fp32"),
        "{error}"
    );
    let onnx = folded("nf_regnet_small", SideOutputs::default());
    let plan = Plan::new(&onnx, (-3.0, 3.0)).unwrap();
    assert!(matches!(plan.quantise(&BTreeMap::new()), Err(Int8Error::NoRange(_))));
}

/// A folder of `count` photographs of each class.
pub fn photographs(folder: &Path, count: usize) {
    for class in ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"] {
        fs::create_dir_all(folder.join(class)).unwrap();
        let mut files: Vec<_> = fs::read_dir(project(&format!("tests/data/cifar10/{class}")))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        for file in files.into_iter().take(count) {
            fs::copy(&file, folder.join(class).join(file.file_name().unwrap())).unwrap();
        }
    }
}

#[test]
fn int8_is_folded_served_and_compared() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    photographs(&here.join("photographs"), 6);
    fs::write(here.join("photographs/cat/broken.jpg"), "no photograph").unwrap();
    let demo = project("models/nf_regnet_cifar10");
    let plain = nfold(&["fold", &demo, "--name", "demo"], here);
    assert!(plain.status.success(), "{}", text(&plain.stderr));
    let int8 = ["fold", &demo, "--name", "demo8", "--precision", "int8", "--calibrate", "photographs"];
    let folded = nfold(&int8, here);
    let said = text(&folded.stderr);
    assert!(folded.status.success(), "{said}");
    assert!(said.contains("held-out images keep their class") && said.contains("top-1"), "{said}");
    assert!(said.contains("left out 1 of 61 photographs that can't be read") && said.contains("broken.jpg"), "{said}");
    // what is counted is said
    for stage in [
        "reading photographs: 61 files",
        "ranges of maps in single precision: 36 images",
        "answers in integers, ranges by min_max: 36 images",
        "answers in single precision: 24 held-out images",
        "answers in integers: 24 held-out images",
    ] {
        assert!(said.lines().any(|line| line == stage), "{stage}: {said}");
    }
    // the same again is the same, as in single precision
    let written = fs::read(here.join("repository/demo8/1/model.onnx")).unwrap();
    let again = nfold(&int8, here);
    let said = text(&again.stderr);
    assert!(again.status.success() && said.contains("unchanged: "), "{said}");
    assert!(written == fs::read(here.join("repository/demo8/1/model.onnx")).unwrap());
    // what contradicts what is recorded of its calibration is refused before anything is calibrated
    let due = "exists already; choose another --model-version, or replace it with --replace";
    for extra in [&["--range-method", "min_max"][..], &["--keep", "stem"]] {
        refused(&nfold(&[&int8[..], extra].concat(), here), due);
    }
    let noise = ["fold", &demo, "--name", "demo8", "--precision", "int8", "--calibrate", "theory"];
    refused(&nfold(&noise, here), due);
    // so is a folder of fewer photographs, and a version in another precision
    fs::create_dir(here.join("none")).unwrap();
    let again = |name: &str, extra: &[&str]| {
        let args = ["fold", &demo, "--name", name, "--precision", "int8", "--calibrate", "none"];
        nfold(&[&args[..], extra].concat(), here)
    };
    for name in ["demo8", "demo"] {
        refused(&again(name, &[]), due);
        refused(&again(name, &["--replace"]), "`none` holds no photographs");
        refused(&again(name, &["--model-version", "2"]), "`none` holds no photographs");
    }
    let model = ModelDir::open(&here.join("repository"), Some("demo8"), None).unwrap();
    let quantisation = model.manifest.quantisation.as_ref().unwrap();
    assert_eq!((quantisation.images, quantisation.held_out), (36, 24));
    assert!(quantisation.agreement.unwrap() >= 0.975 && quantisation.maps.len() > 50 && quantisation.tried.len() == 3);
    let len = |name: &str| fs::metadata(here.join(format!("repository/{name}/1/model.onnx"))).unwrap().len() as f64;
    assert!(len("demo8") <= 0.3 * len("demo"), "{} of {}", len("demo8"), len("demo"));
    fs::remove_file(here.join("photographs/cat/broken.jpg")).unwrap();
    let eval = nfold(&["eval", "photographs", "--model", "demo", "--beside", "demo8"], here);
    let table = text(&eval.stdout);
    assert!(eval.status.success() && table.contains("demo8 version 1, int8"), "{table} {}", text(&eval.stderr));
    // the same answers again
    let classes = |threads: &str| {
        let photographs = ["photographs/cat", "photographs/ship"];
        let answers = nfold(
            &[&["classify", "--model", "demo8", "--recursive", "--threads", threads], &photographs[..]].concat(),
            here,
        );
        assert!(answers.status.success(), "{}", text(&answers.stderr));
        text(&answers.stdout)
    };
    assert_eq!(classes("1"), classes("2"));
}

#[test]
fn calibration_refuses_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let demo = project("models/nf_regnet_cifar10");
    let int8 = |extra: &[&str]| nfold(&[&["fold", &demo, "--precision", "int8"], extra].concat(), here);
    refused(&int8(&[]), "--calibrate DIR");
    refused(&int8(&["--calibrate", "nowhere"]), "is no folder");
    fs::create_dir(here.join("empty")).unwrap();
    refused(&int8(&["--calibrate", "empty"]), "holds no photographs");
    fs::create_dir(here.join("broken")).unwrap();
    fs::write(here.join("broken/a.jpg"), "no photograph").unwrap();
    let output = int8(&["--calibrate", "broken"]);
    assert!(!output.status.success() && text(&output.stderr).contains("no photograph that can be read"));
    photographs(&here.join("few"), 1);
    fs::remove_dir_all(here.join("few/cat")).unwrap();
    let output = int8(&["--calibrate", "few"]);
    assert!(
        !output.status.success() && text(&output.stderr).contains("9 calibration images can be read, 10 are needed")
    );
    refused(&int8(&["--calibrate", "few", "--size", "dynamic"]), "fixed size");
    refused(&int8(&["--calibrate", "few", "--unfolded"]), "--unfolded");
    for flags in [["--calibrate", "few"], ["--range-method", "mse"], ["--min-agreement", "99"], ["--max-drop", "1"]] {
        refused(
            &nfold(&[&["fold", &demo][..], &flags].concat(), here),
            &format!("{} is for --precision int8", flags[0]),
        );
    }
    refused(
        &int8(&["--calibrate", "theory", "--min-agreement", "99"]),
        "measures nothing that --min-agreement could compare",
    );
    let served = nfold(&["serve", &demo, "--precision", "int8", "--admin", "127.0.0.1:0", "--cache", "cache"], here);
    assert!(
        !served.status.success()
            && text(&served.stderr).contains("nfold fold CHECKPOINT --precision int8 --calibrate DIR")
    );
    assert!(!here.join("repository").exists(), "something was left");
    // photographs of noise, of one class: said; and the guard
    fs::create_dir(here.join("noise")).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for i in 0..12 {
        let pixels: Vec<u8> = (0..SIDE * SIDE * 3).map(|_| rng.random()).collect();
        fs::write(here.join(format!("noise/{i}.bmp")), bmp(SIDE as u32, &pixels)).unwrap();
    }
    let share = int8(&["--calibrate", "noise", "--min-agreement", "0.975"]);
    assert_eq!(share.status.code(), Some(2), "a share is no percentage");
    let output = int8(&["--calibrate", "noise", "--min-agreement", "0"]);
    let said = text(&output.stderr);
    assert!(
        output.status.success() && said.contains("look like noise") && said.contains("top-1 isn't measured"),
        "{said}"
    );
    fs::remove_dir_all(here.join("repository")).unwrap();
    // ranges of black images make a network that nothing can be told by
    fs::create_dir_all(here.join("black")).unwrap();
    photographs(&here.join("black"), 2);
    for class in ["bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck", "airplane", "automobile"] {
        for (i, entry) in fs::read_dir(here.join("black").join(class)).unwrap().enumerate() {
            let path = entry.unwrap().path();
            if i == 0 {
                fs::write(path, bmp(32, &[0; 32 * 32 * 3])).unwrap();
            }
        }
    }
    let output = int8(&["--calibrate", "black", "--min-agreement", "100", "--range-method", "percentile"]);
    if !output.status.success() {
        let said = text(&output.stderr);
        assert!(
            said.contains("--min-agreement asks for 100.0") && said.contains("layers that add most noise"),
            "{said}"
        );
        assert!(!here.join("repository").exists(), "something was left");
    }
}

/// An uncompressed picture of `side` by `side` pixels.
fn bmp(side: u32, pixels: &[u8]) -> Vec<u8> {
    let mut file = b"BM".to_vec();
    let numbers = |file: &mut Vec<u8>, numbers: &[u32]| file.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
    numbers(&mut file, &[54 + pixels.len() as u32, 0, 54, 40, side, side]);
    file.extend([1, 0, 24, 0]);
    numbers(&mut file, &[0, pixels.len() as u32, 2835, 2835, 0, 0]);
    file.extend(pixels);
    file
}
