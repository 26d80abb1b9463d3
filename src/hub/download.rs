//! Downloads one file from the hub: complete and verified, or not at all. A partial download stays in the cache as
//! `ETAG.incomplete`, and the next attempt, of this process or another, resumes it.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::client::{Client, Remote};
use super::store::{LARGEST_TEXT, Store};
use super::{Event, HubError, write_error};
use crate::model::hex;

/// Bytes that an attempt must bring to count as progress.
const PROGRESS: u64 = 256 << 10;

/// A file to download.
#[derive(Debug)]
pub struct Transfer<'a> {
    /// The client.
    pub client: &'a Client,
    /// The cache.
    pub store: &'a Store,
    /// The commit.
    pub commit: String,
    /// Path in the repository.
    pub file: String,
}

impl Transfer<'_> {
    fn too_long(&self, remote: &Remote) -> HubError {
        let (file, endpoint) = (self.file.clone(), self.client.endpoint_text.clone());
        HubError::TooLong { file, endpoint, size: remote.size }
    }

    fn wrong(&self, remote: &Remote) -> HubError {
        let (file, endpoint) = (self.file.clone(), self.client.endpoint_text.clone());
        HubError::Digest { file, endpoint, etag: remote.etag.clone() }
    }
}

/// Downloads a small file into memory and verifies it.
pub fn in_memory(transfer: &Transfer<'_>, remote: &Remote) -> Result<Vec<u8>, HubError> {
    if remote.size > LARGEST_TEXT {
        return Err(HubError::TooLarge { file: transfer.file.clone(), size: remote.size, most: LARGEST_TEXT });
    }
    let client = transfer.client;
    let mut fruitless = 0;
    loop {
        let reply = match client.content(&transfer.commit, &transfer.file, 0) {
            Err(error) if error.is_passing() => {
                client.pause(&mut fruitless, client.patience.tries, error)?;
                continue;
            }
            reply => reply?,
        };
        let (host, mut bytes) = (reply.host, Vec::new());
        let read = reply.response.into_body().into_reader().take(remote.size + 1).read_to_end(&mut bytes);
        if bytes.len() as u64 > remote.size {
            return Err(transfer.too_long(remote));
        }
        if read.is_err() || (bytes.len() as u64) < remote.size {
            let reason = format!("`{}` broke off at {} of {} bytes", transfer.file, bytes.len(), remote.size);
            client.pause(&mut fruitless, client.patience.tries, HubError::Unreachable { endpoint: host, reason })?;
            continue;
        }
        let mut check = Check::of(remote);
        check.update(&bytes);
        return if check.agrees_with(remote) { Ok(bytes) } else { Err(transfer.wrong(remote)) };
    }
}

/// Downloads a file of any size into the cache, unless it is there.
pub fn to_store(transfer: &Transfer<'_>, remote: &Remote, say: &mut dyn FnMut(Event<'_>)) -> Result<(), HubError> {
    let (store, etag) = (transfer.store, remote.etag.as_str());
    let lock = store
        .lock(etag, || say(Event::Note(&format!("waiting for another process that fetches `{}`", transfer.file))))?;
    let blob = store.blob(etag);
    // a blob was verified before it got its name
    if blob.metadata().is_ok_and(|there| there.len() == remote.size) {
        return Ok(());
    }
    let path = store.incomplete(etag);
    let outcome = Download::open(transfer, remote, &path)?.run(say);
    if let Err(HubError::TooLong { .. } | HubError::Digest { .. }) = &outcome {
        let _ = std::fs::remove_file(&path);
    }
    outcome?;
    std::fs::rename(&path, &blob).map_err(|e| write_error(&blob, e))?;
    if let Some(folder) = blob.parent() {
        // the rename stands, even if the file system can't sync a folder
        let _ = File::open(folder).and_then(|folder| folder.sync_all());
    }
    drop(lock);
    say(Event::Ends);
    Ok(())
}

