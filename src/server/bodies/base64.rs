//! Base64 as clients send it: with line breaks, without padding, in the URL-safe alphabet, or as a `data:` URL.

use std::io::Read;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

/// The standard alphabet, padding optional.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Most bytes that base64 text of `text` bytes decodes to.
pub(in crate::server) fn most(text: usize) -> usize {
    text.div_ceil(4) * 3
}

/// Decodes the content of a JSON string (between its quotes, escapes included), or says what is wrong with it.
/// Allocates only the result.
pub(in crate::server) fn decode(text: &str) -> Result<Vec<u8>, String> {
    let text = after_data_url(text)?;
    if let Ok(bytes) = BASE64.decode(text) {
        return Ok(bytes);
    }
    let mut bytes = Vec::with_capacity(most(text.len()));
    let mut reader = base64::read::DecoderReader::new(Plain { text: text.as_bytes() }, &BASE64);
    match reader.read_to_end(&mut bytes) {
        Ok(_) => Ok(bytes),
        Err(error) => Err(error.to_string()),
    }
}

/// The base64 part of a `data:` URL; any other text unchanged.
fn after_data_url(text: &str) -> Result<&str, String> {
    let text = text.trim_ascii_start();
    if !text.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:")) {
        return Ok(text);
    }
    let (head, data) = text.split_once(',').ok_or("its `data:` URL has no comma")?;
    if head.rsplit(';').next().is_some_and(|last| last.trim_ascii().eq_ignore_ascii_case("base64")) {
        Ok(data)
    } else {
        Err("its `data:` URL does not say `;base64`".into())
    }
}

/// The text without escapes and white space, in the standard alphabet.
struct Plain<'a> {
    text: &'a [u8],
}

impl Plain<'_> {
    /// The next character; `None` at the end.
    fn next(&mut self) -> Option<u8> {
        let (&byte, rest) = self.text.split_first()?;
        self.text = rest;
        if byte != b'\\' {
            return Some(byte);
        }
        // for a truncated escape, a character outside base64 (JSON's parser lets none through)
        let Some((&escape, rest)) = self.text.split_first() else { return Some(b'?') };
        self.text = rest;
        Some(match escape {
            b'n' | b'r' | b't' | b'f' => b' ',
            b'u' => {
                let (digits, rest) = self.text.split_at(self.text.len().min(4));
                self.text = rest;
                let digits = std::str::from_utf8(digits).ok().filter(|digits| digits.len() == 4);
                let character = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
                // not ASCII, so not base64 either
                character.and_then(|c| u8::try_from(c).ok()).unwrap_or(b'?')
            }
            // `\/`, `\"`, `\\`
            other => other,
        })
    }
}

impl Read for Plain<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len()
            && let Some(byte) = self.next()
        {
            let plain = match byte {
                b'-' => b'+',
                b'_' => b'/',
                white if white.is_ascii_whitespace() => continue,
                other => other,
            };
            buffer[filled] = plain;
            filled += 1;
        }
        Ok(filled)
    }
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD};

    use super::*;

    #[test]
    fn every_form_stands_for_the_same_bytes() {
        for length in [0, 1, 2, 3, 47, 48, 5000] {
            let bytes: Vec<u8> = (0..length).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
            let plain = STANDARD.encode(&bytes);
            let lines: Vec<_> = plain.as_bytes().chunks(76).map(|l| String::from_utf8_lossy(l).into_owned()).collect();
            let forms = [
                plain.clone(),
                STANDARD_NO_PAD.encode(&bytes),
                URL_SAFE.encode(&bytes),
                URL_SAFE_NO_PAD.encode(&bytes),
                lines.join("\n"),
                format!("{}\r\n", lines.join("\r\n")),
                format!(" \t{plain} "),
                format!("data:image/png;base64,{plain}"),
                format!("DATA:;Base64,{}", URL_SAFE_NO_PAD.encode(&bytes)),
                lines.join("\\r\\n"),
                plain.replace('/', "\\/").replace('+', "\\u002B"),
                format!("data:image\\/png;base64,{plain}"),
            ];
            for form in forms {
                assert_eq!(decode(&form).as_ref(), Ok(&bytes), "{form}");
                assert!(most(form.len()) >= bytes.len());
            }
        }
    }

    #[test]
    fn what_is_no_base64_is_refused() {
        for bad in [
            "!",
            "AAAA!",
            "A",
            "AA=A",
            "data:image/png,AAAA",
            "data:AAAA",
            "AA==AA==",
            "é",
            "AAA\\u00e9",
            "AA\\u",
            "AAA\\",
        ] {
            assert!(decode(bad).is_err(), "{bad}");
        }
    }
}
