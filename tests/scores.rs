//! How logits become scores, at every door: sigmoid and softmax, thresholds, temperature, and what a checkpoint says of them.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::cli::{nfold, project, refused, text, with_demo};
use crate::process::{Server, data};

/// Logits of the cat's photograph, by what the Open Inference Protocol answers.
fn logits(server: &Server) -> Vec<f64> {
    let image = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, data("cat.jpg"));
    let body = json!({ "inputs": [{ "name": "input", "datatype": "BYTES", "shape": [1], "data": [image] }] });
    let answer = server.post("/v2/models/tags/infer", &[], body.to_string().as_bytes()).json();
    serde_json::from_value(answer["outputs"][0]["data"].clone()).unwrap()
}

/// The demo's checkpoint folded as `tags` in `folder`.
fn fold(folder: &Path, flags: &[&str]) -> Value {
    let demo = project("models/nf_regnet_cifar10");
    let output = nfold(&[&["fold", &demo, "--name", "tags", "--json"], flags].concat(), folder);
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn predictions(answer: &Value) -> Vec<(String, f64)> {
    let list = answer["results"][0]["predictions"].as_array().unwrap();
    list.iter().map(|p| (p["label"].as_str().unwrap().to_string(), p["score"].as_f64().unwrap())).collect()
}

#[test]
fn sigmoid_scores_and_thresholds_are_the_same_at_every_door() {
    let folder = tempfile::tempdir().unwrap();
    let flags = ["--activation", "sigmoid", "--threshold", "0.5", "--threshold", "cat=0.99", "--threshold", "5=0.3"];
    let report = fold(folder.path(), &flags);
    let due = json!({ "activation": "sigmoid", "threshold": 0.5, "thresholds": { "3": 0.99, "5": 0.3 } });
    assert_eq!((&report["manifest"]["scoring"], &report["manifest"]["format"]), (&due, &json!(2)));
    let cat = project("tests/data/cat.jpg");
    let classified = |flags: &[&str]| -> Value {
        let output = nfold(&[&["classify", &cat, "--json"], flags].concat(), folder.path());
        assert!(output.status.success(), "{}", text(&output.stderr));
        json!({ "results": [serde_json::from_slice::<Value>(&output.stdout).unwrap()] })
    };
    let by_program = [classified(&[]), classified(&["--top-k", "3"]), classified(&["--threshold", "0.9"])];
    let inspected = text(&nfold(&["inspect", "tags"], folder.path()).stdout);
    assert!(inspected.contains("sigmoid, named from 0.5 on, cat from 0.99 on, dog from 0.3 on"), "{inspected}");

    let server = Server::start_in(folder, &[]);
    let logits = logits(&server);
    let sigmoid = |logit: &f64| 1.0 / (1.0 + (-logit).exp());
    let scores: Vec<f64> = logits.iter().map(sigmoid).collect();
    let labels = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];
    let mut all: Vec<(String, f64)> = labels.map(String::from).into_iter().zip(scores).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    let reaches = |name: &str| {
        if name == "cat" {
            0.99
        } else if name == "dog" {
            0.3
        } else {
            0.5
        }
    };
    let own: Vec<_> = all.iter().filter(|(name, score)| *score >= reaches(name)).cloned().collect();
    assert!(!own.is_empty() && own.len() < 10 && own.iter().all(|(name, _)| name != "cat"), "{all:?}");
    let sure: Vec<_> = all.iter().filter(|(_, score)| *score >= 0.9).cloned().collect();
    let near = |found: &[(String, f64)], due: &[(String, f64)]| {
        let same =
            found.len() == due.len() && found.iter().zip(due).all(|(a, b)| a.0 == b.0 && (a.1 - b.1).abs() < 1e-6);
        assert!(same, "{found:?} instead of {due:?}");
    };
    let routes = ["/v1/classify", "/v1/classify?top_k=3", "/v1/classify?threshold=0.9"];
    for ((route, by_program), due) in routes.into_iter().zip(&by_program).zip([&own[..], &all[..3], &sure]) {
        let answer = server.post(route, &[], &data("cat.jpg")).json();
        near(&predictions(&answer), due);
        near(&predictions(by_program), due);
    }
    let both = server.post("/v1/classify?threshold=0&top_k=2", &[], &data("cat.jpg")).json();
    near(&predictions(&both), &all[..2]);
    let none = server.post("/v1/classify?threshold=1", &[], &data("cat.jpg")).json();
    assert_eq!(none["results"], json!([{ "predictions": [] }]), "no class reaches it, and that is an answer");
    for wrong in ["1.5", "-0.1", "nan", "half"] {
        let answer = server.post(&format!("/v1/classify?threshold={wrong}"), &[], &data("cat.jpg"));
        assert_eq!((answer.status, answer.json()["code"].as_str()), (400, Some("invalid_request")), "{wrong}");
    }
    // a client of logits is told what to do with them
    let told = server.get("/v2/models/tags").json();
    assert_eq!(told["properties"]["scores"], "sigmoid");
    let thresholds: Vec<f64> = serde_json::from_str(told["properties"]["threshold"].as_str().unwrap()).unwrap();
    assert_eq!((thresholds.len(), thresholds[0], thresholds[3], thresholds[5]), (10, 0.5, 0.99, 0.3));
}

