//! The structure of a JPEG: frame, scans and end marker, as Pillow and libjpeg read them.
//!
//! Decodes nothing and allocates only a list of scans, so that limits can be checked first.

use super::super::limits::{ImageError, ImageLimits};

const START_OF_IMAGE: u8 = 0xD8;
const END_OF_IMAGE: u8 = 0xD9;
const START_OF_SCAN: u8 = 0xDA;
const EXIF: &[u8] = b"Exif\0\0";
/// Most scans that are listed; a file with more is refused anyway.
const LISTED: usize = 1000;

/// Most blocks in an MCU, by the specification.
const MAX_UNIT: usize = 10;

/// Contents of the markers.
#[derive(Debug)]
pub(super) struct Markers<'a> {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) components: Vec<Component>,
    /// Largest sampling factors, horizontal and vertical.
    pub(super) max_across: usize,
    pub(super) max_down: usize,
    pub(super) progressive: bool,
    /// Arithmetic instead of Huffman coding.
    pub(super) arithmetic: bool,
    /// Lossless (predictive) instead of DCT.
    pub(super) lossless: bool,
    pub(super) scans: Vec<Scan>,
    /// Huffman tables that the file defines before its last scan ends; a progressive file may define new ones for each scan.
    pub(super) huffman_tables: usize,
    /// The EXIF block, starting at its byte order mark.
    pub(super) exif: Option<&'a [u8]>,
    pub(super) end: End,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Component {
    id: u8,
    /// Sampling factors, 1 to 4, horizontal and vertical.
    pub(super) across: usize,
    pub(super) down: usize,
}

/// A scan: its components, and for progressive files its spectral selection and successive approximation.
#[derive(Debug)]
pub(super) struct Scan {
    components: Vec<u8>,
    first: u8,
    last: u8,
    low_bit: u8,
}

/// End of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// With an end marker (EOI); bytes after it are ignored.
    Marked,
    /// Without one: inside a scan, or after another marker.
    Missing,
}

/// Tables in a DHT segment (ITU-T T.81, B.2.4.2): class and slot, how many codes there are of each length from 1 to 16, and a byte
/// per code.
fn tables_in(mut body: &[u8]) -> usize {
    let mut tables = 0;
    while let Some(counts) = body.get(1..17) {
        tables += 1;
        let codes: usize = counts.iter().map(|&count| usize::from(count)).sum();
        body = body.get(17 + codes..).unwrap_or_default();
    }
    tables
}

/// Whether a segment with tables, a frame or a scan is as long as what is in it; others may have any length.
fn has_its_length(marker: u8, mut body: &[u8]) -> bool {
    match marker {
        // DQT: precision and slot, and 64 values of one or two bytes
        0xDB => {
            while let Some((&table, rest)) = body.split_first() {
                let Some(rest) = rest.get(if table >> 4 == 0 { 64 } else { 128 }..) else { return false };
                body = rest;
            }
            true
        }
        // DHT
        0xC4 => {
            while let Some(counts) = body.get(1..17) {
                let codes: usize = counts.iter().map(|&count| usize::from(count)).sum();
                let Some(rest) = body.get(17 + codes..) else { return false };
                body = rest;
            }
            body.is_empty()
        }
        // DRI
        0xDD => body.len() == 2,
        START_OF_SCAN => body.first().is_some_and(|&count| body.len() == 4 + 2 * usize::from(count)),
        _ => true,
    }
}

