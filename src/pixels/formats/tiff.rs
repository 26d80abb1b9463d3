//! TIFF's first page, as Pillow reads it: strips and tiles, palettes, all bit depths, with its orientation.
//!
//! Owns which kinds are supported and what their samples mean; `directory` reads tags, `strips` decompresses. Must not
//! know what happens to the pixels.

use image::metadata::Orientation;

use super::super::limits::{ImageError, ImageLimits, Need};
use super::super::picture::{Picture, Samples, indexed, ramp};
use super::components::{Conversion, Scratch};
use super::directory::Directory;
use super::jpeg;
use super::strips::{Compression, fill};

/// Bytes that decoding allocates besides the pixels: LZW tables.
const WORKING: u64 = 256 << 10;

/// Layout of a page.
#[derive(Debug)]
pub(super) struct Page<'a> {
    directory: Directory<'a>,
    pub(super) width: u32,
    pub(super) height: u32,
    compression: Compression,
    kind: Kind,
    /// Bits per sample.
    bits: u64,
    /// Samples per pixel.
    count: u64,
    /// Planar configuration: each sample has planes of its own.
    planar: bool,
    /// FillOrder 2: the first pixel is in the lowest bit.
    mirrored: bool,
    predictor: u64,
    /// Width and height of a strip or tile.
    chunk: [u32; 2],
    tiled: bool,
    offsets: Vec<u64>,
    lengths: Vec<u64>,
    pub(super) orientation: Orientation,
}

/// Meaning of the samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Unsigned grey of up to 8 bits; white is 0 if inverted.
    Grey {
        inverted: bool,
    },
    /// Unsigned 16-bit grey; Pillow clips at 255.
    Grey16,
    /// Signed grey of 16 or 32 bits, clipped.
    Signed,
    Float,
    Palette,
    Rgb,
    /// RGB, multiplied by the alpha that follows.
    Premultiplied,
    YCbCr,
    Cmyk,
}

mod tag {
    pub const WIDTH: u16 = 256;
    pub const HEIGHT: u16 = 257;
    pub const BITS: u16 = 258;
    pub const COMPRESSION: u16 = 259;
    pub const PHOTOMETRIC: u16 = 262;
    pub const FILL_ORDER: u16 = 266;
    pub const STRIP_OFFSETS: u16 = 273;
    pub const ORIENTATION: u16 = 274;
    pub const SAMPLES: u16 = 277;
    pub const ROWS_PER_STRIP: u16 = 278;
    pub const STRIP_LENGTHS: u16 = 279;
    pub const PLANAR: u16 = 284;
    pub const T4_OPTIONS: u16 = 292;
    pub const PREDICTOR: u16 = 317;
    pub const COLOR_MAP: u16 = 320;
    pub const TILE_WIDTH: u16 = 322;
    pub const TILE_HEIGHT: u16 = 323;
    pub const TILE_OFFSETS: u16 = 324;
    pub const TILE_LENGTHS: u16 = 325;
    pub const EXTRA_SAMPLES: u16 = 338;
    pub const SAMPLE_FORMAT: u16 = 339;
    pub const JPEG_TABLES: u16 = 347;
    pub const SUBSAMPLING: u16 = 530;
}

fn unsupported<T>(detail: String) -> Result<T, ImageError> {
    Err(ImageError::Unsupported { detail })
}

fn corrupt(detail: &str) -> ImageError {
    ImageError::Invalid { reason: "corrupt", detail: format!("TIFF is broken: {detail}") }
}

fn truncated() -> ImageError {
    ImageError::Invalid { reason: "truncated", detail: "TIFF ends before its pixels do".to_owned() }
}

