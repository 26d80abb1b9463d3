//! `deploy/gpu-check`, rehearsed on the CPU: it runs on a machine with a GPU where nobody can fix it.

use std::path::Path;
use std::process::Command;

/// Runs these steps into a folder; returns the output.
fn check(folder: &Path, steps: &str) -> String {
    let mut command = Command::new("python3");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/gpu-check"));
    command.args([
        "--nfold",
        env!("CARGO_BIN_EXE_nfold"),
        "--provider",
        "cpu",
        "--models",
        "nf_regnet_b0",
        "--size",
        "32",
    ]);
    command.args(["--batches", "1,2", "--rounds", "2", "--seconds", "0.3", "--steps", steps, "--out"]);
    let out = command.arg(folder).output().unwrap();
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert!(out.status.success(), "{said}");
    said
}

/// Rows of the table that begin with `start`, word by word.
fn rows(folder: &Path, start: &str) -> Vec<Vec<String>> {
    let table = std::fs::read_to_string(folder.join("table.txt")).unwrap();
    let lines = table.lines().filter(|line| line.starts_with(start));
    lines.map(|line| line.split_whitespace().map(String::from).collect()).collect()
}

/// The first steps, and that finished steps are not repeated.
#[test]
fn the_gpu_check_begins_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let said = check(folder.path(), "machine,models,engine");
    assert_eq!(rows(folder.path(), "nf_regnet_b0@32").len(), 2 * 4, "{said}");
    let again = check(folder.path(), "machine,models,engine");
    assert!(!again.contains("] models") && again.contains("] done"), "{again}");
}

#[test]
#[ignore = "half a minute: every step of deploy/gpu-check (make check-all)"]
fn the_gpu_check_passes_on_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let said = check(folder.path(), "machine,models,torch_compile,parity,buckets,graphs,memory,engine,load");
    let rows = |start: &str| rows(folder.path(), start);
    // both precisions, asked three times: as at folding, the same bits in every batch, nothing elsewhere
    let answers: Vec<_> = [rows("nf_regnet_b0 "), rows("nf_regnet_b0_fp16 ")].concat();
    assert_eq!(answers.len(), 6, "{said}");
    for row in answers {
        let number = |i: usize| row[i].parse::<f64>().unwrap();
        assert!(number(1) <= number(2) && number(3) == 0.0 && row[4] == "0", "{row:?}");
    }
    let engines = rows("nf_regnet_b0@32");
    assert_eq!(engines.len(), 2 * 4, "plain, bound, graph and broadcast at two batch sizes:\n{said}");
    assert!(engines.iter().all(|row| row[2].parse::<f64>().unwrap() > 0.0), "{engines:?}");
    for (load, steps) in [("UINT8 tensors", 6), ("JPEG", 4)] {
        let rows = rows(load);
        assert_eq!(rows.len(), steps, "{said}");
        // images/s, p50, p99, batch, GPU, cores
        let of = |row: &[String], from_end: usize| row[row.len() - from_end].parse::<f64>();
        assert!(rows.iter().all(|row| of(row, 6).unwrap() > 0.0 && of(row, 3).unwrap() >= 1.0), "{rows:?}");
        assert!(rows.iter().all(|row| row[row.len() - 2] == "-"), "no GPU, no figure: {rows:?}");
    }
}
