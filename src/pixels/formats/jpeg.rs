//! JPEG, bit-exact with Pillow's decoder: which files it accepts, the memory that they need, and decoding to component
//! planes.
//!
//! Owns calls of the decoder (`libjpeg-turbo-rs`), its limits, and the meaning of its errors; `markers` reads the
//! structure of a file, `components` turns planes into RGB rows. Must not know what happens to the pixels.

use libjpeg_turbo_rs::{ColorSpace, DecodeLimits, Decoder as Jpeg, JpegError, PixelFormat, RawImage, ScalingFactor};

use super::super::limits::{ImageError, ImageLimits, Need};
use super::super::picture::{Picture, Samples};
use super::components::{Components, Conversion, Plane, packed_inks};
use super::markers::{Component, End, Markers};

/// Scale at which large JPEGs are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scale {
    /// Full size, as `Image.open` does.
    #[default]
    Exact,
    /// 1/2, 1/4 or 1/8 if the image is that much larger than the size it will be resized to, as Pillow's `draft` does:
    /// faster, but with different pixels.
    Fast,
}

/// Most scans of a file; encoders write about ten.
const MAX_SCANS: usize = 100;
/// Most 8x8 blocks in all scans together, as a multiple of the blocks in the largest allowed image: a scan costs time
/// per block, even without data for it.
const MAX_PASSES: u64 = 16;
/// Bytes per block: coefficients, which a file of several scans needs in memory, and one byte of state.
const BLOCK: u64 = 64 * 2 + 1;
/// Most bytes of a Huffman table in the decoder, which keeps each scan's tables until the end.
const HUFFMAN_TABLE: u64 = 8192;
/// Bytes that must follow the last pixel's data if the end marker (EOI) is missing: the decoder's look-ahead.
const LOOK_AHEAD: usize = 4;

/// Size and memory for decoding, by the structure of the file.
pub(super) fn need(bytes: &[u8], markers: &Markers<'_>) -> Need {
    let (width, height) = (markers.width, markers.height);
    let blocks = markers.blocks();
    let kept = bytes.len() as u64 + markers.huffman_tables as u64 * HUFFMAN_TABLE;
    let coefficients = if markers.progressive { blocks * BLOCK } else { 0 };
    if markers.lossless {
        // planes of two bytes per sample, and the result
        let bytes = blocks * 64 * 2 + 3 * u64::from(width) * u64::from(height) + kept;
        return Need { width, height, bytes, rgb: true };
    }
    let rgb = if smoothed(markers) { 3 * u64::from(width) * u64::from(height) } else { 0 };
    // metadata (text, profiles) is copied at most once
    Need { width, height, bytes: blocks * 64 + coefficients + rgb + kept, rgb: rgb > 0 }
}

/// Whether libjpeg's block smoothing applies: a progressive file without all bits of the low frequencies.
fn smoothed(markers: &Markers<'_>) -> bool {
    markers.progressive && markers.leaves_open()
}

/// Reads the structure of a file. Fails if Pillow would not open it, or if it exceeds the limits.
pub(super) fn read<'a>(bytes: &'a [u8], limits: &ImageLimits) -> Result<Markers<'a>, ImageError> {
    let markers = Markers::read(bytes, limits)?;
    if markers.lossless && markers.components.len() == 4 {
        return Err(ImageError::Unsupported { detail: "lossless JPEG of inks is not read".to_owned() });
    }
    if smoothed(&markers) && markers.components.len() == 4 {
        let detail = "progressive JPEG of inks that leaves low frequencies open is not read".to_owned();
        return Err(ImageError::Unsupported { detail });
    }
    if markers.scans.len() > MAX_SCANS {
        let detail = format!("it has {} scans, the limit is {MAX_SCANS}", markers.scans.len());
        return Err(ImageError::TooLarge { reason: "too_many_scans", detail });
    }
    let passes: u64 = markers.scans.iter().map(|scan| markers.scan_blocks(scan)).sum();
    let most = limits.max_pixels.div_ceil(64).saturating_mul(3 * MAX_PASSES);
    if passes > most {
        let detail = format!("its scans go over {passes} blocks, the limit is {most}");
        return Err(ImageError::TooLarge { reason: "too_many_scans", detail });
    }
    Ok(markers)
}

