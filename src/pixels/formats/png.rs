//! PNG as Pillow reads it: samples at the file's bit depth, no gamma, no colour profile, transparency dropped.

use std::io::{self, BufRead, ErrorKind, Read, Seek, SeekFrom};

use image::metadata::Orientation;
use png::{BitDepth, ColorType, DecodeOptions, Decoder, DecodingError, Reader, Transformations};

use super::super::limits::{ImageError, ImageLimits, Need};
use super::super::picture::{Picture, Samples, indexed, ramp};

/// Part of the decoder's message if a complete zlib stream holds too few rows.
const TOO_FEW: &str = "does not have enough data for image";
/// Bytes that the decoder allocates besides the pixels: rows, and the zlib window.
const WORKING: u64 = 256 << 10;

pub(super) fn need(bytes: &[u8], limits: &ImageLimits) -> Result<Need, ImageError> {
    let broken = || ImageError::Invalid { reason: "truncated", detail: "PNG ends before its header does".to_owned() };
    // signature of 8 bytes, then the IHDR chunk: length, type, data
    let header = bytes.get(16..26).ok_or_else(broken)?;
    let [width, height] = [&header[..4], &header[4..8]].map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
    limits.check_size(width, height)?;
    let channels: u64 = match header[9] {
        2 => 3,
        4 => 2,
        6 => 4,
        _ => 1,
    };
    let row = (u64::from(width) * channels * u64::from(header[8])).div_ceil(8);
    Ok(Need { width, height, bytes: row * u64::from(height) + WORKING + 4 * row, rgb: false })
}

/// The IEND chunk: length, type, CRC.
const END: [u8; 12] = [0, 0, 0, 0, b'I', b'E', b'N', b'D', 0xAE, 0x42, 0x60, 0x82];

/// A file followed by an IEND chunk, since the pixels may be complete without one.
struct Ended<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl BufRead for Ended<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let beyond = self.at.saturating_sub(self.bytes.len()).min(END.len());
        Ok(self.bytes.get(self.at..).filter(|rest| !rest.is_empty()).unwrap_or(&END[beyond..]))
    }

    fn consume(&mut self, count: usize) {
        self.at += count;
    }
}

impl Read for Ended<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(to)?;
        self.consume(count);
        Ok(count)
    }
}

impl Seek for Ended<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let all = self.bytes.len() + END.len();
        let to = match to {
            SeekFrom::Start(at) => i64::try_from(at).ok(),
            SeekFrom::Current(by) => (self.at as i64).checked_add(by),
            SeekFrom::End(by) => (all as i64).checked_add(by),
        };
        self.at = to.and_then(|at| usize::try_from(at).ok()).ok_or(ErrorKind::InvalidInput)?;
        Ok(self.at as u64)
    }
}

/// Fails if a chunk before the pixels has a wrong CRC: Pillow checks these, and no others.
fn check_sums(bytes: &[u8]) -> Result<(), ImageError> {
    let mut rest = bytes.get(8..).unwrap_or_default();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*length) as usize;
        let Some((named, after)) = after.split_at_checked(length.saturating_add(4)) else { break };
        let Some((sum, after)) = after.split_first_chunk::<4>() else { break };
        if named.starts_with(b"IDAT") {
            break;
        }
        if crc32fast::hash(named) != u32::from_be_bytes(*sum) {
            let name: String = named[..4].iter().map(|&byte| char::from(byte)).filter(char::is_ascii_graphic).collect();
            return Err(corrupt(format!("PNG is broken: the checksum of its `{name}` chunk is wrong")));
        }
        rest = after;
    }
    Ok(())
}

fn open(bytes: &[u8]) -> Result<Reader<Ended<'_>>, DecodingError> {
    let mut options = DecodeOptions::default();
    options.set_ignore_text_chunk(true);
    options.set_ignore_iccp_chunk(true);
    options.set_ignore_crc(true);
    options.set_ignore_adler32(false);
    let mut decoder = Decoder::new_with_options(Ended { bytes, at: 0 }, options);
    decoder.set_transformations(Transformations::IDENTITY);
    decoder.read_info()
}

/// The orientation in the file's eXIf chunk, if that comes before the pixels.
pub(super) fn orientation(bytes: &[u8]) -> Option<Orientation> {
    let reader = open(bytes).ok()?;
    Orientation::from_exif_chunk(reader.info().exif_metadata.as_ref()?)
}

pub(super) fn decode(bytes: &[u8]) -> Result<Picture, ImageError> {
    check_sums(bytes)?;
    let mut reader = open(bytes).map_err(refusal)?;
    let (width, height) = (reader.info().width, reader.info().height);
    let (color, depth) = (reader.info().color_type, reader.info().bit_depth);
    let size = reader.output_buffer_size().ok_or_else(|| corrupt("it is too large".into()))?;
    let mut data = vec![0; size];
    match reader.next_frame(&mut data) {
        // as Pillow: missing rows of a complete zlib stream are black
        Err(DecodingError::Format(error)) if error.to_string().contains(TOO_FEW) => {}
        Err(error) => return Err(refusal(error)),
        Ok(_) => {}
    }
    // of 16-bit samples, Pillow keeps the upper 8 bits, but clips grey
    let wide = usize::from(depth == BitDepth::Sixteen) + 1;
    let samples = match color {
        ColorType::Grayscale if depth == BitDepth::Sixteen => {
            return Ok(Picture {
                width,
                height,
                samples: Samples::Strided { data: clipped(data), step: 1, from: [0; 3] },
            });
        }
        ColorType::Grayscale if depth == BitDepth::Eight => Samples::Strided { data, step: 1, from: [0; 3] },
        ColorType::Grayscale => indexed(data, depth as u32, ramp(depth as u32)),
        ColorType::Indexed => {
            let palette = reader.info().palette.as_deref().unwrap_or_default();
            let mut colors = Box::new([[0; 3]; 256]);
            for (color, entry) in colors.iter_mut().zip(palette.as_chunks().0) {
                *color = *entry;
            }
            indexed(data, depth as u32, colors)
        }
        ColorType::GrayscaleAlpha => Samples::Strided { data, step: 2 * wide, from: [0; 3] },
        ColorType::Rgb if wide == 1 => Samples::Rgb(data),
        ColorType::Rgb => Samples::Strided { data, step: 3 * wide, from: [0, wide, 2 * wide] },
        ColorType::Rgba => Samples::Strided { data, step: 4 * wide, from: [0, wide, 2 * wide] },
    };
    Ok(Picture { width, height, samples })
}

/// Big-endian 16-bit samples, clipped as in Pillow: 255 and above is white.
pub(super) fn clipped(mut data: Vec<u8>) -> Vec<u8> {
    let pixels = data.len() / 2;
    for i in 0..pixels {
        data[i] = if data[2 * i] > 0 { 255 } else { data[2 * i + 1] };
    }
    data.truncate(pixels);
    data
}

fn corrupt(detail: String) -> ImageError {
    ImageError::Invalid { reason: "corrupt", detail }
}

fn refusal(error: DecodingError) -> ImageError {
    let said: String = error.to_string().chars().filter(|c| !c.is_control()).take(200).collect();
    match error {
        DecodingError::IoError(e) if e.kind() == ErrorKind::UnexpectedEof => {
            ImageError::Invalid { reason: "truncated", detail: "PNG ends before its pixels do".to_owned() }
        }
        DecodingError::LimitsExceeded => ImageError::TooLarge { reason: "too_much_memory", detail: said },
        _ => corrupt(format!("PNG is broken: {said}")),
    }
}
