//! Prints [`printable`] text.

use std::ffi::OsStr;
use std::fmt::{Arguments, Write as _};
use std::io::Write as _;
use std::path::Path;

pub use crate::printable::printable;

/// A path as [`printable`] text; bytes that are not UTF-8 become escapes such as `\xe9`.
pub fn path(path: &Path) -> String {
    os(path.as_os_str())
}

/// An argument as [`path`] shows it.
pub fn os(text: &OsStr) -> String {
    let mut out = String::new();
    for chunk in text.as_encoded_bytes().utf8_chunks() {
        out.push_str(&printable(chunk.valid()));
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

/// Prints one line on stderr as [`printable`] text. A failed write is ignored.
pub fn say(line: Arguments<'_>) {
    let line = line.to_string();
    let _ = writeln!(std::io::stderr(), "{}", printable(&line));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn bytes_that_are_no_text_can_be_told_apart() {
        use std::os::unix::ffi::OsStrExt as _;
        let name = OsStr::from_bytes(b"caf\xe9\x1b.jpg");
        assert_eq!(path(Path::new(name)), "caf\\xe9\\u{1b}.jpg");
    }
}
