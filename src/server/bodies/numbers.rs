//! Lists of numbers in JSON, as tensors come: read in one pass, each number by the shortest exact way to what it is kept as.
//!
//! A general reader would go over the text once for each level around the list, and make every number a double on the way.

use serde::de::Error as _;
use serde_json::Error;

use super::json::Cursor;

/// What a list may hold.
pub(in crate::server) trait Element: Sized {
    /// The number at the beginning of `text` and its length; `text` begins with a digit, or a minus and a digit.
    fn read(text: &[u8]) -> Option<(Self, usize)>;
}

impl Element for f32 {
    /// To the nearest; what is beyond the largest is none.
    fn read(text: &[u8]) -> Option<(Self, usize)> {
        fast_float2::parse_partial(text).ok().filter(|(value, _): &(f32, _)| value.is_finite())
    }
}

impl Element for u8 {
    fn read(text: &[u8]) -> Option<(Self, usize)> {
        let digits = text.iter().take(4).take_while(|byte| byte.is_ascii_digit()).count();
        if digits <= 3 && !matches!(text.get(digits), Some(b'.' | b'e' | b'E' | b'-')) {
            let value = text[..digits].iter().fold(0_u16, |value, digit| 10 * value + u16::from(digit - b'0'));
            return u8::try_from(value).ok().filter(|_| digits > 0).map(|value| (value, digits));
        }
        // such as 7.0
        let (value, length): (f64, usize) = fast_float2::parse_partial(text).ok()?;
        (value.fract() == 0.0 && (0.0..=255.0).contains(&value)).then_some((value as u8, length))
    }
}

/// Reads an array of elements, flat or nested up to `depth` arrays, `most` elements at most; each goes to `keep`.
pub(in crate::server) fn numbers<T: Element>(
    json: &mut Cursor<'_>,
    most: usize,
    depth: usize,
    mut keep: impl FnMut(T),
) -> Result<(), Error> {
    let (mut open, mut count) = (0_usize, 0_usize);
    // behind an element or an array, only a comma or an end may come; behind a comma, none of these
    let (mut behind, mut after_comma) = (false, false);
    loop {
        let rest = json.rest();
        let Some(&byte) = rest.first() else { return Err(Error::custom("the list has no end")) };
        match byte {
            b'[' if !behind => {
                if open == depth {
                    return Err(Error::custom("nested too deep"));
                }
                open += 1;
                after_comma = false;
                json.pass(1);
            }
            b']' if open > 0 && !after_comma => {
                open -= 1;
                behind = true;
                json.pass(1);
                if open == 0 {
                    return Ok(());
                }
            }
            b',' if behind => {
                (behind, after_comma) = (false, true);
                json.pass(1);
            }
            _ if open == 0 => return Err(Error::custom("an array is due")),
            b'-' | b'0'..=b'9' if !behind => {
                if count == most {
                    return Err(Error::custom(format!("more than the {most} elements of the shape")));
                }
                let (value, length) = number(rest)?;
                keep(value);
                count += 1;
                (behind, after_comma) = (true, false);
                json.pass(length);
            }
            b'"' if !behind => return Err(Error::custom("a string can't be an element")),
            _ => return Err(Error::custom(format!("`{}` can't stand there", char::from(byte).escape_debug()))),
        }
    }
}

