//! Parses JSON from clients level by level: the number of members and elements is checked before any is kept, and
//! values that are short by nature (names, shapes, parameters) are refused if they are long.
//!
//! The values of a level stay text ([`RawValue`]) until their type is known, so that no error of serde_json repeats a
//! value of megabytes.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Error, Value};

use super::super::query::no_number;
use super::super::status::cut;

/// Most bytes of a value that is short by nature.
const SHORT: usize = 4096;

/// Most members of an object.
pub(in crate::server) const MEMBERS: usize = 64;

/// A member of an object: its name, truncated if it is long, and its value as text.
pub(in crate::server) type Member<'a> = (String, &'a RawValue);

/// Most levels of nested arrays and objects in a body.
const DEPTH: usize = 64;

/// The members, at most [`MEMBERS`], of a body that is an object and nested no deeper than [`DEPTH`].
pub(in crate::server) fn document(json: &[u8]) -> Result<Vec<Member<'_>>, Error> {
    // the parser keeps state for each open level, even of values that it skips
    if is_deeper_than(json, DEPTH) {
        return Err(Error::custom(format!("nested deeper than {DEPTH} levels")));
    }
    object(json)
}

/// Whether more than `most` arrays and objects are open somewhere. Of text that is no JSON either answer will do.
fn is_deeper_than(json: &[u8], most: usize) -> bool {
    let mut depth = 0;
    scan(json, |byte| {
        depth = depth_after(depth, byte);
        depth > most
    })
    .is_some()
}

fn depth_after(depth: usize, byte: u8) -> usize {
    match byte {
        b'[' | b'{' => depth + 1,
        b']' | b'}' => depth.saturating_sub(1),
        _ => depth,
    }
}

/// Behind the first byte, outside of strings, at which `ends` says so.
fn scan(json: &[u8], mut ends: impl FnMut(u8) -> bool) -> Option<usize> {
    let mut at = 0;
    while let Some(&byte) = json.get(at) {
        at += 1;
        if byte == b'"' {
            at += string(&json[at..]);
        }
        if ends(byte) {
            return Some(at);
        }
    }
    None
}

/// Bytes from behind a string's first quote to behind its last. A string without an end is an error that the parser tells.
fn string(json: &[u8]) -> usize {
    let mut at = 0;
    while let Some(found) = json.get(at..).and_then(|rest| memchr::memchr2(b'"', b'\\', rest)) {
        at += found;
        if json[at] == b'"' {
            return at + 1;
        }
        at += 2;
    }
    json.len()
}

/// The members of an object, at most [`MEMBERS`].
pub(in crate::server) fn object(json: &[u8]) -> Result<Vec<Member<'_>>, Error> {
    begins_with(json, b'{', "an object is due")?;
    let mut json = serde_json::Deserializer::from_slice(json);
    let members = Object.deserialize(&mut json)?;
    json.end()?;
    Ok(members)
}

