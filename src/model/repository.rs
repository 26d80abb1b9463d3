//! What a model repository holds: which of its folders are versions of models, and which are left out, and why.
//!
//! `REPOSITORY/NAME/VERSION`: a name is what [`check_name`] takes, a version is a whole number in the digits it is usually
//! written with (`1`, not `01` or `+1`), and its folder has a manifest. Links are followed wherever they lead, under the
//! name that they have here: that is how ConfigMaps and git-sync lay a repository out. Names that begin with a
//! dot (`..data`, `.git`) and files beside folders are ignored.

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
    /// Folders that look like models or versions and are none.
    pub left_out: Vec<LeftOut>,
}

/// A folder that is left out.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct LeftOut {
    /// Its path below the repository.
    pub path: PathBuf,
    /// Why, and what to do about it.
    pub reason: String,
}

impl Listing {
    fn leave_out(&mut self, path: impl Into<PathBuf>, reason: impl Into<String>) {
        self.left_out.push(LeftOut { path: path.into(), reason: reason.into() });
    }

    /// Names that are there, comma-separated, or `nothing`; and how many folders are left out.
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
        // a folder's name is not to be trusted with a terminal
        write!(f, "`{}` {}", self.path.to_string_lossy().escape_debug(), self.reason)
    }
}

/// Looks at every folder of a repository. Only the repository itself can fail.
pub fn list(repository: &Path) -> Result<Listing, ModelError> {
    match fs::metadata(repository) {
        Ok(metadata) if metadata.is_dir() => {}
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io("read", repository)(e)),
        _ => return Err(ModelError::NoRepository(repository.into())),
    }
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

/// The version that a model's entry is; none if it is a file.
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

/// Whether a path leads to a folder, through links.
fn is_folder(path: &Path) -> Result<bool, String> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(metadata.is_dir()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err("is a link that leads nowhere".into()),
        Err(e) => Err(format!("can't be read: {e}")),
    }
}

/// Names of what a folder holds, without those that begin with a dot.
fn names(folder: &Path) -> std::io::Result<Vec<String>> {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.map(|e| e.file_name().to_string_lossy().into_owned());
    let names: Vec<String> = fs::read_dir(folder)?.map(name).collect::<Result<_, _>>()?;
    Ok(names.into_iter().filter(|name| !name.starts_with('.')).collect())
}