#[test]
fn scores_that_can_t_be_made_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let demo = project("models/nf_regnet_cifar10");
    for (flags, what) in [
        (&["--threshold", "kat=0.5"][..], "no class `kat`; the nearest label is `cat`"),
        (&["--threshold", "10=0.5"], "no class `10`"),
        (&["--threshold", "1.5"], "threshold 1.5 is out of range"),
        (&["--threshold", "0.5", "--threshold", "0.6"], "twice for all classes"),
        (&["--threshold", "cat=0.5", "--threshold", "3=0.6"], "twice for `3`"),
        (&["--activation", "none", "--threshold", "nan"], "is no number"),
    ] {
        refused(&nfold(&[&["fold", &demo], flags].concat(), folder.path()), what);
        assert!(!folder.path().join("repository").exists(), "{flags:?}");
    }
    for flags in [&["--activation", "relu"][..], &["--threshold", "x"], &["--temperature", "0"]] {
        assert_eq!(nfold(&[&["fold", &demo], flags].concat(), folder.path()).status.code(), Some(2), "{flags:?}");
    }
    fold(folder.path(), &[]);
    let cat = project("tests/data/cat.jpg");
    refused(&nfold(&["classify", &cat, "--threshold", "2"], folder.path()), "threshold 2 is out of range");
}

#[test]
fn logits_without_a_function_are_shown_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    fold(folder.path(), &["--activation", "none", "--threshold", "-1"]);
    let cat = project("tests/data/cat.jpg");
    let table = text(&nfold(&["classify", &cat], folder.path()).stdout);
    assert!(table.contains("cat") && !table.contains('%'), "{table}");
    let output = nfold(&["classify", &cat, "--threshold", "1000"], folder.path());
    assert!(text(&output.stdout).contains("no class reaches its threshold"), "{}", text(&output.stdout));
    let csv = text(&nfold(&["classify", &cat, "--threshold", "1000", "--format", "csv"], folder.path()).stdout);
    assert_eq!(csv.lines().count(), 2, "an image that no class is named for has its row: {csv}");
    refused(
        &nfold(&["eval", &project("tests/data/cifar10"), "--limit", "10", "--fit-temperature"], folder.path()),
        "its scores are logits",
    );
    let server = Server::start_in(folder, &[]);
    let logits = logits(&server);
    let answer = server.post("/v1/classify", &[], &data("cat.jpg")).json();
    let found = predictions(&answer);
    assert_eq!(found.len(), logits.iter().filter(|logit| **logit >= -1.0).count());
    assert!((found[0].1 - logits[3]).abs() < 1e-6, "{found:?} {logits:?}");
}

