//! Graphs as ONNX Runtime has rewritten them for this machine, kept in a folder so that the next start needn't.
//!
//! Owns names, integrity and the way to disk of the files; `engine` makes and loads what is in them. A file that can't be
//! used is as good as none. Whoever can write to the folder decides what is computed: it belongs to the server.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

/// Changes with everything that this program does differently when it writes a graph.
const FORMAT: &str = "nfold-graph/1";
/// Ends every file: the mark and a CRC-32 of what is before it.
const MARK: &[u8; 8] = b"nfoldgr1";

/// A folder of rewritten graphs. Clones share it.
#[derive(Debug, Clone)]
pub struct GraphCache {
    folder: PathBuf,
    /// Held while a graph is looked for, made and written: further engines of a model wait for the first one's.
    one: Arc<Mutex<()>>,
}

impl GraphCache {
    /// Graphs in `folder`, which is made with the first of them.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), one: Arc::default() }
    }

    /// Waits until nobody else looks for a graph or makes one.
    pub(super) fn alone(&self) -> MutexGuard<'_, ()> {
        self.one.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the graph that `parts` describe is, or would be. What a rewritten graph depends on beyond them is added: the
    /// processor's instruction sets.
    pub(super) fn place(&self, parts: &[&str]) -> PathBuf {
        let mut digest = Sha256::new();
        for part in [FORMAT, std::env::consts::ARCH, &instructions().join(",")].iter().chain(parts) {
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        let name: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        self.folder.join(format!("{name}.graph"))
    }

    /// The graph there; none if there is none, and an error if what is there is no whole graph.
    pub(super) fn read(&self, place: &Path) -> Result<Option<Vec<u8>>, String> {
        let mut bytes = match std::fs::read(place) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e.to_string()),
        };
        let end = bytes.len().saturating_sub(MARK.len() + 4);
        let (graph, tail) = bytes.split_at(end);
        let whole = tail.strip_prefix(MARK).is_some_and(|sum| sum == crc32fast::hash(graph).to_le_bytes());
        if !whole {
            return Err("it is damaged".into());
        }
        bytes.truncate(end);
        Ok(Some(bytes))
    }

    /// A file beside the others for ONNX Runtime to write to; gone unless it is kept.
    pub(super) fn draft(&self) -> std::io::Result<NamedTempFile> {
        std::fs::create_dir_all(&self.folder)?;
        tempfile::Builder::new().prefix(".").suffix(".draft").tempfile_in(&self.folder)
    }

    /// Seals a draft and gives it its name.
    pub(super) fn keep(&self, draft: NamedTempFile, place: &Path) -> std::io::Result<()> {
        // by its name: ONNX Runtime may have written another file in its place
        let sum = crc32fast::hash(&std::fs::read(draft.path())?);
        let mut file = std::fs::OpenOptions::new().append(true).open(draft.path())?;
        file.write_all(MARK)?;
        file.write_all(&sum.to_le_bytes())?;
        file.sync_all()?;
        draft.persist(place).map(drop).map_err(|e| e.error)
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
        let places = [&["ab", "c"][..], &["a", "bc"], &["abc"], &["ab", "c", ""], &["ab", "d"]].map(|p| cache.place(p));
        for (i, a) in places.iter().enumerate() {
            assert!(places[i + 1..].iter().all(|b| a != b), "{a:?}");
        }
        assert_eq!(cache.place(&["ab", "c"]), places[0]);
    }

    #[test]
    fn what_is_kept_comes_back_whole_or_is_told() {
        let folder = tempfile::tempdir().expect("folder");
        let cache = GraphCache::new(folder.path().join("made"));
        let place = cache.place(&["x"]);
        assert_eq!(cache.read(&place), Ok(None));
        for graph in [&b""[..], b"graph"] {
            let draft = cache.draft().expect("draft");
            std::fs::write(draft.path(), graph).expect("written");
            cache.keep(draft, &place).expect("kept");
            assert_eq!(cache.read(&place), Ok(Some(graph.to_vec())));
        }
        let whole = std::fs::read(&place).expect("file");
        for cut in 0..whole.len() {
            std::fs::write(&place, &whole[..cut]).expect("written");
            assert!(cache.read(&place).is_err(), "{cut}");
            let mut flipped = whole.clone();
            flipped[cut] ^= 1;
            std::fs::write(&place, flipped).expect("written");
            assert!(cache.read(&place).is_err(), "{cut}");
        }
        drop(cache.draft().expect("draft"));
        assert_eq!(std::fs::read_dir(folder.path().join("made")).expect("folder").count(), 1, "drafts go");
    }
}
