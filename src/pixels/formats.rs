//! Image formats: detects a file's format, reads its header, and decodes it to the pixels of Pillow's `convert("RGB")`.
//!
//! Owns the detection by content and the order of checks: file length, size in the header, memory for decoding, and
//! only then the pixels. One file per format. Must not know what happens to the pixels, nor which protocol delivered
//! the bytes.

mod bmp;
pub(super) mod components;
mod directory;
mod gif;
mod jpeg;
mod markers;
mod png;
mod strips;
mod tiff;
mod webp;

use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;

pub use self::jpeg::Scale;
use self::markers::Markers;
use self::tiff::Page;
use super::limits::{ImageError, ImageLimits, Need, RgbImage};
use super::picture::Picture;

/// Decodes images within limits. Cheap to copy; shared by threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Decoder {
    /// Limits that an image is refused above.
    pub limits: ImageLimits,
    /// Scale at which JPEGs are decoded.
    pub jpeg: Scale,
}

/// The supported formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Jpeg,
    Png,
    WebP,
    Gif,
    Bmp,
    Tiff,
}

/// [`Decoder::decode`] at full size, to RGB.
///
/// # Errors
/// As [`Decoder::decode`].
pub fn decode(bytes: &[u8], limits: &ImageLimits, exif_orientation: bool) -> Result<RgbImage, ImageError> {
    let decoder = Decoder { limits: *limits, jpeg: Scale::Exact };
    decoder.decode(bytes, exif_orientation, |width, height| [width, height]).map(Picture::into_rgb)
}

impl Decoder {
    /// Reads the header: format, size, orientation (from EXIF if `exif_orientation` is set), and the memory that
    /// decoding needs. Runs in microseconds, or in one pass over the bytes for progressive JPEG.
    ///
    /// # Errors
    /// [`ImageError::Empty`] and [`ImageError::Unsupported`] by the first bytes, [`ImageError::TooLarge`] by the file's
    /// length and header, [`ImageError::Invalid`] if the header is broken.
    pub fn open<'a>(&self, bytes: &'a [u8], exif_orientation: bool) -> Result<Encoded<'a>, ImageError> {
        if bytes.is_empty() {
            return Err(ImageError::Empty);
        }
        self.limits.check_file(bytes.len())?;
        let format = Format::of(bytes)?;
        let header = match format {
            Format::Jpeg => Header::Jpeg(jpeg::read(bytes, &self.limits)?),
            Format::Tiff => Header::Tiff(tiff::read(bytes, &self.limits)?),
            Format::Png => Header::Png,
            Format::Gif => Header::Gif,
            Format::WebP => Header::WebP,
            Format::Bmp => Header::Bmp,
        };
        let mut need = match &header {
            Header::Jpeg(markers) => jpeg::need(bytes, markers),
            Header::Tiff(page) => page.need(),
            Header::Png => png::need(bytes, &self.limits)?,
            Header::Gif => gif::need(bytes, &self.limits)?,
            Header::WebP => webp::need(bytes, &self.limits)?,
            Header::Bmp => bmp::need(bytes, &self.limits)?,
        };
        let orientation = match &header {
            // Pillow applies a TIFF's orientation on loading, without being asked
            Header::Tiff(page) => Some(page.orientation),
            _ if !exif_orientation => None,
            Header::Jpeg(markers) => markers.exif.and_then(Orientation::from_exif_chunk),
            Header::Png => png::orientation(bytes),
            Header::WebP => webp::orientation(bytes),
            Header::Gif | Header::Bmp => None,
        };
        // broken metadata doesn't make the image unreadable
        let orientation = orientation.unwrap_or(Orientation::NoTransforms);
        if orientation != Orientation::NoTransforms {
            // rotation copies from one RGB buffer to another
            let rgb = 3 * u64::from(need.width) * u64::from(need.height);
            need.bytes = (need.bytes + if need.rgb { 0 } else { rgb }).max(2 * rgb);
        }
        self.limits.check_need(need.bytes)?;
        Ok(Encoded { decoder: *self, bytes, header, orientation, need })
    }

    /// [`open`](Self::open) and [`Encoded::decode`] in one call.
    ///
    /// # Errors
    /// Those of the two.
    pub fn decode(
        &self,
        bytes: &[u8],
        exif_orientation: bool,
        needed: impl Fn(u32, u32) -> [u32; 2],
    ) -> Result<Picture, ImageError> {
        self.open(bytes, exif_orientation)?.decode(needed)
    }
}

/// An image whose header was read and is within the limits.
#[derive(Debug)]
pub struct Encoded<'a> {
    decoder: Decoder,
    bytes: &'a [u8],
    header: Header<'a>,
    orientation: Orientation,
    need: Need,
}

