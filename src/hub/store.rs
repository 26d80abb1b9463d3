//! The hub's cache on disk, laid out like Python's `huggingface_hub`, so that each reads what the other fetched:
//! `models--ORG--NAME/{blobs/ETAG, snapshots/COMMIT/FILE → ../../blobs/ETAG, refs/REVISION}`, and locks in `.locks`. A
//! snapshot's files are linked, and a revision is pointed to its commit, only when all of them are there.

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
    /// The part of model `id`; creates nothing.
    pub fn new(cache: &Path, id: &HubId) -> Self {
        Self { folder: cache.join(id.folder()), locks: cache.join(".locks").join(id.folder()) }
    }

    /// The commit that a revision had when it was last fetched.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.into());
        }
        let text = crate::model::regular_file::read(&self.folder.join("refs").join(revision), 256).ok()?;
        let commit = String::from_utf8(text).ok()?.trim().to_string();
        is_commit(&commit).then_some(commit)
    }

    /// The folder of a commit's files.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// A commit's folder if it holds a complete checkpoint; `of` lists which of the hub's weight files count.
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

    /// Path of a content by its ETag.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Path of a content that is being downloaded.
    pub fn incomplete(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Creates the folders for content.
    pub fn prepare(&self) -> Result<(), HubError> {
        let folder = self.folder.join("blobs");
        fs::create_dir_all(&folder).map_err(|e| write_error(&folder, e))?;
        fs::create_dir_all(&self.locks).map_err(|e| write_error(&self.locks, e))
    }

    /// Locks one content against all processes that download it, Python's included; `wait` is called if another holds
    /// the lock.
    pub fn lock(&self, etag: &str, wait: impl FnOnce()) -> Result<Option<File>, HubError> {
        let path = self.locks.join(format!("{etag}.lock"));
        let file = File::options().create(true).append(true).open(&path).map_err(|e| write_error(&path, e))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(fs::TryLockError::WouldBlock) => {
                wait();
                Ok(file.lock().ok().map(|()| file))
            }
            // a file system without locks: every download is verified anyway
            Err(fs::TryLockError::Error(_)) => Ok(None),
        }
    }

    /// Writes content from memory.
    pub fn put(&self, etag: &str, bytes: &[u8]) -> Result<(), HubError> {
        let path = self.blob(etag);
        if path.metadata().is_ok_and(|there| there.len() == bytes.len() as u64) {
            return Ok(());
        }
        files::write(&path, bytes).map_err(|e| write_error(&path, e))
    }

    /// Links a commit's files, then points the revision to the commit.
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
        // a dangling link
        let _ = fs::remove_file(path);
        #[cfg(unix)]
        let linked = std::os::unix::fs::symlink(Path::new("../../blobs").join(etag), path);
        #[cfg(not(unix))]
        let linked: io::Result<()> = Err(io::ErrorKind::Unsupported.into());
        match linked {
            // another process has created it
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(_) => {
                let mut draft = files::DraftFile::create(path)?;
                io::copy(&mut File::open(self.blob(etag))?, &mut draft)?;
                draft.publish()
            }
            Ok(()) => Ok(()),
        }
    }

    /// Points a revision to a commit.
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