/// JSON read from its beginning on, in one pass: what is inside is read where it stands, or skipped once. Whoever reads a value
/// checks it, so that nothing is looked at twice but what is short.
pub(in crate::server) struct Cursor<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// At the beginning of a text.
    pub(in crate::server) fn new(text: &'a [u8]) -> Self {
        Self { text, at: 0 }
    }

    /// Bytes from here to the text's end.
    pub(in crate::server) fn left(&self) -> usize {
        self.text.len() - self.at
    }

    /// The text from the next byte on that is no white space.
    pub(in crate::server) fn rest(&mut self) -> &'a [u8] {
        let rest = &self.text[self.at..];
        let white = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n')).count();
        self.at += white;
        &rest[white..]
    }

    /// Goes on by `bytes` bytes.
    pub(in crate::server) fn pass(&mut self, bytes: usize) {
        self.at = (self.at + bytes).min(self.text.len());
    }

    /// Goes on behind `byte`, if it comes next.
    fn pass_if(&mut self, byte: u8) -> bool {
        let comes = self.rest().first() == Some(&byte);
        self.at += usize::from(comes);
        comes
    }

    /// Nothing but white space may follow.
    pub(in crate::server) fn end(&mut self) -> Result<(), Error> {
        if self.rest().is_empty() { Ok(()) } else { Err(Error::custom(format!("more text at byte {}", self.at))) }
    }

    /// Whether the next value is `null`, which is then read.
    pub(in crate::server) fn is_null(&mut self) -> Result<bool, Error> {
        let is = self.rest().starts_with(b"null");
        if is {
            self.value()?;
        }
        Ok(is)
    }

    /// The next value, unread and unchecked: text that begins with it and ends with it if it is JSON.
    pub(in crate::server) fn skip(&mut self) -> Result<Self, Error> {
        let rest = self.rest();
        let Some(&first) = rest.first() else { return Err(Error::custom("the text ends where a value is due")) };
        let length = match first {
            b'"' => 1 + string(&rest[1..]),
            b'[' | b'{' => {
                // whoever skips a value remembers each level that is open
                let mut depth = 0;
                let length = scan(rest, |byte| {
                    depth = depth_after(depth, byte);
                    depth == 0 || depth > DEPTH
                });
                if depth > DEPTH {
                    return Err(Error::custom(format!("nested deeper than {DEPTH} levels")));
                }
                length.unwrap_or(rest.len())
            }
            _ => rest.iter().position(|byte| b",]} \t\r\n".contains(byte)).unwrap_or(rest.len()),
        };
        self.at += length;
        Ok(Self::new(&rest[..length]))
    }

    /// The next value, checked.
    pub(in crate::server) fn value(&mut self) -> Result<&'a RawValue, Error> {
        serde_json::from_slice(self.skip()?.text)
    }

    /// Reads an object: each member's name, cut if it is long, and its value by `read`, which must read it. [`MEMBERS`] at most.
    pub(in crate::server) fn members<E: From<Error>>(
        &mut self,
        mut read: impl FnMut(String, &mut Self) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut names: Vec<String> = Vec::new();
        self.list(b'{', b'}', "an object is due", |cursor| {
            if cursor.rest().first() != Some(&b'"') {
                return Err(Error::custom("a member's name is due").into());
            }
            let Cut(name) = serde_json::from_slice(cursor.skip()?.text)?;
            if names.contains(&name) {
                return Err(Error::custom(format!("`{name}` is there twice")).into());
            }
            if names.len() == MEMBERS {
                return Err(Error::custom(format!("an object of more than {MEMBERS} members")).into());
            }
            if !cursor.pass_if(b':') {
                return Err(Error::custom("a colon is due").into());
            }
            names.push(name.clone());
            read(name, cursor)
        })
    }

    /// Reads an array of `what`, each by `read`, which must read it; `most` at most.
    pub(in crate::server) fn elements<E: From<Error>>(
        &mut self,
        most: usize,
        what: &str,
        mut read: impl FnMut(&mut Self) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut count = 0;
        self.list(b'[', b']', "an array is due", |cursor| {
            count += 1;
            if count > most {
                return Err(Error::custom(format!("more than {most} {what}")).into());
            }
            read(cursor)
        })
    }

    fn list<E: From<Error>>(
        &mut self,
        first: u8,
        last: u8,
        due: &str,
        mut read: impl FnMut(&mut Self) -> Result<(), E>,
    ) -> Result<(), E> {
        if !self.pass_if(first) {
            return Err(Error::custom(due).into());
        }
        if self.pass_if(last) {
            return Ok(());
        }
        loop {
            read(self)?;
            if self.pass_if(last) {
                return Ok(());
            }
            if !self.pass_if(b',') {
                return Err(Error::custom(format!("a comma or an end is due at byte {}", self.at)).into());
            }
        }
    }
}