impl<'a> Markers<'a> {
    /// Reads all markers, up to the end of the image.
    ///
    /// # Errors
    /// [`ImageError::Unsupported`] for kinds that Pillow doesn't open, [`ImageError::TooLarge`] by the size,
    /// [`ImageError::Invalid`] for broken files.
    pub(super) fn read(bytes: &'a [u8], limits: &ImageLimits) -> Result<Self, ImageError> {
        let mut frame: Option<Frame> = None;
        let mut exif = None;
        let mut scans = Vec::new();
        let mut huffman_tables = 0;
        let mut end = End::Missing;
        for Segment { marker, body, cut } in Segments::new(bytes) {
            // libjpeg refuses them, and readers that go by what is inside would go on elsewhere
            if !cut && !has_its_length(marker, body) {
                return Err(corrupt("the length of a segment does not fit what is in it"));
            }
            match marker {
                END_OF_IMAGE => {
                    end = End::Marked;
                    break;
                }
                START_OF_IMAGE => return Err(corrupt("a second image begins inside the first")),
                START_OF_SCAN => {
                    if frame.is_none() {
                        return Err(corrupt("a scan comes before the header of the frame"));
                    }
                    scans.push(Scan::read(body).ok_or_else(|| corrupt("the header of a scan is broken"))?);
                    let whole = frame
                        .as_ref()
                        .is_some_and(|frame| !frame.progressive && scans[0].components.len() == frame.components.len());
                    if whole && bytes.ends_with(&[0xFF, END_OF_IMAGE]) {
                        end = End::Marked;
                        break;
                    }
                    if scans.len() > LISTED {
                        break;
                    }
                }
                // C4: DHT (Huffman tables), C8: reserved, CC: DAC (arithmetic conditioning)
                0xC0..=0xCF if !matches!(marker, 0xC4 | 0xC8 | 0xCC) => {
                    if frame.is_some() {
                        return Err(corrupt("there are two headers of frames"));
                    }
                    let read = Frame::read(marker, body)?;
                    limits.check_size(read.width, read.height)?;
                    frame = Some(read);
                }
                0xC4 => huffman_tables += tables_in(body),
                0xE1 if exif.is_none() && scans.is_empty() => exif = body.strip_prefix(EXIF),
                _ => {}
            }
        }
        let Some(frame) = frame else { return Err(truncated()) };
        if scans.is_empty() {
            return Err(if end == End::Marked { corrupt("there is no scan") } else { truncated() });
        }
        let max = |side: fn(&Component) -> usize| frame.components.iter().map(side).max().unwrap_or(1);
        let (max_across, max_down) = (max(|c| c.across), max(|c| c.down));
        let markers = Self {
            width: frame.width,
            height: frame.height,
            components: frame.components,
            max_across,
            max_down,
            progressive: frame.progressive,
            arithmetic: frame.arithmetic,
            lossless: frame.lossless,
            scans,
            huffman_tables,
            exif,
            end,
        };
        markers.check()?;
        Ok(markers)
    }

    /// Refuses kinds that the decoder doesn't support, or decodes differently from Pillow.
    fn check(&self) -> Result<(), ImageError> {
        let unsupported = |detail: &str| Err(ImageError::Unsupported { detail: detail.to_owned() });
        let ids = |i: usize| self.components[i].id;
        let count = self.components.len();
        if (0..count).any(|i| (0..i).any(|j| ids(i) == ids(j))) {
            return unsupported("JPEG whose components share a number is not read");
        }
        let whole = |component: &Component| {
            self.max_across.is_multiple_of(component.across) && self.max_down.is_multiple_of(component.down)
        };
        if !self.components.iter().all(whole) {
            return unsupported("JPEG with fractional sampling is not read");
        }
        let units = self.scans.iter().filter(|scan| scan.components.len() > 1).map(|scan| {
            self.components.iter().filter(|c| scan.components.contains(&c.id)).map(|c| c.across * c.down).sum::<usize>()
        });
        if units.max().is_some_and(|blocks| blocks > MAX_UNIT) {
            return Err(corrupt(&format!("a unit of a scan has more than {MAX_UNIT} blocks")));
        }
        let mixed = self.scans.iter().any(|scan| (2..count).contains(&scan.components.len()));
        if mixed && !self.progressive {
            return unsupported("JPEG with some of its components in one scan and some in another is not read");
        }
        Ok(())
    }

    /// 8x8 blocks in all components, including padding to whole MCUs.
    pub(super) fn blocks(&self) -> u64 {
        let across = self.width.div_ceil(8 * self.max_across as u32);
        let down = self.height.div_ceil(8 * self.max_down as u32);
        let in_unit: usize = self.components.iter().map(|c| c.across * c.down).sum();
        u64::from(across) * u64::from(down) * in_unit as u64
    }

    /// Blocks in a scan.
    pub(super) fn scan_blocks(&self, scan: &Scan) -> u64 {
        let of = |component: &Component| {
            (self.samples_across(component).div_ceil(8) * self.samples_down(component).div_ceil(8)) as u64
        };
        self.components.iter().filter(|c| scan.components.contains(&c.id)).map(of).sum()
    }

    /// Width of a component, in samples.
    pub(super) fn samples_across(&self, component: &Component) -> usize {
        (self.width as usize * component.across).div_ceil(self.max_across)
    }

    /// Height of a component, in samples.
    pub(super) fn samples_down(&self, component: &Component) -> usize {
        (self.height as usize * component.down).div_ceil(self.max_down)
    }

    /// Whether a progressive file lacks bits of the lowest frequencies.
    pub(super) fn leaves_open(&self) -> bool {
        /// The DC coefficient and those that block smoothing estimates.
        const LOWEST: usize = 10;
        self.components.iter().any(|component| {
            let mut open = [true; LOWEST];
            for scan in self.scans.iter().filter(|scan| scan.components.contains(&component.id)) {
                for (at, open) in open.iter_mut().enumerate() {
                    if (usize::from(scan.first)..=usize::from(scan.last)).contains(&at) {
                        *open = scan.low_bit > 0;
                    }
                }
            }
            open.contains(&true)
        })
    }
}