/// Decodes all components, to planes, or to RGB at 1/2, 1/4 or 1/8 if `scale` allows it and the image is that much
/// larger than `needed`.
pub(super) fn decode(
    bytes: &[u8],
    markers: &Markers<'_>,
    limits: &ImageLimits,
    scale: Scale,
    needed: impl FnOnce(u32, u32) -> [u32; 2],
) -> Result<Picture, ImageError> {
    if markers.end == End::Missing {
        if markers.progressive || markers.arithmetic || markers.lossless || markers.scans.len() > 1 {
            return Err(truncated());
        }
        // Pillow needs an end marker, or bytes for the decoder's look-ahead
        let filled = bytes.iter().rposition(|&byte| byte != 0xFF).unwrap_or(0) + 1;
        let pixels = &bytes[..filled.saturating_sub(LOOK_AHEAD)];
        decoder(pixels, markers, limits)?.decode_raw().map_err(|_| truncated())?;
    }
    let [width, height] = [markers.width, markers.height];
    let divisor = match scale {
        _ if markers.lossless => 1,
        Scale::Exact => 1,
        Scale::Fast => draft(width, height, needed(width, height)),
    };
    let components = markers.components.len();
    // CMYK only if the scaled transforms leave no component to upsample
    let even = |c: &Component| markers.max_across / c.across == markers.max_down / c.down;
    let absorbed = |c: &Component| even(c) && markers.max_across / c.across <= divisor as usize;
    if divisor > 1 && components == 4 && markers.components.iter().all(absorbed) {
        return whole(bytes, markers, limits, divisor, PixelFormat::Cmyk);
    }
    if (divisor > 1 && components < 4) || smoothed(markers) || markers.lossless {
        return whole(bytes, markers, limits, divisor, PixelFormat::Rgb);
    }
    let samples = Samples::Components(planes(bytes, markers, limits, None)?);
    Ok(Picture { width, height, samples })
}

/// A JPEG inside another file, which defines the colour space of the components.
pub(super) fn components(
    bytes: &[u8],
    limits: &ImageLimits,
    conversion: Conversion,
) -> Result<([u32; 2], Components), ImageError> {
    let markers = read(bytes, limits)?;
    let wanted = match conversion {
        Conversion::Grey => 1,
        Conversion::Rgb | Conversion::YCbCr => 3,
        Conversion::Cmyk | Conversion::PlainCmyk | Conversion::Ycck => 4,
    };
    if markers.components.len() != wanted || smoothed(&markers) || markers.lossless {
        let detail = format!("JPEG with {} components inside another file is not read", markers.components.len());
        return Err(ImageError::Unsupported { detail });
    }
    Ok(([markers.width, markers.height], planes(bytes, &markers, limits, Some(conversion))?))
}

/// The planes of all components; their colour space is given, or read from the file.
fn planes(
    bytes: &[u8],
    markers: &Markers<'_>,
    limits: &ImageLimits,
    told: Option<Conversion>,
) -> Result<Components, ImageError> {
    let strict = decoder(bytes, markers, limits)?;
    let read = match (strict.jpeg_color_space(), markers.components.len()) {
        (_, 1) => Conversion::Grey,
        (ColorSpace::Rgb, _) => Conversion::Rgb,
        (ColorSpace::Cmyk, _) => Conversion::Cmyk,
        (ColorSpace::Ycck, _) => Conversion::Ycck,
        _ => Conversion::YCbCr,
    };
    let conversion = told.unwrap_or(read);
    let raw = match strict.decode_raw() {
        Ok(raw) => raw,
        // errors that Pillow's decoder only warns about
        Err(JpegError::CorruptData(_) | JpegError::UnexpectedEof) => {
            let mut lenient = decoder(bytes, markers, limits)?;
            lenient.set_lenient(true);
            lenient.decode_raw().map_err(refusal)?
        }
        Err(error) => return Err(refusal(error)),
    };
    let RawImage { planes, plane_widths, .. } = raw;
    let planes =
        planes.into_iter().zip(plane_widths).zip(&markers.components).map(|((data, stride), component)| Plane {
            data,
            stride,
            width: markers.samples_across(component),
            height: markers.samples_down(component),
            across: markers.max_across / component.across,
            down: markers.max_down / component.down,
        });
    Ok(Components { planes: planes.collect(), conversion })
}

