//! Names of models on the hub: `ORG/NAME`, optionally with `@REVISION` after it and `hf://` before it.

use std::fmt;

use super::HubError;

/// Prefix for the hub, whatever is in the working folder.
const SCHEME: &str = "hf://";
/// Extensions of file names: `folder/file` with one of them is not a model on the hub.
const FILES: [&str; 9] = [".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt", ".json", ".onnx", ".zip"];

/// A model on the hub.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct HubId {
    organisation: String,
    name: String,
    revision: Option<String>,
}

impl HubId {
    /// Parses a name.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        let bad = |reason| HubError::NoId { given: text.into(), reason };
        let whole = text.strip_prefix(SCHEME).unwrap_or(text);
        let (repository, revision) = match whole.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (whole, None),
        };
        let Some((organisation, name)) = repository.split_once('/') else {
            return Err(bad("it is not ORG/NAME"));
        };
        if name.contains('/') {
            return Err(bad("it has more than one `/`"));
        }
        if [organisation, name].iter().any(|part| !is_part(part)) {
            return Err(bad("names are letters, digits, `_`, `-` and `.`, 96 at most"));
        }
        if revision.is_some_and(|revision| !is_revision(revision)) {
            return Err(bad("what follows `@` is no branch, tag or commit"));
        }
        Ok(Self { organisation: organisation.into(), name: name.into(), revision: revision.map(String::from) })
    }

    /// Whether a word that is no file or folder here may be a model on the hub, rather than a missing file.
    pub fn is_meant(text: &str) -> bool {
        text.starts_with(SCHEME) || (Self::parse(text).is_ok() && !FILES.iter().any(|end| text.ends_with(end)))
    }

    /// Whether a word begins with `hf://`.
    pub fn is_address(text: &str) -> bool {
        text.starts_with(SCHEME)
    }

    /// `ORG/NAME`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.organisation, self.name)
    }

    /// The name without the organisation: the model's default name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Branch, tag or commit; `main` by default.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// The model's folder in the hub's cache.
    pub(super) fn folder(&self) -> String {
        format!("models--{}--{}", self.organisation, self.name)
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.organisation, self.name)?;
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

fn is_part(part: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let begins_well = part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    let ambiguous = part.contains("--") || part.contains("..") || part.ends_with(['.', '-']);
    begins_well && part.len() <= 96 && part.chars().all(plain) && !ambiguous
}

/// Whether git allows the revision, as far as paths and URLs depend on it.
fn is_revision(revision: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/');
    let part = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains("..");
    revision.len() <= 255 && revision.chars().all(plain) && revision.split('/').all(part)
}

/// Whether a revision is a full commit id, which never changes.
pub(super) fn is_commit(revision: &str) -> bool {
    matches!(revision.len(), 40 | 64) && revision.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        let id = HubId::parse("timm/nf_regnet_b1.ra2_in1k@refs/pr/1").expect("an id");
        assert_eq!((id.repository().as_str(), id.revision()), ("timm/nf_regnet_b1.ra2_in1k", "refs/pr/1"));
        assert_eq!((id.folder().as_str(), id.name()), ("models--timm--nf_regnet_b1.ra2_in1k", "nf_regnet_b1.ra2_in1k"));
        assert_eq!(HubId::parse("hf://timm/x").expect("an id").revision(), "main");
        for good in ["timm/x", "timm/x@main", "a/b.c", "hf://a/b", "hf://./x"] {
            assert!(HubId::is_meant(good), "{good}");
        }
        for path in
            ["./x", "/x", "../x", "~/x", "x", "x/", "x/y/z", "a/b.pth", "a/b c", "a/--b", "a/..", ".a/b", "a/b@"]
        {
            assert!(!HubId::is_meant(path), "{path}");
        }
        for bad in ["hf://x", "hf://x/y/z", "hf://./x", "a/b@../c", "a/b@", "a/b@x..y", "a/b@/x", "a/b@é"] {
            assert!(HubId::parse(bad).is_err(), "{bad}");
        }
    }
}
