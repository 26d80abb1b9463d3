//! A network for sound: spectrograms of one channel that are no squares, any number of classes an image, against timm's
//! answers (tests/data/spectrograms/make.py).

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::cli::{nfold, project, text};
use crate::process::{Server, data};

fn near(found: &[f64], due: &Value) {
    let due: Vec<f64> = serde_json::from_value(due.clone()).unwrap();
    let same = found.len() == due.len() && found.iter().zip(&due).all(|(a, b)| (a - b).abs() < 1e-4);
    assert!(same, "{found:?} instead of {due:?}");
}

fn fold(folder: &Path) -> Value {
    let checkpoint = project("tests/data/spectrograms/checkpoint");
    let flags = ["--name", "sound", "--threshold", "0.5", "--outputs", "logits,features,map", "--json"];
    let output = nfold(&[&["fold", &checkpoint], &flags[..]].concat(), folder);
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice::<Value>(&output.stdout).unwrap()["manifest"].clone()
}

#[test]
fn sounds_are_named_as_timm_names_them() {
    let folder = tempfile::tempdir().unwrap();
    let manifest = fold(folder.path());
    assert_eq!(manifest["scoring"], json!({ "activation": "sigmoid", "threshold": 0.5 }));
    let answers: Value = serde_json::from_slice(&data("spectrograms/answers.json")).unwrap();
    let answers = answers.as_object().unwrap();
    fs::create_dir(folder.path().join("sounds")).unwrap();
    for name in answers.keys() {
        let from = project(&format!("tests/data/spectrograms/{name}"));
        fs::copy(from, folder.path().join("sounds").join(name)).unwrap();
    }
    let args = ["classify", "--recursive", "sounds", "--json", "--features", "f.csv", "--explain", "heat"];
    let output = nfold(&args, folder.path());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let all = nfold(&["classify", "--recursive", "sounds", "--json", "--top-k", "3"], folder.path());
    let rows =
        |output: &[u8]| -> Vec<Value> { text(output).lines().map(|l| serde_json::from_str(l).unwrap()).collect() };
    let csv = fs::read_to_string(folder.path().join("f.csv")).unwrap();
    let features: Vec<Vec<&str>> = csv.lines().skip(1).map(|line| line.split(',').collect()).collect();
    assert_eq!((rows(&output.stdout).len(), features.len(), answers.len()), (8, 8, 8));
    for ((named, all), features) in rows(&output.stdout).iter().zip(rows(&all.stdout)).zip(features) {
        let name = named["image"].as_str().unwrap().strip_prefix("sounds/").unwrap();
        let due = &answers[name];
        let labels = |row: &Value| -> Vec<String> {
            let predictions = row["predictions"].as_array().unwrap();
            predictions.iter().map(|p| p["label"].as_str().unwrap().to_string()).collect()
        };
        let mut parts: Vec<String> = serde_json::from_value(due["parts"].clone()).unwrap();
        let mut found = labels(named);
        parts.sort();
        found.sort();
        assert_eq!(found, parts, "{name}: each of its parts, and nothing where there is none");
        let mut scores = vec![0.0; 3];
        for p in all["predictions"].as_array().unwrap() {
            scores[p["index"].as_u64().unwrap() as usize] = p["score"].as_f64().unwrap();
        }
        near(&scores, &due["scores"]);
        near(&features[1..].iter().map(|value| value.parse().unwrap()).collect::<Vec<_>>(), &due["features"]);
    }
    assert_eq!(fs::read_dir(folder.path().join("heat")).unwrap().count(), 8);
    let heat = image::open(folder.path().join("heat/1-down-tone.png")).unwrap();
    assert_eq!((heat.width(), heat.height()), (96, 64));

    let server = Server::start_in(folder, &[]);
    let told = server.get("/v2/models/sound").json();
    assert_eq!(told["inputs"][0]["shape"], json!([-1, 1, 64, 96]));
    for (name, due) in answers {
        let answer = server.post("/v1/classify", &[], &data(&format!("spectrograms/{name}"))).json();
        let found = answer["results"][0]["predictions"].as_array().unwrap().len();
        assert_eq!(found, due["parts"].as_array().unwrap().len(), "{name}: {answer}");
    }
    let grid = server.post("/v1/explain?class=up", &[], &data("spectrograms/up.png")).json();
    let rows: Vec<Vec<f64>> = serde_json::from_value(grid["grid"].clone()).unwrap();
    assert!(rows.len() < rows[0].len(), "wider than high: {grid}");
    // what the model says of itself for who watches it
    let metrics = crate::process::ask(server.admin, "GET", "/metrics", &[], &[]).unwrap().body;
    let up = metrics
        .lines()
        .find_map(|line| line.strip_prefix("nfold_predictions_total{class=\"up\",model=\"sound\",version=\"1\"} "));
    assert!(up.is_some_and(|count| count.parse::<u32>().unwrap() >= 1), "{metrics}");
    assert!(metrics.contains("nfold_top1_score_count{model=\"sound\",version=\"1\"} 9"), "{metrics}");
}
