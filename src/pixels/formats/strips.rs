//! Decompresses strips and tiles of a TIFF.
//!
//! Owns the compression schemes. Each fills a buffer of known length, and fails if data is missing.

use std::io::Read as _;

use fax::decoder::{DecodeStatus, Group3Decoder, Group4Decoder, pels};
use flate2::read::ZlibDecoder;
use weezl::{BitOrder, LzwStatus, decode};

/// Compression scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Lzw,
    Deflate,
    PackBits,
    /// CCITT Group 3, one-dimensional, with an end-of-line code after every row.
    Group3,
    Group4,
    /// One JPEG per strip or tile.
    Jpeg,
}

/// Decompresses one strip or tile into `out`; its rows have `row` bytes and `width` pixels. Returns `None` if `input`
/// ends early or is broken.
pub(super) fn fill(compression: Compression, input: &[u8], (row, width): (usize, usize), out: &mut [u8]) -> Option<()> {
    match compression {
        Compression::None => out.copy_from_slice(input.get(..out.len())?),
        Compression::Deflate => ZlibDecoder::new(input).read_exact(out).ok()?,
        Compression::Lzw => {
            let mut decoder = decode::Decoder::with_tiff_size_switch(BitOrder::Msb, 8);
            let (mut from, mut to) = (0, 0);
            while to < out.len() {
                let result = decoder.decode_bytes(&input[from..], &mut out[to..]);
                from += result.consumed_in;
                to += result.consumed_out;
                let going = matches!(result.status, Ok(LzwStatus::Ok)) && result.consumed_in + result.consumed_out > 0;
                if !going && to < out.len() {
                    return None;
                }
            }
        }
        Compression::PackBits => {
            let (mut input, mut out) = (input.iter(), out.iter_mut());
            while out.len() > 0 {
                let head = *input.next()?;
                match head as i8 {
                    -128 => {}
                    count @ 0.. => {
                        for _ in 0..=count {
                            let byte = *input.next()?;
                            if let Some(out) = out.next() {
                                *out = byte;
                            }
                        }
                    }
                    count => {
                        let byte = *input.next()?;
                        out.by_ref().take(1 + usize::from(count.unsigned_abs())).for_each(|out| *out = byte);
                    }
                }
            }
        }
        Compression::Group3 => {
            let mut decoder = Group3Decoder::new(input.iter().copied().map(Ok::<u8, ()>)).ok()?;
            for line in out.chunks_exact_mut(row) {
                let status = decoder.advance().ok();
                draw(decoder.transitions(), width, line);
                if status != Some(DecodeStatus::Incomplete) {
                    break;
                }
            }
        }
        Compression::Group4 => {
            let width16 = u16::try_from(width).ok()?;
            let mut decoder = Group4Decoder::new(input.iter().copied().map(Ok::<u8, ()>), width16).ok()?;
            for line in out.chunks_exact_mut(row) {
                if decoder.advance().ok()? == DecodeStatus::End {
                    break;
                }
                draw(decoder.transition(), width, line);
            }
        }
        Compression::Jpeg => return None,
    }
    Some(())
}

/// Draws a bi-level row; black is 1, as in fax.
fn draw(transitions: &[u16], width: usize, line: &mut [u8]) {
    line.fill(0);
    let Ok(width16) = u16::try_from(width) else { return };
    for (x, color) in pels(transitions, width16).enumerate() {
        if color == fax::Color::Black {
            line[x / 8] |= 0x80 >> (x % 8);
        }
    }
}
