//! Execution providers: where the parts of a graph run, and what is reported when that is not the requested provider.

use nfold::engine::{
    Backend as _, Batch, BoundBackend, EngineOptions, Fitted, GpuOptions, OrtBackend, Provider, check_placement,
    placement,
};
use nfold::model::ModelDir;

use crate::cli::{nfold, with_demo};

#[test]
fn every_operator_is_counted_where_it_runs() {
    let folder = with_demo();
    let dir = ModelDir::open(&folder.path().join("repository"), None, None).unwrap();
    let p = &dir.manifest.preprocessing;
    let batch = Batch::zeros(2, p.height as usize, p.width as usize);
    let placement = placement(&dir.read_onnx().unwrap(), "demo", &EngineOptions::default(), &batch).unwrap();
    assert_eq!(placement.keys().collect::<Vec<_>>(), ["CPUExecutionProvider"]);
    assert!(placement["CPUExecutionProvider"] > 20, "{placement:?}");
    check_placement(&placement, Provider::Cpu, "demo").unwrap();
    let refused = check_placement(&placement, Provider::Cuda, "demo").unwrap_err().to_string();
    assert!(refused.contains("0 operators run on cuda") && refused.contains("on CPUExecutionProvider"), "{refused}");
    let left = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 1, "no profile is left behind");
}

#[test]
fn a_provider_that_is_not_there_is_told_with_the_next_step() {
    let folder = with_demo();
    let serve = |flags: &[&str]| {
        let ports = ["serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
        let out = nfold(&[&ports[..], flags].concat(), folder.path());
        (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let (code, said) = serve(&["--tensorrt-fp16"]);
    assert!(code == Some(1) && said.contains("--provider tensorrt"), "{code:?} {said}");
    if cfg!(not(feature = "gpu")) {
        for provider in ["cuda", "tensorrt"] {
            let (code, said) = serve(&["--provider", provider]);
            assert!(code == Some(1) && said.contains("--features gpu"), "{code:?} {said}");
        }
    }
}

/// What GPUs use, on the CPU: bound tensors, and fixed addresses for CUDA graphs, give the same bits for any order and
/// number of shapes.
#[test]
fn bound_tensors_give_the_same_bits() {
    let folder = with_demo();
    let dir = ModelDir::open(&folder.path().join("repository"), None, None).unwrap();
    let onnx = dir.read_onnx().unwrap();
    let p = &dir.manifest.preprocessing;
    let (height, width) = (p.height as usize, p.width as usize);
    let batch = |images: usize, seed: usize| {
        let mut batch = Batch::zeros(images, height, width);
        batch.data.iter_mut().enumerate().for_each(|(i, v)| *v = ((i * 31 + seed * 17) % 255) as f32 / 64.0 - 2.0);
        batch
    };
    let mut plain = OrtBackend::open(&onnx, "demo", &EngineOptions::default()).unwrap();
    for cuda_graph in [false, true] {
        let gpu = GpuOptions { cuda_graph, ..GpuOptions::default() };
        let options = EngineOptions { gpu, ..EngineOptions::default() };
        let graph = Fitted::as_it_is(onnx.clone());
        let mut bound = BoundBackend::open(&graph, "demo", &options, &[3, 1, 8, 3]).unwrap();
        let sizes = [1, 3, 1, 8, 3, 8, 8, 1];
        for (seed, images) in sizes.into_iter().enumerate() {
            let batch = batch(images, seed);
            assert_eq!(bound.run(&batch).unwrap(), plain.run(&batch).unwrap(), "{images} images, graph {cuda_graph}");
        }
        let refused = bound.run(&batch(2, 0)).unwrap_err().to_string();
        assert!(refused.contains("2 images came") && refused.contains("[1, 3, 8]"), "{refused}");
        assert!(bound.repeat().is_err(), "what was staged before is not run again");
        let wrong = Batch { data: vec![0.0; 7], ..batch(1, 0) };
        assert!(bound.run(&wrong).unwrap_err().to_string().contains("7 values came"));
        bound.keep_on_device();
        bound.stage(&batch(3, 5)).unwrap();
        for _ in 0..3 {
            assert_eq!(bound.repeat().unwrap(), None);
        }
        assert!(bound.run(&batch(1, 0)).is_err(), "logits that stay on the device are none");
    }
}
