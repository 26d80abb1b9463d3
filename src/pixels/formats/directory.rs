//! The first image file directory (IFD) of a TIFF, with every offset and count checked.
//!
//! Owns byte order, and the offset sizes of TIFF and BigTIFF. Must not know what tags mean.

use super::super::limits::ImageError;

/// Most entries that are read, and most values of one entry.
const MAX_ENTRIES: u64 = 4096;
const MAX_VALUES: u64 = 1 << 20;

/// A directory, and the file that contains it.
#[derive(Debug)]
pub(super) struct Directory<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) big_endian: bool,
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    tag: u16,
    /// Bytes per value.
    size: u8,
    count: u64,
    /// Offset of the values in the file.
    at: u64,
}

impl<'a> Directory<'a> {
    /// Reads the first directory.
    ///
    /// # Errors
    /// [`ImageError::Invalid`] if it lies outside of the file.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, ImageError> {
        let mut directory = Self { bytes, big_endian: bytes.starts_with(b"MM"), entries: Vec::new() };
        let big = directory.integer(2, 2)? == 43;
        let (start, head, room) = if big { (8, 8, 8) } else { (4, 2, 4) };
        let at = directory.integer(start, room)?;
        let count = directory.integer(at, head)?.min(MAX_ENTRIES);
        let length = 4 + 2 * room;
        for i in 0..count {
            let entry = at.saturating_add(head + i * length);
            let (tag, kind) = (directory.integer(entry, 2)? as u16, directory.integer(entry + 2, 2)?);
            let count = directory.integer(entry + 4, room)?;
            let size = match kind {
                1 | 2 | 6 | 7 => 1,
                3 | 8 => 2,
                4 | 9 | 11 | 13 => 4,
                5 | 10 | 12 | 16 | 17 | 18 => 8,
                _ => continue,
            };
            let inside = count.checked_mul(size).is_some_and(|length| length <= room);
            let at = if inside { entry + 4 + room } else { directory.integer(entry + 4 + room, room)? };
            directory.entries.push(Entry { tag, size: size as u8, count, at });
        }
        Ok(directory)
    }

    /// An unsigned integer of `size` bytes at offset `at`.
    fn integer(&self, at: u64, size: u64) -> Result<u64, ImageError> {
        let end =
            || ImageError::Invalid { reason: "truncated", detail: "TIFF ends before its directory does".to_owned() };
        let range = usize::try_from(at).ok().and_then(|at| Some(at..at.checked_add(size as usize)?));
        let bytes = range.and_then(|range| self.bytes.get(range)).ok_or_else(end)?;
        let join = |value: u64, &byte: &u8| value << 8 | u64::from(byte);
        Ok(if self.big_endian { bytes.iter().fold(0, join) } else { bytes.iter().rev().fold(0, join) })
    }

    fn entry(&self, tag: u16) -> Option<Entry> {
        self.entries.iter().copied().find(|entry| entry.tag == tag)
    }

    /// The first value of a tag, if the tag is there.
    pub(super) fn one(&self, tag: u16) -> Result<Option<u64>, ImageError> {
        let Some(entry) = self.entry(tag).filter(|entry| entry.count > 0) else { return Ok(None) };
        self.integer(entry.at, entry.size.into()).map(Some)
    }

    /// All values of a tag; empty if the tag is missing.
    pub(super) fn all(&self, tag: u16) -> Result<Vec<u64>, ImageError> {
        let Some(entry) = self.entry(tag) else { return Ok(Vec::new()) };
        let size = u64::from(entry.size);
        // no more values than the file can hold, whatever the count says
        let most = (self.bytes.len() as u64 / size).min(MAX_VALUES);
        if entry.count > most {
            let detail = format!("TIFF is broken: tag {tag} has {} values", entry.count);
            return Err(ImageError::Invalid { reason: "corrupt", detail });
        }
        (0..entry.count).map(|i| self.integer(entry.at.saturating_add(i * size), size)).collect()
    }

    /// The bytes of a tag's values.
    pub(super) fn raw(&self, tag: u16) -> Option<&'a [u8]> {
        let entry = self.entry(tag)?;
        let at = usize::try_from(entry.at).ok()?;
        self.bytes.get(at..at.checked_add(usize::try_from(entry.count).ok()? * usize::from(entry.size))?)
    }
}
