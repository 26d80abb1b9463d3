//! Untrusted bytes → the network's input tensor. Knows no network, no request, no batch and no protocol.
//!
//! `limits` (with the errors and [`RgbImage`]) and `memory`, which all threads share, come first; `formats` detects the
//! format by content and decodes to a `picture`; `resample` resizes its rows as Pillow does, `resize` crops and
//! normalises them as timm does, bit-exact; `tensor` reads inputs that a client has preprocessed.

mod formats;
pub mod heat;
mod limits;
mod memory;
mod picture;
mod resample;
mod resize;
mod tensor;

pub use formats::{Decoder, Encoded, Scale, decode};
pub use limits::{ImageError, ImageLimits, Need, RgbImage};
pub use memory::{Claim, DecodeMemory, Share};
pub use picture::Picture;
pub use resize::{Preprocessor, resize};
pub use tensor::RawTensor;
