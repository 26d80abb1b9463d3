//! Graphs as ONNX Runtime has rewritten them for this machine, kept in a folder so that the next start needn't.
//!
//! Owns names, integrity and the way to disk of the files; `engine` makes and loads what is in them. Every graph has a
//! folder of two files: its large weights are beside it, for ONNX Runtime to map into memory rather than copy, so that a
//! load doesn't wait for them and all sessions share them. A graph that can't be used is ignored. Whoever can write to
//! the folder decides what is computed, and can crash the server by truncating a mapped file: only the server may write there.

use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::files::{self, DraftFolder};

use crate::model::{hex, regular_file};

/// Changes with everything that this program does differently when it writes a graph.
const FORMAT: &str = "nfold-graph/3";
/// Ends every graph: the mark, a CRC-32 of what is before it and one of its weights.
const MARK: &[u8; 8] = b"nfoldgr2";
/// The graph's file in its folder.
const GRAPH: &str = "graph";
/// How the name of its weights' file ends.
const WEIGHTS: &str = "weights";
/// Most bytes of a graph: its message format ends there.
const GRAPH_LIMIT: u64 = 1 << 31;
/// How the names of drafts began in nfold 0.1, and the length of their suffix: 0.1 did not sweep them.
const OLD_DRAFT: (&str, usize) = ("draft-", 6);
/// Age past which such a draft is taken for left behind.
const OLD: Duration = Duration::from_secs(3600);

/// A folder of rewritten graphs. Clones share it.
#[derive(Debug, Clone)]
pub struct GraphCache {
    folder: PathBuf,
    /// Held while a graph is looked for, made and written: further engines of a model wait for the first one's.
    one: Arc<Mutex<()>>,
}

impl GraphCache {
    /// Graphs in `folder`, which is made with the first of them. What killed processes left half written there is removed.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        let folder = folder.into();
        files::sweep(&folder);
        sweep_old(&folder);
        Self { folder, one: Arc::default() }
    }

    /// Waits until no other thread looks for a graph or makes one.
    pub(super) fn alone(&self) -> MutexGuard<'_, ()> {
        self.one.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The folder of the graph that `parts` describe, be it there or not. What a rewritten graph depends on beyond them is
    /// added: the processor's instruction sets.
    pub(super) fn folder(&self, parts: &[&str]) -> PathBuf {
        let mut digest = Sha256::new();
        for part in [FORMAT, std::env::consts::ARCH, &instructions().join(",")].iter().chain(parts) {
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        self.folder.join(hex(&digest.finalize()))
    }

    /// The graph there, without its weights; none if there is none, and an error if graph or weights aren't whole.
    pub(super) fn read(&self, folder: &Path) -> Result<Option<Vec<u8>>, String> {
        let mut bytes = match regular_file::read(&folder.join(GRAPH), GRAPH_LIMIT) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !folder.exists() => return Ok(None),
            Err(e) => return Err(e.to_string()),
        };
        let weights = weights_in(folder)
            .and_then(|path| checksum(&path))
            .map_err(|e| format!("its weights can't be read: {e}"))?;
        let end = bytes.len().saturating_sub(MARK.len() + 8);
        let (graph, tail) = bytes.split_at(end);
        if tail != seal(crc32fast::hash(graph), weights) {
            return Err("it is damaged".into());
        }
        bytes.truncate(end);
        Ok(Some(bytes))
    }

    /// A folder beside the others for ONNX Runtime to write to; gone unless it is kept.
    pub(super) fn draft(&self) -> std::io::Result<Draft> {
        std::fs::create_dir_all(&self.folder)?;
        DraftFolder::create_in(&self.folder).map(Draft)
    }

    /// Removes the graph there.
    pub(super) fn discard(&self, folder: &Path) -> std::io::Result<()> {
        // renamed first, so that no reader finds half of it
        let old = self.draft()?;
        std::fs::rename(folder, old.0.path().join("old"))
    }

    /// Seals a draft and gives it its name. If another process was first, its graph stays.
    pub(super) fn keep(&self, draft: Draft, folder: &Path) -> std::io::Result<()> {
        let (graph, weights) = (draft.graph(), draft.0.path().join(draft.weights()));
        // a graph without large weights has no file of them yet
        OpenOptions::new().create(true).append(true).open(&weights)?.sync_all()?;
        let seal = seal(checksum(&graph)?, checksum(&weights)?);
        let mut file = OpenOptions::new().append(true).open(&graph)?;
        file.write_all(&seal)?;
        file.sync_all()?;
        match self.read(folder) {
            Ok(Some(_)) => return Ok(()),
            Ok(None) => {}
            // a folder can't be renamed onto a full one
            Err(_) => self.discard(folder)?,
        }
        draft.0.publish(folder, false)
    }
}

/// A graph being written.
#[derive(Debug)]
pub(super) struct Draft(DraftFolder);

impl Draft {
    /// Where the graph goes.
    pub(super) fn graph(&self) -> PathBuf {
        self.0.path().join(GRAPH)
    }

    /// The file beside it where its weights go. ONNX Runtime writes this name into the graph; that no other graph has it is
    /// what keeps one from another's weights, should a folder change between two looks.
    pub(super) fn weights(&self) -> String {
        let name = self.0.path().file_name().unwrap_or_default().to_string_lossy();
        format!("{}.{WEIGHTS}", name.rsplit('-').next().unwrap_or_default())
    }
}