/// A download in progress.
struct Download<'a> {
    transfer: &'a Transfer<'a>,
    remote: &'a Remote,
    path: &'a Path,
    file: File,
    check: Check,
    /// Bytes in the file.
    have: u64,
    /// Of these, bytes that an earlier process left.
    found: u64,
}

impl<'a> Download<'a> {
    fn open(transfer: &'a Transfer<'a>, remote: &'a Remote, path: &'a Path) -> Result<Self, HubError> {
        let open = || File::options().create(true).read(true).write(true).truncate(false).open(path);
        let file = open().map_err(|e| write_error(path, e))?;
        let mut download = Self { transfer, remote, path, file, check: Check::of(remote), have: 0, found: 0 };
        download.find().map_err(|e| write_error(path, e))?;
        let (need, folder) = (remote.size - download.have, path.parent().unwrap_or(Path::new(".")));
        if let Ok(disk) = rustix::fs::statvfs(folder) {
            let free = disk.f_bavail.saturating_mul(disk.f_frsize);
            if free < need {
                let file = transfer.file.clone();
                return Err(HubError::Space { file, need, folder: folder.into(), free });
            }
        }
        Ok(download)
    }

    /// Resumes what an earlier attempt left.
    fn find(&mut self) -> io::Result<()> {
        let len = self.file.metadata()?.len();
        if len > self.remote.size {
            return self.restart();
        }
        let mut buffer = vec![0; 1 << 16];
        loop {
            match self.file.read(&mut buffer)? {
                0 => break,
                read => {
                    self.check.update(&buffer[..read]);
                    self.have += read as u64;
                }
            }
        }
        self.found = self.have;
        Ok(())
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        (self.have, self.found, self.check) = (0, 0, Check::of(self.remote));
        Ok(())
    }

