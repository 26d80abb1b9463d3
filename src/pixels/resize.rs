//! Decoded pixels → the network's input tensor: timm's resize, crop, padding and normalisation, bit-exact.
//!
//! Owns the geometry (torchvision's and timm's rounding) and the normalisation tables; `resample` computes the pixels.
//! Must not know how an image was encoded, nor what a network, a request or a batch is.

use std::ops::Range;

use super::limits::RgbImage;
use super::picture::Picture;
use super::resample::{RGB, resample};
use crate::model::{Colors, CropMode, Interpolation, Preprocessing};

/// Turns decoded images into input tensors by a [`Preprocessing`]; built once, shared by threads.
#[derive(Debug, Clone)]
pub struct Preprocessor {
    height: usize,
    width: usize,
    /// `floor(size / crop_pct)` of height and width.
    scale: [u64; 2],
    crop_mode: CropMode,
    filter: Interpolation,
    /// Colours of the tensor; `None` if no image can become it.
    colors: Option<Colors>,
    /// Normalised value of each sample, per channel.
    tables: Vec<[f32; 256]>,
    /// Padding colour per channel, for a resized image smaller than the crop.
    fill: Vec<u8>,
}

/// Position of the crop in the resized image, which is never computed as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Placement {
    /// Width and height of the resized image.
    target: [usize; 2],
    /// Left and top of the crop in the resized image; negative if it starts with padding.
    offset: [i64; 2],
}

impl Preprocessor {
    /// Derives tables and sizes from `p`, as timm's `create_transform(is_training=False)` does.
    pub fn new(p: &Preprocessing) -> Self {
        let scale = [p.height, p.width].map(|side| ((f64::from(side) / p.crop_pct).floor() as u64).max(1));
        let table = |(&mean, &std): (&f64, &f64)| {
            let (mean, std) = (mean as f32, std as f32);
            std::array::from_fn(|sample| (sample as f32 / 255.0 - mean) / std)
        };
        let fill = |&mean: &f64| match p.crop_mode {
            CropMode::Border => (255.0 * mean).round_ties_even() as u8,
            CropMode::Center | CropMode::Squash => 0,
        };
        Self {
            height: p.height as usize,
            width: p.width as usize,
            scale,
            crop_mode: p.crop_mode,
            filter: p.interpolation,
            colors: Colors::of_channels(p.channels()),
            tables: p.mean.iter().zip(&p.std).map(table).collect(),
            fill: p.mean.iter().map(fill).collect(),
        }
    }

    /// Height of the tensor, in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Width of the tensor, in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Channels of the tensor.
    pub fn channels(&self) -> usize {
        self.tables.len()
    }

    /// Whether an image can become the tensor, which then has 1 or 3 channels.
    pub fn takes_images(&self) -> bool {
        self.colors.is_some()
    }

    /// Number of values in one image's tensor: channels · height · width.
    pub fn tensor_len(&self) -> usize {
        self.channels() * self.height * self.width
    }

    /// How light each pixel of a tensor's image is, from 0 to 255: of RGB as ITU-R 601 weights colours, of other channels their
    /// mean.
    pub fn lightness(&self, tensor: &[f32]) -> Vec<u8> {
        let pixels = self.height * self.width;
        let weights = match self.channels() {
            3 => vec![0.299, 0.587, 0.114],
            channels => vec![1.0 / channels.max(1) as f64; channels],
        };
        let mut light = vec![0.0_f64; pixels];
        for ((values, table), weight) in tensor.chunks(pixels.max(1)).zip(&self.tables).zip(weights) {
            // a table is a line: it leads back
            let step = f64::from(table[255] - table[0]) / 255.0;
            for (light, value) in light.iter_mut().zip(values) {
                *light += weight * (f64::from(*value) - f64::from(table[0])) / step;
            }
        }
        light.into_iter().map(|light| light.round().clamp(0.0, 255.0) as u8).collect()
    }

    /// Width and height to which an image of `width` × `height` pixels is resized, before the crop.
    pub fn resized(&self, width: u32, height: u32) -> [u32; 2] {
        self.placement(width, height).target.map(|side| u32::try_from(side).unwrap_or(u32::MAX))
    }

    /// Bytes that [`apply`](Self::apply) allocates for an image of `width` × `height` pixels, besides image and tensor:
    /// the image between the two resizing passes, and their result.
    pub fn scratch(&self, width: u32, height: u32) -> u64 {
        let [across, down] = self.placement(width, height).target;
        let (columns, rows) = (across.min(self.width), down.min(self.height));
        let between = (columns * height as usize).max(rows * width as usize);
        (RGB * (between + 2 * self.width * self.height)) as u64
    }

