//! WebP through the `image` crate. Its decoder allocates by the size in a frame header, which is checked first.

use std::io::Cursor;

use image::codecs::webp::WebPDecoder;
use image::metadata::Orientation;
use image::{ColorType, ImageDecoder as _};

use super::super::limits::{ImageError, ImageLimits, Need, ends_early};
use super::super::picture::{Picture, Samples};

/// Bytes that the decoder allocates besides the pixels.
const WORKING: u64 = 1 << 20;
/// Flags of the VP8X chunk.
const ANIMATED: u8 = 2;
const ALPHA: u8 = 16;

/// Chunks of a RIFF, each with its FourCC; the last may be cut short.
fn chunks(mut rest: &[u8]) -> impl Iterator<Item = ([u8; 4], &[u8])> {
    std::iter::from_fn(move || {
        let (head, after) = rest.split_first_chunk::<8>()?;
        let [a, b, c, d, length @ ..] = *head;
        let length = u32::from_le_bytes(length) as usize;
        let body = &after[..length.min(after.len())];
        rest = after.get(length.saturating_add(length % 2)..).unwrap_or_default();
        Some(([a, b, c, d], body))
    })
}

/// Width and height in the header of a VP8 or VP8L bitstream.
fn size_of(name: [u8; 4], body: &[u8]) -> Option<[u32; 2]> {
    match (&name, body) {
        (b"VP8 ", [_, _, _, _, _, _, w0, w1, h0, h1, ..]) => {
            Some([[*w0, *w1], [*h0, *h1]].map(|side| u32::from(u16::from_le_bytes(side) & 0x3FFF)))
        }
        (b"VP8L", [_, a, b, c, d, ..]) => {
            let bits = u32::from_le_bytes([*a, *b, *c, *d]);
            Some([1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)])
        }
        _ => None,
    }
}

/// A side in a frame's header, which stores side − 1 in 24 bits.
fn side(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 3).map_or(0, |three| 1 + u32::from_le_bytes([three[0], three[1], three[2], 0]))
}

/// Fails if a bitstream has another size than the image, or than its animation frame.
fn check_frames(bytes: &[u8]) -> Result<(), ImageError> {
    let file = bytes.get(12..).unwrap_or_default();
    let Some((first, extended)) = chunks(file).next() else { return Ok(()) };
    if first != *b"VP8X" {
        return Ok(());
    }
    let canvas = [side(extended, 4), side(extended, 7)];
    let animated = extended.first().is_some_and(|flags| flags & ANIMATED != 0);
    let mut frame = chunks(file).find(|(name, _)| name == b"ANMF").map(|(_, body)| body);
    let wrong =
        || ImageError::Invalid { reason: "corrupt", detail: "WebP is broken: a frame has another size".to_owned() };
    if let Some(body) = frame.take_if(|_| animated) {
        let size = [side(body, 6), side(body, 9)];
        let inner = chunks(body.get(16..).unwrap_or_default());
        if size[0] > canvas[0] || size[1] > canvas[1] || inner.filter_map(|(n, b)| size_of(n, b)).any(|s| s != size) {
            return Err(wrong());
        }
    }
    if chunks(file).filter_map(|(name, body)| size_of(name, body)).any(|size| size != canvas) {
        Err(wrong())
    } else {
        Ok(())
    }
}

pub(super) fn need(bytes: &[u8], limits: &ImageLimits) -> Result<Need, ImageError> {
    let decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(refusal)?;
    let (width, height) = decoder.dimensions();
    limits.check_size(width, height)?;
    check_frames(bytes)?;
    let pixels = u64::from(width) * u64::from(height);
    // planes, state per macroblock, and copies of the file's parts
    let lossy = 7 * pixels / 4 + 3 * bytes.len() as u64;
    let beside = match (bytes.get(12..16), bytes.get(20).copied().unwrap_or(0)) {
        (Some(b"VP8 "), _) => lossy,
        (Some(b"VP8L"), _) => 4 * pixels,
        // a frame of an animation, and its canvas
        (_, flags) if flags & ANIMATED != 0 => 8 * pixels + 3 * bytes.len() as u64,
        (_, flags) if flags & ALPHA != 0 => lossy + 5 * pixels,
        _ => 4 * pixels + 3 * bytes.len() as u64,
    };
    Ok(Need { width, height, bytes: decoder.total_bytes() + beside + WORKING, rgb: false })
}

/// The orientation in the file's EXIF chunk.
pub(super) fn orientation(bytes: &[u8]) -> Option<Orientation> {
    let (_, exif) = chunks(bytes.get(12..)?).find(|(name, _)| name == b"EXIF")?;
    Orientation::from_exif_chunk(exif.strip_prefix(b"Exif\0\0").unwrap_or(exif))
}

pub(super) fn decode(bytes: &[u8]) -> Result<Picture, ImageError> {
    let decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(refusal)?;
    let (width, height) = decoder.dimensions();
    let opaque = decoder.color_type() == ColorType::Rgb8;
    let mut data = vec![0; decoder.total_bytes() as usize];
    decoder.read_image(&mut data).map_err(refusal)?;
    let samples = if opaque { Samples::Rgb(data) } else { Samples::Strided { data, step: 4, from: [0, 1, 2] } };
    Ok(Picture { width, height, samples })
}

fn refusal(error: image::ImageError) -> ImageError {
    if ends_early(&error) {
        return ImageError::Invalid { reason: "truncated", detail: "WebP ends before its pixels do".to_owned() };
    }
    let said: String = error.to_string().chars().filter(|c| !c.is_control()).take(200).collect();
    match error {
        image::ImageError::Unsupported(_) => ImageError::Unsupported { detail: said },
        _ => ImageError::Invalid { reason: "corrupt", detail: said },
    }
}
