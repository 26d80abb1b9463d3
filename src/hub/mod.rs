//! Fetches checkpoints by their names on the model hub: complete or not at all, into the hub's own cache, verified by
//! size and digest, resumed after a download broke off.
//!
//! `id` parses names, `settings` reads the hub's variables, `store` is the cache on disk, `client` sends requests (with
//! the cargo feature `hub`; without it only the cache is read), `download` fetches one file. Only `nfold fold` and
//! `nfold serve SOURCE` use it. Knows which files make a checkpoint, not what is in them.

#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod download;
mod id;
mod settings;
// without a client nothing is written there
#[cfg_attr(not(feature = "hub"), allow(dead_code))]
mod store;

use std::io;
use std::path::{Path, PathBuf};

pub use self::id::HubId;
pub use self::settings::{HubOptions, Patience, Token, can_write};
use self::store::Store;
use crate::checkpoint::{self, CheckpointError};

/// Why a model can't be fetched from the hub.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The name is not valid on the hub.
    #[error(
        "`{given}` is neither a file or folder here nor a name on the hub (ORG/NAME or ORG/NAME@REVISION): {reason}"
    )]
    NoId {
        /// The name.
        given: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The hub has no such model, or hides it.
    #[error(
        "`{id}` is no file or folder here, and {endpoint} has no such model or hides it; check the name, and set HF_TOKEN to read a private one"
    )]
    NotFound {
        /// The model.
        id: String,
        /// The hub.
        endpoint: String,
    },
    /// The model is gated: its owner asks readers to agree to terms first.
    #[error("`{id}` is gated: accept its terms at {endpoint}/{id}, then set HF_TOKEN to a token of that account")]
    Gated {
        /// The model.
        id: String,
        /// The hub.
        endpoint: String,
    },
    /// The token has no read access.
    #[error("{endpoint} does not let this HF_TOKEN read `{id}`; use a token that may")]
    Forbidden {
        /// The model.
        id: String,
        /// The hub.
        endpoint: String,
    },
    /// The model has no such revision.
    #[error("`{id}` has no revision `{revision}`; its branches and tags are at {endpoint}/{id}/tree/main")]
    NoRevision {
        /// The model.
        id: String,
        /// The revision.
        revision: String,
        /// The hub.
        endpoint: String,
    },
    /// The revision has no such file of a checkpoint.
    #[error("`{id}` has no {what}, so it is no checkpoint of timm that nfold can fold")]
    NoCheckpoint {
        /// The model.
        id: String,
        /// The missing files.
        what: String,
    },
    /// The cache does not have the model, and requests are disabled.
    #[error("`{id}` is not whole in the cache `{cache}`, and {why}")]
    Offline {
        /// The model.
        id: String,
        /// The cache.
        cache: PathBuf,
        /// Why requests are disabled, and what to do.
        why: &'static str,
    },
    /// The host can't be reached.
    #[error("can't reach {endpoint}: {reason}; check the network, HF_ENDPOINT and HTTPS_PROXY")]
    Unreachable {
        /// The hub, or the host of a redirect.
        endpoint: String,
        /// The system's error.
        reason: String,
    },
    /// The hub is overloaded or has an internal error.
    #[error("{endpoint} answers {status} for `{file}`{after}; try again later")]
    Busy {
        /// The hub, or the host of a redirect.
        endpoint: String,
        /// The HTTP status.
        status: u16,
        /// The file.
        file: String,
        /// ` after N tries`, or empty.
        after: String,
        /// `Retry-After` in seconds.
        seconds: Option<u64>,
    },
    /// An unexpected status.
    #[error("{endpoint} answers {status} for `{file}`{message}")]
    Status {
        /// The hub, or the host of a redirect.
        endpoint: String,
        /// The HTTP status.
        status: u16,
        /// The file.
        file: String,
        /// `: ` and the hub's message, or empty.
        message: String,
    },
    /// The response is not from a model hub.
    #[error(
        "{endpoint} does not answer `{file}` as a model hub does ({what}); is HF_ENDPOINT right, or does a proxy want a login?"
    )]
    NoHub {
        /// The hub, or the host of a redirect.
        endpoint: String,
        /// The file.
        file: String,
        /// What is wrong with the response.
        what: String,
    },
    /// A redirect that can't be followed.
    #[error("{endpoint} redirects `{file}` {what}; that is not followed")]
    Redirect {
        /// The hub, or the host of a redirect.
        endpoint: String,
        /// The file.
        file: String,
        /// The target.
        what: String,
    },
    /// The connection broke repeatedly.
    #[error(
        "`{file}` broke off at {got} of {size} bytes {tries} times in a row; what is there is kept: the same command goes on from it"
    )]
    Broken {
        /// The file.
        file: String,
        /// Bytes received.
        got: u64,
        /// Bytes announced.
        size: u64,
        /// Attempts in a row.
        tries: u32,
    },
    /// The hub sent more than it announced.
    #[error("`{file}` is longer than the {size} bytes that {endpoint} announced; nothing of it is kept")]
    TooLong {
        /// The file.
        file: String,
        /// The hub.
        endpoint: String,
        /// Bytes announced.
        size: u64,
    },
    /// The content's digest is not the announced one.
    #[error("`{file}` has another digest than {endpoint} announced ({etag}); nothing of it is kept, try again")]
    Digest {
        /// The file.
        file: String,
        /// The hub.
        endpoint: String,
        /// The announced digest.
        etag: String,
    },
    /// A file that should be small is too large.
    #[error("`{file}` has {size} bytes, and {most} are the most that nfold reads")]
    TooLarge {
        /// The file.
        file: String,
        /// Size in bytes.
        size: u64,
        /// Most bytes.
        most: u64,
    },
    /// Not enough disk space.
    #[error(
        "`{file}` needs {need} bytes and `{folder}` has {free} free; make room, or set HF_HUB_CACHE to another disk"
    )]
    Space {
        /// The file.
        file: String,
        /// Bytes needed.
        need: u64,
        /// The destination.
        folder: PathBuf,
        /// Bytes free.
        free: u64,
    },
    /// The disk filled up during the download.
    #[error(
        "the disk of `{0}` is full; make room, or set HF_HUB_CACHE to another disk; the same command goes on from what is there"
    )]
    Full(PathBuf),
    /// The cache can't be written.
    #[error("can't write `{path}`: {source}; set HF_HUB_CACHE to a folder that can be written")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// No certificate authorities are installed.
    #[error(
        "no certificate authorities are installed, so {0} can't be trusted; install ca-certificates, or set SSL_CERT_FILE"
    )]
    NoAuthorities(String),
    /// `HF_ENDPOINT` is not a valid URL.
    #[error("HF_ENDPOINT `{0}` is no address such as https://huggingface.co")]
    BadEndpoint(String),
    /// nfold can't fold a model with this configuration.
    #[error("`{id}`: {source}")]
    Checkpoint {
        /// The model.
        id: String,
        /// Why.
        source: CheckpointError,
    },
}

