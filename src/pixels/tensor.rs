//! Inputs that a client has prepared itself, as they travel: bytes that become one image's tensor on a compute thread.
//!
//! Owns the number formats that are taken in place of an encoded image. Knows no protocol.

use bytes::Bytes;
use half::f16;

use super::resize::Preprocessor;

/// One image without its encoding. Multi-byte values are little-endian.
#[derive(Debug, Clone)]
pub enum RawTensor {
    /// `[channels, height, width]` of 4-byte floating point, normalised.
    Fp32(Bytes),
    /// `[channels, height, width]` of 2-byte (IEEE half precision) floating point, normalised.
    Fp16(Bytes),
    /// `[height, width, channels]` bytes (red, green, blue, or grey), of the network's size: normalised here, not resized.
    Pixels(Bytes),
}

impl RawTensor {
    /// Values it holds; none if its bytes are no whole number of them.
    pub fn values(&self) -> Option<usize> {
        let (bytes, size) = match self {
            Self::Fp32(bytes) => (bytes, 4),
            Self::Fp16(bytes) => (bytes, 2),
            Self::Pixels(bytes) => (bytes, 1),
        };
        bytes.len().is_multiple_of(size).then_some(bytes.len() / size)
    }

    /// The network's input. Its length is the caller's business.
    pub(crate) fn tensor(&self, preprocessor: &Preprocessor) -> Vec<f32> {
        match self {
            Self::Fp32(bytes) => bytes.as_chunks().0.iter().map(|&value: &[u8; 4]| f32::from_le_bytes(value)).collect(),
            Self::Fp16(bytes) => bytes.as_chunks().0.iter().map(|&value| f16::from_le_bytes(value).to_f32()).collect(),
            Self::Pixels(bytes) => preprocessor.normalise(bytes),
        }
    }
}
