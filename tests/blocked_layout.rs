//! Graphs that nfold lays out in blocks equal those that ONNX Runtime makes, to the bit; graphs that can't be laid out
//! stay as they are.

use std::collections::{BTreeMap, BTreeSet};

use nfold::checkpoint::Checkpoint;
use nfold::engine::{self, Backend as _, Batch, EngineOptions, Fitted, OrtBackend};
use nfold::fold::{FoldOptions, Size, fold};
use nfold::model::{Gate, Precision};
use nfold::pb::onnx::{ModelProto, NodeProto};
use nfold::relayout::Kernels;
use nfold::relayout::blocked_layout::lay_out;
use nfold::relayout::channel_padding::pad_channels;
use nfold::relayout::detached_weights::detach_weights;
use nfold::relayout::sample::sample;
use prost::Message as _;
use rand::SeedableRng as _;
use rand::seq::IndexedRandom as _;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution as _, StandardNormal};

use crate::golden::goldens_folder;

/// Odd, so that windows at the border are partial.
const SIDES: (u32, u32) = (67, 64);

fn folded(name: &str, options: FoldOptions) -> Vec<u8> {
    let checkpoint = Checkpoint::open(&goldens_folder().join(name)).unwrap();
    fold(&checkpoint, &FoldOptions { size: Size::Fixed(SIDES.0, SIDES.1), ..options }).unwrap().onnx
}

fn logits(graph: &Fitted) -> Vec<f32> {
    let mut backend = OrtBackend::open_fitted(graph, "layout", &EngineOptions::default()).unwrap();
    let mut batch = Batch::zeros_of(2, [backend.input_channels().unwrap(), SIDES.0 as usize, SIDES.1 as usize]);
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    batch.data.iter_mut().for_each(|v| *v = StandardNormal.sample(&mut rng));
    backend.run(&batch).unwrap().data
}

/// Number of each operator, with what is fused into it.
fn census(graph: &Fitted) -> BTreeMap<String, usize> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("optimized");
    engine::write_optimized(graph, "layout", &path).unwrap();
    let mut census = BTreeMap::new();
    for node in ModelProto::decode(std::fs::read(path).unwrap().as_slice()).unwrap().graph.unwrap().node {
        let activation =
            node.attribute.iter().find(|a| a.name == "activation").map(|a| a.s.clone()).unwrap_or_default();
        let activation = String::from_utf8(activation).unwrap();
        let gated = if node.attribute.iter().any(|a| a.name == "gated" && a.i == 1) { " gated" } else { "" };
        let what = format!("{}.{} of {} {activation}{gated}", node.domain, node.op_type, node.input.len());
        *census.entry(what).or_default() += 1;
    }
    census
}

