//! From an encoded file to RGB pixels, as Pillow's `Image.open(…).convert("RGB")` gives them; limits come first.
//!
//! Owns the limits on untrusted images, the choice of decoder by content, EXIF orientation and the way to RGB8. Must
//! not know what happens to the pixels, nor which protocol brought the bytes.
//!
//! Where it deviates from Pillow 13 (each pinned by a test in `tests/preprocess.rs`): JPEG pixels come from another
//! inverse DCT and upsampler (`zune-jpeg`: up to 5 levels on photographs, 0.2 in the mean) unless a [`JpegDecoder`] of
//! the feature `turbojpeg` is chosen; 16-bit greyscale keeps its high byte where Pillow clips at 255; what the first
//! frame of a GIF leaves open is black, in Pillow its background.

use std::error::Error;
use std::io::{self, Cursor};

use image::codecs::{bmp, gif, jpeg, png, tiff, webp};
use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ImageDecoder, ImageFormat};

#[cfg(feature = "turbojpeg")]
use super::libjpeg;
use super::limits::{ImageError, ImageLimits, RgbImage};

/// Which decoder reads JPEG.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum JpegDecoder {
    /// The `image` crate's: near Pillow's pixels.
    #[default]
    Image,
    /// libjpeg-turbo as Pillow uses it: Pillow's pixels.
    #[cfg(feature = "turbojpeg")]
    TurboJpeg,
    /// The same, but an image much larger than it will be resized to is decoded at 1/2, 1/4 or 1/8, as Pillow's
    /// `draft` does: faster, and farther from Pillow's full decode than the `image` crate is.
    #[cfg(feature = "turbojpeg")]
    TurboJpegFast,
}

/// Decodes images within limits. Copied freely, shared by threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Decoder {
    /// What an image may cost.
    pub limits: ImageLimits,
    /// Who reads JPEG.
    pub jpeg: JpegDecoder,
}