/// The number at the beginning of `text`, which must be as JSON writes it, and its length.
fn number<T: Element>(text: &[u8]) -> Result<(T, usize), Error> {
    let digits_at = |at: usize| text.get(at..).unwrap_or_default().iter().take_while(|b| b.is_ascii_digit()).count();
    let start = usize::from(text[0] == b'-');
    let whole = digits_at(start);
    let mut well_formed = whole == 1 || whole > 1 && text[start] != b'0';
    if text.get(start + whole) == Some(&b'.') {
        well_formed &= text.get(start + whole + 1).is_some_and(u8::is_ascii_digit);
    }
    let wrong = || {
        let shown = text.iter().take_while(|byte| byte.is_ascii_graphic() && !b",]".contains(byte)).take(40);
        let shown: String = shown.map(|&byte| char::from(byte)).collect();
        Error::custom(format!("`{shown}` can't be an element; send finite numbers, as JSON writes them"))
    };
    let (value, length) = Some(text).filter(|_| well_formed).and_then(T::read).ok_or_else(wrong)?;
    // what follows is for the list to judge, but for what would have been a part of the number
    match text.get(length) {
        Some(b'.' | b'e' | b'E' | b'+' | b'-' | b'0'..=b'9') => Err(wrong()),
        _ => Ok((value, length)),
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn read<T: Element>(text: &str, most: usize) -> Result<Vec<T>, String> {
        let mut found = Vec::new();
        let mut json = Cursor::new(text.as_bytes());
        numbers(&mut json, most, 16, |value| found.push(value)).map_err(|e| e.to_string())?;
        json.end().map(|()| found).map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_read_is_what_the_standard_library_reads() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for _ in 0..200 {
            let texts: Vec<String> = (0..100)
                .map(|_| {
                    let value = f32::from_bits(rng.random());
                    match rng.random_range(0..5) {
                        _ if !value.is_finite() => "0".into(),
                        0 => format!("{value}"),
                        1 => format!("{value:e}"),
                        // as Python writes what numpy has
                        2 => format!("{:?}", f64::from(value)),
                        // between two of them
                        3 => format!("{:?}", f64::from(value) * (1.0 + 1e-9)),
                        _ => format!("{}", rng.random::<i32>()),
                    }
                })
                .collect();
            let found = read::<f32>(&format!(" [{}] ", texts.join(",")), 100).expect("numbers");
            for (text, value) in texts.iter().zip(found) {
                assert_eq!(text.parse::<f32>().map(f32::to_bits), Ok(value.to_bits()), "{text}");
            }
        }
    }

    #[test]
    fn lists_may_be_nested_and_no_longer_than_they_say() {
        for good in ["[1,2,3,4]", "[[1,2],[3,4]]", "[[[1]],[],[2, 3],\n4]", "[\t[1e0 ,2.0],[3],[4]]"] {
            assert_eq!(read::<f32>(good, 4), Ok(vec![1.0, 2.0, 3.0, 4.0]), "{good}");
            assert_eq!(read::<u8>(good, 4), Ok(vec![1, 2, 3, 4]), "{good}");
            assert!(read::<f32>(good, 3).is_err_and(|e| e.contains("more than the 3 elements")), "{good}");
        }
        assert_eq!(read::<f32>("[]", 0), Ok(vec![]));
        assert!(read::<f32>(&"[".repeat(17), 1).is_err_and(|e| e == "nested too deep"));
        assert!(read::<f32>(&format!("{}1{}", "[".repeat(16), "]".repeat(16)), 1).is_ok());
    }

    #[test]
    fn what_is_no_json_is_refused_as_the_general_reader_does() {
        let words = [
            "[", "]", ",", "1", "-1", "0", "-0", "1.5", "1e5", "1E+2", "2e-3", "01", "1.", ".5", "+1", "-", "1e",
            "1e+", "--1", "1.e1", "inf", "nan", "-inf", "NaN", "\"1\"", "null", "true", "{}", " ", "1_0", "0x1", "1 2",
            "[]", ",,", "1-", "1f", "\u{e9}",
        ];
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for _ in 0..100_000 {
            let text: String = (0..rng.random_range(1..7)).map(|_| words[rng.random_range(0..words.len())]).collect();
            let text = if rng.random() { format!("[{text}]") } else { text };
            let flat = |value: &serde_json::Value| {
                let mut found = Some(Vec::new());
                let mut left = vec![value];
                while let Some(value) = left.pop() {
                    match value {
                        serde_json::Value::Array(values) => left.extend(values.iter().rev()),
                        serde_json::Value::Number(n) => {
                            // what is beyond single precision is refused here
                            let value = n.as_f64().map(|n| n as f32).filter(|value| value.is_finite());
                            found = found.zip(value).map(|(mut found, value)| {
                                found.push(value);
                                found
                            });
                        }
                        _ => found = None,
                    }
                }
                found.filter(|_| value.is_array())
            };
            let due = serde_json::from_str(&text).ok().and_then(|value| flat(&value));
            assert_eq!(read::<f32>(&text, 100).ok(), due, "{text}");
        }
    }

    #[test]
    fn bytes_are_whole_and_small() {
        assert_eq!(read::<u8>("[0,7,255,7.0,2.55e2,0e0]", 9), Ok(vec![0, 7, 255, 7, 255, 0]));
        for bad in ["256", "-1", "1.5", "1000", "1e3", "99999999999999999999", "-0.5"] {
            assert!(read::<u8>(&format!("[{bad}]"), 1).is_err_and(|e| e.contains("can't be an element")), "{bad}");
        }
    }

    #[test]
    fn what_no_single_precision_holds_is_refused_in_few_words() {
        for bad in ["1e39", "-1e39", "1e400", &"9".repeat(1_000_000), "1x", "0.5.5"] {
            let error = read::<f32>(&format!("[{bad}]"), 1).expect_err(bad);
            assert!(error.len() < 150, "{error}");
        }
        assert_eq!(read::<f32>(&format!("[0.{}]", "3".repeat(1_000_000)), 1), Ok(vec![1.0 / 3.0]));
    }
}
