//! Limits on untrusted images, errors for refused ones, and the decoded image.
//!
//! Must not know a format.

use std::error::Error;
use std::io;

/// Limits above which an image is refused. All are checked before pixels are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLimits {
    /// Largest encoded file, in bytes. Default 20 MiB.
    pub max_bytes: usize,
    /// Largest width and height, in pixels. Default 16384.
    pub max_side: u32,
    /// Largest width × height, in pixels. Default 64 million.
    pub max_pixels: u64,
    /// Most bytes of memory for decoding, all buffers together. Default 224 MiB, the most that [`DecodeMemory`] grants
    /// one image.
    ///
    /// [`DecodeMemory`]: super::DecodeMemory
    pub max_decoded_bytes: u64,
}

impl Default for ImageLimits {
    fn default() -> Self {
        Self { max_bytes: 20 << 20, max_side: 16384, max_pixels: 64_000_000, max_decoded_bytes: 224 << 20 }
    }
}

/// A decoded image: rows from top to bottom, pixels from left to right, one byte each of red, green and blue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage {
    /// Pixels per row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Samples, height × width × 3.
    pub data: Vec<u8>,
}

/// Why an image can't be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// The image has 0 bytes.
    #[error("image is empty (0 bytes); send the encoded file as it is on disk")]
    Empty,
    /// The format, or this kind of it, is not supported.
    #[error("{detail}; send it as JPEG, PNG or WebP")]
    Unsupported {
        /// What the bytes are instead.
        detail: String,
    },
    /// The image exceeds one of [`ImageLimits`].
    #[error("image is too large: {detail}; scale it down")]
    TooLarge {
        /// Label of the limit: see [`ImageError::reason`].
        reason: &'static str,
        /// The limit, the image's value and the limit's value.
        detail: String,
    },
    /// The image is corrupt or truncated.
    #[error("image can't be decoded: {detail}; check that the file is whole and opens elsewhere")]
    Invalid {
        /// Label of the kind of damage: see [`ImageError::reason`].
        reason: &'static str,
        /// Message of the decoder.
        detail: String,
    },
}

impl ImageError {
    /// All values of [`reason`](Self::reason).
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

    /// Checks width and height from the header.
    pub(super) fn check_size(&self, width: u32, height: u32) -> Result<(), ImageError> {
        if width == 0 || height == 0 {
            let detail = format!("it is {width} pixels wide and {height} high");
            return Err(ImageError::Invalid { reason: "corrupt", detail });
        }
        over("too_large", "pixels wide", width.into(), self.max_side.into())?;
        over("too_large", "pixels high", height.into(), self.max_side.into())?;
        over("too_many_pixels", "pixels", u64::from(width) * u64::from(height), self.max_pixels)
    }

    /// Checks the memory for decoding, computed from the header.
    pub(super) fn check_need(&self, bytes: u64) -> Result<(), ImageError> {
        over("too_much_memory", "bytes to be decoded in", bytes, self.max_decoded_bytes)
    }
}

/// Fails if `actual` is more than `limit`.
pub(super) fn over(reason: &'static str, what: &str, actual: u64, limit: u64) -> Result<(), ImageError> {
    if actual <= limit {
        return Ok(());
    }
    Err(ImageError::TooLarge { reason, detail: format!("it has {actual} {what}, the limit is {limit}") })
}

/// Size of an image, and memory for decoding it, by its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Pixels per row, before the orientation is applied.
    pub width: u32,
    /// Rows, before the orientation is applied.
    pub height: u32,
    /// Peak bytes of memory for decoding, including the decoded image.
    pub bytes: u64,
    /// Whether `bytes` include the image as RGB.
    pub(super) rgb: bool,
}

/// Whether a decoder's error is an unexpected end of the data.
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