/// Decodes to packed pixels with the decoder's own last steps: smoothing, or a scaled inverse transform.
fn whole(
    bytes: &[u8],
    markers: &Markers<'_>,
    limits: &ImageLimits,
    divisor: u32,
    format: PixelFormat,
) -> Result<Picture, ImageError> {
    let scaling = ScalingFactor::try_new(1, divisor).map_err(refusal)?;
    let open = || -> Result<Jpeg<'_>, ImageError> {
        let mut jpeg = decoder(bytes, markers, limits)?;
        jpeg.set_output_format(format);
        jpeg.set_block_smoothing(true);
        jpeg.set_scale(scaling);
        Ok(jpeg)
    };
    let image = match open()?.decode_image() {
        Err(JpegError::CorruptData(_) | JpegError::UnexpectedEof) => {
            let mut lenient = open()?;
            lenient.set_lenient(true);
            lenient.decode_image()
        }
        done => done,
    };
    let image = image.map_err(refusal)?;
    let (width, height) = (image.width as u32, image.height as u32);
    let data = match format {
        PixelFormat::Cmyk => packed_inks(&image.data),
        _ => image.data,
    };
    Ok(Picture { width, height, samples: Samples::Rgb(data) })
}

/// Pillow's `draft`: the largest reduction that leaves at least the needed width and height.
fn draft(width: u32, height: u32, needed: [u32; 2]) -> u32 {
    let divisor = (width / needed[0].max(1)).min(height / needed[1].max(1));
    [8, 4, 2].into_iter().find(|&factor| factor <= divisor).unwrap_or(1)
}

/// The decoder, which reads the markers again. Broken segments may lead it to another frame than [`Markers`], to which no limit
/// was applied: such files are refused.
fn decoder<'a>(bytes: &'a [u8], markers: &Markers<'_>, limits: &ImageLimits) -> Result<Jpeg<'a>, ImageError> {
    let limits = DecodeLimits {
        max_width: limits.max_side as usize,
        max_height: limits.max_side as usize,
        max_pixels: limits.max_pixels,
        max_scans: MAX_SCANS,
        max_memory: None,
    };
    let jpeg = Jpeg::new_with_limits(bytes, limits).map_err(refusal)?;
    let frame = jpeg.header();
    let sampling = frame.components.iter().map(|c| [c.horizontal_sampling, c.vertical_sampling].map(usize::from));
    let same = [frame.width, frame.height].map(u32::from) == [markers.width, markers.height]
        && frame.is_progressive == markers.progressive
        && frame.is_lossless == markers.lossless
        && sampling.eq(markers.components.iter().map(|c| [c.across, c.down]));
    if same {
        Ok(jpeg)
    } else {
        Err(ImageError::Invalid {
            reason: "corrupt",
            detail: "JPEG is broken: its header of the frame is ambiguous".to_owned(),
        })
    }
}

fn truncated() -> ImageError {
    ImageError::Invalid { reason: "truncated", detail: "JPEG ends before its pixels do".to_owned() }
}

/// A decoder error as an error of the image.
fn refusal(error: JpegError) -> ImageError {
    let said: String = error.to_string().chars().filter(|c| !c.is_control()).take(200).collect();
    match error {
        JpegError::UnexpectedEof => truncated(),
        JpegError::Unsupported(_) => {
            ImageError::Unsupported { detail: format!("JPEG of a kind that is not read ({said})") }
        }
        JpegError::LimitExceeded { .. } | JpegError::AllocationFailed { .. } => {
            ImageError::TooLarge { reason: "too_much_memory", detail: said }
        }
        _ => ImageError::Invalid { reason: "corrupt", detail: said },
    }
}
