//! What a graph gives beside logits: features, maps and class activation maps, against timm's own and at every door.

use std::path::Path;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use nfold::checkpoint::Checkpoint;
use nfold::engine::{Backend, Batch, ClassMaps, EngineOptions, Extras, Fitted, Kernels, OrtBackend};
use nfold::fold::{FoldOptions, SideOutputs, Size, fold};
use nfold::model::{Gate, Precision};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::cli::{nfold, project, refused, text};
use crate::golden::{goldens_folder, ways_to_run};
use crate::process::{Server, data};

const ALL: SideOutputs = SideOutputs { features: true, map: true };
const BOTH: Extras = Extras { features: true, map: true };

fn doubles(file: &SafeTensors<'_>, name: &str) -> Option<Vec<f64>> {
    let data = file.tensor(name).ok()?.data();
    Some(data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect())
}

/// Largest difference as a share of the largest value.
fn apart(found: &[f32], due: &[f64]) -> f64 {
    assert_eq!(found.len(), due.len());
    let largest = due.iter().fold(0.0_f64, |most, value| most.max(value.abs()));
    found.iter().zip(due).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max) / largest
}

fn input(name: &str) -> Batch {
    let bytes = std::fs::read(goldens_folder().join(name).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor("input.0").unwrap();
    let &[images, _, height, width] = tensor.shape() else { panic!("{:?}", tensor.shape()) };
    let data = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    Batch { images, height, width, data }
}

/// timm's `forward_head(pre_logits=True)`, `forward_features`, and rows of the head times the map, in double precision.
#[test]
fn features_maps_and_class_maps_are_timms() {
    let bytes = std::fs::read(goldens_folder().join("features.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let names: Vec<&str> = file.names().into_iter().filter_map(|name| name.strip_suffix(".map")).collect();
    assert!(names.len() > 10);
    let (mut worst, mut exact, mut none) = (0.0_f64, 0, 0);
    for name in names {
        let checkpoint = Checkpoint::open(&goldens_folder().join(name)).unwrap();
        let batch = input(name);
        let fixed = Size::Fixed(batch.height as u32, batch.width as u32);
        let due = |what: &str| doubles(&file, &format!("{name}.{what}"));
        let (features, map) = (due("features").unwrap(), due("map").unwrap());
        for (size, gate, unfolded, precision, allowed) in [
            (fixed, Gate::Resize, false, Precision::Fp32, 1e-5),
            (Size::Dynamic, Gate::Broadcast, false, Precision::Fp32, 1e-5),
            (fixed, Gate::Broadcast, true, Precision::Fp32, 1e-5),
            (fixed, Gate::Resize, false, Precision::Fp16, 2e-2),
        ] {
            let options = FoldOptions { size, gate, unfolded, precision, outputs: ALL, ..FoldOptions::default() };
            let folded = fold(&checkpoint, &options).unwrap();
            let width = features.len() / batch.images;
            assert_eq!(folded.manifest.features, Some(width as u32), "{name}");
            let class_maps = ClassMaps::of(&folded.onnx);
            for (graph, how) in ways_to_run(folded.onnx) {
                let what = format!("{name} {size:?} {gate:?} {precision:?} unfolded {unfolded}{how}");
                let mut backend = OrtBackend::open_fitted(&graph, &what, &EngineOptions::default()).unwrap();
                let answers = backend.run_with(&batch, BOTH).unwrap();
                let errors = [apart(&answers.features, &features), apart(&answers.map, &map)];
                assert!(errors.iter().all(|error| *error < allowed), "{what}: {errors:?}");
                if precision == Precision::Fp32 {
                    worst = errors.iter().fold(worst, |worst, error| worst.max(*error));
                }
                // logits are the same bits, whatever is asked for beside them
                assert_eq!(backend.run(&batch).unwrap(), answers.logits, "{what}");
                match (&class_maps, due("cam")) {
                    (Ok(maps), Some(cam)) => {
                        let classes = answers.logits.classes;
                        let image = answers.map.len() / batch.images;
                        let grid = |at: usize| maps.grid(at % classes, &answers.map[at / classes * image..][..image]);
                        let found: Vec<f32> = (0..batch.images * classes).flat_map(|at| grid(at).unwrap()).collect();
                        let error = apart(&found, &cam);
                        assert!(error < allowed, "{what}: class maps {error:e}");
                        assert_eq!(maps.grid(classes, &answers.map[..image]), None, "no such class");
                        exact += 1;
                    }
                    (Err(_), None) => none += 1,
                    other => panic!("{what}: {other:?}"),
                }
            }
        }
    }
    println!("largest error {worst:.1e} of the largest value; {exact} with class maps, {none} without");
    assert!(exact > 0 && none > 0);
}

/// Features and maps of an image are the same bits alone and among others.
#[test]
fn side_outputs_do_not_depend_on_the_batch() {
    for name in ["nf_regnet_small", "eca_nfnet_l0_small", "regnety_small"] {
        let checkpoint = Checkpoint::open(&goldens_folder().join(name)).unwrap();
        let (height, width) = (67, 64);
        let options = FoldOptions { size: Size::Fixed(67, 64), outputs: ALL, ..FoldOptions::default() };
        let graph = Fitted::for_this_cpu(fold(&checkpoint, &options).unwrap().onnx, Kernels::Own);
        let mut backend = OrtBackend::open_fitted(&graph, name, &EngineOptions::default()).unwrap();
        let images = nfold::engine::verify::images([3, height, width]).take(5);
        let images: Vec<Vec<f32>> = images.collect();
        let together = Batch { images: 5, height, width, data: images.concat() };
        let together = backend.run_with(&together, BOTH).unwrap();
        for (i, data) in images.into_iter().enumerate() {
            let alone = backend.run_with(&Batch { images: 1, height, width, data }, BOTH).unwrap();
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            for (alone, together) in [(&alone.features, &together.features), (&alone.map, &together.map)] {
                let part = &together[i * alone.len()..(i + 1) * alone.len()];
                assert_eq!(bits(alone), bits(part), "{name}: image {i}");
            }
        }
    }
}

fn fold_demo(folder: &Path, name: &str, outputs: &str) {
    let demo = project("models/nf_regnet_cifar10");
    let output = nfold(&["fold", &demo, "--name", name, "--outputs", outputs], folder);
    assert!(output.status.success(), "{}", text(&output.stderr));
}

fn vector(value: &Value) -> Vec<f64> {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{e}: {value}"))
}

#[test]
fn features_come_by_every_door() {
    let folder = tempfile::tempdir().unwrap();
    fold_demo(folder.path(), "with", "logits,features");
    fold_demo(folder.path(), "without", "logits");
    let (cat, ship) = (project("tests/data/cat.jpg"), project("tests/data/cifar10/ship/0000.jpg"));
    let classified = ["classify", &cat, &ship, "no.jpg", "--model", "with", "--skip-broken"];
    for flags in [&["--features", "f.npy"][..], &["--features", "f.csv"], &["--features", "unit.npy", "--l2"]] {
        // a file that is not there is named before anything is run, unless such files are skipped
        refused(&nfold(&[&classified[..6], flags].concat(), folder.path()), "no.jpg");
        let output = nfold(&[&classified, flags].concat(), folder.path());
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    std::fs::write(folder.path().join("no.jpg"), "no image").unwrap();
    for flags in [&["--features", "f.npy"][..], &["--features", "f.csv"], &["--features", "unit.npy", "--l2"]] {
        let output = nfold(&[&classified, flags].concat(), folder.path());
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("512 features an image; "), "{}", text(&output.stderr));
    }
    let npy = |name: &str| -> Vec<f32> {
        let bytes = std::fs::read(folder.path().join(name)).unwrap();
        assert!(bytes.starts_with(b"\x93NUMPY\x01\x00") && text(&bytes[..128]).contains("'shape': (3, 512)"), "{name}");
        bytes[128..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let (rows, unit) = (npy("f.npy"), npy("unit.npy"));
    assert_eq!(rows.len(), 3 * 512);
    assert!(rows[..1024].iter().all(|value| value.is_finite()) && rows[1024..].iter().all(|value| value.is_nan()));
    let length = |row: &[f32]| row.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    assert!((length(&unit[..512]) - 1.0).abs() < 1e-6 && (length(&rows[..512]) - 1.0).abs() > 0.1);
    let csv = std::fs::read_to_string(folder.path().join("f.csv")).unwrap();
    let line: Vec<&str> = csv.lines().nth(1).unwrap().split(',').collect();
    assert_eq!((line.len(), line[0], line[1].parse::<f32>().unwrap()), (513, cat.as_str(), rows[0]));
    for (flags, what) in [
        (&["--features", "f.parquet", "--model", "with"][..], "Parquet is not written"),
        (&["--features", "f.txt", "--model", "with"], "neither .npy (NumPy) nor .csv"),
        (&["--features", "f.npy", "--model", "without"], "folded without the output `features`"),
        (&["--explain", "heat", "--model", "with"], "folded without the output `map`"),
    ] {
        refused(&nfold(&[&["classify", &cat], flags].concat(), folder.path()), what);
    }
    let due: Vec<f64> = rows[..512].iter().map(|value| f64::from(*value)).collect();
    let near = |found: &[f64], due: &[f64]| {
        let same = found.len() == due.len() && found.iter().zip(due).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(same, "{found:?} instead of {due:?}");
    };

    let server = Server::start_in(folder, &["--default-model", "with"]);
    let cat = data("cat.jpg");
    let answer = server.post("/v1/embed", &[], &cat).json();
    assert_eq!((&answer["model"], &answer["version"], &answer["errors"]), (&json!("with"), &json!(1), &Value::Null));
    near(&vector(&answer["features"][0]), &due);
    let unit: Vec<f64> = unit[..512].iter().map(|value| f64::from(*value)).collect();
    near(&vector(&server.post("/v1/embed?l2=true", &[], &cat).json()["features"][0]), &unit);
    let b64 = BASE64_STANDARD.encode(&cat);
    let json = [("content-type", "application/json")];
    let images = json!({ "images": [{ "b64": b64 }, { "b64": BASE64_STANDARD.encode("no image") }] });
    let answer = server.post("/v1/embed", &json, images.to_string().as_bytes()).json();
    near(&vector(&answer["features"][0]), &due);
    assert_eq!((&answer["features"][1], &answer["errors"][0]["index"]), (&Value::Null, &json!(1)));
    assert_eq!(answer["errors"][0]["code"], "unsupported_media_type");

    // as OpenAI's clients ask
    let input = json!({ "input": [b64, b64], "model": "with", "user": "someone" });
    let answer = server.post("/v1/embeddings", &json, input.to_string().as_bytes()).json();
    assert_eq!(
        (&answer["object"], &answer["model"], &answer["data"][1]["index"]),
        (&json!("list"), &json!("with"), &json!(1))
    );
    near(&vector(&answer["data"][1]["embedding"]), &due);
    let input = json!({ "input": b64, "model": "with", "encoding_format": "base64" });
    let answer = server.post("/v1/embeddings", &json, input.to_string().as_bytes()).json();
    let bytes = BASE64_STANDARD.decode(answer["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let found = bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())));
    near(&found.collect::<Vec<_>>(), &due);

    // OIP gives logits alone until outputs are named
    let body = |outputs: Value| json!({ "inputs": [{ "name": "input", "datatype": "BYTES", "shape": [1], "data": [b64] }], "outputs": outputs });
    let infer = |outputs: Value| server.post("/v2/models/with/infer", &[], body(outputs).to_string().as_bytes()).json();
    assert_eq!(infer(json!([]))["outputs"].as_array().unwrap().len(), 1);
    let both = infer(json!([{ "name": "features" }, { "name": "logits", "parameters": { "classification": 1 } }]));
    assert_eq!((&both["outputs"][0]["shape"], &both["outputs"][1]["shape"]), (&json!([1, 512]), &json!([1, 1])));
    near(&vector(&both["outputs"][0]["data"]), &due);
    let told = server.get("/v2/models/with").json();
    assert_eq!(told["outputs"][1], json!({ "name": "features", "datatype": "FP32", "shape": [-1, 512] }));
    for (outputs, what) in [
        (json!([{ "name": "features", "parameters": { "classification": 1 } }]), "has no classes"),
        (json!([{ "name": "features" }, { "name": "features" }]), "more than once"),
        (json!([{ "name": "map" }]), "--outputs logits,features,map"),
        (json!([{ "name": "cam" }]), "there is `logits`, `features`"),
    ] {
        let answer = infer(outputs);
        assert_eq!(answer["code"], "invalid_request");
        assert!(answer["error"].as_str().unwrap().contains(what), "{what}: {answer}");
    }

    // what can't be had is named
    for (target, body, what) in [
        ("/v1/embed?model=without", &cat[..], "folded without the output `features`"),
        ("/v1/embed?l3=true", &cat[..], "l3"),
        ("/v1/explain", &cat[..], "folded without the output `map`"),
    ] {
        let answer = server.post(target, &[], body);
        assert_eq!((answer.status, answer.json()["code"].as_str()), (400, Some("invalid_request")), "{target}");
        assert!(answer.json()["error"].as_str().unwrap().contains(what), "{target}: {}", answer.json());
    }
    for (body, what) in [
        (json!({ "input": [1, 2] }), "is no string"),
        (json!({ "input": [] }), "holds no image"),
        (json!({ "input": [b64], "images": [] }), "both `images` and `input`"),
        (json!({ "input": [b64], "dimensions": 8 }), "there is no field `dimensions`"),
        (json!({ "input": [b64], "encoding_format": "int8" }), "neither `float` nor `base64`"),
        (json!({ "input": [b64], "model": "without" }), "folded without the output `features`"),
        (json!({ "top_k": 5 }), "there is no field `top_k`"),
    ] {
        let answer = server.post("/v1/embed", &json, body.to_string().as_bytes());
        assert!(
            answer.status == 400 && answer.json()["error"].as_str().unwrap().contains(what),
            "{what}: {}",
            answer.json()
        );
    }
    let unknown = json!({ "input": [b64], "model": "other" });
    assert_eq!(server.post("/v1/embed", &json, unknown.to_string().as_bytes()).status, 404);
}

/// The demo says where it sees the cat: a grid whose mean and bias are the logit, and a picture.
#[test]
fn class_maps_are_served_as_numbers_and_as_pictures() {
    let folder = tempfile::tempdir().unwrap();
    fold_demo(folder.path(), "m", "logits,features,map");
    let cat = project("tests/data/cat.jpg");
    let output = nfold(&["classify", &cat, "--explain", "heat"], folder.path());
    assert!(output.status.success() && text(&output.stderr).contains("wrote 1 pictures into `heat`"));
    let by_program = std::fs::read(folder.path().join("heat/1-cat.png")).unwrap();
    let server = Server::start_in(folder, &[]);
    let cat = data("cat.jpg");
    let answer = server.post("/v1/explain", &[], &cat).json();
    assert_eq!((&answer["class"], &answer["index"], &answer["model"]), (&json!("cat"), &json!(3), &json!("m")));
    let named = server.post("/v1/classify?top_k=1", &[], &cat).json();
    assert_eq!(answer["score"], named["results"][0]["predictions"][0]["score"]);
    let b64 = BASE64_STANDARD.encode(&cat);
    let body = json!({ "inputs": [{ "name": "input", "datatype": "BYTES", "shape": [1], "data": [b64] }] });
    let logits =
        vector(&server.post("/v2/models/m/infer", &[], body.to_string().as_bytes()).json()["outputs"][0]["data"]);
    let mean = |class: &str| {
        let answer = server.post(&format!("/v1/explain?class={class}"), &[], &cat).json();
        let rows: Vec<Vec<f64>> = serde_json::from_value(answer["grid"].clone()).unwrap();
        let cells = rows.concat();
        cells.iter().sum::<f64>() / cells.len() as f64
    };
    let checkpoint = std::fs::read(project("models/nf_regnet_cifar10/model.safetensors")).unwrap();
    let checkpoint = SafeTensors::deserialize(&checkpoint).unwrap();
    let bias = checkpoint.tensor("head.fc.bias").unwrap().data();
    let bias: Vec<f64> = bias.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect();
    for (class, index) in [("cat", 3), ("5", 5), ("ship", 8)] {
        let error = mean(class) + bias[index] - logits[index];
        assert!(error.abs() < 1e-4, "{class}: {error}");
    }
    // among many others it is the same to the bit
    let grids: Vec<Value> = std::thread::scope(|scope| {
        let ask = || server.post("/v1/explain", &[], &cat).json()["grid"].clone();
        let others = || server.post("/v1/classify", &[], &cat).json();
        let asked: Vec<_> = (0..6).map(|_| scope.spawn(ask)).collect();
        let _others: Vec<_> = (0..6).map(|_| scope.spawn(others)).collect();
        asked.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(grids.iter().all(|grid| *grid == answer["grid"]));
    // other classes are seen elsewhere, and a picture is the same at both doors
    let picture = crate::serve::ask(
        server.http,
        "POST /v1/explain",
        &[("accept", "image/png"), ("accept-encoding", "gzip")],
        &cat,
    );
    assert_eq!((picture.status, picture.headers["content-type"].as_str()), (200, "image/png"));
    assert_eq!(picture.headers["x-heat-class"], "3");
    assert!(!picture.headers.contains_key("content-encoding"), "a PNG file is compressed by itself");
    let range: Vec<f64> = picture.headers["x-heat-range"].split(' ').map(|end| end.parse().unwrap()).collect();
    assert!(range.len() == 2 && range[0] < range[1], "{range:?}");
    let decoded = image::load_from_memory(&picture.bytes).unwrap().to_rgb8();
    assert_eq!(decoded.dimensions(), (64, 64));
    assert_eq!(decoded, image::load_from_memory(&by_program).unwrap().to_rgb8());
    for (target, what) in [
        ("/v1/explain?class=kat", "no class `kat`; the nearest label is `cat`"),
        ("/v1/explain?class=10", "no class `10`"),
        ("/v1/explain?klass=cat", "klass"),
    ] {
        let answer = server.post(target, &[], &cat);
        assert!(
            answer.status == 400 && answer.json()["error"].as_str().unwrap().contains(what),
            "{target}: {}",
            answer.json()
        );
    }
    let two = json!({ "images": [{ "b64": b64 }, { "b64": b64 }] });
    let answer = server.post("/v1/explain", &[("content-type", "application/json")], two.to_string().as_bytes());
    assert!(
        answer.status == 400 && answer.json()["error"].as_str().unwrap().contains("at most 1"),
        "{}",
        answer.json()
    );
    assert_eq!(server.post("/v1/explain", &[], b"no image").status, 415);
}

/// A head that reads maxima has no such map, and says so.
#[test]
fn other_poolings_say_that_they_have_none() {
    let folder = tempfile::tempdir().unwrap();
    let golden = crate::cli::golden("nf_regnet_grey");
    let output = nfold(&["fold", &golden, "--name", "m", "--outputs", "logits,map", "--size", "48"], folder.path());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let cat = project("tests/data/cat.jpg");
    refused(
        &nfold(&["classify", &cat, "--explain", "heat"], folder.path()),
        "no class activation maps: it pools by maxima",
    );
    let server = Server::start_in(folder, &[]);
    let answer = server.post("/v1/explain", &[], &data("cat.jpg"));
    assert_eq!(answer.status, 400);
    assert!(answer.json()["error"].as_str().unwrap().contains("it pools by maxima"), "{}", answer.json());
    assert_eq!(server.post("/v1/embed", &[], &data("cat.jpg")).status, 400, "nor features, which were left out");
}
