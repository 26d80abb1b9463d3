//! API keys; without a key file, requests need none.
//!
//! Keys are kept as digests and compared in constant time. Health calls need no key, nor do pages, which hold no data;
//! metrics are on another port.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::doors::{self, Hosts};
use super::status::{ApiError, Code};
use crate::model::regular_file;

/// Most bytes of a key file.
const LARGEST: u64 = 16 << 20;

/// Why a key file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The file can't be read.
    #[error("can't read API keys from `{path}`: {source} (--api-key-file)")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A line is not a valid key, or the file holds no key.
    #[error("`{path}` is no file of API keys: {reason}; write one key a line, at least 16 characters without spaces")]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

type Digests = Arc<[[u8; 32]]>;

/// The keys of a file.
#[derive(Debug)]
pub(super) struct Keys {
    path: PathBuf,
    digests: RwLock<Digests>,
}

impl Keys {
    /// Reads a file: one key per line; empty lines and lines that start with `#` are skipped.
    pub(super) fn open(path: PathBuf) -> Result<Self, KeysError> {
        let digests = RwLock::new(read(&path)?);
        Ok(Self { path, digests })
    }

    /// Reads the file again and returns the number of keys; on failure the old keys stay.
    pub(super) fn reload(&self) -> Result<usize, KeysError> {
        let digests = read(&self.path)?;
        let count = digests.len();
        *self.digests.write().unwrap_or_else(PoisonError::into_inner) = digests;
        Ok(count)
    }

    fn admits(&self, headers: &HeaderMap) -> bool {
        let bearer = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes).and_then(bearer);
        let Some(key) = bearer else { return false };
        let digest = digest(key);
        let digests = self.digests.read().unwrap_or_else(PoisonError::into_inner).clone();
        // every key is compared, so that the time does not show which one matches
        digests.iter().fold(subtle::Choice::from(0), |found, known| found | known.ct_eq(&digest)).into()
    }
}

/// The key of `Bearer KEY`; the scheme is case-insensitive.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

fn digest(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

fn read(path: &Path) -> Result<Digests, KeysError> {
    let bytes = regular_file::read(path, LARGEST).map_err(|source| KeysError::Io { path: path.into(), source })?;
    let text = String::from_utf8_lossy(&bytes);
    let bad = |reason: String| KeysError::Bad { path: path.into(), reason };
    let mut digests = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let key = line.trim();
        if key.is_empty() || key.starts_with('#') {
            continue;
        }
        if key.len() < 16 || !key.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(bad(format!("line {} is too short or has characters that no header takes", i + 1)));
        }
        digests.push(digest(key.as_bytes()));
    }
    if digests.is_empty() { Err(bad("it holds no key".into())) } else { Ok(digests.into()) }
}

/// The layer.
pub(super) async fn check(State((keys, hosts)): State<(Arc<Keys>, Hosts)>, request: Request, next: Next) -> Response {
    let open = doors::is_open(&hosts, request.method(), request.uri().path());
    if open || keys.admits(request.headers()) {
        return next.run(request).await;
    }
    let text = "an API key is needed: send the header `authorization: Bearer KEY`";
    let error = ApiError::new(Code::Unauthenticated, text);
    if doors::is_grpc(&request) {
        return error.into_status().into_http();
    }
    let mut response = error.into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(text: &str) -> Result<Keys, KeysError> {
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(file.path(), text).expect("write");
        Keys::open(file.path().into())
    }

    fn asked(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_str(value).expect("header"))])
    }

    #[test]
    fn only_whole_keys_of_the_file_are_admitted() {
        let keys = keys("# ours\nfirst-key-0123456789\n\nsecond-key-0123456789\n").expect("keys");
        for good in ["Bearer first-key-0123456789", "bearer second-key-0123456789", "BEARER  first-key-0123456789 "] {
            assert!(keys.admits(&asked(good)), "{good}");
        }
        for bad in
            ["", "Bearer", "Bearer ", "Bearer first-key-012345678", "first-key-0123456789", "Basic x", "Bearer # ours"]
        {
            assert!(!keys.admits(&asked(bad)), "{bad}");
        }
        assert!(!keys.admits(&HeaderMap::new()));
    }

    #[test]
    fn a_file_that_would_let_nobody_or_anybody_in_is_refused() {
        for bad in ["", "# nothing\n", "short\n", "two words that are long enough\n"] {
            assert!(matches!(keys(bad), Err(KeysError::Bad { .. })), "{bad}");
        }
    }
}