/// Parts of the header that decoding needs.
#[derive(Debug)]
enum Header<'a> {
    Jpeg(Markers<'a>),
    Tiff(Page<'a>),
    Png,
    Gif,
    WebP,
    Bmp,
}

impl Encoded<'_> {
    /// Size of the image and memory to decode it, by the header.
    pub fn need(&self) -> Need {
        self.need
    }

    /// Decodes the first frame to the pixels of Pillow's `convert("RGB")`: alpha is dropped, greyscale repeated,
    /// palettes looked up.
    ///
    /// `needed` returns the width and height that an (upright) image of a width and height will be resized to;
    /// [`Scale::Fast`] never decodes to a smaller size, [`Scale::Exact`] ignores it.
    ///
    /// # Errors
    /// [`ImageError::Invalid`] if the pixels can't be decoded in full, [`ImageError::Unsupported`] if only the pixels
    /// show that their kind is not supported.
    pub fn decode(&self, needed: impl Fn(u32, u32) -> [u32; 2]) -> Result<Picture, ImageError> {
        let Self { decoder, bytes, orientation, .. } = *self;
        let needed = |width: u32, height: u32| {
            if is_turned(orientation) {
                let [across, down] = needed(height, width);
                [down, across]
            } else {
                needed(width, height)
            }
        };
        let decode = || match &self.header {
            Header::Jpeg(markers) => jpeg::decode(bytes, markers, &decoder.limits, decoder.jpeg, needed),
            Header::Tiff(page) => page.decode(&decoder.limits),
            Header::Png => png::decode(bytes),
            Header::Gif => gif::decode(bytes),
            Header::WebP => webp::decode(bytes),
            Header::Bmp => bmp::decode(bytes),
        };
        // decoders are libraries: a panic in one must fail this image only
        let failed = |_| {
            let detail = "the decoder of its format fails on it".to_owned();
            Err(ImageError::Invalid { reason: "corrupt", detail })
        };
        let picture = catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(failed)?;
        Ok(picture.upright(orientation))
    }
}

/// Whether the orientation swaps width and height.
fn is_turned(orientation: Orientation) -> bool {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    matches!(orientation, Rotate90 | Rotate90FlipH | Rotate270 | Rotate270FlipH)
}

impl Format {
    /// Detects the format by the first bytes.
    fn of(bytes: &[u8]) -> Result<Self, ImageError> {
        match bytes {
            [0xFF, 0xD8, 0xFF, ..] => Ok(Self::Jpeg),
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1A, b'\n', ..] => Ok(Self::Png),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Ok(Self::WebP),
            [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Ok(Self::Gif),
            [b'B', b'M', ..] => Ok(Self::Bmp),
            [b'I', b'I', 42 | 43, 0, ..] | [b'M', b'M', 0, 42 | 43, ..] => Ok(Self::Tiff),
            _ => Err(ImageError::Unsupported { detail: unknown(bytes).to_owned() }),
        }
    }
}

/// Describes bytes in none of the supported formats.
fn unknown(bytes: &[u8]) -> &'static str {
    let brand = bytes.get(4..12).unwrap_or_default();
    let text = bytes.trim_ascii_start();
    let starts = |with: &[u8]| text.len() >= with.len() && text[..with.len()].eq_ignore_ascii_case(with);
    match (bytes, brand) {
        (_, b"ftypavif" | b"ftypavis") => "AVIF images are not read",
        (_, [b'f', b't', b'y', b'p', b'h', b'e', b'i' | b'v', _] | b"ftypmif1" | b"ftypmsf1") => {
            "HEIC images (photos of iPhones) are not read"
        }
        ([0xFF, 0x0A, ..] | [0, 0, 0, 12, b'J', b'X', b'L', b' ', ..], _) => "JPEG XL images are not read",
        ([0, 0, 0, 12, b'j', b'P', ..] | [0xFF, 0x4F, 0xFF, 0x51, ..], _) => "JPEG 2000 images are not read",
        ([0xFF, 0xD8, ..], _) => "the file begins like a JPEG, but has no marker after its start",
        ([b'%', b'P', b'D', b'F', ..], _) => "this is a PDF document, not an image",
        ([b'8', b'B', b'P', b'S', ..], _) => "Photoshop documents are not read",
        ([0, 0, 1 | 2, 0, ..], _) => "icons and cursors are not read",
        ([b'P', b'1'..=b'7', b' ' | b'\n' | b'\r' | b'\t', ..], _) => "PNM images are not read",
        ([b'q', b'o', b'i', b'f', ..], _) => "QOI images are not read",
        ([0x76, 0x2F, 0x31, 1, ..], _) => "OpenEXR images are not read",
        ([b'P', b'K', 3 | 5, 4 | 6, ..], _) => "this is a ZIP archive, not an image",
        ([0x1F, 0x8B, ..], _) => "this is a gzip file, not an image",
        (_, [b'f', b't', b'y', b'p', ..]) => "this is a video or another file of the ISO media format, not an image",
        _ if starts(b"<svg") || (starts(b"<?xml") && contains(text, b"<svg")) => "SVG drawings are not read",
        _ if starts(b"<!doctype html") || starts(b"<html") => "this is an HTML page, not an image",
        _ => "the bytes are not an image of a known format",
    }
}

fn contains(bytes: &[u8], word: &[u8]) -> bool {
    bytes[..bytes.len().min(4096)].windows(word.len()).any(|window| window == word)
}
