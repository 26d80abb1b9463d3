//! Limits on encoded images and how they are decoded: the flags that `nfold serve` and `nfold classify` share.

use std::sync::Arc;

use clap::{Args, ValueEnum};

use crate::pixels::{DecodeMemory, Decoder, ImageLimits, Scale};

/// Flags for encoded images.
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// Most bytes of an encoded image
    #[arg(help_heading = "Limits", long, value_name = "BYTES", env = "NFOLD_MAX_IMAGE_BYTES", default_value_t = ImageLimits::default().max_bytes as u64, value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    max_image_bytes: u64,
    /// Most pixels of an image's width, and of its height
    #[arg(help_heading = "Limits", long, value_name = "PIXELS", env = "NFOLD_MAX_IMAGE_SIDE", default_value_t = ImageLimits::default().max_side, value_parser = clap::value_parser!(u32).range(1..))]
    max_image_side: u32,
    /// Most pixels of an image
    #[arg(help_heading = "Limits", long, value_name = "PIXELS", env = "NFOLD_MAX_IMAGE_PIXELS", default_value_t = ImageLimits::default().max_pixels, value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    max_image_pixels: u64,
    /// Most bytes of memory for all images being decoded; an image that needs more than seven eighths of it is refused,
    /// others wait for each other
    #[arg(help_heading = "Limits", long, value_name = "BYTES", env = "NFOLD_DECODE_MEMORY", default_value_t = DecodeMemory::DEFAULT, value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    decode_memory: u64,
    /// How JPEGs are decoded: `exact` to Pillow's pixels, or `fast` at 1/2, 1/4 or 1/8 if an image is that much larger
    /// than its resized size, to the pixels of Pillow's `draft`
    #[arg(
        help_heading = "Limits",
        long,
        value_enum,
        env = "NFOLD_JPEG_SCALE",
        default_value = "exact",
        value_name = "SCALE"
    )]
    jpeg_scale: ScaleArg,
}

/// Whether large JPEGs are decoded at full size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ScaleArg {
    Exact,
    Fast,
}

impl ImageArgs {
    /// The decoder, and the memory that all images share.
    pub fn resolve(&self) -> (Decoder, Arc<DecodeMemory>) {
        let memory = DecodeMemory::new(self.decode_memory);
        let limits = ImageLimits {
            max_bytes: usize::try_from(self.max_image_bytes).unwrap_or(usize::MAX),
            max_side: self.max_image_side,
            max_pixels: self.max_image_pixels,
            max_decoded_bytes: memory.largest(),
        };
        let jpeg = match self.jpeg_scale {
            ScaleArg::Exact => Scale::Exact,
            ScaleArg::Fast => Scale::Fast,
        };
        (Decoder { limits, jpeg }, memory)
    }
}