/// Removes what nfold 0.1 left half written.
fn sweep_old(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let rest = name.to_str().and_then(|name| name.strip_prefix(OLD_DRAFT.0)).unwrap_or_default();
        let made = rest.len() == OLD_DRAFT.1 && rest.bytes().all(|b| b.is_ascii_alphanumeric());
        let modified = entry.metadata().ok().filter(std::fs::Metadata::is_dir).and_then(|m| m.modified().ok());
        if made && modified.is_some_and(|at| at.elapsed().is_ok_and(|age| age > OLD)) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// The weights' file in a graph's folder.
fn weights_in(folder: &Path) -> std::io::Result<PathBuf> {
    let paths = std::fs::read_dir(folder)?.map(|entry| entry.map(|e| e.path()));
    let mut weights = paths.filter(|p| p.as_ref().map_or(true, |p| p.extension().is_some_and(|e| e == WEIGHTS)));
    weights.next().unwrap_or_else(|| Err(std::io::ErrorKind::NotFound.into()))
}

fn seal(graph: u32, weights: u32) -> Vec<u8> {
    [&MARK[..], &graph.to_le_bytes(), &weights.to_le_bytes()].concat()
}

/// CRC-32 of a file, read a little at a time.
fn checksum(path: &Path) -> std::io::Result<u32> {
    let (mut file, mut sum) = (regular_file::open(path)?, crc32fast::Hasher::new());
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(sum.finalize()),
            read => sum.update(&buffer[..read]),
        }
    }
}

/// What ONNX Runtime's kernels choose by, as far as this processor has it: its layout of channels is 16 wide with AVX-512,
/// else 8, and some weights are packed for one set alone.
fn instructions() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    use std::arch::is_x86_feature_detected as has;
    #[cfg(target_arch = "x86_64")]
    let sets = [
        ("sse4.1", has!("sse4.1")),
        ("avx", has!("avx")),
        ("avx2", has!("avx2")),
        ("fma", has!("fma")),
        ("f16c", has!("f16c")),
        ("avxvnni", has!("avxvnni")),
        ("avx512f", has!("avx512f")),
        ("avx512bw", has!("avx512bw")),
        ("avx512dq", has!("avx512dq")),
        ("avx512vl", has!("avx512vl")),
        ("avx512vnni", has!("avx512vnni")),
        ("avx512bf16", has!("avx512bf16")),
    ];
    #[cfg(target_arch = "aarch64")]
    use std::arch::is_aarch64_feature_detected as has;
    #[cfg(target_arch = "aarch64")]
    let sets = [
        ("neon", has!("neon")),
        ("fp16", has!("fp16")),
        ("dotprod", has!("dotprod")),
        ("i8mm", has!("i8mm")),
        ("bf16", has!("bf16")),
        ("sve", has!("sve")),
    ];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let sets: [(&str, bool); 0] = [];
    sets.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_counts_and_none_runs_into_the_next() {
        let cache = GraphCache::new("nowhere");
        let folders =
            [&["ab", "c"][..], &["a", "bc"], &["abc"], &["ab", "c", ""], &["ab", "d"]].map(|p| cache.folder(p));
        for (i, a) in folders.iter().enumerate() {
            assert!(folders[i + 1..].iter().all(|b| a != b), "{a:?}");
        }
        assert_eq!(cache.folder(&["ab", "c"]), folders[0]);
    }

    #[test]
    fn what_is_kept_comes_back_whole_or_is_told() {
        let temporary = tempfile::tempdir().expect("folder");
        let cache = GraphCache::new(temporary.path().join("made"));
        let folder = cache.folder(&["x"]);
        assert_eq!(cache.read(&folder), Ok(None));
        for (graph, weights) in [(&b""[..], None), (b"graph", None), (b"graph", Some(b"weights"))] {
            let draft = cache.draft().expect("draft");
            std::fs::write(draft.graph(), graph).expect("written");
            if let Some(weights) = weights {
                std::fs::write(draft.0.path().join(draft.weights()), weights).expect("written");
            }
            cache.keep(draft, &folder).expect("kept");
            assert_eq!(cache.read(&folder), Ok(Some(graph.to_vec())));
            if weights.is_none() {
                std::fs::remove_dir_all(&folder).expect("removed");
            }
        }
        let first = |other: &[u8]| {
            let draft = cache.draft().expect("draft");
            std::fs::write(draft.graph(), other).expect("written");
            cache.keep(draft, &folder).expect("kept");
            cache.read(&folder)
        };
        assert_eq!(first(b"another process's"), Ok(Some(b"graph".to_vec())), "who was first stays");
        for path in [folder.join(GRAPH), weights_in(&folder).expect("weights")] {
            let file = path.display();
            let whole = std::fs::read(&path).expect("file");
            for cut in 0..whole.len() {
                std::fs::write(&path, &whole[..cut]).expect("written");
                assert!(cache.read(&folder).is_err(), "{file} {cut}");
                let mut flipped = whole.clone();
                flipped[cut] ^= 1;
                std::fs::write(&path, flipped).expect("written");
                assert!(cache.read(&folder).is_err(), "{file} {cut}");
            }
            std::fs::remove_file(&path).expect("removed");
            assert!(cache.read(&folder).is_err(), "no {file}");
            std::fs::write(&path, whole).expect("written");
            assert_eq!(cache.read(&folder), Ok(Some(b"graph".to_vec())));
        }
        drop(cache.draft().expect("draft"));
        assert_eq!(std::fs::read_dir(temporary.path().join("made")).expect("folder").count(), 1, "drafts go");
    }
}
