//! Decompression bombs: small files of many pixels, in every format.

use std::io::Cursor;

use nfold::pixels::ImageLimits;

use crate::preprocess::encoded;

/// A file, and whether the default limits allow it.
pub struct Bomb {
    pub what: &'static str,
    pub bytes: Vec<u8>,
    pub accepted: bool,
}

/// One bomb of each kind, `side` × `side` pixels where the format allows a choice.
pub fn bombs(side: u16) -> Vec<Bomb> {
    let accepted = |what, bytes| Bomb { what, bytes, accepted: true };
    let refused = |what, bytes| Bomb { what, bytes, accepted: false };
    let large = u64::from(side) * u64::from(side) > ImageLimits::default().max_decoded_bytes / 4;
    let unless_large = |what, bytes| Bomb { what, bytes, accepted: !large };
    vec![
        accepted("JPEG, grey", jpeg(side, 1, &[])),
        accepted("JPEG, 4:4:4", jpeg(side, 3, &[])),
        accepted("progressive JPEG, grey, 11 scans", jpeg(side, 1, &[10])),
        unless_large("progressive JPEG, 4:4:4, 10 scans", jpeg(side, 3, &[9])),
        refused("progressive JPEG, grey, 2000 scans", jpeg(side, 1, &[2000])),
        accepted("GIF, a pixel on a large screen", gif(side)),
        accepted("PNG, RGB", png(side, png::ColorType::Rgb, png::BitDepth::Eight)),
        unless_large("PNG, RGBA", png(side, png::ColorType::Rgba, png::BitDepth::Eight)),
        unless_large("PNG, RGBA of 16 bits", png(side, png::ColorType::Rgba, png::BitDepth::Sixteen)),
        accepted("PNG, palette of 1 bit", png(side, png::ColorType::Indexed, png::BitDepth::One)),
        accepted("BMP, run lengths", bmp(side)),
        unless_large("TIFF, one strip", tiff(side)),
        unless_large("WebP, lossless", webp(side)),
        accepted("WebP, lossy, 16 million pixels", encoded("bombs/lossy.webp")),
    ]
}

/// Writes bits, highest first; FF bytes are stuffed as JPEG requires.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    value: u32,
    count: u32,
}

impl Bits {
    fn put(&mut self, value: u32, count: u32) {
        for i in (0..count).rev() {
            self.value = self.value << 1 | (value >> i & 1);
            self.count += 1;
            if self.count == 8 {
                self.bytes.push(self.value as u8);
                self.bytes.extend((self.value == 0xFF).then_some(0));
                (self.value, self.count) = (0, 0);
            }
        }
    }

    fn done(mut self) -> Vec<u8> {
        while self.count > 0 {
            self.put(1, 1);
        }
        self.bytes
    }
}

fn segment(marker: u8, body: &[u8]) -> Vec<u8> {
    let length = (body.len() as u16 + 2).to_be_bytes();
    [&[0xFF, marker][..], &length, body].concat()
}

/// A JPEG of zeros: baseline, or progressive with as many scans of runs of empty blocks as `scans` says.
fn jpeg(side: u16, components: u8, scans: &[usize]) -> Vec<u8> {
    let blocks = u32::from(side).div_ceil(8).pow(2);
    let table = |class: u8, symbols: [u8; 2]| {
        let mut body = vec![class << 4, 1, 1];
        body.extend([0; 14]);
        body.extend(symbols);
        segment(0xC4, &body)
    };
    let of = |with: &dyn Fn(u8) -> Vec<u8>| -> Vec<u8> { (1..=components).flat_map(with).collect() };
    let mut file = vec![0xFF, 0xD8];
    file.extend(segment(0xDB, &[&[0][..], &[1; 64]].concat()));
    let [high, low] = side.to_be_bytes();
    let frame = [vec![8, high, low, high, low, components], of(&|i| vec![i, 0x11, 0])].concat();
    file.extend(segment(if scans.is_empty() { 0xC0 } else { 0xC2 }, &frame));
    file.extend(table(0, [0, 1]));
    // the first symbol of the other: an empty block, or the longest run of them
    file.extend(table(1, if scans.is_empty() { [0, 1] } else { [0xE0, 0] }));
    let last = if scans.is_empty() { 63 } else { 0 };
    file.extend(segment(0xDA, &[vec![components], of(&|i| vec![i, 0]), vec![0, last, 0]].concat()));
    let bits = blocks as usize * usize::from(components) * if scans.is_empty() { 2 } else { 1 };
    file.extend(vec![0; bits.div_ceil(8)]);
    let mut empty = Bits::default();
    let mut left = blocks;
    while left >= 1 << 14 {
        let run = left.min(32767);
        empty.put(0, 1);
        empty.put(run - (1 << 14), 14);
        left -= run;
    }
    (0..left).for_each(|_| empty.put(2, 2));
    let empty = empty.done();
    for i in 0..scans.first().copied().unwrap_or(0) {
        file.extend(segment(0xDA, &[1, (i % usize::from(components)) as u8 + 1, 0, 1, 63, 0]));
        file.extend_from_slice(&empty);
    }
    file.extend([0xFF, 0xD9]);
    file
}

