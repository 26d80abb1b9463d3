//! Untrusted bytes → the network's input tensor. Knows no network, no request, no batch and no protocol.
//!
//! `limits` come first (with the errors and [`RgbImage`]) and `memory`, which all threads share; `formats` tells the format
//! by its content and decodes to a `picture`; `resize` crops and normalises what `resample` makes of its rows, as timm
//! does, to the bit; `tensor` reads what a client has prepared itself.

mod formats;
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
