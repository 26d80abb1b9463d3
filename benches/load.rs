//! Load time of a graph: folded, from the graph cache, and as others exported it, interleaved.
//!
//! `cargo bench --bench load -- FOLDED.onnx [EXPORT.onnx ...]` prints medians and quartiles of 31 loads each, and each
//! of nfold's graphs as a fraction of each export's time (from the ratios of the rounds). Sessions have one thread;
//! files are read beforehand.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use nfold::engine::graph_cache::GraphCache;
use nfold::engine::{EngineOptions, Fitted, Kernels, OrtBackend};

const ROUNDS: usize = 31;

struct Lane<'a> {
    name: String,
    onnx: &'a [u8],
    load: &'a dyn Fn(Vec<u8>) -> Result<OrtBackend>,
    times: Vec<f64>,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [folded, exports @ ..] = args.as_slice() else {
        println!("nothing is measured without: -- FOLDED.onnx [EXPORT.onnx ...]");
        return Ok(());
    };
    let read = |path: &String| std::fs::read(path).with_context(|| format!("`{path}` can't be read"));
    let (onnx, exported) = (read(folded)?, exports.iter().map(read).collect::<Result<Vec<_>>>()?);
    let folder = tempfile::tempdir()?;
    let (cache, options) = (GraphCache::new(folder.path()), EngineOptions::default());

    let open = |graph: Fitted| Ok(OrtBackend::open_fitted(&graph, "bench", &options)?);
    let cold = |onnx| open(Fitted::for_this_cpu(onnx, Kernels::Own));
    let plain = |onnx| open(Fitted::as_it_is(onnx));
    let graph = Fitted::for_this_cpu(onnx.clone(), Kernels::Own);
    let cached = |_| Ok(OrtBackend::open_cached(&|| &graph, "bench", "bench", &options, &cache)?);
    cached(Vec::new())?;

    let lane = |name: &str, onnx, load| Lane { name: name.into(), onnx, load, times: Vec::new() };
    let mut ours =
        [lane("folded", &onnx, &cold as _), lane("as folded", &onnx, &plain), lane("from the cache", &[], &cached)];
    let file = |path| Path::new(path).file_name().unwrap_or_default().to_string_lossy();
    let mut theirs: Vec<Lane<'_>> =
        exports.iter().zip(&exported).map(|(path, onnx)| lane(&file(path), onnx, &plain)).collect();
    for round in 0..ROUNDS {
        let mut lanes: Vec<_> = ours.iter_mut().chain(&mut theirs).collect();
        let first = round % lanes.len();
        lanes.rotate_left(first);
        for lane in lanes {
            let onnx = lane.onnx.to_vec();
            let started = Instant::now();
            let backend = (lane.load)(onnx)?;
            lane.times.push(started.elapsed().as_secs_f64() * 1e3);
            drop(backend);
        }
    }
    for lane in ours.iter().chain(&theirs) {
        let [low, middle, high] = quartiles(lane.times.clone());
        println!("{}: {middle:.1} ms ({low:.1} to {high:.1})", lane.name);
    }
    for (our, their) in ours.iter().flat_map(|our| theirs.iter().map(move |their| (our, their))) {
        let [low, middle, high] = quartiles(our.times.iter().zip(&their.times).map(|(a, b)| a / b).collect());
        println!("{} / {}: {middle:.3} ({low:.3} to {high:.3})", our.name, their.name);
    }
    Ok(())
}

fn quartiles(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| values[values.len() * quarter / 4])
}
