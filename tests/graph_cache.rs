//! The graph cache: the same bits, damaged files, folders that can't be written.

use std::path::{Path, PathBuf};

use nfold::checkpoint::Checkpoint;
use nfold::engine::graph_cache::GraphCache;
use nfold::engine::{Backend as _, Batch, EngineOptions, Fitted, OrtBackend};
use nfold::fold::{FoldOptions, Size, fold};
use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution as _, StandardNormal};

use crate::golden::{goldens_folder, ways_to_run};

fn folded(name: &str) -> Vec<u8> {
    let checkpoint = Checkpoint::open(&goldens_folder().join(name)).unwrap();
    fold(&checkpoint, &FoldOptions { size: Size::Fixed(67, 64), ..FoldOptions::default() }).unwrap().onnx
}

fn bits(backend: &mut OrtBackend) -> Vec<u32> {
    let mut batch = Batch::zeros(3, 67, 64);
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    batch.data.iter_mut().for_each(|v| *v = StandardNormal.sample(&mut rng));
    backend.run(&batch).unwrap().data.iter().map(|v| v.to_bits()).collect()
}

fn options(intra_threads: usize) -> EngineOptions {
    EngineOptions { intra_threads, spinning: intra_threads > 1, ..EngineOptions::default() }
}

fn cached(onnx: &[u8], sha256: &str, threads: usize, folder: &Path) -> Vec<u32> {
    let (cache, graph) = (GraphCache::new(folder), Fitted::as_it_is(onnx.to_vec()));
    bits(&mut OrtBackend::open_cached(&|| &graph, sha256, "m", &options(threads), &cache).unwrap())
}

fn files(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect()
}

#[test]
fn cold_and_cached_give_the_same_bits() {
    for name in ["nf_regnet_small", "eca_nfnet_l0_small", "dm_nfnet_f0_small", "resnet50_small", "efficientnet_small"] {
        let folder = tempfile::tempdir().unwrap();
        let onnx = folded(name);
        let cold = bits(&mut OrtBackend::open(&onnx, name, &options(1)).unwrap());
        assert_eq!(cached(&onnx, name, 1, folder.path()), cold, "{name}: while it is written");
        let written = files(folder.path());
        assert_eq!(written.len(), 1, "{written:?}");
        let stamp = || std::fs::metadata(&written[0]).unwrap().modified().unwrap();
        let first = stamp();
        for threads in [1, 2] {
            assert_eq!(cached(&onnx, name, threads, folder.path()), cold, "{name}: from the cache, {threads} threads");
        }
        // it was really loaded: with another model's file in its place another model answers
        assert_eq!((files(folder.path()).len(), stamp()), (1, first));
    }
}

#[test]
fn graphs_are_kept_however_they_run() {
    for (graph, how) in ways_to_run(folded("nf_regnet_small")) {
        let folder = tempfile::tempdir().unwrap();
        let cache = GraphCache::new(folder.path());
        let cold = bits(&mut OrtBackend::open_fitted(&graph, "m", &options(1)).unwrap());
        for round in ["written", "kept"] {
            let mut backend = OrtBackend::open_cached(&|| &graph, "x", "m", &options(1), &cache).unwrap();
            assert_eq!(bits(&mut backend), cold, "{round}{how}");
        }
        let nothing = || -> &Fitted { panic!("it was not kept{how}") };
        assert_eq!(bits(&mut OrtBackend::open_cached(&nothing, "x", "m", &options(1), &cache).unwrap()), cold);
    }
}

#[test]
fn a_hit_is_what_is_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folded("nf_regnet_small"), folded("nf_regnet_gelu"));
    cached(&a, "a", 1, folder.path());
    let of_a = files(folder.path()).pop().unwrap();
    let answers_b = cached(&b, "b", 1, folder.path());
    let of_b = files(folder.path()).into_iter().find(|f| *f != of_a).unwrap();
    std::fs::remove_dir_all(&of_a).unwrap();
    std::fs::rename(of_b, of_a).unwrap();
    assert_eq!(cached(&a, "a", 1, folder.path()), answers_b);
}

/// A graph's two files.
fn parts(folder: &Path) -> (PathBuf, PathBuf) {
    let (graph, weights): (Vec<_>, Vec<_>) = files(folder).into_iter().partition(|f| f.ends_with("graph"));
    assert_eq!((graph.len(), weights.len()), (1, 1));
    (graph[0].clone(), weights[0].clone())
}

