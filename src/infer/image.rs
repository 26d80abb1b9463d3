//! From an encoded file to RGB pixels, as Pillow's `Image.open(…).convert("RGB")` gives them; limits come first.
//!
//! Owns the limits on untrusted images, the choice of decoder by content, EXIF orientation and the way to RGB8. Must
//! not know what happens to the pixels, nor which protocol brought the bytes.
//!
//! Where it deviates from Pillow 13 (each pinned by a test in `tests/preprocess.rs`): JPEG pixels come from another
//! inverse DCT and upsampler (`zune-jpeg`: up to 5 levels on photographs, 0.2 in the mean); 16-bit greyscale keeps its
//! high byte where Pillow clips at 255; what the first frame of a GIF leaves open is black, in Pillow its background.

use std::error::Error;
use std::io::{self, Cursor};

use image::codecs::{bmp, gif, jpeg, png, tiff, webp};
use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ImageDecoder, ImageFormat};

/// What an image may cost before it is refused. Everything is checked before pixels are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLimits {
    /// Largest encoded file, in bytes. Default 20 MiB.
    pub max_bytes: usize,
    /// Largest width and height, in pixels. Default 16384.
    pub max_side: u32,
    /// Largest width × height, in pixels. Default 64 million.
    pub max_pixels: u64,
    /// Largest memory for decoded samples, before they become RGB8, and for a decoder's own buffers, in bytes each.
    /// Default 256 MiB.
    pub max_decoded_bytes: u64,
    /// Largest memory for what comes before the pixels (text, colour profiles), in bytes. Default 8 MiB.
    pub max_metadata_bytes: u64,
}

impl Default for ImageLimits {
    fn default() -> Self {
        Self {
            max_bytes: 20 << 20,
            max_side: 16384,
            max_pixels: 64_000_000,
            max_decoded_bytes: 256 << 20,
            max_metadata_bytes: 8 << 20,
        }
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
    #[error("{detail}; send a JPEG, PNG, WebP, GIF, BMP or TIFF")]
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
    pub const REASONS: [&'static str; 7] =
        ["empty", "bad_format", "too_large", "too_many_pixels", "too_much_memory", "truncated", "corrupt"];

    /// The error as a metric label: one of [`REASONS`](Self::REASONS).
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Unsupported { .. } => "bad_format",
            Self::TooLarge { reason, .. } | Self::Invalid { reason, .. } => reason,
        }
    }

    /// An error of the `image` crate, in terms of this room.
    fn from_decoder(format: ImageFormat, error: &image::ImageError) -> Self {
        // decoders quote what they read: keep a hostile file from writing the message
        let said: String = error.to_string().chars().filter(|c| !c.is_control()).take(200).collect();
        match error {
            image::ImageError::Unsupported(_) => Self::Unsupported { detail: said },
            image::ImageError::Limits(_) => Self::TooLarge {
                reason: "too_much_memory",
                detail: format!("{format:?} needs more memory than an image may have"),
            },
            _ if ends_early(error) => {
                Self::Invalid { reason: "truncated", detail: format!("{format:?} ends before its pixels do") }
            }
            _ => Self::Invalid { reason: "corrupt", detail: said },
        }
    }
}

/// Whether a decoder's error comes from reading past the last byte.
fn ends_early(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::UnexpectedEof) {
            return true;
        }
        cause = error.source();
    }
    false
}

impl ImageLimits {
    fn check_file(&self, bytes: usize) -> Result<(), ImageError> {
        over("too_large", "bytes", bytes as u64, self.max_bytes as u64)
    }

    fn check_header(&self, (width, height): (u32, u32), decoded: u64) -> Result<(), ImageError> {
        over("too_large", "pixels wide", width.into(), self.max_side.into())?;
        over("too_large", "pixels high", height.into(), self.max_side.into())?;
        over("too_many_pixels", "pixels", u64::from(width) * u64::from(height), self.max_pixels)?;
        over("too_much_memory", "bytes when decoded", decoded, self.max_decoded_bytes)
    }
}

/// What a decoder may allocate. Sides and pixels are not its business: `check_header` says which of them is too much.
fn allocation(bytes: u64) -> image::Limits {
    let mut limits = image::Limits::no_limits();
    limits.max_alloc = Some(bytes);
    limits
}

/// Fails when `actual` is more than `limit`.
fn over(reason: &'static str, what: &str, actual: u64, limit: u64) -> Result<(), ImageError> {
    if actual <= limit {
        return Ok(());
    }
    Err(ImageError::TooLarge { reason, detail: format!("it has {actual} {what}, the limit is {limit}") })
}

