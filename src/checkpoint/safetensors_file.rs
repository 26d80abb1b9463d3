//! Reads headers of safetensors files: names, shapes and offsets; no values.

use std::collections::{BTreeMap, HashMap};
use std::io;

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::store::{Entry, Number, SourceFile};
use crate::printable::brief;

/// Most bytes of a header: enough for tens of thousands of tensors.
const LARGEST_HEADER: u64 = 16 << 20;

/// Why a header can't be read.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The system's error.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The header is too large.
    #[error("its header has {0} bytes, more than the {LARGEST_HEADER} that are read")]
    TooLarge(u64),
    /// The safetensors reader refuses it.
    #[error("{0}")]
    Bad(String),
}

/// Tensors and metadata of a file.
#[derive(Debug)]
pub struct Header {
    /// Tensors by name; each has this file's index.
    pub entries: BTreeMap<String, Entry>,
    /// The `__metadata__` of the header.
    pub metadata: HashMap<String, String>,
}

/// Reads the header of the file with index `file` of the checkpoint.
pub fn read(source: &SourceFile, file: usize) -> Result<Header, HeaderError> {
    let bad = |reason: String| HeaderError::Bad(reason);
    if source.len < 8 {
        return Err(bad("header too small".into()));
    }
    let mut length = [0; 8];
    source.read_at(0, &mut length)?;
    let length = u64::from_le_bytes(length);
    if length > source.len - 8 {
        return Err(bad("header longer than the file".into()));
    }
    if length > LARGEST_HEADER {
        return Err(HeaderError::TooLarge(length));
    }
    let mut header = vec![0; length as usize];
    source.read_at(8, &mut header)?;
    // as safetensors itself does: checks shapes and sizes, and that tensors are contiguous
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|e| bad(brief(e)))?;
    let start = 8 + length;
    let (mut entries, mut end) = (BTreeMap::new(), 0);
    for (name, info) in metadata.tensors() {
        let number = match info.dtype {
            Dtype::F64 => Number::F64,
            Dtype::F32 => Number::F32,
            Dtype::F16 => Number::F16,
            Dtype::BF16 => Number::Bf16,
            other => Number::Other(format!("{other:?}")),
        };
        end = end.max(info.data_offsets.1 as u64);
        let offset = start + info.data_offsets.0 as u64;
        entries.insert(name, Entry { file, number, shape: info.shape.clone(), strides: None, offset });
    }
    if start + end != source.len {
        return Err(bad(format!("its tensors end at byte {}, the file at {}", start + end, source.len)));
    }
    Ok(Header { entries, metadata: metadata.metadata().clone().unwrap_or_default() })
}