/// Reads the first directory, and checks the page as far as possible without its pixels.
pub(super) fn read<'a>(bytes: &'a [u8], limits: &ImageLimits) -> Result<Page<'a>, ImageError> {
    let directory = Directory::read(bytes)?;
    let one = |tag: u16, default: u64| directory.one(tag).map(|value| value.unwrap_or(default));
    let side = |tag: u16| -> Result<u32, ImageError> {
        u32::try_from(one(tag, 0)?).map_err(|_| corrupt("its sides are too long"))
    };
    let (width, height) = (side(tag::WIDTH)?, side(tag::HEIGHT)?);
    limits.check_size(width, height)?;
    let compression = compression(one(tag::COMPRESSION, 1)?, one(tag::T4_OPTIONS, 0)?)?;
    let photometric = one(tag::PHOTOMETRIC, 0)?;
    let mut bits = directory.all(tag::BITS)?;
    if bits.is_empty() {
        bits.push(1);
    }
    let count = one(tag::SAMPLES, 1)?;
    if bits.iter().any(|other| *other != bits[0]) {
        let (first, count) = (&bits[..bits.len().min(8)], bits.len());
        return unsupported(format!("TIFF with {count} samples of {first:?} … bits is not read"));
    }
    if !(1..=6).contains(&count) {
        return unsupported(format!("TIFF with {count} samples a pixel is not read"));
    }
    let bits = bits[0];
    let format = one(tag::SAMPLE_FORMAT, 1)?;
    let extra = directory.all(tag::EXTRA_SAMPLES)?;
    let kind = kind(photometric, bits, count, format, &extra)?;
    if kind == Kind::YCbCr && compression != Compression::Jpeg {
        let subsampling = directory.all(tag::SUBSAMPLING)?;
        if !matches!(subsampling[..], [1, 1]) {
            return unsupported("TIFF with subsampled YCbCr that isn't JPEG is not read".into());
        }
    }
    let predictor = one(tag::PREDICTOR, 1)?;
    let predicted = matches!(compression, Compression::Lzw | Compression::Deflate);
    if predicted && (predictor > 2 || (predictor == 2 && !matches!(bits, 8 | 16))) {
        return unsupported(format!("TIFF with predictor {predictor} for samples of {bits} bits is not read"));
    }
    let tiled = directory.one(tag::TILE_WIDTH)?.is_some();
    let chunk = if tiled {
        [side(tag::TILE_WIDTH)?, side(tag::TILE_HEIGHT)?]
    } else {
        let rows = one(tag::ROWS_PER_STRIP, height.into())?.min(height.into());
        [width, u32::try_from(rows).unwrap_or(height)]
    };
    if chunk.contains(&0) {
        return Err(corrupt("its strips or tiles have no pixels"));
    }
    limits.check_size(chunk[0], chunk[1])?;
    // like Pillow, accept strip tags for tiles and the reverse
    let either = |strips: u16, tiles: u16| -> Result<Vec<u64>, ImageError> {
        let (first, second) = if tiled { (tiles, strips) } else { (strips, tiles) };
        let values = directory.all(first)?;
        if values.is_empty() { directory.all(second) } else { Ok(values) }
    };
    let offsets = either(tag::STRIP_OFFSETS, tag::TILE_OFFSETS)?;
    let lengths = either(tag::STRIP_LENGTHS, tag::TILE_LENGTHS)?;
    let orientation = u8::try_from(one(tag::ORIENTATION, 1)?).ok().and_then(Orientation::from_exif);
    Ok(Page {
        width,
        height,
        compression,
        kind,
        bits,
        count,
        planar: one(tag::PLANAR, 1)? == 2 && count > 1,
        mirrored: one(tag::FILL_ORDER, 1)? == 2,
        predictor: if predicted { predictor } else { 1 },
        chunk,
        tiled,
        offsets,
        lengths,
        orientation: orientation.unwrap_or(Orientation::NoTransforms),
        directory,
    })
}

fn compression(scheme: u64, fax_options: u64) -> Result<Compression, ImageError> {
    let name = match scheme {
        1 => return Ok(Compression::None),
        3 if fax_options & 1 == 0 => return Ok(Compression::Group3),
        4 => return Ok(Compression::Group4),
        5 => return Ok(Compression::Lzw),
        7 => return Ok(Compression::Jpeg),
        8 | 32946 => return Ok(Compression::Deflate),
        32773 => return Ok(Compression::PackBits),
        2 => "CCITT run lengths",
        3 => "two-dimensional Group 3",
        6 => "JPEG of the old kind",
        34712 | 33003 | 33005 => "JPEG 2000",
        34925 => "LZMA",
        50000 => "Zstandard",
        50001 => "WebP",
        34887 => "LERC",
        other => return unsupported(format!("TIFF compressed by scheme {other} is not read")),
    };
    unsupported(format!("TIFF compressed by {name} is not read"))
}

