//! Untrusted bytes → the network's input tensor. Knows no network, no request, no batch and no protocol.
//!
//! `limits` come first (with the errors and [`RgbImage`]); `formats` tells the format by its content and decodes to RGB;
//! `resize` crops and normalises what `resample` makes, as timm does, to the bit; `tensor` reads what a client has
//! prepared itself.

mod formats;
#[cfg(feature = "turbojpeg")]
mod libjpeg;
mod limits;
mod resample;
mod resize;
mod tensor;

pub use formats::{Decoder, JpegDecoder, decode};
pub use limits::{ImageError, ImageLimits, RgbImage};
pub use resize::{Preprocessor, resize};
pub use tensor::RawTensor;
