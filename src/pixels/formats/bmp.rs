//! BMP through the `image` crate, with 5- and 6-bit samples scaled to 8 bits as Pillow does.

use std::io::Cursor;

use image::codecs::bmp::BmpDecoder;
use image::{ColorType, ImageDecoder as _};

use super::super::limits::{ImageError, ImageLimits, Need, ends_early};
use super::super::picture::{Picture, Samples};

/// Bytes that the decoder allocates besides the pixels: rows, and the palette.
const WORKING: u64 = 1 << 20;

pub(super) fn need(bytes: &[u8], limits: &ImageLimits) -> Result<Need, ImageError> {
    let decoder = BmpDecoder::new(Cursor::new(bytes)).map_err(refusal)?;
    let (width, height) = decoder.dimensions();
    limits.check_size(width, height)?;
    Ok(Need { width, height, bytes: decoder.total_bytes() + WORKING, rgb: decoder.color_type() == ColorType::Rgb8 })
}

pub(super) fn decode(bytes: &[u8]) -> Result<Picture, ImageError> {
    let decoder = BmpDecoder::new(Cursor::new(bytes)).map_err(refusal)?;
    let (width, height) = decoder.dimensions();
    let color = decoder.color_type();
    let mut data = vec![0; decoder.total_bytes() as usize];
    decoder.read_image(&mut data).map_err(refusal)?;
    if bytes.get(28..30) == Some(&[16, 0]) && color == ColorType::Rgb8 {
        rescale(bytes, &mut data);
    }
    let samples = match color {
        ColorType::Rgb8 => Samples::Rgb(data),
        ColorType::Rgba8 => Samples::Strided { data, step: 4, from: [0, 1, 2] },
        ColorType::L8 => Samples::Strided { data, step: 1, from: [0; 3] },
        other => return Err(ImageError::Unsupported { detail: format!("BMP with `{other:?}` samples is not read") }),
    };
    Ok(Picture { width, height, samples })
}

/// Rescales samples of 5 or 6 bits, which the decoder scaled to 8, as Pillow scales them: by division, rounded down.
fn rescale(bytes: &[u8], data: &mut [u8]) {
    let mask = bytes.get(58..62).map_or(0, |green| u32::from_le_bytes([green[0], green[1], green[2], green[3]]));
    let fields = bytes.get(30..34) == Some(&[3, 0, 0, 0]);
    let most = [31, if fields && mask == 0x7E0 { 63 } else { 31 }, 31];
    for pixel in data.chunks_exact_mut(3) {
        for (sample, most) in pixel.iter_mut().zip(most) {
            let value = (u32::from(*sample) * most + 127) / 255;
            *sample = (value * 255 / most) as u8;
        }
    }
}

fn refusal(error: image::ImageError) -> ImageError {
    if ends_early(&error) {
        return ImageError::Invalid { reason: "truncated", detail: "BMP ends before its pixels do".to_owned() };
    }
    // decoders quote the file in messages: drop control characters and limit the length
    let said: String = error.to_string().chars().filter(|c| !c.is_control()).take(200).collect();
    match error {
        image::ImageError::Unsupported(_) => ImageError::Unsupported { detail: said },
        _ => ImageError::Invalid { reason: "corrupt", detail: said },
    }
}