/// The kinds that Pillow opens, without those that no program writes.
fn kind(photometric: u64, bits: u64, count: u64, format: u64, extra: &[u64]) -> Result<Kind, ImageError> {
    let colors = count - (extra.len() as u64).min(count - 1);
    let small = matches!(bits, 1 | 2 | 4 | 8);
    Ok(match (photometric, format, bits) {
        (0 | 1, 1 | 4, _) if colors == 1 && small => Kind::Grey { inverted: photometric == 0 },
        (0 | 1, 1, 16) if count == 1 => Kind::Grey16,
        (1, 1, 32) | (1, 2, 16 | 32) if count == 1 => Kind::Signed,
        (0 | 1, 3, 32) if count == 1 => Kind::Float,
        (1, 2, 8) if count == 1 => Kind::Grey { inverted: false },
        (3, 1, _) if small && (count == 1 || bits == 8) => Kind::Palette,
        (2, 1, 8 | 16) if count >= 3 => match extra.first() {
            Some(1) if count > 3 => Kind::Premultiplied,
            _ => Kind::Rgb,
        },
        (5, 1, 8 | 16) if count >= 4 => Kind::Cmyk,
        (6, 1, 8) if count == 3 => Kind::YCbCr,
        (6, 1, 8) if count == 1 => Kind::Grey { inverted: false },
        (8..=10, ..) => return unsupported("TIFF in CIE Lab is not read".into()),
        _ => {
            let what = match format {
                2 => "signed",
                3 => "floating-point",
                _ => "unsigned",
            };
            return unsupported(format!(
                "TIFF of photometric kind {photometric} with {count} {what} samples of {bits} bits is not read"
            ));
        }
    })
}