#[test]
fn laid_out_graphs_are_those_that_the_runtime_makes() {
    let Some(block) = engine::channel_block() else {
        crate::cli::skip("without AVX2 nothing is laid out");
        return;
    };
    let (mut same, mut fewer, mut stay) = (0, BTreeSet::new(), BTreeSet::new());
    for entry in std::fs::read_dir(goldens_folder()).unwrap().map(|e| e.unwrap()).filter(|e| e.path().is_dir()) {
        let name = entry.file_name().into_string().unwrap();
        let onnx = folded(&name, FoldOptions::default());
        let ours = Fitted::for_this_cpu(onnx.clone(), Kernels::Runtime);
        if !ours.is_laid_out() {
            stay.insert(name);
            continue;
        }
        let theirs = Fitted::padded(onnx.clone().into(), block).unwrap_or_else(|| Fitted::as_it_is(onnx));
        let (of_ours, of_theirs) = (logits(&ours), logits(&theirs));
        if census(&ours) == census(&theirs) {
            assert!(of_ours.iter().map(|l| l.to_bits()).eq(of_theirs.iter().map(|l| l.to_bits())), "{name}");
            same += 1;
        } else {
            let furthest = of_ours.iter().zip(&of_theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(furthest < 1e-5, "{name}: {furthest}");
            let (ours, theirs): (usize, usize) = (census(&ours).values().sum(), census(&theirs).values().sum());
            assert!(ours <= theirs, "{name}: {ours} operators instead of {theirs}");
            fewer.insert(name);
        }
    }
    // activations for which the runtime leaves the layout
    let leaving = ["nf_regnet_celu", "nf_regnet_elu", "nf_regnet_relu6", "nf_regnet_selu", "nf_resnet_deep_pool"];
    assert_eq!(fewer.iter().collect::<Vec<_>>(), leaving);
    // gates that mix neighbouring channels which are no whole blocks, an activation that the runtime may have to compose,
    // the mean of two poolings
    let (due, alike): (&[&str], _) = match block {
        16 => (&["eca_regnet", "efficientnet_odd", "nf_resnet_channels"], 42),
        _ => (&["efficientnet_odd", "nf_resnet_channels"], 43),
    };
    assert_eq!(stay.iter().collect::<Vec<_>>(), due);
    assert_eq!(same, alike);
}

/// A graph that nfold does not lay out still gets the runtime's blocked layout: half precision, computed in single
/// precision on a CPU.
#[test]
fn half_precision_runs_in_blocks() {
    let Some(block) = engine::channel_block() else {
        crate::cli::skip("without AVX2 nothing is padded");
        return;
    };
    let onnx = folded("nf_regnet_small", FoldOptions { precision: Precision::Fp16, ..FoldOptions::default() });
    let census = census(&Fitted::padded(onnx.clone().into(), block).unwrap_or_else(|| Fitted::as_it_is(onnx)));
    let outside: Vec<_> =
        census.keys().filter(|op| op.contains("Conv") && !op.starts_with("com.microsoft.nchwc")).collect();
    assert!(outside.is_empty() && !census.contains_key(".Sigmoid of 1 "), "{census:?}");
}

/// How many operators of each kind a graph has.
fn operators(graph: &Fitted) -> BTreeMap<String, usize> {
    let mut operators = BTreeMap::new();
    for (what, count) in census(graph) {
        *operators.entry(what.split(' ').next().unwrap().to_string()).or_default() += count;
    }
    operators
}

/// Every 3x3 in small groups, with what is around it, is one operator; so is every gate; no activation takes several.
#[test]
fn our_kernels_do_the_work_of_several_operators() {
    if engine::channel_block().is_none() {
        crate::cli::skip("without AVX2 nothing is laid out");
        return;
    }
    let (mut whole, mut fallen) = (0, Vec::new());
    for entry in std::fs::read_dir(goldens_folder()).unwrap().map(|e| e.unwrap()).filter(|e| e.path().is_dir()) {
        let name = entry.file_name().into_string().unwrap();
        let onnx = folded(&name, FoldOptions::default());
        let [own, runtime] =
            [Kernels::Own, Kernels::Runtime].map(|kernels| Fitted::for_this_cpu(onnx.clone(), kernels));
        assert_eq!(own.is_laid_out(), runtime.is_laid_out(), "{name}");
        // gates that are part of the convolution that reads the map
        let counts = census(&own);
        let with_gates: usize =
            counts.iter().filter(|(what, _)| what.ends_with(" gated")).map(|(_, count)| count).sum();
        let [own, runtime] = [operators(&own), operators(&runtime)];
        let count = |of: &BTreeMap<String, usize>, what: &str| of.get(what).copied().unwrap_or(0);
        let gates = count(&runtime, "com.microsoft.nchwc.Upsample");
        let several = ["com.microsoft.QuickGelu", "com.microsoft.nchwc.Upsample", ".Gelu", "com.microsoft.Gelu"];
        let theirs = several.iter().map(|what| count(&runtime, what)).sum::<usize>();
        let ours = own.keys().any(|what| what.starts_with("nfold."));
        let slow = theirs - gates;
        if slow > 0 && !ours {
            fallen.push(name.clone());
        } else if ours && theirs > 0 {
            assert!(several.iter().all(|what| count(&own, what) == 0), "{name}: {own:?}");
            assert_eq!(count(&own, "nfold.Gated") + with_gates, gates, "{name}");
            assert!(own.values().sum::<usize>() < runtime.values().sum(), "{name}");
            whole += 1;
        }
        if name == "nf_regnet_small" {
            // its eight blocks are two operators each beside the gate, of which four have a shortcut of one; the activation of the
            // stem, which two read
            let of = ["ExpandConv", "GroupedConv", "PointwiseConv", "Gated", "Activation"];
            let of = of.map(|what| count(&own, &format!("nfold.{what}")));
            assert_eq!((of, with_gates), ([8, 0, 13, 0, 1], 8), "{own:?}");
            assert_eq!(count(&own, "com.microsoft.nchwc.GlobalAveragePool"), 1);
        }
    }
    assert!(whole > 10, "{whole}");
    // what isn't laid out at all has activations of several operators too; gates beside ReLU alone stay ONNX Runtime's
    let left = |name: &str| name.ends_with("_odd") || name == "eca_regnet";
    assert!(fallen.iter().all(|name| left(name)), "{fallen:?}");
}

/// The graph laid out for either's kernels, with all its weights in it.
fn laid_out(onnx: &[u8], block: usize) -> Option<ModelProto> {
    let [runtime, own] = [Kernels::Runtime, Kernels::Own].map(|kernels| laid_out_for(onnx, block, kernels));
    assert_eq!(runtime.is_some(), own.is_some());
    runtime
}

fn laid_out_for(onnx: &[u8], block: usize, kernels: Kernels) -> Option<ModelProto> {
    let mut model = ModelProto::decode(onnx).unwrap();
    let before = model.clone();
    match lay_out(&mut model, block, kernels) {
        Some(filters) => {
            let onnx = detach_weights(model, &filters, usize::MAX).expect("weights as large as their shapes say").onnx;
            Some(ModelProto::decode(onnx.as_slice()).unwrap())
        }
        None => {
            assert!(model == before, "what isn't laid out stays as it was");
            None
        }
    }
}

#[test]
fn what_is_not_understood_stays() {
    let sample = sample(16, Kernels::Runtime).unwrap();
    assert!(laid_out(&sample, 16).is_some() && laid_out(&sample, 8).is_some());
    assert_eq!(laid_out(&sample, 0), None);
    assert_eq!(laid_out(&sample, 64), None, "16 channels are no block of 64");
    assert_eq!(laid_out(&laid_out(&sample, 16).unwrap().encode_to_vec(), 16), None, "laid out once is laid out");
    let padded = |options| {
        let onnx = folded("nf_regnet_small", options);
        pad_channels(onnx.into(), 16, Kernels::Runtime).expect("padded").encode_to_vec()
    };
    assert!(laid_out(&padded(FoldOptions::default()), 16).is_some());
    let half = FoldOptions { precision: Precision::Fp16, ..FoldOptions::default() };
    let broadcast = FoldOptions { gate: Gate::Broadcast, ..FoldOptions::default() };
    assert_eq!(laid_out(&padded(half), 16), None);
    assert_eq!(laid_out(&padded(broadcast), 16), None, "one pixel for all is not looked for by blocks");
    let unfolded = FoldOptions { unfolded: true, ..FoldOptions::default() };
    assert_eq!(laid_out(&folded("nf_regnet_small", unfolded), 16), None, "weights that are computed");

    let altered = |alter: &dyn Fn(&mut ModelProto)| {
        let mut model = ModelProto::decode(sample.as_slice()).unwrap();
        alter(&mut model);
        laid_out(&model.encode_to_vec(), 16)
    };
    assert!(altered(&|_| ()).is_some());
    assert_eq!(altered(&|m| m.producer_name = "pytorch".into()), None);
    assert_eq!(altered(&|m| m.graph = None), None);
    assert_eq!(altered(&|m| m.graph.as_mut().unwrap().initializer.truncate(3)), None);
    let node = |m: &mut ModelProto, op: &str, alter: &dyn Fn(&mut NodeProto)| {
        alter(m.graph.as_mut().unwrap().node.iter_mut().find(|n| n.op_type == op).unwrap())
    };
    assert_eq!(altered(&|m| node(m, "Gelu", &|n| n.op_type = "Softmax".into())), None);
    assert_eq!(altered(&|m| node(m, "Resize", &|n| n.attribute[1].s = b"cubic".to_vec())), None);
    assert_eq!(altered(&|m| node(m, "Mul", &|n| n.input.swap(0, 1))), None, "x · sigmoid(x), not the other way round");
    assert_eq!(altered(&|m| node(m, "Conv", &|n| n.input[0] = "head.weight".into())), None, "another image");
    let output = |m: &mut ModelProto| m.graph.as_mut().unwrap().output[0].name = "stem.act".into();
    assert_eq!(altered(&output), None, "a map that is handed out");
    // a gate for all pixels at once
    assert_eq!(
        altered(&|m| m.graph.as_mut().unwrap().node.iter_mut().for_each(|n| {
            if n.name == "gate" {
                n.input[1] = "gate.sigmoid".into()
            }
        })),
        None
    );
    assert_eq!(
        altered(&|m| m.graph.as_mut().unwrap().node.iter_mut().for_each(|n| {
            if n.name == "last" {
                n.input[1] = "project.weight".into()
            }
        })),
        None,
        "one weight, two readers"
    );
}

/// Every weight is where the layout expects it, for every block size.
#[test]
fn weights_lie_in_blocks() {
    for block in [8, 16] {
        let onnx = sample(block, Kernels::Runtime).unwrap();
        let (plain, moved) = (ModelProto::decode(onnx.as_slice()).unwrap(), laid_out(&onnx, block).unwrap());
        let moved = moved.graph.unwrap().initializer;
        let mut seen = 0;
        for tensor in plain.graph.unwrap().initializer.iter().filter(|t| t.dims.len() == 4) {
            let values: Vec<f32> = tensor.raw_data.as_chunks().0.iter().map(|v| f32::from_le_bytes(*v)).collect();
            let &[_, columns, height, width] = &tensor.dims.iter().map(|&d| d as usize).collect::<Vec<_>>()[..] else {
                panic!("{:?}", tensor.dims)
            };
            let moved = &moved.iter().find(|t| t.name == tensor.name).unwrap().float_data;
            assert_eq!(moved.len(), values.len());
            // input channels read together: none on the image and depthwise
            let unit = if columns == 3 || columns == 1 { 1 } else { block };
            for (at, value) in values.iter().enumerate() {
                let (pixel, at) = (at % (height * width), at / (height * width));
                let (column, row) = (at % columns, at / columns);
                let target = row / block * columns / unit + column / unit;
                let target = (target * height * width + pixel) * unit + column % unit;
                assert_eq!(moved[target * block + row % block], *value, "{} in blocks of {block}", tensor.name);
                seen += 1;
            }
        }
        assert!(seen > 3_000, "{seen}");
    }
}

/// Damaged graphs give a result or an error, never a panic.
#[test]
fn damaged_graphs_are_survived() {
    let onnx = sample(16, Kernels::Runtime).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(29);
    let numbers: Vec<i64> = vec![-1, 0, 1, 3, 16, 17, 1 << 20, 1 << 42, i64::MAX, i64::MIN];
    let mut taken = 0;
    for _ in 0..2000 {
        let mut model = ModelProto::decode(onnx.as_slice()).unwrap();
        let graph = model.graph.as_mut().unwrap();
        let number = *numbers.choose(&mut rng).unwrap();
        let mut any = |len: usize| rand::Rng::random_range(&mut rng, 0..len);
        let (a, b) = (any(graph.node.len()), any(graph.node.len()));
        match any(6) {
            0 => {
                let tensor = any(graph.initializer.len());
                let dims = &mut graph.initializer[tensor].dims;
                let dim = any(dims.len().max(1));
                dims.get_mut(dim).into_iter().for_each(|d| *d = number);
            }
            1 => graph.node[a].attribute.iter_mut().filter(|a| a.name == "group").for_each(|a| a.i = number),
            2 => drop(graph.node.remove(a)),
            3 => graph.node[a].input = graph.node[b].input.clone(),
            4 => graph.node[a].op_type = graph.node[b].op_type.clone(),
            _ => graph.node[a].output.truncate(any(2)),
        }
        taken += usize::from(laid_out(&model.encode_to_vec(), 16).is_some());
    }
    assert!(taken < 1000, "{taken}");
}