/// An error of the `image` crate, in terms of this room.
fn from_decoder(format: ImageFormat, error: &image::ImageError) -> ImageError {
    // decoders quote what they read: keep a hostile file from writing the message
    let said: String = error.to_string().chars().filter(|c| !c.is_control()).take(200).collect();
    match error {
        image::ImageError::Unsupported(_) => ImageError::Unsupported { detail: said },
        image::ImageError::Limits(_) => ImageError::TooLarge {
            reason: "too_much_memory",
            detail: format!("{format:?} needs more memory than an image may have"),
        },
        _ if ends_early(error) => {
            ImageError::Invalid { reason: "truncated", detail: format!("{format:?} ends before its pixels do") }
        }
        _ => ImageError::Invalid { reason: "corrupt", detail: said },
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

/// What a decoder may allocate. Sides and pixels are not its business: `check_header` says which of them is too much.
fn allocation(bytes: u64) -> image::Limits {
    let mut limits = image::Limits::no_limits();
    limits.max_alloc = Some(bytes);
    limits
}

/// [`Decoder::decode`] with the `image` crate's decoders, at full size.
///
/// # Errors
/// As [`Decoder::decode`].
pub fn decode(bytes: &[u8], limits: &ImageLimits, exif_orientation: bool) -> Result<RgbImage, ImageError> {
    let decoder = Decoder { limits: *limits, jpeg: JpegDecoder::Image };
    decoder.decode(bytes, exif_orientation, |width, height| [width, height])
}

impl Decoder {
    /// Decodes the first frame of an encoded image, whose format is told by its content, to RGB8 as Pillow's
    /// `convert("RGB")` does: alpha is dropped, greyscale repeated, palettes looked up, 16-bit samples keep the high
    /// byte.
    ///
    /// With `exif_orientation` the image is turned upright as its EXIF block says. `needed` tells to which width and
    /// height an (upright) image of a width and height will be resized; `JpegDecoder::TurboJpegFast` never decodes
    /// to less, the others don't ask.
    ///
    /// # Errors
    /// [`ImageError::Empty`] and [`ImageError::Unsupported`] by the first bytes, [`ImageError::TooLarge`] by the
    /// file's length and header, [`ImageError::Invalid`] when the pixels can't be decoded in full.
    pub fn decode(
        &self,
        bytes: &[u8],
        exif_orientation: bool,
        needed: impl Fn(u32, u32) -> [u32; 2],
    ) -> Result<RgbImage, ImageError> {
        if bytes.is_empty() {
            return Err(ImageError::Empty);
        }
        self.limits.check_file(bytes.len())?;
        let format = sniff(bytes)?;
        match self.jpeg {
            #[cfg(feature = "turbojpeg")]
            JpegDecoder::TurboJpeg | JpegDecoder::TurboJpegFast if format == ImageFormat::Jpeg => {
                if let Some(image) = self.by_libjpeg(bytes, exif_orientation, needed)? {
                    return Ok(image);
                }
            }
            _ => drop(needed),
        }
        let limits = &self.limits;
        let failed = |error: image::ImageError| from_decoder(format, &error);

        let mut decoder = open(format, bytes, limits).map_err(failed)?;
        let (width, height) = decoder.dimensions();
        limits.check_header((width, height), decoder.total_bytes())?;
        if width == 0 || height == 0 {
            let detail = format!("{format:?} is {width} pixels wide and {height} high");
            return Err(ImageError::Invalid { reason: "corrupt", detail });
        }
        if format == ImageFormat::Jpeg {
            check_jpeg_end(bytes)?;
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

    /// JPEG by libjpeg-turbo; nothing when it has doubts about the header.
    #[cfg(feature = "turbojpeg")]
    fn by_libjpeg(
        &self,
        bytes: &[u8],
        exif_orientation: bool,
        needed: impl Fn(u32, u32) -> [u32; 2],
    ) -> Result<Option<RgbImage>, ImageError> {
        let reader = exif_orientation.then(|| open(ImageFormat::Jpeg, bytes, &self.limits).ok());
        let orientation = reader.flatten().and_then(|mut reader| reader.orientation().ok());
        let orientation = orientation.unwrap_or(Orientation::NoTransforms);
        let fast = self.jpeg == JpegDecoder::TurboJpegFast;
        let divisor = |width: u32, height: u32| {
            if !fast {
                return 1;
            }
            // decoded sizes are rounded up, so that they are never below what is needed
            let ([across, down], [width, height]) = match is_turned(orientation) {
                true => (needed(height, width), [height, width]),
                false => (needed(width, height), [width, height]),
            };
            (width / across.max(1)).min(height / down.max(1))
        };
        let image = libjpeg::decode(bytes, &self.limits, divisor)?;
        Ok(image.map(|image| upright(image, orientation)))
    }
}

/// Whether width and height change places.
#[cfg(feature = "turbojpeg")]
fn is_turned(orientation: Orientation) -> bool {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    matches!(orientation, Rotate90 | Rotate90FlipH | Rotate270 | Rotate270FlipH)
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

/// Fails when a JPEG has no end-of-image marker: decoders fill what is missing with grey; Pillow refuses.
pub(super) fn check_jpeg_end(bytes: &[u8]) -> Result<(), ImageError> {
    // bytes may follow the image: walk its segments, as a thumbnail inside one of them has an end of its own
    if bytes.ends_with(&[0xFF, END_OF_IMAGE]) || jpeg_segments(bytes).any(|(marker, _)| marker == END_OF_IMAGE) {
        return Ok(());
    }
    Err(ImageError::Invalid { reason: "truncated", detail: "JPEG has no end-of-image marker".to_owned() })
}

/// The marker that ends a JPEG.
const END_OF_IMAGE: u8 = 0xD9;

/// The segments of a JPEG: each marker with what belongs to it, which may be cut short by the end of the file.
pub(super) fn jpeg_segments(bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let at = rest.windows(2).position(|pair| pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0xFF))?;
        let marker = rest[at + 1];
        rest = &rest[at + 2..];
        let length = match (marker, rest) {
            // no length follows: start and end of image, restart
            (0x01 | 0xD0..=0xD9, _) => 0,
            (_, [high, low, ..]) => usize::from(u16::from_be_bytes([*high, *low])).max(2),
            _ => 0,
        };
        let (segment, after) = rest.split_at(length.min(rest.len()));
        rest = after;
        Some((marker, segment))
    })
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