impl Page<'_> {
    /// Bytes per pixel of the result.
    fn stored(&self) -> u64 {
        match self.kind {
            Kind::Grey { .. } | Kind::Grey16 | Kind::Signed | Kind::Float | Kind::Palette => 1,
            _ => 3,
        }
    }

    /// Samples per pixel in one chunk.
    fn in_chunk(&self) -> u64 {
        if self.planar { 1 } else { self.count }
    }

    /// Bytes per row of a chunk.
    fn row(&self) -> u64 {
        (u64::from(self.chunk[0]) * self.in_chunk() * self.bits).div_ceil(8)
    }

    pub(super) fn need(&self) -> Need {
        let pixels = u64::from(self.width) * u64::from(self.height);
        let area = u64::from(self.chunk[0]) * u64::from(self.chunk[1]);
        let chunk = match self.compression {
            // planes at the largest sampling, coefficients, and a copy of the chunk with its tables
            Compression::Jpeg => area * 9 + self.directory.bytes.len() as u64,
            Compression::None if !self.mirrored => 0,
            _ => self.row() * u64::from(self.chunk[1]),
        };
        let mirrored = if self.mirrored { self.directory.bytes.len() as u64 } else { 0 };
        let lists = 16 * self.offsets.len() as u64;
        let bytes = pixels * self.stored() + chunk + mirrored + lists + WORKING;
        Need { width: self.width, height: self.height, bytes, rgb: self.stored() == 3 }
    }

    /// Bytes of one strip or tile in the file.
    fn input(&self, number: usize) -> Result<&[u8], ImageError> {
        let at = usize::try_from(*self.offsets.get(number).ok_or_else(truncated)?).map_err(|_| truncated())?;
        let rest = self.directory.bytes.get(at..).ok_or_else(truncated)?;
        let length =
            self.lengths.get(number).map_or(rest.len(), |&length| usize::try_from(length).unwrap_or(rest.len()));
        Ok(&rest[..length.min(rest.len())])
    }

    pub(super) fn decode(&self, limits: &ImageLimits) -> Result<Picture, ImageError> {
        let (width, height) = (self.width as usize, self.height as usize);
        let stored = self.stored() as usize;
        let mut data = vec![0; stored * width * height];
        let [across, down] = [self.width.div_ceil(self.chunk[0]), self.height.div_ceil(self.chunk[1])];
        let row = self.row() as usize;
        let mut buffer = Vec::new();
        let planes = if self.planar { (stored as u64).min(self.count) } else { 1 };
        for plane in 0..planes as usize {
            for number in 0..(across * down) as usize {
                let (left, top) = (
                    number % across as usize * self.chunk[0] as usize,
                    number / across as usize * self.chunk[1] as usize,
                );
                // the last strip ends with the image; tiles are always whole
                let rows = if self.tiled { self.chunk[1] as usize } else { (height - top).min(self.chunk[1] as usize) };
                let position = Position { left, top, rows, plane };
                let input = self.input(number + plane * (across * down) as usize)?;
                if self.compression == Compression::Jpeg {
                    self.paste_jpeg(input, position, limits, &mut data)?;
                    continue;
                }
                if self.compression == Compression::None && !self.mirrored {
                    self.paste(input.get(..row * rows).ok_or_else(truncated)?, row, position, &mut data);
                    continue;
                }
                buffer.clear();
                buffer.resize(row * rows, 0);
                let mirrored: Vec<u8>;
                let input = if self.mirrored {
                    mirrored = input.iter().map(|byte| byte.reverse_bits()).collect();
                    &mirrored
                } else {
                    input
                };
                fill(self.compression, input, (row, self.chunk[0] as usize), &mut buffer).ok_or_else(truncated)?;
                if self.predictor == 2 {
                    self.undo_differences(&mut buffer, row);
                }
                self.paste(&buffer, row, position, &mut data);
            }
        }
        let (width, height) = (self.width, self.height);
        let samples = match self.kind {
            Kind::Palette => {
                let map = self.directory.all(tag::COLOR_MAP)?;
                let entries = 1 << self.bits;
                if map.len() < 3 * entries {
                    return Err(corrupt("its palette is too short"));
                }
                let mut colors = Box::new([[0; 3]; 256]);
                for (i, color) in colors.iter_mut().enumerate().take(entries) {
                    *color = [0, 1, 2].map(|channel| (map[channel * map.len() / 3 + i] >> 8) as u8);
                }
                indexed(data, 8, colors)
            }
            Kind::Grey { .. } if self.bits < 8 => indexed(data, 8, ramp(self.bits as u32)),
            _ if stored == 1 => Samples::Strided { data, step: 1, from: [0; 3] },
            _ => Samples::Rgb(data),
        };
        Ok(Picture { width, height, samples })
    }

    /// Undoes horizontal differencing (predictor 2) in each row.
    fn undo_differences(&self, buffer: &mut [u8], row: usize) {
        let step = self.in_chunk() as usize * (self.bits / 8) as usize;
        for line in buffer.chunks_exact_mut(row) {
            if self.bits == 8 {
                for i in step..row {
                    line[i] = line[i].wrapping_add(line[i - step]);
                }
                continue;
            }
            for i in (step..row.saturating_sub(1)).step_by(2) {
                let sum = self.sixteen(&line[i..]).wrapping_add(self.sixteen(&line[i - step..]));
                let bytes = if self.directory.big_endian { sum.to_be_bytes() } else { sum.to_le_bytes() };
                line[i..i + 2].copy_from_slice(&bytes);
            }
        }
    }

    fn sixteen(&self, bytes: &[u8]) -> u16 {
        let two = [bytes[0], bytes[1]];
        if self.directory.big_endian { u16::from_be_bytes(two) } else { u16::from_le_bytes(two) }
    }

    fn thirty_two(&self, bytes: &[u8]) -> u32 {
        let four = [bytes[0], bytes[1], bytes[2], bytes[3]];
        if self.directory.big_endian { u32::from_be_bytes(four) } else { u32::from_le_bytes(four) }
    }

    /// Copies a chunk's pixels into the image.
    fn paste(&self, chunk: &[u8], row: usize, position: Position, data: &mut [u8]) {
        let (width, stored) = (self.width as usize, self.stored() as usize);
        let pixels = (width - position.left).min(self.chunk[0] as usize);
        let bytes = (self.bits / 8) as usize;
        let count = self.in_chunk() as usize;
        let high = if self.bits == 16 && !self.directory.big_endian { 1 } else { 0 };
        let lines = data.chunks_exact_mut(stored * width).skip(position.top).take(position.rows);
        for (line, chunk) in lines.zip(chunk.chunks_exact(row)) {
            let line = &mut line[stored * position.left..][..stored * pixels];
            if self.planar {
                for (x, out) in line.iter_mut().skip(position.plane).step_by(stored).enumerate() {
                    *out = chunk[x * bytes + high];
                }
                continue;
            }
            let samples = |x: usize| &chunk[x * count * bytes..][..count * bytes];
            match self.kind {
                Kind::Grey { inverted } => {
                    let most = ((1u32 << self.bits) - 1) as u8;
                    for (x, out) in line.iter_mut().enumerate() {
                        let value = self.small(chunk, x * count);
                        *out = if inverted { most - value } else { value };
                    }
                }
                Kind::Palette => line.iter_mut().enumerate().for_each(|(x, out)| *out = self.small(chunk, x * count)),
                Kind::Grey16 => {
                    line.iter_mut().enumerate().for_each(|(x, out)| *out = self.sixteen(samples(x)).min(255) as u8);
                }
                Kind::Signed => {
                    for (x, out) in line.iter_mut().enumerate() {
                        let value = match bytes {
                            2 => i32::from(self.sixteen(samples(x)) as i16),
                            _ => self.thirty_two(samples(x)) as i32,
                        };
                        *out = value.clamp(0, 255) as u8;
                    }
                }
                Kind::Float => {
                    for (x, out) in line.iter_mut().enumerate() {
                        // cast as in Pillow: truncated, 0 for NaN
                        *out = f32::from_bits(self.thirty_two(samples(x))) as u8;
                    }
                }
                Kind::Rgb | Kind::YCbCr | Kind::Cmyk | Kind::Premultiplied => {
                    for (x, out) in line.chunks_exact_mut(3).enumerate() {
                        let at = |i: usize| samples(x)[i * bytes + high];
                        out.copy_from_slice(&match self.kind {
                            Kind::Premultiplied => divided([at(0), at(1), at(2)], at(3)),
                            Kind::Cmyk => inked([at(0), at(1), at(2)], at(3)),
                            Kind::YCbCr => pillows_rgb([at(0), at(1), at(2)]),
                            _ => [at(0), at(1), at(2)],
                        });
                    }
                }
            }
        }
    }

    /// Sample `at` of a row, of up to 8 bits.
    fn small(&self, row: &[u8], at: usize) -> u8 {
        let bits = self.bits as usize;
        let mask = ((1u32 << bits) - 1) as u8;
        (row[at * bits / 8] >> (8 - bits - at * bits % 8)) & mask
    }

    /// Decodes a strip or tile that is a JPEG, with the tables of the JPEGTables tag.
    fn paste_jpeg(
        &self,
        input: &[u8],
        position: Position,
        limits: &ImageLimits,
        data: &mut [u8],
    ) -> Result<(), ImageError> {
        let tables = self.directory.raw(tag::JPEG_TABLES).unwrap_or_default();
        let tables = tables.strip_prefix(b"\xFF\xD8").unwrap_or_default();
        let tables = tables.strip_suffix(b"\xFF\xD9").unwrap_or(tables);
        let body = input.strip_prefix(b"\xFF\xD8").ok_or_else(|| corrupt("a strip is no JPEG"))?;
        let whole = [b"\xFF\xD8", tables, body].concat();
        let conversion = match self.kind {
            Kind::YCbCr => Conversion::YCbCr,
            Kind::Cmyk => Conversion::PlainCmyk,
            Kind::Grey { .. } => Conversion::Grey,
            _ => Conversion::Rgb,
        };
        let (size, components) = jpeg::components(&whole, limits, conversion)?;
        if size[0] > self.chunk[0] || size[1] > self.chunk[1] {
            return Err(corrupt("a strip is larger than it should be"));
        }
        let (width, stored) = (self.width as usize, self.stored() as usize);
        let pixels = (width - position.left).min(size[0] as usize);
        let mut rgb = vec![0; 3 * pixels];
        let mut scratch = Scratch::default();
        let lines = data.chunks_exact_mut(stored * width).skip(position.top);
        for (y, line) in lines.take(size[1] as usize).enumerate() {
            components.row(y, 0..pixels, &mut scratch, &mut rgb);
            let line = &mut line[stored * position.left..][..stored * pixels];
            let step = if stored == 1 { 3 } else { 1 };
            line.iter_mut().zip(rgb.iter().step_by(step)).for_each(|(out, sample)| *out = *sample);
            if self.kind == (Kind::Grey { inverted: true }) {
                line.iter_mut().for_each(|sample| *sample = 255 - *sample);
            }
        }
        Ok(())
    }
}

