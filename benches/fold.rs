//! Time and peak memory of `nfold fold`, by size of the checkpoint.
//!
//! `cargo bench --bench fold [-- ARCH[@SIDE] ...]` writes new checkpoints and folds each with the program itself, in a
//! process of its own. Memory is the process's peak above that of folding a tiny checkpoint, which leaves out the
//! runtime's own memory; it is also printed as a multiple of the checkpoint's size. Linux only.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nfold::checkpoint::init::{InitOptions, init_active};
use serde_json::{Map, json};

const SIZES: [&str; 4] = ["nf_regnet_b1", "eca_nfnet_l0", "nf_resnet50", "dm_nfnet_f0"];

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let wanted: Vec<&str> = if args.is_empty() { SIZES.to_vec() } else { args.iter().map(String::as_str).collect() };
    let folder = tempfile::tempdir()?;
    let tiny = json!({"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]});
    fresh(&folder.path().join("tiny"), "resnet18", tiny.as_object().cloned().unwrap_or_default())?;
    let (base, _) = fold(folder.path(), "tiny", Some("64"))?;
    println!("{:<20} {:>10} {:>10} {:>8} {:>8}", "checkpoint", "MB", "peak MB", "times", "seconds");
    for spec in wanted {
        let (name, side) = match spec.split_once('@') {
            Some((name, side)) => (name, Some(side)),
            None => (spec, None),
        };
        let path = folder.path().join(name);
        fresh(&path, name, Map::new())?;
        let size = fs::metadata(path.join("model.safetensors"))?.len() as f64;
        let (peak, time) = fold(folder.path(), name, side)?;
        let above = peak.saturating_sub(base) as f64;
        let (megabytes, seconds) = (size / 1e6, time.as_secs_f64());
        println!("{spec:<20} {megabytes:>10.1} {:>10.1} {:>8.2} {seconds:>8.1}", above / 1e6, above / size);
        fs::remove_dir_all(&path)?;
    }
    Ok(())
}

fn fresh(path: &Path, architecture: &str, model_args: Map<String, serde_json::Value>) -> Result<()> {
    init_active(path, &InitOptions { architecture: architecture.into(), seed: 1, model_args })?;
    Ok(())
}

/// Peak memory in bytes, and time.
fn fold(folder: &Path, name: &str, side: Option<&str>) -> Result<(u64, Duration)> {
    let started = Instant::now();
    let mut child = Command::new(env!("CARGO_BIN_EXE_nfold"))
        .args(["fold", name, "--replace"])
        .args(side.into_iter().flat_map(|side| ["--size", side]))
        .current_dir(folder)
        .stderr(Stdio::null())
        .spawn()
        .context("nfold can't be run")?;
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    loop {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib: Option<u64> = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
        peak = peak.max(kib.unwrap_or(0) << 10);
        if let Some(status) = child.try_wait()? {
            if !status.success() {
                bail!("`nfold fold {name}` failed");
            }
            return Ok((peak, started.elapsed()));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