/// The elements of the array that `json` is; of more than `most` only how many there are.
pub(in crate::server) fn array(json: &RawValue, most: usize) -> Result<Result<Vec<&RawValue>, usize>, Error> {
    begins_with(json.get().as_bytes(), b'[', "an array is due")?;
    Array { most }.deserialize(&mut serde_json::Deserializer::from_str(json.get()))
}

/// A value that is short by nature; `None` for `null`.
pub(in crate::server) fn short<'a, T: Deserialize<'a>>(name: &str, json: &'a RawValue) -> Result<Option<T>, Error> {
    let text = json.get();
    if text.len() > SHORT {
        return Err(Error::custom(format!("`{name}` is {} bytes long, at most {SHORT} are taken", text.len())));
    }
    let wrong = |e: Error| Error::custom(format!("`{name}`: {}", cut(&e.to_string())));
    serde_json::from_str(text).map_err(wrong)
}

/// A number that is whole and not negative. `null` is no number.
pub(in crate::server) fn whole<T: std::str::FromStr>(name: &str, json: &RawValue) -> Result<Option<T>, Error> {
    match json.get() {
        "null" => Ok(None),
        text => text.parse().map(Some).map_err(|_| Error::custom(no_number(name, text))),
    }
}

/// A text, cut if it is long. `null` is no text.
pub(in crate::server) fn text(name: &str, json: &RawValue) -> Result<Option<String>, Error> {
    match json.get() {
        "null" => Ok(None),
        text if text.starts_with('"') => Ok(Some(serde_json::from_str::<Cut>(text)?.0)),
        _ => Err(Error::custom(format!("`{name}` is no string"))),
    }
}

/// The content of a string, between its quotes and with its escapes; `None` if it is not a string.
pub(in crate::server) fn quoted(json: &RawValue) -> Option<&str> {
    json.get().strip_prefix('"')?.strip_suffix('"')
}

/// Named scalars, at most [`MEMBERS`].
pub(in crate::server) fn scalars(
    name: &str,
    json: &RawValue,
) -> Result<std::collections::BTreeMap<String, Value>, Error> {
    if json.get() == "null" {
        return Ok(Default::default());
    }
    let members = object(json.get().as_bytes()).map_err(|e| Error::custom(format!("`{name}`: {e}")))?;
    let mut scalars = std::collections::BTreeMap::new();
    for (member, value) in members {
        if value.get().starts_with(['{', '[']) {
            return Err(Error::custom(format!("`{name}`: `{member}` is not a single value")));
        }
        let value = short(&member, value)?.unwrap_or(Value::Null);
        scalars.insert(member, value);
    }
    Ok(scalars)
}

fn begins_with(json: &[u8], first: u8, due: &str) -> Result<(), Error> {
    let white = |byte: &&u8| !matches!(byte, b' ' | b'\t' | b'\r' | b'\n');
    match json.iter().find(white) {
        Some(&byte) if byte == first => Ok(()),
        _ => Err(Error::custom(due)),
    }
}

/// A string of any length, of which only the beginning is kept.
struct Cut(String);

impl<'de> Deserialize<'de> for Cut {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Beginning;
        impl Visitor<'_> for Beginning {
            type Value = Cut;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Cut, E> {
                Ok(Cut(cut(text).into_owned()))
            }
        }
        deserializer.deserialize_str(Beginning)
    }
}

struct Object;

impl<'de> DeserializeSeed<'de> for Object {
    type Value = Vec<Member<'de>>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object {
    type Value = Vec<Member<'de>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members: Vec<Member<'de>> = Vec::new();
        while let Some(Cut(name)) = map.next_key()? {
            if members.iter().any(|(other, _)| *other == name) {
                return Err(A::Error::custom(format!("`{name}` is there twice")));
            }
            if members.len() == MEMBERS {
                return Err(A::Error::custom(format!("an object of more than {MEMBERS} members")));
            }
            members.push((name, map.next_value()?));
        }
        Ok(members)
    }
}

struct Array {
    most: usize,
}

