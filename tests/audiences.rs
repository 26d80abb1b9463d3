//! docs/outputs.md as a reader follows it: every command and program of every section.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::cli::{project, skip, text};
use crate::process::Server;

/// A block's language and text.
fn blocks(section: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    let mut rest = section;
    while let Some((_, after)) = rest.split_once("```") {
        let Some((language, after)) = after.split_once('\n') else { break };
        let Some((block, after)) = after.split_once("```") else { break };
        found.push((language, block));
        rest = after;
    }
    found
}

fn run(program: &str, args: &[&str], folder: &Path) -> std::process::Output {
    let bin = Path::new(env!("CARGO_BIN_EXE_nfold")).parent().unwrap().display().to_string();
    let path = format!("{bin}:{}", std::env::var("PATH").unwrap_or_default());
    Command::new(program).args(args).env("PATH", path).current_dir(folder).output().unwrap()
}

#[test]
fn commands_for_each_audience_run() {
    let document = fs::read_to_string(project("docs/outputs.md")).unwrap();
    let sections: Vec<&str> = document.split("\n## ").skip(1).collect();
    assert_eq!(sections.len(), 3);
    let mut ran = 0;
    for section in sections {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path().to_path_buf();
        for linked in ["models", "tests"] {
            std::os::unix::fs::symlink(project(linked), here.join(linked)).unwrap();
        }
        fs::copy(project("tests/data/cat.jpg"), here.join("photo.jpg")).unwrap();
        fs::create_dir(here.join("photos")).unwrap();
        for class in ["cat", "dog", "ship"] {
            let photograph = project(&format!("tests/data/cifar10/{class}/0000.jpg"));
            fs::copy(photograph, here.join(format!("photos/{class}.jpg"))).unwrap();
        }
        fs::create_dir(here.join("spectrograms")).unwrap();
        for sound in ["up.png", "down-tone.png", "noise.png"] {
            let from = project(&format!("tests/data/spectrograms/{sound}"));
            fs::copy(from, here.join("spectrograms").join(sound)).unwrap();
        }
        let (mut folder, mut server) = (Some(folder), None::<Server>);
        for (language, block) in blocks(section) {
            if block.trim() == "nfold serve" {
                server = folder.take().map(|folder| Server::start_in(folder, &[]));
                continue;
            }
            let block = match &server {
                Some(server) => block.replace("localhost:8000", &server.http.to_string()),
                None => block.to_string(),
            };
            let output = match language {
                "sh" => run("bash", &["-euo", "pipefail", "-c", &block], &here),
                "python" if !run("python3", &["-c", "import numpy"], &here).status.success() => {
                    skip("python3 has no numpy, so a program of docs/outputs.md was not run");
                    continue;
                }
                "python" => run("python3", &["-c", &block], &here),
                other => panic!("a block of {other:?}"),
            };
            assert!(output.status.success(), "{block}{}{}", text(&output.stdout), text(&output.stderr));
            assert!(!output.stdout.is_empty() || !output.stderr.is_empty(), "{block}");
            ran += 1;
        }
    }
    assert!(ran >= 6, "{ran}");
}
