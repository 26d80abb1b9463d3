//! Graphs padded to the processor's block size give the same logits, for every block size; graphs that can't be padded
//! stay as they are.

use std::collections::{BTreeSet, HashMap};

use nfold::checkpoint::Checkpoint;
use nfold::engine::{Backend as _, Batch, EngineOptions, OrtBackend};
use nfold::fold::{FoldOptions, Size, fold};
use nfold::model::{Gate, Precision};
use nfold::pb::onnx::{DataLocation, ModelProto, NodeProto, dimension_proto};
use nfold::relayout::detached_weights::detach_weights;
use nfold::relayout::{Kernels, channel_padding};
use prost::Message as _;
use rand::SeedableRng as _;
use rand::seq::IndexedRandom as _;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution as _, StandardNormal};

use crate::golden::goldens_folder;

const SIDE: u32 = 64;

fn pad_channels(onnx: &[u8], block: usize) -> Option<Vec<u8>> {
    channel_padding::pad_channels(onnx.to_vec().into(), block, Kernels::Runtime).map(|model| model.encode_to_vec())
}

fn folded(name: &str, options: FoldOptions) -> Vec<u8> {
    let checkpoint = Checkpoint::open(&goldens_folder().join(name)).unwrap();
    let size = if options.size == Size::Dynamic { Size::Dynamic } else { Size::Fixed(SIDE, SIDE) };
    fold(&checkpoint, &FoldOptions { size, ..options }).unwrap().onnx
}

/// Logits of two random tensors by the graph, unpadded.
fn logits(onnx: &[u8]) -> Vec<f32> {
    let mut backend = OrtBackend::open(onnx, "padded", &EngineOptions::default()).unwrap();
    let mut batch = Batch::zeros_of(2, [backend.input_channels().unwrap(), SIDE as usize, SIDE as usize]);
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    batch.data.iter_mut().for_each(|v| *v = StandardNormal.sample(&mut rng));
    backend.run(&batch).unwrap().data
}

fn agree(name: &str, onnx: &[u8], padded: &[u8], tolerance: f32) {
    let (before, after) = (logits(onnx), logits(padded));
    let span = before.iter().fold(f32::MIN, |a, b| a.max(*b)) - before.iter().fold(f32::MAX, |a, b| a.min(*b));
    let furthest = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(before.len() == after.len() && furthest <= tolerance * span, "{name}: {furthest} of {span}");
}

#[test]
fn every_family_answers_as_before() {
    let mut names: Vec<String> =
        std::fs::read_dir(goldens_folder()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| goldens_folder().join(name).is_dir());
    let (mut padded_at, mut fitting) = (BTreeSet::new(), 0);
    for name in &names {
        let onnx = folded(name, FoldOptions::default());
        // no processor has blocks of 12, but they don't divide the powers of two in groups and widths
        for block in [8, 12, 16] {
            match pad_channels(&onnx, block) {
                Some(padded) => {
                    agree(&format!("{name} in blocks of {block}"), &onnx, &padded, 1e-5);
                    assert_eq!(pad_channels(&padded, block), None, "{name}: padded once is padded");
                    padded_at.insert((name.as_str(), block));
                }
                None => fitting += 1,
            }
        }
    }
    for (name, block) in [("nf_regnet_small", 16), ("regnety_small", 12), ("efficientnet_small", 16)] {
        assert!(padded_at.contains(&(name, block)), "{name} in blocks of {block} stayed as it was; {padded_at:?}");
    }
    assert!(fitting > 0, "something fits");
}

#[test]
fn every_emission_answers_as_before() {
    let broadcast = FoldOptions { gate: Gate::Broadcast, ..FoldOptions::default() };
    let dynamic = FoldOptions { size: Size::Dynamic, ..FoldOptions::default() };
    let half = FoldOptions { precision: Precision::Fp16, ..FoldOptions::default() };
    for (options, tolerance) in [(broadcast, 1e-5), (dynamic, 1e-5), (half, 2e-3)] {
        let onnx = folded("nf_regnet_small", options);
        agree("nf_regnet_small", &onnx, &pad_channels(&onnx, 16).expect("padded"), tolerance);
    }
}

#[test]
fn weights_beside_the_graph_are_those_in_it() {
    for precision in [Precision::Fp32, Precision::Fp16] {
        let onnx = folded("nf_regnet_small", FoldOptions { precision, ..FoldOptions::default() });
        let padded = channel_padding::pad_channels(onnx.into(), 16, Kernels::Runtime).expect("padded");
        let whole = padded.encode_to_vec();
        for from in [0, 1 << 12, usize::MAX] {
            let apart = detach_weights(padded.clone(), &HashMap::new(), from).expect("weights as large as they say");
            let mut again = ModelProto::decode(apart.onnx.as_slice()).unwrap();
            assert!(
                apart.weights.is_empty() == (from == usize::MAX || from > 0 && precision == Precision::Fp16),
                "{from}"
            );
            let tensors = &mut again.graph.as_mut().unwrap().initializer;
            for weight in apart.weights {
                let tensor = tensors.iter_mut().find(|t| t.name == weight.name).unwrap();
                let values = weight.values();
                assert!(tensor.data_location() == DataLocation::External && 4 * values.len() >= from);
                assert!(tensor.dims.iter().map(|&d| d as usize).eq(weight.dims.iter().copied()));
                assert!(values.as_ptr().addr() % 64 == 0, "{} lies across cache lines", weight.name);
                (tensor.data_location, tensor.external_data) = (0, Vec::new());
                tensor.float_data = values.to_vec();
            }
            let answers = |onnx: &[u8]| logits(onnx).into_iter().map(f32::to_bits).collect::<Vec<_>>();
            assert!(answers(&again.encode_to_vec()) == answers(&whole), "{precision:?} from {from}");
        }
    }
}