/// Decodes the first frame of an encoded image, whose format is told by its content, to RGB8 as Pillow's
/// `convert("RGB")` does: alpha is dropped, greyscale repeated, palettes looked up, 16-bit samples keep the high byte.
///
/// With `exif_orientation` the image is turned upright as its EXIF block says.
///
/// # Errors
/// [`ImageError::Empty`] and [`ImageError::Unsupported`] by the first bytes, [`ImageError::TooLarge`] by the file's
/// length and header, [`ImageError::Invalid`] when the pixels can't be decoded in full.
pub fn decode(bytes: &[u8], limits: &ImageLimits, exif_orientation: bool) -> Result<RgbImage, ImageError> {
    if bytes.is_empty() {
        return Err(ImageError::Empty);
    }
    limits.check_file(bytes.len())?;
    let format = sniff(bytes)?;
    let failed = |error: image::ImageError| ImageError::from_decoder(format, &error);

    let mut decoder = open(format, bytes, limits).map_err(failed)?;
    let (width, height) = decoder.dimensions();
    limits.check_header((width, height), decoder.total_bytes())?;
    if width == 0 || height == 0 {
        let detail = format!("{format:?} is {width} pixels wide and {height} high");
        return Err(ImageError::Invalid { reason: "corrupt", detail });
    }
    if format == ImageFormat::Jpeg && !jpeg_has_end(bytes) {
        let detail = "JPEG has no end-of-image marker".to_owned();
        return Err(ImageError::Invalid { reason: "truncated", detail });
    }
    decoder.set_limits(allocation(limits.max_decoded_bytes)).map_err(failed)?;
    // a broken EXIF block doesn't make the picture unreadable
    let orientation = if exif_orientation { decoder.orientation().ok() } else { None };
    let color = decoder.color_type();
    let mut samples = vec![0; decoder.total_bytes() as usize];
    decoder.read_image(&mut samples).map_err(failed)?;
    let data = to_rgb(color, samples)?;
    Ok(upright(RgbImage { width, height, data }, orientation.unwrap_or(Orientation::NoTransforms)))
}

/// The format by the first bytes.
fn sniff(bytes: &[u8]) -> Result<ImageFormat, ImageError> {
    use ImageFormat::{Bmp, Gif, Jpeg, Png, Tiff, WebP};
    match image::guess_format(bytes) {
        Ok(format @ (Jpeg | Png | WebP | Gif | Bmp | Tiff)) => Ok(format),
        Ok(other) => Err(ImageError::Unsupported { detail: format!("`{other:?}` images are not read") }),
        Err(_) => Err(ImageError::Unsupported { detail: "the bytes are not an image of a known format".to_owned() }),
    }
}

/// Reads the header only.
fn open<'a>(
    format: ImageFormat,
    bytes: &'a [u8],
    limits: &ImageLimits,
) -> image::ImageResult<Box<dyn ImageDecoder + 'a>> {
    let input = Cursor::new(bytes);
    Ok(match format {
        ImageFormat::Png => Box::new(png::PngDecoder::with_limits(input, allocation(limits.max_metadata_bytes))?),
        ImageFormat::WebP => Box::new(webp::WebPDecoder::new(input)?),
        ImageFormat::Gif => Box::new(gif::GifDecoder::new(input)?),
        ImageFormat::Bmp => Box::new(bmp::BmpDecoder::new(input)?),
        ImageFormat::Tiff => Box::new(tiff::TiffDecoder::new(input)?),
        _ => Box::new(jpeg::JpegDecoder::new(input)?),
    })
}

/// Whether the end-of-image marker is there. The decoder fills what is missing with grey; Pillow refuses.
fn jpeg_has_end(bytes: &[u8]) -> bool {
    if bytes.ends_with(&[0xFF, 0xD9]) {
        return true;
    }
    // bytes may follow the image: walk its segments, as a thumbnail inside one of them has an end of its own
    let mut rest = bytes;
    while let Some(at) = rest.windows(2).position(|pair| pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0xFF)) {
        rest = match rest[at + 1..] {
            [0xD9, ..] => return true,
            // no length follows: start of image, restart
            [0x01 | 0xD0..=0xD8, ref rest @ ..] => rest,
            [_, high, low, ..] => {
                let length = usize::from(u16::from_be_bytes([high, low]));
                rest.get(at + 2 + length.max(2)..).unwrap_or_default()
            }
            _ => &[],
        };
    }
    false
}

/// Samples as a decoder gives them, as RGB8.
fn to_rgb(color: ColorType, samples: Vec<u8>) -> Result<Vec<u8>, ImageError> {
    // 16-bit samples are in the machine's byte order; Pillow takes the high byte
    const HIGH: usize = if cfg!(target_endian = "little") { 1 } else { 0 };
    let (size, from) = match color {
        ColorType::Rgb8 => return Ok(samples),
        ColorType::L8 => (1, [0; 3]),
        ColorType::La8 => (2, [0; 3]),
        ColorType::Rgba8 => (4, [0, 1, 2]),
        ColorType::L16 => (2, [HIGH; 3]),
        ColorType::La16 => (4, [HIGH; 3]),
        ColorType::Rgb16 => (6, [HIGH, 2 + HIGH, 4 + HIGH]),
        ColorType::Rgba16 => (8, [HIGH, 2 + HIGH, 4 + HIGH]),
        other => return Err(ImageError::Unsupported { detail: format!("`{other:?}` samples are not read") }),
    };
    let mut rgb = vec![0; samples.len() / size * 3];
    for (to, pixel) in rgb.chunks_exact_mut(3).zip(samples.chunks_exact(size)) {
        to.copy_from_slice(&from.map(|i| pixel[i]));
    }
    Ok(rgb)
}

/// Turns and mirrors the image.
fn upright(image: RgbImage, orientation: Orientation) -> RgbImage {
    if orientation == Orientation::NoTransforms {
        return image;
    }
    let RgbImage { width, height, data } = image;
    let mut turned = DynamicImage::ImageRgb8(image::RgbImage::from_raw(width, height, data).unwrap_or_default());
    turned.apply_orientation(orientation);
    RgbImage { width: turned.width(), height: turned.height(), data: turned.into_bytes() }
}
