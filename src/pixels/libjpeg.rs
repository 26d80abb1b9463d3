//! JPEG by libjpeg-turbo, the decoder inside Pillow, with Pillow's settings: accurate integer inverse DCT, smooth
//! upsampling, and its conversion of CMYK. Only in builds with the feature `turbojpeg`.
//!
//! Owns how that library is called and what its complaints mean. Must not know limits other than those it is given, nor
//! what happens to the pixels.

use turbojpeg::{Colorspace, DecompressHeader, Decompressor, Error, Image, PixelFormat, ScalingFactor};

use super::formats::{check_jpeg_end, jpeg_segments};
use super::limits::{ImageError, ImageLimits, RgbImage, over};

/// Most scans of a progressive file: each costs a pass over all pixels, and ten are usual.
const SCANS: u32 = 100;
/// Bytes of a coefficient, of which a file of several scans keeps one for each sample.
const COEFFICIENT: u64 = 2;

/// What libjpeg-turbo starts a message with when it goes on nevertheless: it fills in or leaves out, and so does Pillow.
const WARNINGS: [&str; 6] = [
    "Corrupt JPEG data",
    "Inconsistent progression sequence",
    "Invalid SOS parameters for sequential JPEG",
    "Unknown Adobe color transform code",
    "Warning:",
    ENDS_EARLY,
];
/// The warning that Pillow takes for an error.
const ENDS_EARLY: &str = "Premature end of JPEG file";

/// Decodes a JPEG to RGB8, at 1/8, 1/4 or 1/2 of its size where `divisor`, told width and height, is at least that much.
/// Nothing comes back when the header makes the library warn: its binding then gives no header, and another decoder must
/// do.
///
/// # Errors
/// As [`Decoder::decode`](super::Decoder::decode); limits are checked before memory is taken.
pub(super) fn decode(
    bytes: &[u8],
    limits: &ImageLimits,
    divisor: impl FnOnce(u32, u32) -> u32,
) -> Result<Option<RgbImage>, ImageError> {
    let mut decompressor = Decompressor::new().map_err(refusal)?;
    decompressor.set_scan_limit(SCANS).map_err(refusal)?;
    let header = match decompressor.read_header(bytes) {
        Ok(header) => header,
        Err(error) if is_warning(&error) => return Ok(None),
        Err(error) => return Err(refusal(error)),
    };
    // a JPEG's sides have 16 bits
    let (width, height) = (header.width as u32, header.height as u32);
    let factor = match divisor(width, height) {
        _ if header.is_lossless => ScalingFactor::ONE,
        0 | 1 => ScalingFactor::ONE,
        2 | 3 => ScalingFactor::ONE_HALF,
        4..=7 => ScalingFactor::ONE_QUARTER,
        _ => ScalingFactor::ONE_EIGHTH,
    };
    let format = match header.colorspace {
        Colorspace::CMYK | Colorspace::YCCK => PixelFormat::CMYK,
        Colorspace::RGB | Colorspace::YCbCr | Colorspace::Gray => PixelFormat::RGB,
    };
    let scaled = header.scaled(factor);
    let pitch = scaled.width * format.size();
    limits.check_header((width, height), (pitch * scaled.height) as u64)?;
    over("too_much_memory", "bytes of coefficients", coefficients(bytes, &header), limits.max_decoded_bytes)?;
    check_jpeg_end(bytes)?;

    decompressor.set_scaling_factor(factor).map_err(refusal)?;
    let mut pixels = vec![0; pitch * scaled.height];
    let image = Image { pixels: &mut pixels[..], width: scaled.width, pitch, height: scaled.height, format };
    match decompressor.decompress(bytes, image) {
        Err(error) if !is_warning(&error) || says(&error, ENDS_EARLY) => return Err(refusal(error)),
        _ => {}
    }
    if format == PixelFormat::CMYK {
        pixels = cmyk_to_rgb(&pixels);
    }
    Ok(Some(RgbImage { width: scaled.width as u32, height: scaled.height as u32, data: pixels }))
}

/// Memory for the coefficients of the whole image, which the library keeps when they come in several scans.
fn coefficients(bytes: &[u8], header: &DecompressHeader) -> u64 {
    let pixels = (header.width * header.height) as u64;
    let (full, reduced) = match header.colorspace {
        Colorspace::Gray => (1, 0),
        Colorspace::RGB | Colorspace::YCbCr => (1, 2),
        Colorspace::CMYK | Colorspace::YCCK => (2, 2),
    };
    // a first scan that lacks a component isn't the last
    let in_scan = jpeg_segments(bytes).find(|(marker, _)| *marker == 0xDA).and_then(|(_, scan)| scan.get(2));
    if !header.is_progressive && in_scan.is_some_and(|count| u64::from(*count) == full + reduced) {
        return 0;
    }
    let (across, down) = header.subsamp.size();
    (full * pixels + reduced * pixels.div_ceil((across * down) as u64)) * COEFFICIENT
}

/// Pillow's `convert("RGB")` of CMYK, whose samples are stored inverted: `(255 − c)(255 − k) / 255`, rounded.
fn cmyk_to_rgb(pixels: &[u8]) -> Vec<u8> {
    let mut rgb = vec![0; pixels.len() / 4 * 3];
    for (to, from) in rgb.chunks_exact_mut(3).zip(pixels.chunks_exact(4)) {
        let light = u32::from(from[3]);
        for (to, from) in to.iter_mut().zip(from) {
            let product = u32::from(255 - from) * light + 128;
            *to = (light - (((product >> 8) + product) >> 8)) as u8;
        }
    }
    rgb
}

fn says(error: &Error, start: &str) -> bool {
    matches!(error, Error::TurboJpegError(said) if said.starts_with(start))
}

fn is_warning(error: &Error) -> bool {
    WARNINGS.iter().any(|start| says(error, start))
}

/// An error of the library, in terms of the image.
fn refusal(error: Error) -> ImageError {
    if says(&error, ENDS_EARLY) {
        return ImageError::Invalid { reason: "truncated", detail: "JPEG ends before its pixels do".to_owned() };
    }
    if says(&error, "Insufficient memory") {
        let detail = "JPEG needs more memory than an image may have".to_owned();
        return ImageError::TooLarge { reason: "too_much_memory", detail };
    }
    // more than the format's own 65500 a side
    if says(&error, "Maximum supported image dimension") {
        return ImageError::TooLarge {
            reason: "too_large",
            detail: "JPEG is more than 65500 pixels wide or high".into(),
        };
    }
    let said = match &error {
        Error::TurboJpegError(said) => said.chars().filter(|c| !c.is_control()).take(200).collect(),
        other => other.to_string(),
    };
    if says(&error, "Unsupported") {
        return ImageError::Unsupported { detail: said };
    }
    ImageError::Invalid { reason: "corrupt", detail: said }
}
