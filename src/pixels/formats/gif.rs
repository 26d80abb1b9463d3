//! GIF's first frame on its logical screen, as Pillow renders it: pixels outside of the frame have its transparent
//! colour, or the first of its palette.

use std::io::{ErrorKind, Read as _};

use gif::{ColorOutput, DecodeOptions, DecodingError, MemoryLimit};

use super::super::limits::{ImageError, ImageLimits, Need};
use super::super::picture::{Picture, indexed, ramp};

/// Bytes that the decoder allocates besides the pixels: LZW tables.
const WORKING: u64 = 256 << 10;

/// Position of the first frame, and size of the screen.
#[derive(Debug)]
struct Layout {
    /// Width and height of the image: the logical screen, enlarged to hold the frame.
    size: [u32; 2],
    at: [u32; 2],
    frame: [u32; 2],
}

/// Reads the blocks before the first frame.
fn layout(bytes: &[u8]) -> Result<Layout, ImageError> {
    let truncated = || ImageError::Invalid { reason: "truncated", detail: "GIF ends before its pixels do".to_owned() };
    let corrupt = |detail: &str| ImageError::Invalid { reason: "corrupt", detail: format!("GIF is broken: {detail}") };
    let pair = |at: usize| -> Result<[u32; 2], ImageError> {
        let four = bytes.get(at..at + 4).ok_or_else(truncated)?;
        Ok([u16::from_le_bytes([four[0], four[1]]).into(), u16::from_le_bytes([four[2], four[3]]).into()])
    };
    let screen = pair(6)?;
    let flags = *bytes.get(10).ok_or_else(truncated)?;
    let mut at = 13 + if flags & 0x80 != 0 { 3 << ((flags & 7) + 1) } else { 0 };
    loop {
        match bytes.get(at).ok_or_else(truncated)? {
            b',' => break,
            b'!' => {
                at += 2;
                loop {
                    let length = usize::from(*bytes.get(at).ok_or_else(truncated)?);
                    at += 1 + length;
                    if length == 0 {
                        break;
                    }
                }
            }
            b';' => return Err(corrupt("it has no frame")),
            _ => return Err(corrupt("there is a block of an unknown kind")),
        }
    }
    let (corner, frame) = (pair(at + 1)?, pair(at + 5)?);
    let size = [0, 1].map(|axis| screen[axis].max(corner[axis] + frame[axis]));
    if size.contains(&0) || frame.contains(&0) {
        return Err(corrupt(&format!("its frame is {} pixels wide and {} high", frame[0], frame[1])));
    }
    Ok(Layout { size, at: corner, frame })
}

pub(super) fn need(bytes: &[u8], limits: &ImageLimits) -> Result<Need, ImageError> {
    let Layout { size: [width, height], frame, .. } = layout(bytes)?;
    limits.check_size(width, height)?;
    let area = |[width, height]: [u32; 2]| u64::from(width) * u64::from(height);
    let whole = area([width, height]);
    let apart = if frame == [width, height] { 0 } else { area(frame) };
    Ok(Need { width, height, bytes: whole + apart + WORKING, rgb: false })
}

pub(super) fn decode(bytes: &[u8]) -> Result<Picture, ImageError> {
    let Layout { size: [width, height], at, frame: [columns, rows] } = layout(bytes)?;
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    // the frame's size was checked above
    options.set_memory_limit(MemoryLimit::Unlimited);
    let without = bytes[10] & 0x80 == 0;
    let mut screen = [0; 13];
    screen.copy_from_slice(&bytes[..13]);
    let shades = if without {
        // the decoder requires a palette: give it a grey ramp
        screen[10] |= 0x87;
        ramp(8).as_flattened().to_vec()
    } else {
        Vec::new()
    };
    let input = screen.as_slice().chain(shades.as_slice()).chain(&bytes[13..]);
    let mut decoder = options.read_info(input).map_err(refusal)?;
    let frame = decoder.next_frame_info().map_err(refusal)?;
    let Some(frame) = frame else {
        return Err(ImageError::Invalid { reason: "corrupt", detail: "GIF has no frame".to_owned() });
    };
    let (background, local) = (frame.transparent.unwrap_or(0), frame.palette.clone());
    let mut pixels = vec![0; columns as usize * rows as usize];
    decoder.read_into_buffer(&mut pixels).map_err(refusal)?;
    let colors = match (local.as_deref(), decoder.global_palette()) {
        // as Pillow: a palette that is a grey ramp counts as absent
        (Some(local), _) if !is_ramp(local) => colors_of(local),
        (_, Some(global)) if !is_ramp(global) => colors_of(global),
        _ => ramp(8),
    };
    let data = if [columns, rows] == [width, height] {
        pixels
    } else {
        let mut screen = vec![background; width as usize * height as usize];
        let lines = screen.chunks_exact_mut(width as usize).skip(at[1] as usize);
        for (line, pixels) in lines.zip(pixels.chunks_exact(columns as usize)) {
            line[at[0] as usize..][..pixels.len()].copy_from_slice(pixels);
        }
        screen
    };
    Ok(Picture { width, height, samples: indexed(data, 8, colors) })
}

/// Whether every colour is the grey level of its index.
fn is_ramp(palette: &[u8]) -> bool {
    palette.chunks_exact(3).enumerate().all(|(i, color)| color.iter().all(|&sample| usize::from(sample) == i))
}

/// A palette of 256 colours; missing ones are black.
fn colors_of(palette: &[u8]) -> Box<[[u8; 3]; 256]> {
    let mut colors = Box::new([[0; 3]; 256]);
    for (color, entry) in colors.iter_mut().zip(palette.as_chunks().0) {
        *color = *entry;
    }
    colors
}

fn refusal(error: DecodingError) -> ImageError {
    let said: String = error.to_string().chars().filter(|c| !c.is_control()).take(200).collect();
    match error {
        DecodingError::Io(e) if e.kind() == ErrorKind::UnexpectedEof => {
            ImageError::Invalid { reason: "truncated", detail: "GIF ends before its pixels do".to_owned() }
        }
        _ => ImageError::Invalid { reason: "corrupt", detail: format!("GIF is broken: {said}") },
    }
}
