//! `nfold eval` on real photographs, compared with timm's predictions for the same files.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::cli::{nfold, project, refused, text, with_demo};
use crate::process::Server;

/// timm's predictions, as JSON lines for `--against`.
fn timm(folder: &Path) -> (Value, String) {
    let said: Value = serde_json::from_slice(&fs::read(project("tests/data/cifar10.json")).unwrap()).unwrap();
    let labels = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];
    let images = said["images"].as_object().unwrap();
    let row = |(image, answer): (&String, &Value)| {
        let label = labels[answer["top1"].as_u64().unwrap() as usize];
        format!("{}\n", json!({ "image": format!("elsewhere/{image}"), "predictions": [{ "label": label }] }))
    };
    let path = folder.join("timm.jsonl");
    fs::write(&path, images.iter().map(row).collect::<String>()).unwrap();
    (said, path.display().to_string())
}

fn evaluated(args: &[&str], folder: &Path) -> Value {
    let output = nfold(&[&["eval", "--json"], args].concat(), folder);
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn photographs_are_as_right_as_timm_says_and_image_by_image_the_same() {
    let folder = with_demo();
    let here = folder.path();
    let (said, against) = timm(here);
    let photographs = project("tests/data/cifar10");
    let found = evaluated(&[&photographs, "--against", &against, "--predictions", "own.jsonl"], here);
    let images = said["images"].as_object().unwrap().len();
    assert_eq!(found["images"], images);
    assert_eq!(found["evaluation"]["top1"]["value"], said["accuracy"]);
    assert_eq!(found["against"]["comparison"]["agreement"]["count"], images);
    let classes = found["evaluation"]["classes"].as_array().unwrap();
    assert_eq!(classes.len(), 10);
    assert_eq!((&classes[3]["label"], &classes[3]["recall"]["of"]), (&"cat".into(), &(images / 10).into()));
    assert!(found["evaluation"]["calibration_error"].as_f64().unwrap() < 0.1);
    // a run agrees with itself
    let limited = evaluated(&[&photographs, "--against", "own.jsonl", "--limit", "50"], here);
    assert_eq!(limited["against"]["comparison"]["agreement"]["count"], 50);
    assert!(limited["evaluation"]["classes"].as_array().unwrap().iter().all(|c| c["recall"]["of"] == 5), "{limited}");
}

#[test]
fn tables_name_images_and_classes_and_pages_show_errors() {
    let folder = with_demo();
    let here = folder.path();
    fs::create_dir(here.join("images")).unwrap();
    for (name, photograph) in [("a.jpg", "cat"), ("b.jpg", "dog"), ("c.jpg", "ship")] {
        let first =
            fs::read_dir(project(&format!("tests/data/cifar10/{photograph}"))).unwrap().next().unwrap().unwrap();
        fs::copy(first.path(), here.join("images").join(name)).unwrap();
    }
    // by label in another case, by position, and wrongly
    fs::write(here.join("test.csv"), "path,label\nimages/a.jpg,Cat\nimages/b.jpg,5\n\"images/c.jpg\",frog\n").unwrap();
    let output = nfold(&["eval", "test.csv", "--report", "page"], here);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    assert!(said.contains("of 3; 95 %") && said.contains("frog taken for ship"), "{said}");
    let page = fs::read_to_string(here.join("page/index.html")).unwrap();
    assert!(page.contains("<img alt=\"images/c.jpg\" src=\"data:image/jpeg;base64,/9j/"), "{page}");

    // a pipe is read once, and whole
    assert!(std::process::Command::new("mkfifo").arg(here.join("pipe")).status().unwrap().success());
    let rows = format!("images/{}a.jpg,cat\n", "./".repeat(25)).repeat(300);
    let pipe = here.join("pipe");
    let writes = std::thread::spawn(move || fs::write(pipe, rows));
    let output = nfold(&["eval", "pipe"], here);
    assert!(text(&output.stdout).contains("of 300; 95 %"), "{output:?}");
    writes.join().unwrap().unwrap();

    // one that can't be read is named, and not counted
    fs::write(here.join("test.csv"), "images/a.jpg,cat\nimages/none.jpg,cat\n").unwrap();
    let output = nfold(&["eval", "test.csv"], here);
    let said = text(&output.stderr);
    assert!(
        output.status.code() == Some(1) && said.contains("`images/none.jpg`") && said.contains("1 of 2 images"),
        "{said}"
    );
    assert!(text(&output.stdout).contains("of 1; 95 %"));
    assert!(nfold(&["eval", "test.csv", "--skip-broken"], here).status.success());
}

#[test]
fn what_names_no_class_or_image_is_refused() {
    let folder = with_demo();
    let here = folder.path();
    fs::create_dir_all(here.join("data/catt")).unwrap();
    fs::copy(project("tests/data/cat.jpg"), here.join("data/catt/1.jpg")).unwrap();
    refused(&nfold(&["eval", "data"], here), "no class `catt`; nearest to the first: cat");
    fs::create_dir_all(here.join("empty/cat")).unwrap();
    refused(&nfold(&["eval", "empty"], here), "CLASS/IMAGE");
    refused(&nfold(&["eval", "nowhere"], here), "check the path");
    let image = nfold(&["eval", &project("tests/data/cat.jpg")], here);
    refused(&image, "is an image, and of one image there is no accuracy: eval takes a folder");
    assert!(text(&image.stderr).contains("`nfold classify` classifies it"), "{}", text(&image.stderr));
    let weights = nfold(&["eval", &project("models/nf_regnet_cifar10/model.safetensors")], here);
    refused(&weights, "model.safetensors` is no text; give a folder");
    fs::write(here.join("latin.csv"), b"a.jpg,cat\nb.jpg,\xe9\n").unwrap();
    refused(&nfold(&["eval", "latin.csv"], here), "latin.csv`, line 2 is not UTF-8; save the table as UTF-8");
    let wide: Vec<u8> = "\u{feff}a.jpg,cat\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    fs::write(here.join("wide.csv"), wide).unwrap();
    refused(&nfold(&["eval", "wide.csv"], here), "is not UTF-8 but UTF-16; save the table as UTF-8");
    fs::write(here.join("one.csv"), "a.jpg\n").unwrap();
    refused(&nfold(&["eval", "one.csv"], here), "line 1: two columns");
    fs::write(here.join("other.jsonl"), "{\"image\":\"x.jpg\",\"predictions\":[{\"label\":\"cat\"}]}\n").unwrap();
    fs::rename(here.join("data/catt"), here.join("data/cat")).unwrap();
    refused(&nfold(&["eval", "data", "--against", "other.jsonl"], here), "no image of");
    fs::write(here.join("other.jsonl"), "cat\n").unwrap();
    refused(&nfold(&["eval", "data", "--against", "other.jsonl"], here), "line 1");
}

/// A class's folder that can't be searched is named, counts as no image, and the others are evaluated.
#[cfg(unix)]
#[test]
fn folders_that_cannot_be_searched_are_named() {
    use std::os::unix::fs::symlink;
    let folder = with_demo();
    let here = folder.path();
    fs::create_dir_all(here.join("data/cat")).unwrap();
    fs::copy(project("tests/data/cat.jpg"), here.join("data/cat/1.jpg")).unwrap();
    symlink("/nowhere", here.join("data/dog")).unwrap();
    let output = nfold(&["eval", "data"], here);
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("error: `dog`: can't search it: No such file"), "{said}");
    assert!(
        said.ends_with(
            "error: 1 folder could not be searched; the lines above say why (--skip-broken exits with 0 all the same)\n"
        ),
        "{said}"
    );
    let table = text(&output.stdout);
    assert!(
        table.contains("of 1; 95 %") && table.contains("; 0 could not be read, 1 folder could not be searched\n"),
        "{table}"
    );
    // its name needs to be no class: it is not known what is in it
    symlink("backup", here.join("data/backup")).unwrap();
    fs::write(here.join("data/cat/2.jpg"), "no image").unwrap();
    let output = nfold(&["eval", "data", "--json"], here);
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("error: `backup`: can't search it: "), "{said}");
    assert!(said.contains("error: 1 of 2 images could not be evaluated and 2 folders not searched; "), "{said}");
    assert!(nfold(&["eval", "data", "--skip-broken", "--report", "page"], here).status.success());
    let page = fs::read_to_string(here.join("page/index.html")).unwrap();
    assert!(
        page.contains("<p>1 images could not be read and are not counted.</p><p>2 folders could not be searched.</p>")
    );
    // a link that is called as an image is one beside the folders
    symlink("/nowhere", here.join("data/gone.jpg")).unwrap();
    let said = text(&nfold(&["eval", "data", "--skip-broken"], here).stderr);
    assert!(said.contains("left out 1 files beside the folders") && !said.contains("`gone.jpg`"), "{said}");
}