/// Position of a strip or tile in the image.
#[derive(Clone, Copy)]
struct Position {
    left: usize,
    top: usize,
    rows: usize,
    plane: usize,
}

/// RGB divided by its alpha, as Pillow does.
fn divided(color: [u8; 3], alpha: u8) -> [u8; 3] {
    match alpha {
        0 => [0; 3],
        255 => color,
        _ => color.map(|sample| (u32::from(sample) * 255 / u32::from(alpha)).min(255) as u8),
    }
}

/// Pillow's conversion of CMYK: `(255 − k) − c (255 − k) / 255`, rounded.
fn inked(color: [u8; 3], black: u8) -> [u8; 3] {
    let light = u32::from(255 - black);
    color.map(|ink| {
        let product = u32::from(ink) * light + 128;
        (light - (((product >> 8) + product) >> 8)) as u8
    })
}

/// Pillow's conversion of YCbCr, which is coarser than libjpeg's: 6 fractional bits.
fn pillows_rgb([y, cb, cr]: [u8; 3]) -> [u8; 3] {
    const BITS: i32 = 6;
    let part = |factor: f64, sample: u8| {
        // as Pillow's tables: factor × (sample − 128), plus one half, truncated
        (factor * f64::from(1 << BITS) * f64::from(i32::from(sample) - 128) + 0.5) as i32
    };
    let y = i32::from(y);
    let red = y + (part(1.402, cr) >> BITS);
    let green = y + ((part(-0.34414, cb) + part(-0.71414, cr)) >> BITS);
    let blue = y + (part(1.772, cb) >> BITS);
    [red, green, blue].map(|sample| sample.clamp(0, 255) as u8)
}