#[test]
fn a_damaged_file_is_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    let onnx = folded("nf_regnet_small");
    let cold = cached(&onnx, "x", 1, folder.path());
    let entry = files(folder.path()).pop().unwrap();
    let size = |file: PathBuf| std::fs::metadata(file).unwrap().len();
    let sizes = || (size(parts(&entry).0), size(parts(&entry).1));
    let whole = sizes();
    assert!(whole.1 > 1 << 16, "large weights are beside the graph: {whole:?}");
    // whole, but no graph
    let sealed = |weights: &[u8]| {
        let sums = [crc32fast::hash(b"no graph"), crc32fast::hash(weights)].map(u32::to_le_bytes).concat();
        [&b"no graph"[..], b"nfoldgr2", &sums].concat()
    };
    type Damage<'a> = &'a dyn Fn(Vec<u8>) -> Vec<u8>;
    let damages: [Damage<'_>; 3] = [&|_| Vec::new(), &|whole| whole[..whole.len() / 2].to_vec(), &|mut whole| {
        let middle = whole.len() / 2;
        whole[middle] ^= 64;
        whole
    }];
    let recovers = |what: &str| {
        assert_eq!(cached(&onnx, "x", 1, folder.path()), cold, "{what}");
        assert_eq!(sizes(), whole, "made anew");
        let stamp = std::fs::metadata(parts(&entry).0).unwrap().modified().unwrap();
        assert_eq!(cached(&onnx, "x", 1, folder.path()), cold, "{what}");
        assert_eq!(std::fs::metadata(parts(&entry).0).unwrap().modified().unwrap(), stamp, "and good for the next");
        assert_eq!(files(folder.path()).len(), 1, "no draft is left behind");
    };
    for damage in damages {
        for is_graph in [true, false] {
            let (graph, weights) = parts(&entry);
            let file = if is_graph { graph } else { weights };
            std::fs::write(&file, damage(std::fs::read(&file).unwrap())).unwrap();
            recovers(&format!("{}", file.display()));
        }
    }
    let (graph, weights) = parts(&entry);
    std::fs::write(&graph, sealed(&std::fs::read(weights).unwrap())).unwrap();
    recovers("no graph");
    std::fs::remove_file(parts(&entry).1).unwrap();
    recovers("no weights");
    // a folder that can't be made or written, and a file where the folder should be
    let other = tempfile::tempdir().unwrap();
    let in_the_way = other.path().join("file");
    std::fs::write(&in_the_way, "").unwrap();
    assert_eq!(cached(&onnx, "x", 1, &in_the_way.join("cache")), cold);
    std::fs::remove_dir_all(&entry).unwrap();
    std::fs::write(&entry, "").unwrap();
    recovers("a file where the folder should be");
    if Path::new("/proc/self").exists() {
        assert_eq!(cached(&onnx, "x", 1, Path::new("/proc/nfold-cache")), cold, "a read-only file system");
    }
}

/// Sessions map the weights' file: running sessions are not affected if it is replaced or removed.
#[test]
fn a_running_session_keeps_its_weights() {
    let folder = tempfile::tempdir().unwrap();
    let onnx = folded("nf_regnet_small");
    let cold = cached(&onnx, "x", 1, folder.path());
    let (cache, graph) = (GraphCache::new(folder.path()), Fitted::as_it_is(onnx.clone()));
    let mut running = OrtBackend::open_cached(&|| &graph, "x", "m", &options(1), &cache).unwrap();
    std::fs::remove_dir_all(files(folder.path()).pop().unwrap()).unwrap();
    assert_eq!(bits(&mut running), cold);
    assert_eq!(cached(&onnx, "x", 1, folder.path()), cold, "made anew");
    assert_eq!(bits(&mut running), cold);
}

/// `serve --check` fills the cache that a start uses, and does not listen.
#[test]
fn a_check_fills_the_cache_and_listens_nowhere() {
    let demo = crate::cli::with_demo();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().to_string();
    let check = || {
        let ports = ["--http", port.as_str(), "--grpc", port.as_str(), "--admin", port.as_str()];
        let output =
            crate::cli::nfold(&[&["serve", "--check", "--graph-cache", "cache"], &ports[..]].concat(), demo.path());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = check();
    assert!(code == Some(0) && said.contains("every model starts"), "{code:?} {said}");
    let written = |path: &PathBuf| std::fs::metadata(path.join("graph")).unwrap().modified().unwrap();
    let kept = files(&demo.path().join("cache"));
    assert!(!kept.is_empty());
    let before: Vec<_> = kept.iter().map(written).collect();
    assert_eq!(check().0, Some(0));
    assert_eq!(
        files(&demo.path().join("cache")).iter().map(written).collect::<Vec<_>>(),
        before,
        "loaded, not made anew"
    );
    std::fs::write(demo.path().join("repository/nf_regnet_cifar10/1/model.onnx"), "no graph").unwrap();
    let (code, said) = check();
    assert!(code == Some(1) && said.contains("error: "), "{code:?} {said}");
}
