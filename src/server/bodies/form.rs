//! Parses `multipart/form-data` (RFC 7578) in memory: its parts are slices of the body.
//!
//! Written here because the existing libraries copy every part out of a stream, and limit neither the number of parts
//! nor the length of their headers.

use bytes::Bytes;
use memchr::memmem;

use super::super::status::{ApiError, Code, cut};

/// Most bytes of a part's headers.
const HEAD: usize = 8 * 1024;
/// Most headers of a part.
const HEADERS: usize = 16;
/// Most bytes of a boundary; RFC 2046 allows 70.
const BOUNDARY: usize = 256;
/// Most parts that are not files.
const FIELDS: usize = 16;

/// A part of a form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    /// Name of the field, truncated if it is long.
    pub(super) name: String,
    /// Whether the part has a file name.
    pub(super) is_file: bool,
    pub(super) bytes: Bytes,
}

fn invalid(why: impl std::fmt::Display) -> ApiError {
    ApiError::new(Code::InvalidRequest, format!("the form can't be read: {why}"))
}

/// The boundary parameter of a content type.
pub(super) fn boundary(content_type: &str) -> Result<String, ApiError> {
    let found = parameters(content_type).find(|(name, _)| name.eq_ignore_ascii_case("boundary"));
    let boundary = found.map(|(_, value)| value).filter(|value| !value.is_empty());
    let boundary = boundary.ok_or_else(|| invalid("its content type has no boundary"))?;
    match boundary.len() {
        0..=BOUNDARY => Ok(boundary),
        length => Err(invalid(format!("its boundary is {length} bytes long, at most {BOUNDARY} are taken"))),
    }
}

/// The parts of a body, at most `files` of them files.
pub(super) fn parts(body: &Bytes, boundary: &str, files: usize) -> Result<Vec<Part>, ApiError> {
    let delimiter = format!("\r\n--{boundary}");
    let finder = memmem::Finder::new(&delimiter);
    // the first delimiter may start the body, without a line break before it
    let mut at = if body.starts_with(&delimiter.as_bytes()[2..]) {
        delimiter.len() - 2
    } else {
        finder.find(body).ok_or_else(|| invalid("its boundary is not in it"))? + delimiter.len()
    };
    let (mut parts, mut found) = (Vec::new(), [0, 0]);
    while let Some(start) = after_delimiter(&body[at..])? {
        at += start;
        let (name, is_file, length) = head(&body[at..])?;
        at += length;
        let end = at_delimiter(body, at, &finder)?;
        found[usize::from(is_file)] += 1;
        if found[1] > files {
            let text =
                format!("more than {files} images in one request, at most {files} are taken; send fewer at a time");
            return Err(ApiError::new(Code::InvalidRequest, text));
        }
        if found[0] > FIELDS {
            return Err(invalid(format!("more than {FIELDS} of its fields are no files")));
        }
        // a part with an empty body ends with its head
        parts.push(Part { name, is_file, bytes: body.slice(at.min(end)..end) });
        at = end + delimiter.len();
    }
    Ok(parts)
}

/// Offset of the next part after a delimiter; `None` after the last delimiter.
fn after_delimiter(rest: &[u8]) -> Result<Option<usize>, ApiError> {
    if rest.starts_with(b"--") {
        return Ok(None);
    }
    match padding(rest) {
        Some(length) => Ok(Some(length)),
        None => Err(invalid("a boundary is not followed by a line's end")),
    }
}

/// Length of the white space and line break that must follow a delimiter; `None` if they are missing.
fn padding(rest: &[u8]) -> Option<usize> {
    let white = rest.iter().take(HEAD).take_while(|b| matches!(b, b' ' | b'\t')).count();
    rest[white..].starts_with(b"\r\n").then_some(white + 2)
}

/// Offset of the next delimiter from `at` on. A part may contain text that only begins like a delimiter.
fn at_delimiter(body: &[u8], at: usize, finder: &memmem::Finder<'_>) -> Result<usize, ApiError> {
    // the line break that ends the head may also begin the delimiter
    let mut from = at.saturating_sub(2);
    loop {
        let found = finder.find(&body[from..]).ok_or_else(|| invalid("its last part has no end"))? + from;
        let rest = &body[found + finder.needle().len()..];
        if rest.starts_with(b"--") || padding(rest).is_some() {
            return Ok(found);
        }
        from = found + finder.needle().len();
    }
}

/// The head of a part: the field's name, whether it is a file, and the head's length.
fn head(part: &[u8]) -> Result<(String, bool, usize), ApiError> {
    let most = &part[..part.len().min(HEAD)];
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let (length, headers) = match httparse::parse_headers(most, &mut headers) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) if part.len() > HEAD => {
            return Err(invalid(format!("a part's headers are longer than {HEAD} bytes")));
        }
        Ok(httparse::Status::Partial) => return Err(invalid("a part's headers have no end")),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(invalid(format!("a part has more than {HEADERS} headers")));
        }
        Err(error) => return Err(invalid(format!("a part's headers: {error}"))),
    };
    let disposition = headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-disposition"));
    let disposition = disposition.map(|header| String::from_utf8_lossy(header.value)).unwrap_or_default();
    let (mut name, mut is_file) = (String::new(), false);
    for (key, value) in parameters(&disposition) {
        match key.to_ascii_lowercase().as_str() {
            "name" => name = cut(&value).into_owned(),
            "filename" | "filename*" => is_file = true,
            _ => {}
        }
    }
    Ok((name, is_file, length))
}