/// What a server answers is what its model answers in process, image by image and figure by figure.
#[test]
fn a_server_is_as_right_as_its_model() {
    let server = Server::start(&[]);
    let (here, url) = (server.folder(), format!("http://{}", server.http));
    let photographs = project("tests/data/cifar10");
    let local = evaluated(&[&photographs, "--limit", "60", "--predictions", "here.jsonl"], here);
    let remote = evaluated(&[&photographs, "--limit", "60", "--server", &url, "--against", "here.jsonl"], here);
    for figure in ["evaluation", "model", "version", "onnx_sha256", "images", "scores"] {
        assert_eq!(remote[figure], local[figure], "{figure}");
    }
    assert_eq!(remote["against"]["comparison"]["agreement"]["count"], 60);
    // what can't be read is the image's, what can't be asked the server's
    fs::write(here.join("test.csv"), format!("{photographs}/cat/0000.jpg,cat\ntest.csv,cat\n")).unwrap();
    let output = nfold(&["eval", "test.csv", "--server", &url], here);
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("`test.csv`") && said.contains("1 of 2 images"), "{said}");
    let asked = |flags: &[&str]| nfold(&[&["eval", &photographs, "--limit", "3"], flags].concat(), here);
    refused(&asked(&["--server", &url, "--model", "other"]), "answers 404: model `other`");
    refused(&asked(&["--server", "http://127.0.0.1:1"]), "does not answer");
    refused(&asked(&["--server", "https://127.0.0.1:1"]), "without TLS");
    assert_eq!(asked(&["--server", &url, "--fit-temperature"]).status.code(), Some(2));
}
