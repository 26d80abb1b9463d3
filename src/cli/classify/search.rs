//! Searches folders for images (`--recursive`), in order of their names, and reports what is left out.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::bail;

use crate::cli::printable::{self, say};

/// File extensions that are searched for: those of the formats that can be decoded.
const EXTENSIONS: [&str; 10] = ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"];
/// System folders that hold no photographs: thumbnails and side files of Synology, macOS archives, Windows and recycle
/// bins.
const SYSTEM: [&str; 7] =
    ["@eaDir", "#recycle", "@Recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"];

/// An image to classify, or an entry that can't be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Where it is.
    pub path: PathBuf,
    /// Why it can't be read; `None` for an image to classify.
    pub refused: Option<String>,
    /// Whether it is a folder that can't be searched.
    pub is_folder: bool,
}

impl Found {
    /// An image to classify.
    pub fn image(path: PathBuf) -> Self {
        Self { path, refused: None, is_folder: false }
    }
}

/// The result of a search.
#[derive(Debug, Default)]
pub struct Search {
    /// Images, and entries with an image's name that can't be read.
    pub found: Vec<Found>,
    /// Number and first path of the entries left out, by reason.
    left_out: BTreeMap<Reason, (usize, String)>,
    /// Whether to include hidden names and system folders.
    hidden: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    Hidden,
    Link,
    Kind,
}

impl Search {
    /// An empty search. `hidden` includes names that begin with a dot, and system folders.
    pub fn new(hidden: bool) -> Self {
        Self { hidden, ..Self::default() }
    }

    /// Adds every image under `folder`, in order of the names. Follows links to files, but not to folders, which may
    /// form a cycle. A subfolder that can't be read is added to `found` as such.
    pub fn folder(&mut self, folder: &Path) -> io::Result<()> {
        let mut entries: Vec<PathBuf> = fs::read_dir(folder)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
        entries.sort();
        for path in entries {
            let name = path.file_name().unwrap_or_default();
            let hidden = name.as_encoded_bytes().starts_with(b".") || SYSTEM.iter().any(|system| name == *system);
            if hidden && !self.hidden {
                self.leave_out(Reason::Hidden, name);
                continue;
            }
            match fs::metadata(&path) {
                Ok(there) if there.is_dir() && path.is_symlink() => self.leave_out(Reason::Link, name),
                Ok(there) if there.is_dir() => {
                    if let Err(e) = self.folder(&path) {
                        self.refuse_folder(path, &e);
                    }
                }
                Ok(_) | Err(_) if !is_image(&path) => self.leave_out(Reason::Kind, name),
                Ok(there) if there.is_file() => self.found.push(Found::image(path)),
                Ok(_) => self.refuse(path, "it is no file".into()),
                Err(e) if path.is_symlink() => self.refuse(path, format!("its link can't be followed: {e}")),
                Err(e) => self.refuse(path, format!("can't read it: {e}")),
            }
        }
        Ok(())
    }

    /// Adds an entry that can't be read.
    pub fn refuse(&mut self, path: PathBuf, reason: String) {
        self.found.push(Found { path, refused: Some(reason), is_folder: false });
    }

    /// Adds a folder that can't be searched.
    pub fn refuse_folder(&mut self, path: PathBuf, error: &io::Error) {
        self.found.push(Found { path, refused: Some(format!("can't search it: {error}")), is_folder: true });
    }

    fn leave_out(&mut self, reason: Reason, name: &OsStr) {
        let (count, _) = self.left_out.entry(reason).or_insert_with(|| (0, printable::path(Path::new(name))));
        *count += 1;
    }

    /// The readable images. Names the others, and what was left out, on stderr; if no image is left, the error does,
    /// with `hint` as the next step.
    pub fn readable(self, hint: &str) -> anyhow::Result<Vec<PathBuf>> {
        let left_out = self.left_out();
        let mut files = Vec::new();
        for Found { path, refused, .. } in self.found {
            match refused {
                None => files.push(path),
                Some(reason) => say(format_args!("warning: `{}` is left out: {reason}", printable::path(&path))),
            }
        }
        if files.is_empty() {
            let left = left_out.map(|left| format!("; {left}")).unwrap_or_default();
            bail!("there is no image file (looked for: {}); {hint}{left}", known());
        }
        if let Some(left) = left_out {
            say(format_args!("note: {left}"));
        }
        Ok(files)
    }

    /// What was left out and why, as a sentence; `None` if nothing was.
    pub fn left_out(&self) -> Option<String> {
        let what = |(reason, (count, first)): (&Reason, &(usize, String))| {
            let example = if *count == 1 { first.clone() } else { format!("{first}, …") };
            let (one, many) = match reason {
                Reason::Hidden => ("hidden name or system folder", "hidden names and system folders"),
                Reason::Link => ("link to a folder", "links to folders"),
                Reason::Kind => ("file that is no image by its name", "files that are no images by their names"),
            };
            let hint = if *reason == Reason::Hidden { ": --hidden takes them" } else { "" };
            format!("{count} {} ({example}{hint})", if *count == 1 { one } else { many })
        };
        let parts: Vec<_> = self.left_out.iter().map(what).collect();
        if parts.is_empty() { None } else { Some(format!("left out {}", parts.join("; "))) }
    }
}

/// Whether a file's name is an image's.
pub fn is_image(path: &Path) -> bool {
    let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
    extension.is_some_and(|e| EXTENSIONS.contains(&e.as_str()))
}

/// The formats that are searched for, for messages.
pub fn known() -> String {
    EXTENSIONS.join(", ")
}
