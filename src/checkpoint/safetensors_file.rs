//! Headers of safetensors files: names, shapes and places; no values.

use std::collections::{BTreeMap, HashMap};
use std::io;

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::store::{Entry, Number, SourceFile};
use crate::printable::brief;

/// Most bytes of a header: tens of thousands of tensors fit.
const LARGEST_HEADER: u64 = 16 << 20;

/// Why a header is not read.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The system refused.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is larger than that of any checkpoint.
    #[error("its header has {0} bytes, more than the {LARGEST_HEADER} that are read")]
    TooLarge(u64),
    /// The format's reader refuses it.
    #[error("{0}")]
    Bad(String),
}

/// Tensors of a file, and the notes that the writer left.
#[derive(Debug)]
pub struct Header {
    /// Tensors by name; each with this file's number.
    pub entries: BTreeMap<String, Entry>,
    /// The writer's notes.
    pub metadata: HashMap<String, String>,
}

/// Reads the header of the checkpoint's file number `file`.
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
    // as the format's own reader does it: checks shapes, sizes, and that tensors follow each other without a hole
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