    /// Resizes, crops, pads and normalises `image` into `out`, one image's part of a batch: `[channels, height, width]`
    /// (R, G, B, or grey), each value `(sample / 255 − mean) / std` in single precision.
    ///
    /// # Panics
    /// If `out` is not [`tensor_len`](Self::tensor_len) long, or no image [can](Self::takes_images) become the tensor:
    /// both are mistakes of the caller, never of the image.
    pub fn apply(&self, image: &Picture, out: &mut [f32]) {
        assert_eq!(out.len(), self.tensor_len(), "the output must hold one image's tensor");
        let Some(colors) = self.colors else { panic!("no image can become {} channels", self.channels()) };
        let place = self.placement(image.width, image.height);
        let columns = overlap(place.offset[0], self.width, place.target[0]);
        let rows = overlap(place.offset[1], self.height, place.target[1]);
        let pixels = resample(image, place.target, [columns.clone(), rows.clone()], self.filter, colors);
        // position in the output of the part of the crop that the resized image covers
        let left = (columns.start as i64 - place.offset[0]) as usize;
        let top = (rows.start as i64 - place.offset[1]) as usize;
        if columns.len() < self.width || rows.len() < self.height {
            for (channel, plane) in out.chunks_exact_mut(self.height * self.width).enumerate() {
                plane.fill(self.tables[channel][usize::from(self.fill[channel])]);
            }
        }
        let lines = pixels.chunks_exact(RGB * columns.len().max(1)).enumerate();
        let at = |y: usize| (top + y) * self.width + left..(top + y) * self.width + left + columns.len();
        let [first, second, third] = self.tables.as_slice() else {
            for (y, line) in lines {
                for (pixel, shade) in line.chunks_exact(RGB).zip(&mut out[at(y)]) {
                    *shade = self.tables[0][usize::from(pixel[0])];
                }
            }
            return;
        };
        let (red, rest) = out.split_at_mut(self.height * self.width);
        let (green, blue) = rest.split_at_mut(self.height * self.width);
        for (y, line) in lines {
            let (red, green, blue) = (&mut red[at(y)], &mut green[at(y)], &mut blue[at(y)]);
            for (((pixel, red), green), blue) in line.chunks_exact(RGB).zip(red).zip(green).zip(blue) {
                *red = first[usize::from(pixel[0])];
                *green = second[usize::from(pixel[1])];
                *blue = third[usize::from(pixel[2])];
            }
        }
    }

    /// Normalises an image of the tensor's size, `[height, width, channels]`, without resize or crop. Gives the same
    /// values as [`apply`](Self::apply) for the same pixels.
    pub fn normalise(&self, pixels: &[u8]) -> Vec<f32> {
        let mut out = Vec::with_capacity(pixels.len());
        for (channel, table) in self.tables.iter().enumerate() {
            out.extend(pixels.iter().skip(channel).step_by(self.channels()).map(|&sample| table[usize::from(sample)]));
        }
        out
    }

    /// timm's geometry for a `width` × `height` image: size after resizing, and start of the crop.
    fn placement(&self, width: u32, height: u32) -> Placement {
        let [scale_h, scale_w] = self.scale;
        let (w, h) = (f64::from(width), f64::from(height));
        let target = match self.crop_mode {
            CropMode::Squash => [scale_w, scale_h],
            // torchvision's Resize with one number: the long side is truncated
            CropMode::Center if scale_h == scale_w => {
                let long = |long: f64, short: f64| (scale_h as f64 * long / short) as u64;
                if width <= height { [scale_h, long(h, w)] } else { [long(w, h), scale_h] }
            }
            // timm's ResizeKeepRatio: both sides are rounded half to even
            CropMode::Center | CropMode::Border => {
                let (ratio_h, ratio_w) = (h / scale_h as f64, w / scale_w as f64);
                let border = self.crop_mode == CropMode::Border;
                let ratio = if border { ratio_h.max(ratio_w) } else { ratio_h.min(ratio_w) };
                [w, h].map(|side| (side / ratio).round_ties_even() as u64)
            }
        };
        // Pillow refuses to resize a side to 0 (a 1000:1 image under `border`); a service must answer
        let target = target.map(|side| side.max(1) as usize);
        Placement { target, offset: [crop_offset(target[0], self.width), crop_offset(target[1], self.height)] }
    }
}

/// Start of a centred crop of `crop` in `size` pixels, rounded half to even as Python's `round`; negative for padding,
/// whose smaller half comes first, as in torchvision.
fn crop_offset(size: usize, crop: usize) -> i64 {
    let spare = size as i64 - crop as i64;
    if spare < 0 { -(-spare / 2) } else { (spare as f64 / 2.0).round_ties_even() as i64 }
}

/// The part of `0..size` that a crop of `len` from `offset` covers.
fn overlap(offset: i64, len: usize, size: usize) -> Range<usize> {
    let start = offset.max(0) as usize;
    let end = (offset + len as i64).clamp(0, size as i64) as usize;
    start.min(end)..end
}

/// `image` resized to `width` × `height`; equals Pillow 13's `Image.resize` of the same RGB pixels.
pub fn resize(image: &Picture, width: u32, height: u32, filter: Interpolation) -> RgbImage {
    let (w, h) = (width as usize, height as usize);
    RgbImage { width, height, data: resample(image, [w, h], [0..w, 0..h], filter, Colors::Rgb) }
}
