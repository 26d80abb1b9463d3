//! `--jpeg-decoder`: the choice that `nfold serve` and `nfold classify` share, and what to do when the program lacks it.

use clap::ValueEnum;

use crate::pixels::JpegDecoder;

/// Who decodes JPEG.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum JpegDecoderArg {
    /// The image crate: no C code; up to 5 levels of 255 from Pillow
    Image,
    /// libjpeg-turbo: Pillow's pixels
    #[value(name = "turbojpeg")]
    TurboJpeg,
    /// libjpeg-turbo at 1/2, 1/4 or 1/8 where the image is that much larger than it will be resized to
    #[value(name = "turbojpeg-fast")]
    TurboJpegFast,
}

impl JpegDecoderArg {
    /// The decoder, if this program has it.
    pub fn resolve(self) -> anyhow::Result<JpegDecoder> {
        match self {
            Self::Image => Ok(JpegDecoder::Image),
            #[cfg(feature = "turbojpeg")]
            Self::TurboJpeg => Ok(JpegDecoder::TurboJpeg),
            #[cfg(feature = "turbojpeg")]
            Self::TurboJpegFast => Ok(JpegDecoder::TurboJpegFast),
            #[cfg(not(feature = "turbojpeg"))]
            Self::TurboJpeg | Self::TurboJpegFast => anyhow::bail!(
                "this program was built without libjpeg-turbo; build it with `cargo build --release --features turbojpeg` \
                 (needs cmake and nasm), or take `--jpeg-decoder image`"
            ),
        }
    }
}