#[test]
fn groups_become_whole_blocks() {
    let convolutions = |onnx: &[u8]| {
        let graph = ModelProto::decode(onnx).unwrap().graph.unwrap();
        let shape = |node: &NodeProto| {
            let weight = graph.initializer.iter().find(|t| t.name == node.input[1]).unwrap();
            let groups = node.attribute.iter().find(|a| a.name == "group").map_or(1, |a| a.i);
            (groups, weight.dims[0], weight.dims[1])
        };
        graph.node.iter().filter(|n| n.op_type == "Conv").map(shape).collect::<Vec<_>>()
    };
    let onnx = folded("nf_regnet_small", FoldOptions::default());
    let (before, after) = (convolutions(&onnx), convolutions(&pad_channels(&onnx, 16).expect("padded")));
    assert_eq!(before.len(), after.len());
    assert!(before.iter().any(|&(groups, _, size)| groups > 1 && size % 16 > 0), "{before:?}");
    for (&(groups, rows, columns), &(new_groups, new_rows, new_columns)) in before.iter().zip(&after) {
        assert_eq!(new_rows, (rows + 15) / 16 * 16);
        match groups {
            1 => assert!(new_groups == 1 && (new_columns == columns || new_columns % 16 == 0)),
            _ => assert!(new_columns % 16 == 0 && new_groups * new_columns == new_rows, "{groups} x {columns}"),
        }
    }
}

#[test]
fn what_is_not_understood_stays() {
    let small = || FoldOptions::default();
    let onnx = folded("nf_regnet_small", small());
    assert!(pad_channels(&onnx, 16).is_some());
    assert_eq!(pad_channels(&onnx, 1), None, "every width is a multiple of 1");
    let unfolded = folded("nf_regnet_small", FoldOptions { unfolded: true, ..small() });
    assert_eq!(pad_channels(&unfolded, 16), None, "weights that are computed");

    let altered = |alter: &dyn Fn(&mut ModelProto)| {
        let mut model = ModelProto::decode(onnx.as_slice()).unwrap();
        alter(&mut model);
        pad_channels(&model.encode_to_vec(), 16)
    };
    assert!(altered(&|_| ()).is_some());
    let graph = |model: &mut ModelProto| model.graph.take().unwrap();
    assert_eq!(altered(&|m| m.producer_name = "pytorch".into()), None);
    assert_eq!(altered(&|m| drop(graph(m))), None);
    assert_eq!(altered(&|m| m.graph.as_mut().unwrap().node[2].op_type = "Softmax".into()), None);
    assert_eq!(altered(&|m| m.graph.as_mut().unwrap().initializer.truncate(3)), None);
    let shared = |m: &mut ModelProto| {
        let graph = m.graph.as_mut().unwrap();
        let convolutions: Vec<usize> = (0..graph.node.len()).filter(|&i| graph.node[i].op_type == "Conv").collect();
        let bias = graph.node[convolutions[0]].input[2].clone();
        graph.node[convolutions[1]].input[2] = bias;
    };
    assert_eq!(altered(&shared), None, "one tensor, two readers");
    assert_eq!(altered(&|m| m.graph.as_mut().unwrap().output[0].name = "final_conv".into()), None, "a map handed out");
    // shapes that nothing bears out: not even memory is asked for
    let wide = |m: &mut ModelProto| {
        let shape = m.graph.as_mut().unwrap().input[0].r#type.as_mut().unwrap().tensor_type.as_mut().unwrap();
        shape.shape.as_mut().unwrap().dim[1].value = Some(dimension_proto::Value::DimValue(1 << 42));
    };
    assert_eq!(altered(&wide), None);
    for dim in [0, 1] {
        assert_eq!(altered(&|m| m.graph.as_mut().unwrap().initializer[0].dims[dim] = 1 << 42), None);
    }
}

/// Damaged graphs stay as they are and never cause a panic.
#[test]
fn damaged_graphs_stay() {
    let onnx = folded("nf_regnet_small", FoldOptions::default());
    let mut rng = ChaCha8Rng::seed_from_u64(17);
    let numbers: Vec<i64> = vec![-1, 0, 1, 3, 7, 8, 16, 1 << 20, 1 << 42, i64::MAX, i64::MIN];
    for _ in 0..400 {
        let mut model = ModelProto::decode(onnx.as_slice()).unwrap();
        let graph = model.graph.as_mut().unwrap();
        let number = *numbers.choose(&mut rng).unwrap();
        let mut any = |len: usize| rand::Rng::random_range(&mut rng, 0..len);
        match any(4) {
            0 => {
                let tensor = any(graph.initializer.len());
                let dims = &mut graph.initializer[tensor].dims;
                let dim = any(dims.len().max(1));
                dims.get_mut(dim).into_iter().for_each(|d| *d = number);
            }
            1 => {
                let convolutions: Vec<usize> =
                    (0..graph.node.len()).filter(|&i| graph.node[i].op_type == "Conv").collect();
                let node = convolutions[any(convolutions.len())];
                graph.node[node].attribute.iter_mut().filter(|a| a.name == "group").for_each(|a| a.i = number);
            }
            2 => drop(graph.node.remove(any(graph.node.len()))),
            _ => {
                let (a, b) = (any(graph.node.len()), any(graph.node.len()));
                let input = graph.node[b].input.clone();
                graph.node[a].input = input;
            }
        }
        pad_channels(&model.encode_to_vec(), 16);
    }
    for cut in 0..64 {
        pad_channels(&onnx[..onnx.len() * cut / 64], 16);
    }
}