/// transformers says what outputs are; timm's own arguments don't, whatever the loss was.
#[test]
fn what_a_checkpoint_says_of_its_scores_counts() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let demo = project("models/nf_regnet_cifar10");
    let scoring = |kind: &str, flags: &[&str]| -> (Value, Value) {
        let copy = here.join("copy");
        fs::create_dir_all(&copy).unwrap();
        fs::copy(Path::new(&demo).join("model.safetensors"), copy.join("model.safetensors")).unwrap();
        let mut config: Value =
            serde_json::from_slice(&fs::read(Path::new(&demo).join("config.json")).unwrap()).unwrap();
        config["problem_type"] = kind.into();
        fs::write(copy.join("config.json"), config.to_string()).unwrap();
        let output = nfold(&[&["fold", "copy", "--replace", "--json"], flags].concat(), here);
        if !output.status.success() {
            return (text(&output.stderr).into(), Value::Null);
        }
        let manifest = serde_json::from_slice::<Value>(&output.stdout).unwrap()["manifest"].clone();
        let from =
            manifest["source"]["settings"].as_array().unwrap().iter().find(|s| s["setting"] == "scores").cloned();
        (manifest["scoring"].clone(), from.map_or(Value::Null, |from| from["origin"].clone()))
    };
    let (found, from) = scoring("multi_label_classification", &[]);
    assert_eq!((&found["activation"], &from), (&json!("sigmoid"), &json!("problem_type in config.json")));
    assert_eq!(
        scoring("multi_label_classification", &["--activation", "softmax"]),
        (Value::Null, json!("--activation"))
    );
    assert_eq!(scoring("single_label_classification", &[]).0, Value::Null);
    assert_eq!(scoring("regression", &[]).0["activation"], "none");
    let (refused, _) = scoring("clustering", &[]);
    assert!(refused.as_str().unwrap().contains("problem_type is \"clustering\""), "{refused}");
}

/// The demo answers as sure as it is right once its logits are divided by what `eval` finds.
#[test]
fn a_fitted_temperature_calibrates() {
    let folder = with_demo();
    let here = folder.path();
    // too sure of itself
    fold(here, &["--temperature", "0.4"]);
    let photographs = project("tests/data/cifar10");
    let evaluated = |flags: &[&str]| -> Value {
        let output = nfold(&[&["eval", &photographs, "--model", "tags", "--json"], flags].concat(), here);
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let before = evaluated(&["--fit-temperature"]);
    let fit = &before["fit"];
    let errors = ["calibration_error_before", "calibration_error_after"].map(|name| fit[name].as_f64().unwrap());
    assert!(errors[1] < 0.06 && errors[0] > 2.0 * errors[1], "{fit}");
    assert!(fit["fit"]["likelihood_after"].as_f64() < fit["fit"]["likelihood_before"].as_f64());
    let temperature = fit["fit"]["temperature"].as_f64().unwrap();
    assert!((0.7..1.6).contains(&temperature), "{fit}");
    // the command that it prints, with the checkpoint named
    let command = fit["command"].as_str().unwrap().replace("CHECKPOINT", &project("models/nf_regnet_cifar10"));
    let words: Vec<&str> = command.split(' ').skip(1).collect();
    let output = nfold(&words, here);
    assert!(output.status.success(), "{command}: {}", text(&output.stderr));
    let after = evaluated(&[]);
    let error = after["evaluation"]["calibration_error"].as_f64().unwrap();
    assert!((error - errors[1]).abs() < 1e-9, "{error} {errors:?}");
    assert_eq!(after["evaluation"]["top1"], before["evaluation"]["top1"], "the classes stay");
    let table = text(&nfold(&["eval", &photographs, "--model", "tags", "--fit-temperature"], here).stdout);
    assert!(table.contains("fits best") && table.contains("nfold fold CHECKPOINT"), "{table}");
}
