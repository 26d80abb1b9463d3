//! Protobuf's wire format: iterates over the fields of a message, counts them and keeps none.

use super::super::status::{ApiError, Code};

/// Most fields of a message and of each message in it. Some dozens are usual; unpacked repeated values have a limit of
/// their own.
pub(super) const FIELDS: usize = 4096;
/// Most nested groups (a deprecated encoding).
const DEPTH: usize = 16;

/// Why a message is refused.
#[derive(Debug)]
pub(super) struct Unread {
    pub(super) error: ApiError,
    /// The message can't be decoded, which ends a stream.
    pub(super) malformed: bool,
}

impl From<ApiError> for Unread {
    fn from(error: ApiError) -> Self {
        Self { error, malformed: false }
    }
}

pub(super) fn malformed(why: impl std::fmt::Display) -> Unread {
    let text = format!("the message is no ModelInferRequest: {why}");
    Unread { error: ApiError::new(Code::InvalidRequest, text), malformed: true }
}

/// A field's value as encoded.
#[derive(Debug, Clone, Copy)]
pub(super) enum Field<'a> {
    Varint(u64),
    Fixed64([u8; 8]),
    Bytes(&'a [u8]),
    Fixed32([u8; 4]),
}

impl<'a> Field<'a> {
    pub(super) fn bytes(self) -> Result<&'a [u8], Unread> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            _ => Err(malformed("a field has another type")),
        }
    }

    pub(super) fn varint(self) -> Result<u64, Unread> {
        match self {
            Self::Varint(number) => Ok(number),
            _ => Err(malformed("a field has another type")),
        }
    }

    pub(super) fn text(self) -> Result<&'a str, Unread> {
        std::str::from_utf8(self.bytes()?).map_err(|_| malformed("a string is not UTF-8"))
    }
}

/// An iterator over the fields of a message.
struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Result<u64, Unread> {
        let mut number = 0;
        for shift in 0..10 {
            let (&byte, rest) = self.rest.split_first().ok_or_else(|| malformed("it is cut short"))?;
            self.rest = rest;
            number |= u64::from(byte & 0x7f) << (7 * shift);
            if byte < 0x80 {
                // the tenth byte of a varint may hold one bit only
                return if shift < 9 || byte < 2 { Ok(number) } else { Err(malformed("a number is too long")) };
            }
        }
        Err(malformed("a number is too long"))
    }

    fn slice(&mut self, length: u64) -> Result<&'a [u8], Unread> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let (slice, rest) = self.rest.split_at_checked(length).ok_or_else(|| malformed("it is cut short"))?;
        self.rest = rest;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Unread> {
        let (array, rest) = self.rest.split_first_chunk().ok_or_else(|| malformed("it is cut short"))?;
        self.rest = rest;
        Ok(*array)
    }

    /// The next field, skipping groups; `None` at the end.
    fn next(&mut self) -> Result<Option<(u32, Field<'a>)>, Unread> {
        let mut open = Vec::new();
        while !self.rest.is_empty() {
            let tag = u32::try_from(self.varint()?).map_err(|_| malformed("a tag is too large"))?;
            let number = tag >> 3;
            if number == 0 {
                return Err(malformed("a field has the number 0"));
            }
            let field = match tag & 7 {
                0 => Field::Varint(self.varint()?),
                1 => Field::Fixed64(self.array()?),
                2 => {
                    let length = self.varint()?;
                    Field::Bytes(self.slice(length)?)
                }
                3 if open.len() < DEPTH => {
                    open.push(number);
                    continue;
                }
                4 if open.pop() == Some(number) => continue,
                5 => Field::Fixed32(self.array()?),
                3 => return Err(malformed("groups are nested too deep")),
                4 => return Err(malformed("a group ends that did not begin")),
                _ => return Err(malformed("a field has a type that does not exist")),
            };
            if open.is_empty() {
                return Ok(Some((number, field)));
            }
        }
        if open.is_empty() { Ok(None) } else { Err(malformed("a group has no end")) }
    }
}

/// Visits every field of a message, at most [`FIELDS`].
pub(super) fn fields<'a>(
    message: &'a [u8],
    mut each: impl FnMut(u32, Field<'a>) -> Result<(), Unread>,
) -> Result<(), Unread> {
    let (mut fields, mut count) = (Fields { rest: message }, 0);
    while let Some((number, field)) = fields.next()? {
        count += 1;
        if count > FIELDS {
            return Err(malformed(format!("more than {FIELDS} fields")));
        }
        each(number, field)?;
    }
    Ok(())
}

/// Visits the values of a repeated integer field, packed or not.
pub(super) fn numbers(field: Field<'_>, each: &mut dyn FnMut(u64) -> Result<(), Unread>) -> Result<(), Unread> {
    match field {
        Field::Varint(number) => each(number),
        Field::Bytes(packed) => {
            let mut packed = Fields { rest: packed };
            while !packed.rest.is_empty() {
                each(packed.varint()?)?;
            }
            Ok(())
        }
        _ => Err(malformed("a field has another type")),
    }
}

/// Visits every field with this number in the messages `contents`; unpacked values are one field each.
pub(super) fn every<'a>(
    contents: &[&'a [u8]],
    number: u32,
    mut each: impl FnMut(Field<'a>) -> Result<(), Unread>,
) -> Result<(), Unread> {
    for rest in contents {
        let mut fields = Fields { rest };
        while let Some((found, field)) = fields.next()? {
            if found == number {
                each(field)?;
            }
        }
    }
    Ok(())
}
