//! Lists a model repository: which folders are versions of models, and which are skipped and why.
//!
//! The layout is `REPOSITORY/NAME/VERSION`. NAME is valid by [`check_name`]; VERSION is a whole number in canonical
//! form (`1`, not `01` or `+1`), a folder with a manifest. Symbolic links are followed, and keep the names that they
//! have in the repository: ConfigMaps and git-sync use such links. Names that begin with a dot (`..data`, `.git`) and
//! files beside folders are ignored.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::{MANIFEST_FILE, ModelError, check_name, io};
use crate::files;

/// The models of a repository.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// Models by name, each with its versions in ascending order, at least one.
    pub models: BTreeMap<String, Vec<u64>>,
    /// Folders that look like models or versions but aren't valid.
    pub left_out: Vec<LeftOut>,
}

/// A skipped folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct LeftOut {
    /// Path relative to the repository.
    pub path: PathBuf,
    /// Reason, and what to do about it.
    pub reason: String,
}

impl Listing {
    fn leave_out(&mut self, path: impl Into<PathBuf>, reason: impl Into<String>) {
        self.left_out.push(LeftOut { path: path.into(), reason: reason.into() });
    }

    /// Names of the models, comma-separated, or `nothing`; and the number of skipped folders.
    pub fn summary(&self) -> String {
        let names = self.models.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let names = if names.is_empty() { "nothing".into() } else { names };
        match self.left_out.first() {
            None => names,
            Some(left_out) => format!("{names}; left out: {left_out}"),
        }
    }
}

impl std::fmt::Display for LeftOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // escaped, since a folder's name may hold control characters
        write!(f, "`{}` {}", self.path.to_string_lossy().escape_debug(), self.reason)
    }
}

/// Refuses a repository that does not exist or is no folder, without looking into it.
pub fn check(repository: &Path) -> Result<(), ModelError> {
    match fs::metadata(repository) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err(ModelError::NoFolder(repository.into())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(ModelError::NoRepository(repository.into())),
        Err(e) => Err(io("read", repository)(e)),
    }
}

/// Lists every folder of a repository. Fails only if the repository itself can't be read.
pub fn list(repository: &Path) -> Result<Listing, ModelError> {
    check(repository)?;
    let mut listing = Listing::default();
    for name in names(repository).map_err(io("read", repository))? {
        let folder = repository.join(&name);
        match is_folder(&folder) {
            Ok(true) => {}
            Ok(false) => continue,
            Err(reason) => {
                listing.leave_out(&name, reason);
                continue;
            }
        }
        if check_name(&name).is_err() {
            listing.leave_out(
                &name,
                "can't be a model's name; use letters, digits, `_`, `-` and `.`, starting with a letter or digit",
            );
            continue;
        }
        files::recover(&folder);
        let entries = match names(&folder) {
            Ok(entries) => entries,
            Err(e) => {
                listing.leave_out(&name, format!("can't be read: {e}"));
                continue;
            }
        };
        let (before, mut versions) = (listing.left_out.len(), Vec::new());
        for entry in entries {
            let path = Path::new(&name).join(&entry);
            match version(&folder, &entry) {
                Ok(found) => versions.extend(found),
                Err(reason) => listing.leave_out(path, reason),
            }
        }
        versions.sort_unstable();
        if !versions.is_empty() {
            listing.models.insert(name, versions);
        } else if listing.left_out.len() == before {
            listing.leave_out(name, "holds no version; a version is a folder whose name is a whole number");
        }
    }
    listing.left_out.sort();
    Ok(listing)
}

/// The version number of an entry in a model's folder; `None` if the entry is a file.
fn version(model: &Path, entry: &str) -> Result<Option<u64>, String> {
    let folder = model.join(entry);
    if !is_folder(&folder)? {
        return Ok(None);
    }
    let number: u64 = match entry.parse::<u64>() {
        Ok(number) if number.to_string() == entry => number,
        Ok(number) => return Err(format!("is no version: call it `{number}`")),
        Err(_) => return Err("is no version: its name has to be a whole number below 2^64".into()),
    };
    match fs::metadata(folder.join(MANIFEST_FILE)) {
        Ok(metadata) if metadata.is_file() => Ok(Some(number)),
        Ok(_) => Err(format!("is no version: its {MANIFEST_FILE} is not a file")),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(format!("is no version: it has no {MANIFEST_FILE}")),
        Err(e) => Err(format!("can't be read: {e}")),
    }
}

/// Whether a path is a folder; follows symbolic links.
fn is_folder(path: &Path) -> Result<bool, String> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(metadata.is_dir()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err("is a link that leads nowhere".into()),
        Err(e) => Err(format!("can't be read: {e}")),
    }
}

/// Names in a folder, except those that begin with a dot.
fn names(folder: &Path) -> std::io::Result<Vec<String>> {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.map(|e| e.file_name().to_string_lossy().into_owned());
    let names: Vec<String> = fs::read_dir(folder)?.map(name).collect::<Result<_, _>>()?;
    Ok(names.into_iter().filter(|name| !name.starts_with('.')).collect())
}
