//! Execution providers: where the parts of a graph run, and what is said when that is not where they should.

use nfold::engine::{Batch, EngineOptions, Provider, check_placement, place};
use nfold::model::ModelDir;

use crate::cli::{nfold, with_demo};

#[test]
fn every_operator_is_counted_where_it_runs() {
    let folder = with_demo();
    let dir = ModelDir::open(&folder.path().join("repository"), None, None).unwrap();
    let p = &dir.manifest.preprocessing;
    let batch = Batch::zeros(2, p.height as usize, p.width as usize);
    let placement = place(&dir.read_onnx().unwrap(), "demo", &EngineOptions::default(), &batch).unwrap();
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