/// The parameters after the first `;`, with values unquoted.
fn parameters(value: &str) -> impl Iterator<Item = (&str, String)> {
    let mut rest = value.split_once(';').map_or("", |(_, rest)| rest);
    std::iter::from_fn(move || {
        let (name, after) = rest.split_once('=')?;
        let name = name.trim_matches(|c: char| c == ';' || c.is_whitespace());
        let after = after.trim_start();
        let mut text = String::new();
        if let Some(quoted) = after.strip_prefix('"') {
            let (mut escaped, mut end) = (false, quoted.len());
            for (i, c) in quoted.char_indices() {
                match c {
                    '"' if !escaped => {
                        end = i + 1;
                        break;
                    }
                    '\\' if !escaped => escaped = true,
                    c => {
                        // browsers do not escape backslashes in file names
                        if escaped && c != '"' && c != '\\' {
                            text.push('\\');
                        }
                        text.push(c);
                        escaped = false;
                    }
                }
            }
            rest = quoted[end..].split_once(';').map_or("", |(_, rest)| rest);
        } else {
            let (value, more) = after.split_once(';').unwrap_or((after, ""));
            text.push_str(value.trim());
            rest = more;
        }
        Some((name, text))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<Vec<Part>, ApiError> {
        parts(&Bytes::copy_from_slice(body.as_bytes()), "X", 3)
    }

    fn part(name: &str, is_file: bool, bytes: &'static str) -> Part {
        Part { name: name.into(), is_file, bytes: Bytes::from_static(bytes.as_bytes()) }
    }

    #[test]
    fn boundaries() {
        let cases = [
            ("multipart/form-data; boundary=X", Some("X")),
            ("multipart/form-data;charset=utf-8;Boundary=\"a b;c\"", Some("a b;c")),
            ("multipart/form-data; boundary= X ; x=y", Some("X")),
            ("multipart/form-data", None),
            ("multipart/form-data; boundary=", None),
            ("multipart/form-data; boundary=\"\"", None),
        ];
        for (content_type, due) in cases {
            assert_eq!(boundary(content_type).ok().as_deref(), due, "{content_type}");
        }
        assert!(boundary(&format!("multipart/form-data; boundary={}", "x".repeat(8000))).is_err());
    }

    #[test]
    fn parts_are_what_was_sent() {
        let body = "--X\r\nContent-Disposition: form-data; name=\"a\"; filename=\"C:\\x \\\"y\\\".jpg\"\r\nContent-Type: image/jpeg\r\n\r\none\r\n--Xtra\r\n--\r\n--X \t\r\ncontent-disposition: form-data; name=top_k\r\n\r\n5\r\n--X\r\nContent-Disposition: form-data; name=\"e\"; filename*=UTF-8''e\r\n\r\n\r\n--X--\r\nepilogue";
        let due = [part("a", true, "one\r\n--Xtra\r\n--"), part("top_k", false, "5"), part("e", true, "")];
        assert_eq!(parse(body).expect("form"), due);
        assert_eq!(parse(&format!("preamble\r\n{body}")).expect("form"), due);
        assert_eq!(parse("--X--").expect("no part"), []);
        assert_eq!(parse("--X\r\n\r\nx\r\n--X--").expect("no headers"), [part("", false, "x")]);
        assert_eq!(parse("--X\r\n\r\n--X--").expect("no headers, no body"), [part("", false, "")]);
    }

    #[test]
    fn broken_and_oversized_forms_are_refused() {
        let head = "--X\r\nContent-Disposition: form-data; name=\"a\"; filename=\"a\"\r\n\r\n";
        let field = "--X\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nx\r\n";
        for bad in [
            "".into(),
            "junk".into(),
            "--X".into(),
            "--X\r\n".into(),
            "--Xjunk".into(),
            head.into(),
            format!("{head}x"),
            format!("{head}x\r\n--"),
            format!("{head}x\r\n--Y--"),
            format!("{}--X--", format!("{head}x\r\n").repeat(4)),
            format!("{}--X--", field.repeat(FIELDS + 1)),
            format!("--X\r\n{}\r\nx\r\n--X--", "a: b\r\n".repeat(HEADERS + 1)),
            format!("--X\r\na: {}\r\n\r\nx\r\n--X--", "b".repeat(HEAD)),
            format!("--X{}", " ".repeat(100_000)),
        ] {
            let error = parse(&bad).expect_err(&bad);
            assert!(error.code == Code::InvalidRequest && error.message.len() < 400, "{error:?}");
        }
        assert_eq!(parse(&format!("{}--X--", format!("{head}x\r\n").repeat(3))).expect("three").len(), 3);
    }
}