impl<'de> DeserializeSeed<'de> for Array {
    type Value = Result<Vec<&'de RawValue>, usize>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Array {
    type Value = Result<Vec<&'de RawValue>, usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut elements = Vec::new();
        while elements.len() < self.most {
            match seq.next_element()? {
                Some(element) => elements.push(element),
                None => return Ok(Ok(elements)),
            }
        }
        let mut count = elements.len();
        while seq.next_element::<IgnoredAny>()?.is_some() {
            count += 1;
        }
        Ok(if count > self.most { Err(count) } else { Ok(elements) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(text: &str) -> &RawValue {
        serde_json::from_str(text).expect("JSON")
    }

    #[test]
    fn levels_are_read_one_at_a_time() {
        let members = object(b" {\"a\": [1, {\"b\": 2}], \"\\u0063\": null} ").expect("object");
        let shown: Vec<_> = members.iter().map(|(name, value)| (name.as_str(), value.get())).collect();
        assert_eq!(shown, [("a", "[1, {\"b\": 2}]"), ("c", "null")]);
        let elements = array(members[0].1, 2).expect("array").expect("few");
        assert_eq!(elements.iter().map(|e| e.get()).collect::<Vec<_>>(), ["1", "{\"b\": 2}"]);
        assert_eq!(array(members[0].1, 1).expect("array").map(|e| e.len()), Err(2));
        let nested = |depth: usize| format!("{{\"a\":{}\"[\\\"[[\"{}}}", "[".repeat(depth), "]".repeat(depth));
        assert!(document(nested(DEPTH - 1).as_bytes()).is_ok() && document(nested(DEPTH).as_bytes()).is_err());
        for bad in ["", "[]", "\"text\"", "{", "{\"a\"}", "{\"a\":1} 2", "{\"a\":1,\"a\":2}", "{\"a\":\"\u{1}\"}"] {
            assert!(object(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(object(b"{\"a\":\"\xff\"}").is_err() && object(&[b'['; 100_000]).is_err());
        let deep = format!("{{\"a\":{}", "[".repeat(1_000_000));
        assert!(object(deep.as_bytes()).is_err());
        assert!(array(raw("{}"), 1).is_err() && array(raw("\"text\""), 1).is_err());
    }

    #[test]
    fn many_and_long_things_are_refused_in_few_words() {
        let many: Vec<_> = (0..=MEMBERS).map(|i| format!("\"{i}\":0")).collect();
        let long = "\u{7f}".repeat(1_000_000);
        let longs = format!("\"{long}\"");
        let errors = [
            object(format!("{{{}}}", many.join(",")).as_bytes()).err(),
            object(format!("{{\"{long}\":1,\"{long}\":2}}").as_bytes()).err(),
            short::<i64>("n", raw(&longs)).err(),
            short::<i64>("n", raw(&format!("\"{}\"", &long[..4000]))).err(),
            short::<Vec<i64>>("n", raw(&format!("[{}0]", "0,".repeat(1_000_000)))).err(),
            scalars("p", raw(&format!("{{\"a\":{longs}}}"))).err(),
            scalars("p", raw("{\"a\":[1]}")).err(),
            scalars("p", raw("{\"a\":{}}")).err(),
            text("t", raw("1")).err(),
        ];
        for error in errors {
            let error = error.expect("refused").to_string();
            assert!(error.len() < 2000, "{} bytes: {error}", error.len());
        }
        let kept = text("t", raw(&longs)).expect("text").expect("some");
        assert!(kept.chars().count() < 300, "{}", kept.len());
        assert_eq!(text("t", raw("null")).expect("null"), None);
        let scalars = scalars("p", raw("{\"a\":1,\"b\":true,\"c\":\"x\",\"d\":null}")).expect("scalars");
        assert_eq!(serde_json::to_string(&scalars).expect("JSON"), "{\"a\":1,\"b\":true,\"c\":\"x\",\"d\":null}");
    }
}