impl HubError {
    /// Whether the error may be temporary, so that a retry or the cache can help.
    fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Busy { .. })
    }
}

/// Progress of a download.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    /// A file's download begins.
    Begins {
        /// Name of the file.
        file: &'a str,
        /// Size in bytes.
        size: u64,
        /// Bytes that an earlier attempt left.
        have: u64,
    },
    /// This many bytes are there.
    At(u64),
    /// The file is complete and verified.
    Ends,
    /// A message for the user.
    Note(&'a str),
}

/// A checkpoint in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// A folder with the checkpoint's files.
    pub folder: PathBuf,
    /// The commit.
    pub commit: String,
}

/// Fetches a model's checkpoint into the cache, unless it is there. `check` examines its configuration before its
/// weights are fetched. Blocks for as long as the download takes.
pub fn fetch(
    id: &HubId,
    options: &HubOptions,
    check: &dyn Fn(&[u8]) -> Result<(), CheckpointError>,
    say: &mut dyn FnMut(Event<'_>),
) -> Result<Snapshot, HubError> {
    let store = Store::new(&options.cache, id);
    let cached = || {
        let commit = store.commit(id.revision())?;
        Some(Snapshot { folder: store.whole(&commit, &checkpoint::HUB_WEIGHTS)?, commit })
    };
    let missing = |why| HubError::Offline { id: id.to_string(), cache: options.cache.clone(), why };
    // a commit never changes
    if (options.offline || id::is_commit(id.revision()))
        && let Some(snapshot) = cached()
    {
        return Ok(snapshot);
    }
    if options.offline {
        return Err(missing("HF_HUB_OFFLINE forbids fetching it; unset that, or name the folder of a copy"));
    }
    match online(id, options, &store, check, say) {
        Err(error) if error.is_passing() => match cached() {
            Some(snapshot) => {
                let short = &snapshot.commit[..12];
                say(Event::Note(&format!("{error}; commit {short}, which is cached, is used instead")));
                Ok(snapshot)
            }
            None => Err(error),
        },
        other => other,
    }
}

#[cfg(not(feature = "hub"))]
fn online(
    id: &HubId,
    options: &HubOptions,
    store: &Store,
    _: &dyn Fn(&[u8]) -> Result<(), CheckpointError>,
    _: &mut dyn FnMut(Event<'_>),
) -> Result<Snapshot, HubError> {
    if let Some(commit) = store.commit(id.revision())
        && let Some(folder) = store.whole(&commit, &checkpoint::HUB_WEIGHTS)
    {
        return Ok(Snapshot { folder, commit });
    }
    let why =
        "this build can't fetch it (cargo feature `hub`); fetch it with `hf download`, or name the folder of a copy";
    Err(HubError::Offline { id: id.to_string(), cache: options.cache.clone(), why })
}

#[cfg(feature = "hub")]
fn online(
    id: &HubId,
    options: &HubOptions,
    store: &Store,
    check: &dyn Fn(&[u8]) -> Result<(), CheckpointError>,
    say: &mut dyn FnMut(Event<'_>),
) -> Result<Snapshot, HubError> {
    use self::client::Client;
    use self::download::{Transfer, in_memory, to_store};

    let client = Client::new(id, options)?;
    let none = |what: String| HubError::NoCheckpoint { id: id.to_string(), what };
    let config = client
        .look(id.revision(), checkpoint::CONFIG_FILE)?
        .ok_or_else(|| none(format!("{} at revision `{}`", checkpoint::CONFIG_FILE, id.revision())))?;
    let commit = config.commit.clone();
    // only with the preferred format of weights: the revision may have gained it since
    if let Some(folder) = store.whole(&commit, &checkpoint::HUB_WEIGHTS[..2]) {
        // fails in a read-only cache, where it is not needed
        let _ = store.refer(id.revision(), &commit);
        return Ok(Snapshot { folder, commit });
    }
    let transfer = |file: &str| Transfer { client: &client, store, commit: commit.clone(), file: file.into() };
    let text = in_memory(&transfer(checkpoint::CONFIG_FILE), &config)?;
    check(&text).map_err(|source| HubError::Checkpoint { id: id.to_string(), source })?;

    let mut weights = None;
    for file in checkpoint::HUB_WEIGHTS {
        if let Some(found) = client.look(&commit, file)? {
            weights = Some((file, found));
            break;
        }
    }
    let (file, found) = weights.ok_or_else(|| none(checkpoint::HUB_WEIGHTS.join(", ")))?;
    store.prepare()?;
    let mut small = vec![(checkpoint::CONFIG_FILE.to_string(), config, text)];
    let mut large = Vec::new();
    if checkpoint::is_index(file) {
        let index = in_memory(&transfer(file), &found)?;
        let bad = |reason| HubError::Checkpoint {
            id: id.to_string(),
            source: CheckpointError::Config { path: file.into(), reason },
        };
        for shard in checkpoint::shards_of(&index).map_err(bad)? {
            let found = client.look(&commit, &shard)?.ok_or_else(|| none(format!("`{shard}`, which {file} names")))?;
            large.push((shard, found));
        }
        small.push((file.into(), found, index));
    } else {
        large.push((file.into(), found));
    }
    for (file, found) in &large {
        to_store(&transfer(file), found, say)?;
    }
    for (_, found, text) in &small {
        store.put(&found.etag, text)?;
    }
    let named = |(file, found): (String, client::Remote)| (file, found.etag);
    let files: Vec<_> =
        large.into_iter().chain(small.into_iter().map(|(file, found, _)| (file, found))).map(named).collect();
    let folder = store.publish(id.revision(), &commit, &files)?;
    Ok(Snapshot { folder, commit })
}

/// The error of a failed write.
#[cfg_attr(not(feature = "hub"), allow(dead_code))]
fn write_error(path: &Path, source: io::Error) -> HubError {
    if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
        HubError::Full(path.into())
    } else {
        HubError::Write { path: path.into(), source }
    }
}
