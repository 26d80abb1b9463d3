//! Text for people: what comes from files (labels, names, messages) can't move a terminal's cursor, change its title or
//! forge a line. Values in JSON and CSV are left as they are.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fmt::{Arguments, Write as _};
use std::io::Write as _;
use std::path::Path;

/// `text` with control characters, and characters that turn the direction of writing, as escapes such as `\u{1b}`.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_control) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_control(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    Cow::Owned(out)
}

/// A path as [`printable`] text; bytes that are no UTF-8 become escapes such as `\xe9`.
pub fn path(path: &Path) -> String {
    os(path.as_os_str())
}

fn os(text: &OsStr) -> String {
    let mut out = String::new();
    for chunk in text.as_encoded_bytes().utf8_chunks() {
        out.push_str(&printable(chunk.valid()));
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

/// One line on stderr, [`printable`]. That nobody reads it, or that it can't be written, is no failure.
pub fn say(line: Arguments<'_>) {
    let line = line.to_string();
    let _ = writeln!(std::io::stderr(), "{}", printable(&line));
}

fn is_control(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_get_no_control_characters() {
        assert_eq!(printable("plain, γ and 猫"), "plain, γ and 猫");
        assert_eq!(printable("\x1b[31mred\x1b]0;evil\x07"), "\\u{1b}[31mred\\u{1b}]0;evil\\u{7}");
        assert_eq!(printable("a\r\nb\tc\u{9b}\u{7f}\u{202e}"), "a\\r\\nb\\tc\\u{9b}\\u{7f}\\u{202e}");
    }

    #[cfg(unix)]
    #[test]
    fn bytes_that_are_no_text_can_be_told_apart() {
        use std::os::unix::ffi::OsStrExt as _;
        let name = OsStr::from_bytes(b"caf\xe9\x1b.jpg");
        assert_eq!(path(Path::new(name)), "caf\\xe9\\u{1b}.jpg");
    }
}
