//! Text for people: what comes from files, clients and command lines (labels, names, messages) can't move a terminal's
//! cursor, change its title or forge a line. Values in JSON and CSV are left as they are.

use std::borrow::Cow;

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

/// An error's text, cut: errors of some libraries are as long as the file that they are about.
pub fn brief(error: impl std::fmt::Display) -> String {
    const MOST: usize = 1000;
    let mut text = error.to_string();
    if let Some((end, _)) = text.char_indices().nth(MOST) {
        text.truncate(end);
        text.push('…');
    }
    text
}

fn is_control(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_brief() {
        assert_eq!(brief("short"), "short");
        assert_eq!(brief("γ".repeat(1000)), "γ".repeat(1000));
        assert_eq!(brief("γ".repeat(1001)), format!("{}…", "γ".repeat(1000)));
    }

    #[test]
    fn terminals_get_no_control_characters() {
        assert_eq!(printable("plain, γ and 猫"), "plain, γ and 猫");
        assert_eq!(printable("\x1b[31mred\x1b]0;evil\x07"), "\\u{1b}[31mred\\u{1b}]0;evil\\u{7}");
        assert_eq!(printable("a\r\nb\tc\u{9b}\u{7f}\u{202e}"), "a\\r\\nb\\tc\\u{9b}\\u{7f}\\u{202e}");
    }
}
