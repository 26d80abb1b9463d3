//! The hub's cache on disk, as Python's `huggingface_hub` lays it out, so that each reads what the other fetched:
//! `models--ORG--NAME/{blobs/ETAG, snapshots/COMMIT/FILE → ../../blobs/ETAG, refs/REVISION}`, and locks in `.locks`.
//! A snapshot gets its names, and a revision its commit, only when all of it is there.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::id::{HubId, is_commit};
use super::{HubError, write_error};
use crate::checkpoint;
use crate::files;

/// Most bytes of a small file: a reference, a configuration, an index.
pub const LARGEST_TEXT: u64 = 16 << 20;

/// One model's part of the cache.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    locks: PathBuf,
}

impl Store {
    /// The part of `id` in the cache; nothing is made yet.
    pub fn new(cache: &Path, id: &HubId) -> Self {
        Self { folder: cache.join(id.folder()), locks: cache.join(".locks").join(id.folder()) }
    }

    /// The commit that a revision was when it was last fetched.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.into());
        }
        let text = crate::model::regular_file::read(&self.folder.join("refs").join(revision), 256).ok()?;
        let commit = String::from_utf8(text).ok()?.trim().to_string();
        is_commit(&commit).then_some(commit)
    }

    /// Where a commit's files are.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// A commit's folder, where it holds a whole checkpoint; `of` says which of the hub's weights count.
    pub fn whole(&self, commit: &str, of: &[&str]) -> Option<PathBuf> {
        let folder = self.snapshot(commit);
        let has = |file: &str| folder.join(file).is_file();
        let weights = |file: &&str| has(file) && (!checkpoint::is_index(file) || self.has_shards(&folder, file));
        (has(checkpoint::CONFIG_FILE) && of.iter().any(weights)).then_some(folder)
    }

    fn has_shards(&self, folder: &Path, index: &str) -> bool {
        let text = crate::model::regular_file::read(&folder.join(index), LARGEST_TEXT);
        let shards = text.ok().and_then(|text| checkpoint::shards_of(&text).ok());
        shards.is_some_and(|shards| shards.iter().all(|shard| folder.join(shard).is_file()))
    }

    /// Content by its ETag.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Content that is being fetched.
    pub fn incomplete(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Makes the folders that content goes to.
    pub fn prepare(&self) -> Result<(), HubError> {
        let folder = self.folder.join("blobs");
        fs::create_dir_all(&folder).map_err(|e| write_error(&folder, e))?;
        fs::create_dir_all(&self.locks).map_err(|e| write_error(&self.locks, e))
    }

    /// The lock of one content among all processes that fetch it, Python's too; `wait` is called where another has it.
    pub fn lock(&self, etag: &str, wait: impl FnOnce()) -> Result<Option<File>, HubError> {
        let path = self.locks.join(format!("{etag}.lock"));
        let file = File::options().create(true).append(true).open(&path).map_err(|e| write_error(&path, e))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(fs::TryLockError::WouldBlock) => {
                wait();
                Ok(file.lock().ok().map(|()| file))
            }
            // a file system without locks: what is fetched is checked whatever others did
            Err(fs::TryLockError::Error(_)) => Ok(None),
        }
    }

    /// Writes content that was held in memory.
    pub fn put(&self, etag: &str, bytes: &[u8]) -> Result<(), HubError> {
        let path = self.blob(etag);
        if path.metadata().is_ok_and(|there| there.len() == bytes.len() as u64) {
            return Ok(());
        }
        files::write(&path, bytes).map_err(|e| write_error(&path, e))
    }

    /// Gives a commit's files their names, and then the revision its commit.
    pub fn publish(&self, revision: &str, commit: &str, files: &[(String, String)]) -> Result<PathBuf, HubError> {
        let folder = self.snapshot(commit);
        fs::create_dir_all(&folder).map_err(|e| write_error(&folder, e))?;
        for (file, etag) in files {
            let path = folder.join(file);
            self.name(&path, etag).map_err(|e| write_error(&path, e))?;
        }
        self.refer(revision, commit)?;
        Ok(folder)
    }

    fn name(&self, path: &Path, etag: &str) -> io::Result<()> {
        if path.exists() {
            return Ok(());
        }
        // a link that leads nowhere
        let _ = fs::remove_file(path);
        #[cfg(unix)]
        let linked = std::os::unix::fs::symlink(Path::new("../../blobs").join(etag), path);
        #[cfg(not(unix))]
        let linked: io::Result<()> = Err(io::ErrorKind::Unsupported.into());
        match linked {
            // somebody else was here
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(_) => {
                let mut draft = files::DraftFile::create(path)?;
                io::copy(&mut File::open(self.blob(etag))?, &mut draft)?;
                draft.publish()
            }
            Ok(()) => Ok(()),
        }
    }

    /// Notes which commit a revision is.
    pub fn refer(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(|e| write_error(folder, e))?;
        files::write(&path, commit.as_bytes()).map_err(|e| write_error(&path, e))
    }
}
