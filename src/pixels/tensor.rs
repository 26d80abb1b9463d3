//! Inputs that a client has preprocessed: bytes of a request that become one image's tensor on a compute thread.
//!
//! Owns the element types that are accepted in place of an encoded image. Knows no protocol.

use bytes::Bytes;
use half::f16;

use super::resize::Preprocessor;

/// One image, not encoded. Multi-byte values are little-endian.
#[derive(Debug, Clone)]
pub enum RawTensor {
    /// `[channels, height, width]` in single precision, normalised.
    Fp32(Bytes),
    /// `[channels, height, width]` in IEEE half precision, normalised.
    Fp16(Bytes),
    /// `[height, width, channels]` bytes (red, green, blue, or grey) at the network's input size; nfold normalises
    /// them, but doesn't resize.
    Pixels(Bytes),
}

impl RawTensor {
    /// Number of values; `None` if the bytes are not a whole number of values.
    pub fn values(&self) -> Option<usize> {
        let (bytes, size) = match self {
            Self::Fp32(bytes) => (bytes, 4),
            Self::Fp16(bytes) => (bytes, 2),
            Self::Pixels(bytes) => (bytes, 1),
        };
        bytes.len().is_multiple_of(size).then_some(bytes.len() / size)
    }

    /// Converts to the network's input. The caller checks the length.
    pub(crate) fn tensor(&self, preprocessor: &Preprocessor) -> Vec<f32> {
        match self {
            Self::Fp32(bytes) => bytes.as_chunks().0.iter().map(|&value: &[u8; 4]| f32::from_le_bytes(value)).collect(),
            Self::Fp16(bytes) => bytes.as_chunks().0.iter().map(|&value| f16::from_le_bytes(value).to_f32()).collect(),
            Self::Pixels(bytes) => preprocessor.normalise(bytes),
        }
    }
}
