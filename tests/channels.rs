//! Networks with other input channels than RGB, end to end: folded, classified and served, compared with timm.

use std::fs;
use std::path::Path;

use base64::Engine as _;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::cli::{golden, nfold, refused, text};
use crate::preprocess::{encoded, hash, tensor_of};
use crate::process::Server;
use nfold::model::Preprocessing;
use nfold::pixels::{Decoder, Preprocessor};

/// timm's tensors for networks of one channel (`make_grey.py`).
#[derive(Deserialize)]
struct Grey {
    tensors: Vec<Tensor>,
    answers: Vec<Answer>,
}

#[derive(Deserialize)]
struct Tensor {
    file: String,
    preprocessing: Preprocessing,
    sha256: String,
}

#[derive(Deserialize)]
struct Answer {
    file: String,
    logits: Vec<f64>,
}

fn grey() -> Grey {
    serde_json::from_slice(&encoded("grey.json")).unwrap()
}

fn folded(name: &str) -> tempfile::TempDir {
    let here = tempfile::tempdir().unwrap();
    let output = nfold(&["fold", &golden(name), "--repository", "repository"], here.path());
    assert!(output.status.success(), "{}", text(&output.stderr));
    here
}

fn near(found: &[f64], timm: &[f64]) {
    let span = timm.iter().fold(f64::MIN, |a, b| a.max(*b)) - timm.iter().fold(f64::MAX, |a, b| a.min(*b));
    assert_eq!(found.len(), timm.len());
    for (a, b) in found.iter().zip(timm) {
        assert!((a - b).abs() <= 1e-5 * span, "{found:?} for {timm:?}");
    }
}

/// Pillow's `convert("L")` of every kind of image, and timm's transforms after it.
#[test]
fn grey_tensors_equal_timm_to_the_bit() {
    let cases = grey().tensors;
    assert!(cases.len() >= 150);
    for Tensor { file, preprocessing, sha256 } in cases {
        let preprocessor = Preprocessor::new(&preprocessing);
        let image =
            Decoder::default().decode(&encoded(&format!("images/{file}")), false, |w, h| preprocessor.resized(w, h));
        let bytes: Vec<u8> =
            tensor_of(&image.unwrap(), &preprocessing).iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(hash(&bytes), sha256, "{file} through {preprocessing:?}");
    }
}

#[test]
fn a_grey_network_answers_as_timm_does() {
    let here = folded("nf_regnet_grey");
    let answers = grey().answers;
    let files: Vec<String> = answers.iter().map(|a| crate::cli::project(&data(&a.file))).collect();
    let mut args = vec!["classify", "--repository", "repository", "--top-k", "7", "--json"];
    args.extend(files.iter().map(String::as_str));
    let output = nfold(&args, here.path());
    assert!(output.status.success(), "{}", text(&output.stderr));
    for (line, answer) in text(&output.stdout).lines().zip(&answers) {
        let line: Value = serde_json::from_str(line).unwrap();
        let sum: f64 = answer.logits.iter().map(|l| l.exp()).sum();
        for found in line["predictions"].as_array().unwrap() {
            let score = answer.logits[found["index"].as_u64().unwrap() as usize].exp() / sum;
            assert!((found["score"].as_f64().unwrap() - score).abs() < 1e-4, "{line} for {:?}", answer.logits);
        }
    }

    let server = Server::start_in(here, &["--repository", "repository"]);
    let metadata = server.get("/v2/models/nf_regnet_grey").json();
    assert_eq!(metadata["inputs"][0]["shape"], json!([-1, 1, 256, 256]));
    let config = server.get("/v2/models/nf_regnet_grey/config").json();
    assert_eq!(config["input"][0]["dims"].to_string().replace('"', ""), "[1,256,256]");
    let infer = |input: Value| {
        server.post("/v2/models/nf_regnet_grey/infer", &[], json!({"inputs": [input]}).to_string().as_bytes())
    };
    let logits = |answer: Value| -> Vec<f64> {
        answer["outputs"][0]["data"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
    };
    for answer in &answers {
        let bytes = fs::read(crate::cli::project(&data(&answer.file))).unwrap();
        let classified = server.post("/v1/classify", &[("content-type", "image/jpeg")], &bytes);
        assert_eq!(classified.status, 200, "{classified:?}");
        let text = base64::engine::general_purpose::STANDARD.encode(&bytes);
        let raw = infer(json!({"name": "input", "datatype": "BYTES", "shape": [1], "data": [text]}));
        near(&logits(raw.json()), &answer.logits);
    }
    // one plane, not three
    let pixels = |shape: [usize; 4]| json!({"name": "input", "datatype": "FP32", "shape": shape, "data": vec![0.5; shape.iter().product()]});
    assert_eq!(infer(pixels([1, 1, 256, 256])).status, 200);
    let refused = infer(pixels([1, 3, 256, 256]));
    assert_eq!(refused.status, 400);
    assert!(refused.body.contains("[N,1,256,256]"), "{refused:?}");
}

fn data(file: &str) -> String {
    format!("tests/data/preprocess/images/{file}")
}

/// Four channels: tensors only, and every protocol and command says so.
#[test]
fn networks_that_see_no_images_take_tensors() {
    let here = tempfile::tempdir().unwrap();
    let output = nfold(&["fold", &golden("nfnet_both"), "--repository", "repository", "--size", "64"], here.path());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let image = crate::cli::project(&data("jpeg_420.jpg"));
    refused(&nfold(&["classify", "--repository", "repository", &image], here.path()), "takes 4 channels");
    let server = Server::start_in(here, &["--repository", "repository"]);
    let bytes = fs::read(Path::new(&image)).unwrap();
    let answer = server.post("/v1/classify", &[("content-type", "image/jpeg")], &bytes);
    assert_eq!(answer.status, 400, "{answer:?}");
    assert!(answer.body.contains("the model takes 4 channels"), "{answer:?}");
    let tensor = |shape: [usize; 4], datatype: &str| {
        let data = vec![1; shape.iter().product()];
        let input = json!({"name": "input", "datatype": datatype, "shape": shape, "data": data});
        server.post("/v2/models/nfnet_both/infer", &[], json!({"inputs": [input]}).to_string().as_bytes())
    };
    for answer in [tensor([2, 4, 64, 64], "FP32"), tensor([1, 64, 64, 4], "UINT8")] {
        assert_eq!(answer.status, 200, "{answer:?}");
    }
}
