//! A decoded image in the decoder's own layout; rows of RGB are converted on demand.
//!
//! So an image is in memory once, and often at less than three bytes per pixel. Must not know formats, nor what becomes
//! of the rows.

use std::ops::Range;

use image::DynamicImage;
use image::metadata::Orientation;

use super::formats::components::{Components, Scratch};
use super::limits::RgbImage;

/// A decoded image.
#[derive(Debug)]
pub struct Picture {
    /// Pixels per row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    pub(super) samples: Samples,
}

/// The samples, in their layout.
#[derive(Debug)]
pub(super) enum Samples {
    /// Three bytes per pixel, rows contiguous.
    Rgb(Vec<u8>),
    /// `step` bytes per pixel, with red, green and blue at the indices `from`; rows contiguous.
    Strided { data: Vec<u8>, step: usize, from: [usize; 3] },
    /// Palette indices of `bits` bits, most significant first; every row starts at a byte.
    Indexed { data: Vec<u8>, bits: u32, colors: Box<[[u8; 3]; 256]> },
    /// Component planes of a JPEG.
    Components(Components),
}

impl Picture {
    /// The bytes, if they are packed RGB.
    pub(super) fn rgb(&self) -> Option<&[u8]> {
        match &self.samples {
            Samples::Rgb(data) => Some(data),
            _ => None,
        }
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> u64 {
        match &self.samples {
            Samples::Rgb(data) | Samples::Strided { data, .. } | Samples::Indexed { data, .. } => data.len() as u64,
            Samples::Components(components) => components.bytes(),
        }
    }

    /// Writes the pixels of `columns` of row `y` to `out`, three bytes each.
    pub(super) fn row(&self, y: usize, columns: Range<usize>, scratch: &mut Scratch, out: &mut [u8]) {
        let width = self.width as usize;
        match &self.samples {
            Samples::Rgb(data) => {
                out.copy_from_slice(&data[3 * (y * width + columns.start)..][..3 * columns.len()]);
            }
            Samples::Strided { data, step, from } => {
                let pixels = data[step * (y * width + columns.start)..][..step * columns.len()].chunks_exact(*step);
                for (out, pixel) in out.chunks_exact_mut(3).zip(pixels) {
                    out.copy_from_slice(&from.map(|at| pixel[at]));
                }
            }
            Samples::Indexed { data, bits, colors } => {
                let bits = *bits as usize;
                let line = &data[y * (width * bits).div_ceil(8)..];
                let mask = ((1u32 << bits) - 1) as u8;
                for (out, x) in out.chunks_exact_mut(3).zip(columns) {
                    let at = x * bits;
                    let index = (line[at / 8] >> (8 - bits - at % 8)) & mask;
                    out.copy_from_slice(&colors[usize::from(index)]);
                }
            }
            Samples::Components(components) => components.row(y, columns, scratch, out),
        }
    }

    /// Converts the whole image to RGB.
    pub fn into_rgb(self) -> RgbImage {
        let (width, height) = (self.width, self.height);
        if let Samples::Rgb(data) = self.samples {
            return RgbImage { width, height, data };
        }
        let mut data = vec![0; width as usize * height as usize * 3];
        let mut scratch = Scratch::default();
        for (y, line) in data.chunks_exact_mut(3 * width as usize).enumerate() {
            self.row(y, 0..width as usize, &mut scratch, line);
        }
        RgbImage { width, height, data }
    }

    /// Rotates and mirrors the image by its orientation.
    pub(super) fn upright(self, orientation: Orientation) -> Self {
        if orientation == Orientation::NoTransforms {
            return self;
        }
        let RgbImage { width, height, data } = self.into_rgb();
        let mut turned = DynamicImage::ImageRgb8(image::RgbImage::from_raw(width, height, data).unwrap_or_default());
        turned.apply_orientation(orientation);
        Self { width: turned.width(), height: turned.height(), samples: Samples::Rgb(turned.into_bytes()) }
    }
}

impl From<RgbImage> for Picture {
    fn from(image: RgbImage) -> Self {
        Self { width: image.width, height: image.height, samples: Samples::Rgb(image.data) }
    }
}

/// Samples that are palette indices of 1, 2, 4 or 8 bits.
pub(super) fn indexed(data: Vec<u8>, bits: u32, colors: Box<[[u8; 3]; 256]>) -> Samples {
    Samples::Indexed { data, bits, colors }
}

/// A grey palette from black to white, with 2^`bits` levels.
pub(super) fn ramp(bits: u32) -> Box<[[u8; 3]; 256]> {
    let most = (1usize << bits) - 1;
    let mut colors = Box::new([[0; 3]; 256]);
    for (i, color) in colors.iter_mut().enumerate().take(most + 1) {
        *color = [(i * 255 / most) as u8; 3];
    }
    colors
}