/// The frame header (SOF).
struct Frame {
    width: u32,
    height: u32,
    components: Vec<Component>,
    progressive: bool,
    arithmetic: bool,
    lossless: bool,
}

impl Frame {
    fn read(marker: u8, body: &[u8]) -> Result<Self, ImageError> {
        let unsupported = |detail: String| ImageError::Unsupported { detail };
        let [precision, h1, h0, w1, w0, count, rest @ ..] = body else {
            return Err(corrupt("the header of the frame is too short"));
        };
        if *precision != 8 {
            return Err(unsupported(format!("JPEG with {precision} bits a sample is not read")));
        }
        match marker {
            0xC0..=0xC3 | 0xC9 | 0xCA => {}
            0xC7 | 0xCB | 0xCF => return Err(unsupported("lossless JPEG of this kind is not read".into())),
            _ => return Err(unsupported("hierarchical JPEG is not read".into())),
        }
        if !matches!(count, 1 | 3 | 4) {
            return Err(unsupported(format!("JPEG with {count} components is not read")));
        }
        let [height, width] = [[*h1, *h0], [*w1, *w0]].map(|side| u32::from(u16::from_be_bytes(side)));
        if width == 0 || height == 0 {
            return Err(corrupt(&format!("it is {width} pixels wide and {height} high")));
        }
        let of = |three: &[u8]| {
            let (across, down) = (usize::from(three[1] >> 4), usize::from(three[1] & 15));
            let known = (1..=4).contains(&across) && (1..=4).contains(&down);
            known.then_some(Component { id: three[0], across, down })
        };
        let components: Option<Vec<Component>> = rest.chunks_exact(3).take(usize::from(*count)).map(of).collect();
        let components = components.filter(|_| rest.len() == 3 * usize::from(*count));
        let components = components.ok_or_else(|| corrupt("the header of the frame is broken"))?;
        Ok(Self {
            width,
            height,
            components,
            progressive: marker & 7 == 2,
            arithmetic: marker & 8 != 0,
            lossless: marker & 7 == 3,
        })
    }
}

impl Scan {
    fn read(body: &[u8]) -> Option<Self> {
        let (count, rest) = body.split_first()?;
        let count = usize::from(*count);
        let components = rest.get(..2 * count)?.chunks_exact(2).map(|pair| pair[0]).collect();
        let [first, last, bits, ..] = rest.get(2 * count..)? else { return None };
        Some(Self { components, first: *first, last: *last, low_bit: bits & 15 })
    }
}

/// A marker segment; its body may be cut short by the end of the file.
struct Segment<'a> {
    marker: u8,
    body: &'a [u8],
    /// Whether the file ends inside it.
    cut: bool,
}

/// Iterates over marker segments; skips bytes between them, such as entropy-coded data.
struct Segments<'a> {
    rest: &'a [u8],
}

impl<'a> Segments<'a> {
    /// Starts after the SOI marker.
    fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes.get(2..).unwrap_or_default() }
    }
}

impl<'a> Iterator for Segments<'a> {
    type Item = Segment<'a>;

    fn next(&mut self) -> Option<Segment<'a>> {
        let mut from = 0;
        let marker = loop {
            from += self.rest.get(from..)?.iter().position(|&byte| byte == 0xFF)? + 1;
            match self.rest.get(from)? {
                // a fill byte, whose marker's own FF follows; a stuffed byte; RST markers, which have no length
                0xFF => {}
                0x00 | 0x01 | 0xD0..=0xD7 => from += 1,
                &marker => break marker,
            }
        };
        let after = &self.rest[from + 1..];
        let length = match (marker, after) {
            (START_OF_IMAGE | END_OF_IMAGE, _) => 0,
            (_, [high, low, ..]) => usize::from(u16::from_be_bytes([*high, *low])).max(2),
            _ => 0,
        };
        let (segment, rest) = after.split_at(length.min(after.len()));
        self.rest = rest;
        Some(Segment { marker, body: segment.get(2..).unwrap_or_default(), cut: segment.len() < length })
    }
}

fn corrupt(detail: &str) -> ImageError {
    ImageError::Invalid { reason: "corrupt", detail: format!("JPEG is broken: {detail}") }
}

fn truncated() -> ImageError {
    ImageError::Invalid { reason: "truncated", detail: "JPEG ends before its pixels do".to_owned() }
}
