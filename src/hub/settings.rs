//! The hub's own environment variables: its endpoint, its cache, the token to send, and whether to send requests at
//! all.

use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The default endpoint.
const ENDPOINT: &str = "https://huggingface.co";

/// How the hub is accessed.
#[derive(Debug, Clone)]
pub struct HubOptions {
    /// URL of the hub (`HF_ENDPOINT`), without a trailing slash.
    pub endpoint: String,
    /// Folder of the hub's cache (`HF_HUB_CACHE`, else `hub` in `HF_HOME`).
    pub cache: PathBuf,
    /// Token, sent to the endpoint's host only (`HF_TOKEN`, else the file that `hf auth login` wrote).
    pub token: Option<Token>,
    /// No requests are sent (`HF_HUB_OFFLINE`).
    pub offline: bool,
    /// Timeouts and retries.
    pub patience: Patience,
}

/// A secret that is never displayed.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// Wraps a token.
    pub fn new(token: &str) -> Self {
        Self(token.trim().into())
    }

    /// The value of the header `authorization`.
    #[cfg(feature = "hub")]
    pub(super) fn bearer(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Timeouts and retries.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Longest wait for a connection.
    pub connect: Duration,
    /// Longest wait for a response and for each further part of it (`HF_HUB_ETAG_TIMEOUT`, `HF_HUB_DOWNLOAD_TIMEOUT`).
    pub read: Duration,
    /// Longest that one response may take; the file is then requested again from where it stopped.
    pub response: Duration,
    /// Attempts without progress in a row before giving up.
    pub tries: u32,
    /// Pause after the first attempt without progress; doubled after each further one.
    pub pause: Duration,
    /// Longest pause, whatever the hub asks for.
    pub longest_pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            read: Duration::from_secs(10),
            response: Duration::from_secs(120),
            tries: 5,
            pause: Duration::from_millis(500),
            longest_pause: Duration::from_secs(30),
        }
    }
}

impl HubOptions {
    /// Reads the variables as Python's `huggingface_hub` does. If none names the cache folder and the default one can't
    /// be written, `spare` is used.
    pub fn from_environment(spare: &Path) -> Self {
        let home = set("HF_HOME").map(expanded);
        let usual = home.clone().or_else(|| {
            let caches = set("XDG_CACHE_HOME").map(expanded).or_else(|| Some(home_folder()?.join(".cache")));
            Some(caches?.join("huggingface"))
        });
        let named = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"].into_iter().find_map(set).map(expanded);
        let cache = named.or_else(|| home.map(|home| home.join("hub"))).unwrap_or_else(|| {
            let folder = usual.clone().map(|usual| usual.join("hub"));
            // an existing folder may be read even if it can't be written
            folder.filter(|folder| folder.is_dir() || can_write(folder)).unwrap_or_else(|| spare.join("hub"))
        });
        let token_file = set("HF_TOKEN_PATH").map(expanded).or_else(|| Some(usual?.join("token")));
        let token = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].into_iter().find_map(set);
        let token = token.or_else(|| fs::read_to_string(token_file?).ok());
        let mut patience = Patience::default();
        let seconds = ["HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"].into_iter().filter_map(set);
        // both timeouts use one limit: the longer one
        if let Some(longest) = seconds.filter_map(|s| s.trim().parse::<u64>().ok()).filter(|s| *s > 0).max() {
            patience.read = Duration::from_secs(longest.min(3600));
        }
        Self {
            endpoint: set("HF_ENDPOINT").as_deref().unwrap_or(ENDPOINT).trim().trim_end_matches('/').into(),
            cache,
            token: token.map(|t| Token::new(&t)).filter(|t| !t.0.is_empty()),
            offline: ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].into_iter().find_map(set).is_some_and(|v| is_true(&v)),
            patience,
        }
    }
}

/// A variable's value, unless it is empty.
fn set(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.trim().is_empty())
}

fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&value.trim().to_ascii_lowercase().as_str())
}

fn home_folder() -> Option<PathBuf> {
    env::home_dir().filter(|home| home.is_absolute())
}

/// A path with a leading `~` replaced.
fn expanded(path: String) -> PathBuf {
    match (path.strip_prefix("~/"), home_folder()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => path.into(),
    }
}

/// Whether a folder exists or can be created, and is writable.
pub fn can_write(folder: &Path) -> bool {
    fs::create_dir_all(folder).and_then(|()| tempfile::tempfile_in(folder)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_not_shown() {
        let options =
            HubOptions { token: Some(Token::new("hf_secret\n")), ..HubOptions::from_environment(Path::new("x")) };
        assert!(!format!("{options:?}").contains("secret"));
        assert_eq!(Token::new("a\n"), Token::new("a"));
    }

    #[test]
    fn switches_are_read_as_python_reads_them() {
        assert!(["1", "ON", "yes", "True "].iter().all(|v| is_true(v)));
        assert!(["0", "off", "no", "2", ""].iter().all(|v| !is_true(v)));
    }
}