    fn run(mut self, say: &mut dyn FnMut(Event<'_>)) -> Result<(), HubError> {
        let path = self.path;
        let (file, size) = (self.transfer.file.as_str(), self.remote.size);
        if !self.check.knows() {
            say(Event::Note(&format!("the hub names no digest of `{file}`: only its size is checked")));
        }
        say(Event::Begins { file, size, have: self.have });
        loop {
            self.complete(say)?;
            if std::mem::replace(&mut self.check, Check::of(self.remote)).agrees_with(self.remote) {
                self.file.sync_all().map_err(|e| write_error(path, e))?;
                return Ok(());
            }
            if self.found == 0 {
                return Err(self.transfer.wrong(self.remote));
            }
            // the damage may be in what an earlier process left
            say(Event::Note(&format!("what was left of `{file}` was damaged: it is fetched from its start")));
            self.restart().map_err(|e| write_error(path, e))?;
        }
    }

    /// Sends requests until all bytes are there.
    fn complete(&mut self, say: &mut dyn FnMut(Event<'_>)) -> Result<(), HubError> {
        let (client, path, size) = (self.transfer.client, self.path, self.remote.size);
        let (file, commit) = (&self.transfer.file, &self.transfer.commit);
        let (mut fruitless, mut restarts) = (0, 0);
        while self.have < size {
            let before = self.have;
            let reply = match client.content(commit, file, self.have) {
                Err(error) if error.is_passing() => {
                    client.pause(&mut fruitless, client.patience.tries, error)?;
                    continue;
                }
                reply => reply?,
            };
            let status = reply.response.status().as_u16();
            let begins = reply.response.headers().get("content-range").and_then(|v| v.to_str().ok());
            if self.have > 0 && (status != 206 || begins.is_none_or(|range| !starts_at(range, self.have))) {
                // the server does not support ranges, or has fewer bytes than announced
                restarts += 1;
                if restarts >= client.patience.tries {
                    return Err(self.broken(before, restarts));
                }
                self.restart().map_err(|e| write_error(path, e))?;
                say(Event::At(0));
                if status != 200 {
                    continue;
                }
            }
            let started = self.have;
            self.receive(reply.response.into_body().into_reader(), say)?;
            if self.have < size {
                let error = self.broken(self.have, fruitless + 1);
                self.count(&mut fruitless, self.have - started, error)?;
            }
        }
        Ok(())
    }

    fn broken(&self, got: u64, tries: u32) -> HubError {
        HubError::Broken { file: self.transfer.file.clone(), got, size: self.remote.size, tries }
    }

    /// Counts an incomplete attempt; returns the error after too many without progress in a row.
    fn count(&self, fruitless: &mut u32, brought: u64, error: HubError) -> Result<(), HubError> {
        if brought >= PROGRESS {
            *fruitless = 0;
            return Ok(());
        }
        let client = self.transfer.client;
        client.pause(fruitless, client.patience.tries, error)
    }

    /// Writes the body until it ends or breaks off; the caller checks which.
    fn receive(&mut self, mut body: impl io::Read, say: &mut dyn FnMut(Event<'_>)) -> Result<(), HubError> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let read = match body.read(&mut buffer) {
                Ok(0) | Err(_) => return Ok(()),
                Ok(read) => read,
            };
            if self.have + read as u64 > self.remote.size {
                return Err(self.transfer.too_long(self.remote));
            }
            self.file.write_all(&buffer[..read]).map_err(|e| write_error(self.path, e))?;
            self.check.update(&buffer[..read]);
            self.have += read as u64;
            say(Event::At(self.have));
        }
    }
}

/// Whether a `Content-Range` such as `bytes 5-9/10` begins at `from`.
fn starts_at(range: &str, from: u64) -> bool {
    let start = range.strip_prefix("bytes ").and_then(|rest| rest.split_once('-'));
    start.is_some_and(|(start, _)| start.trim().parse() == Ok(from))
}

/// The digest in an ETag.
enum Check {
    /// Of an LFS file.
    Sha256(Sha256),
    /// git's digest of a file, or, from some mirrors, the plain SHA-1.
    Sha1 { git: Sha1, plain: Sha1 },
    /// Not a known digest.
    Unknown,
}

impl Check {
    fn of(remote: &Remote) -> Self {
        let is_hex = remote.etag.bytes().all(|b| b.is_ascii_hexdigit());
        match remote.etag.len() {
            64 if is_hex => Self::Sha256(Sha256::new()),
            40 if is_hex => {
                let git = Sha1::new_with_prefix(format!("blob {}\0", remote.size));
                Self::Sha1 { git, plain: Sha1::new() }
            }
            _ => Self::Unknown,
        }
    }

    fn knows(&self) -> bool {
        !matches!(self, Self::Unknown)
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Sha1 { git, plain } => {
                git.update(bytes);
                plain.update(bytes);
            }
            Self::Unknown => {}
        }
    }

    fn agrees_with(self, remote: &Remote) -> bool {
        let etag = remote.etag.to_ascii_lowercase();
        match self {
            Self::Sha256(hash) => hex(&hash.finalize()) == etag,
            Self::Sha1 { git, plain } => [git, plain].into_iter().any(|hash| hex(&hash.finalize()) == etag),
            Self::Unknown => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn git_names_files_by_their_length_and_content() {
        // git hash-object of "hello\n"
        let remote = Remote { etag: "ce013625030ba8dba906f756967f9e9ca394464a".into(), size: 6, commit: String::new() };
        let mut check = Check::of(&remote);
        check.update(b"hello\n");
        assert!(check.agrees_with(&remote));
        assert!(!Check::of(&remote).agrees_with(&remote));
    }

    #[test]
    fn ranges_begin_where_they_say() {
        assert!(starts_at("bytes 5-9/10", 5));
        assert!(!starts_at("bytes 0-9/10", 5) && !starts_at("5-9/10", 5));
    }
}