fn gif(side: u16) -> Vec<u8> {
    let [low, high] = side.to_le_bytes();
    let screen = [b'G', b'I', b'F', b'8', b'9', b'a', low, high, low, high, 0x80, 0, 0, 1, 2, 3, 4, 5, 6];
    let frame = [b',', 0, 0, 0, 0, 1, 0, 1, 0, 0, 2, 2, 0x44, 1, 0, b';'];
    [&screen[..], &frame].concat()
}

fn png(side: u16, color: png::ColorType, depth: png::BitDepth) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, side.into(), side.into());
    encoder.set_color(color);
    encoder.set_depth(depth);
    encoder.set_filter(png::Filter::NoFilter);
    if color == png::ColorType::Indexed {
        encoder.set_palette(vec![1, 2, 3, 4, 5, 6]);
    }
    let mut writer = encoder.write_header().unwrap();
    let row = (usize::from(side) * color.samples() * depth as usize).div_ceil(8);
    let mut stream = writer.stream_writer().unwrap();
    for _ in 0..side {
        std::io::Write::write_all(&mut stream, &vec![0; row]).unwrap();
    }
    stream.finish().unwrap();
    drop(writer);
    file
}

fn bmp(side: u16) -> Vec<u8> {
    // the end of the picture, at once
    let (palette, data) = ([0; 8], [0, 1]);
    let start = 54 + palette.len() as u32;
    let side = i32::from(side).to_le_bytes();
    let mut file = b"BM".to_vec();
    for value in [start + 2, 0, start, 40] {
        file.extend(value.to_le_bytes());
    }
    file.extend([side, side].concat());
    file.extend([1, 0, 8, 0, 1, 0, 0, 0, 2, 0, 0, 0]);
    file.extend([0; 8]);
    file.extend([2, 0, 0, 0, 0, 0, 0, 0]);
    file.extend([&palette[..], &data].concat());
    file
}

/// PackBits: two bytes for 128 copies of a byte.
fn tiff(side: u16) -> Vec<u8> {
    let row = usize::from(side) * 3;
    let mut strip = [0x81, 0].repeat(row / 128);
    if !row.is_multiple_of(128) {
        strip.extend([(257 - row % 128) as u8, 0]);
    }
    let strip = strip.repeat(side.into());
    let mut file = b"II*\0".to_vec();
    file.extend((8 + strip.len() as u32 + 8).to_le_bytes());
    file.extend_from_slice(&strip);
    let bits = file.len() as u32;
    file.extend([8, 0, 8, 0, 8, 0, 0, 0]);
    let side = u32::from(side);
    let tags: [(u16, u16, u32, u32); 9] = [
        (256, 4, 1, side),
        (257, 4, 1, side),
        (258, 3, 3, bits),
        (259, 3, 1, 32773),
        (262, 3, 1, 2),
        (273, 4, 1, 8),
        (277, 3, 1, 3),
        (278, 4, 1, side),
        (279, 4, 1, strip.len() as u32),
    ];
    file.extend((tags.len() as u16).to_le_bytes());
    for (tag, kind, count, value) in tags {
        file.extend([tag.to_le_bytes(), kind.to_le_bytes()].concat());
        file.extend([count.to_le_bytes(), value.to_le_bytes()].concat());
    }
    file.extend([0; 4]);
    file
}

fn webp(side: u16) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    let side = u32::from(side);
    let image = image::GrayImage::new(side, side);
    image::codecs::webp::WebPEncoder::new_lossless(&mut file)
        .encode(&image, side, side, image::ExtendedColorType::L8)
        .unwrap();
    file.into_inner()
}
