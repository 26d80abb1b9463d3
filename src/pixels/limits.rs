//! What an untrusted image may cost, why one is refused, and the decoded image.
//!
//! Owns the limits and the errors of this room. Must not know a format.

use std::error::Error;
use std::io;

/// What an image may cost before it is refused. Everything is checked before pixels are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLimits {
    /// Largest encoded file, in bytes. Default 20 MiB.
    pub max_bytes: usize,
    /// Largest width and height, in pixels. Default 16384.
    pub max_side: u32,
    /// Largest width × height, in pixels. Default 64 million.
    pub max_pixels: u64,
    /// Most bytes that decoding may take, all buffers together. Default 224 MiB, what [`DecodeMemory`] leaves one image.
    ///
    /// [`DecodeMemory`]: super::DecodeMemory
    pub max_decoded_bytes: u64,
}

impl Default for ImageLimits {
    fn default() -> Self {
        Self { max_bytes: 20 << 20, max_side: 16384, max_pixels: 64_000_000, max_decoded_bytes: 224 << 20 }
    }
}

/// A decoded image: rows from the top, pixels from the left, one byte each of red, green and blue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage {
    /// Pixels a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Samples, height × width × 3 of them.
    pub data: Vec<u8>,
}

/// Why bytes didn't become an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// There are no bytes.
    #[error("image is empty (0 bytes); send the encoded file as it is on disk")]
    Empty,
    /// Not one of the formats that are read, or a kind of it that no decoder here knows.
    #[error("{detail}; send it as JPEG, PNG or WebP")]
    Unsupported {
        /// What was found instead.
        detail: String,
    },
    /// More than [`ImageLimits`] allow.
    #[error("image is too large: {detail}; scale it down")]
    TooLarge {
        /// Label of the limit: see [`ImageError::reason`].
        reason: &'static str,
        /// Which limit, the image's number and the limit's.
        detail: String,
    },
    /// Corrupt or truncated.
    #[error("image can't be decoded: {detail}; check that the file is whole and opens elsewhere")]
    Invalid {
        /// Label of the kind of damage: see [`ImageError::reason`].
        reason: &'static str,
        /// What the decoder says.
        detail: String,
    },
}

impl ImageError {
    /// Every value of [`reason`](Self::reason).
    pub const REASONS: [&'static str; 8] = [
        "empty",
        "bad_format",
        "too_large",
        "too_many_pixels",
        "too_much_memory",
        "too_many_scans",
        "truncated",
        "corrupt",
    ];

    /// The error as a metric label: one of [`REASONS`](Self::REASONS).
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Unsupported { .. } => "bad_format",
            Self::TooLarge { reason, .. } | Self::Invalid { reason, .. } => reason,
        }
    }
}

impl ImageLimits {
    pub(super) fn check_file(&self, bytes: usize) -> Result<(), ImageError> {
        over("too_large", "bytes", bytes as u64, self.max_bytes as u64)
    }

    /// By the header alone.
    pub(super) fn check_size(&self, width: u32, height: u32) -> Result<(), ImageError> {
        if width == 0 || height == 0 {
            let detail = format!("it is {width} pixels wide and {height} high");
            return Err(ImageError::Invalid { reason: "corrupt", detail });
        }
        over("too_large", "pixels wide", width.into(), self.max_side.into())?;
        over("too_large", "pixels high", height.into(), self.max_side.into())?;
        over("too_many_pixels", "pixels", u64::from(width) * u64::from(height), self.max_pixels)
    }

    /// What decoding takes, by the header alone.
    pub(super) fn check_need(&self, bytes: u64) -> Result<(), ImageError> {
        over("too_much_memory", "bytes to be decoded in", bytes, self.max_decoded_bytes)
    }
}

/// Fails when `actual` is more than `limit`.
pub(super) fn over(reason: &'static str, what: &str, actual: u64, limit: u64) -> Result<(), ImageError> {
    if actual <= limit {
        return Ok(());
    }
    Err(ImageError::TooLarge { reason, detail: format!("it has {actual} {what}, the limit is {limit}") })
}

/// What an image's header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Pixels a row, before any turning.
    pub width: u32,
    /// Rows, before any turning.
    pub height: u32,
    /// Bytes that decoding takes at its peak, the decoded image included.
    pub bytes: u64,
    /// Whether `bytes` hold the image as RGB already.
    pub(super) rgb: bool,
}

/// Whether a decoder's error comes from reading past the last byte.
pub(super) fn ends_early(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::UnexpectedEof) {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_the_most_that_passes() {
        let limits = ImageLimits { max_bytes: 10, max_side: 20, max_pixels: 300, max_decoded_bytes: 900 };
        let reason = |checked: Result<(), ImageError>| checked.err().map(|error| error.reason());
        assert_eq!(reason(limits.check_file(10)), None);
        assert_eq!(reason(limits.check_file(11)), Some("too_large"));
        assert_eq!(reason(limits.check_need(900)), None);
        assert_eq!(reason(limits.check_need(901)), Some("too_much_memory"));
        for (width, height, refused) in [
            (15, 20, None),
            (16, 20, Some("too_many_pixels")),
            (20, 1, None),
            (21, 1, Some("too_large")),
            (1, 21, Some("too_large")),
            (0, 1, Some("corrupt")),
            (1, 0, Some("corrupt")),
        ] {
            assert_eq!(reason(limits.check_size(width, height)), refused, "{width} x {height}");
        }
    }
}
