//! Index of a checkpoint's tensors (names, shapes, offsets), which are read from the files one at a time, so that a
//! checkpoint is never in memory as a whole. Doesn't know networks.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use half::{bf16, f16};

use crate::model::regular_file;

/// Data type of a tensor's values, little-endian.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Number {
    F64,
    F32,
    F16,
    Bf16,
    /// Any other type, by name; never a weight's.
    Other(String),
}

impl Number {
    /// Bytes per value; `None` for types that weights don't have.
    pub fn size(&self) -> Option<u64> {
        match self {
            Self::F64 => Some(8),
            Self::F32 => Some(4),
            Self::F16 | Self::Bf16 => Some(2),
            Self::Other(_) => None,
        }
    }
}

/// Location and type of a tensor in a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Index of the checkpoint's file.
    pub file: usize,
    /// Data type.
    pub number: Number,
    /// Shape.
    pub shape: Vec<usize>,
    /// Strides by dimension, in values; `None` if the tensor is row-major and contiguous.
    pub strides: Option<Vec<usize>>,
    /// Offset of the first value in the file, in bytes.
    pub offset: u64,
}

/// A file of a checkpoint.
#[derive(Debug)]
pub struct SourceFile {
    /// Path.
    pub path: PathBuf,
    /// Length in bytes when it was opened.
    pub len: u64,
    file: Mutex<File>,
}

impl SourceFile {
    /// Opens a file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = regular_file::open(path)?;
        let len = file.metadata()?.len();
        Ok(Self { path: path.into(), len, file: Mutex::new(file) })
    }

    /// Fills `bytes` from the file, starting at `offset`.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(bytes)
    }

    /// An independent reader of the file, from the start.
    pub fn reader(&self) -> io::Result<File> {
        regular_file::open(&self.path)
    }

    /// The first `count` bytes, or fewer if the file is shorter.
    pub fn start(&self, count: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; count.min(usize::try_from(self.len).unwrap_or(count))];
        self.read_at(0, &mut bytes)?;
        Ok(bytes)
    }

    /// SHA-256 of the file.
    pub fn digest(&self) -> io::Result<[u8; 32]> {
        use sha2::Digest as _;
        let (mut hash, mut buffer, mut file) = (sha2::Sha256::new(), vec![0; CHUNK], self.reader()?);
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hash.finalize().into()),
                read => hash.update(&buffer[..read]),
            }
        }
    }
}

/// Converts little-endian values to double precision and appends them.
type Convert = fn(&[u8], &mut Vec<f64>);

/// Bytes per read.
const CHUNK: usize = 1 << 20;

/// All tensors of a checkpoint, unread.
#[derive(Debug, Default)]
pub struct Tensors {
    /// Files of the checkpoint.
    pub files: Vec<SourceFile>,
    /// Tensors by name.
    pub entries: BTreeMap<String, Entry>,
}

impl Tensors {
    /// The values of `entry` in double precision, row-major. `None` if the data type is not a weight's.
    pub fn values(&self, entry: &Entry) -> io::Result<Option<Vec<f64>>> {
        let (Some(size), Some(file)) = (entry.number.size(), self.files.get(entry.file)) else { return Ok(None) };
        let count: usize = entry.shape.iter().product();
        let reach = match &entry.strides {
            None => count,
            Some(_) if count == 0 => 0,
            Some(strides) => 1 + entry.shape.iter().zip(strides).map(|(d, s)| (d - 1) * s).sum::<usize>(),
        };
        let (bytes, convert): (usize, Convert) = match entry.number {
            Number::F64 => (8, |b, out| out.extend(b.as_chunks().0.iter().map(|v| f64::from_le_bytes(*v)))),
            Number::F32 => (4, |b, out| out.extend(b.as_chunks().0.iter().map(|v| f64::from(f32::from_le_bytes(*v))))),
            Number::F16 => (2, |b, out| out.extend(b.as_chunks().0.iter().map(|v| f16::from_le_bytes(*v).to_f64()))),
            _ => (2, |b, out| out.extend(b.as_chunks().0.iter().map(|v| bf16::from_le_bytes(*v).to_f64()))),
        };
        let end = (reach as u64).checked_mul(size).and_then(|bytes| bytes.checked_add(entry.offset));
        if end.is_none_or(|end| end > file.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (mut values, mut buffer) = (Vec::with_capacity(reach), vec![0; CHUNK.min(reach * bytes)]);
        let (mut offset, mut left) = (entry.offset, reach * bytes);
        while left > 0 {
            let now = left.min(CHUNK);
            file.read_at(offset, &mut buffer[..now])?;
            convert(&buffer[..now], &mut values);
            (offset, left) = (offset + now as u64, left - now);
        }
        match &entry.strides {
            None => Ok(Some(values)),
            Some(strides) => Ok(Some(in_rows(&values, &entry.shape, strides))),
        }
    }
}

/// Values in row-major order, gathered by the strides.
fn in_rows(values: &[f64], shape: &[usize], strides: &[usize]) -> Vec<f64> {
    let count: usize = shape.iter().product();
    let mut index = vec![0; shape.len()];
    let mut out = Vec::with_capacity(count);
    for _ in 0..count {
        let at: usize = index.iter().zip(strides).map(|(i, s)| i * s).sum();
        out.push(values.get(at).copied().unwrap_or(f64::NAN));
        for d in (0..shape.len()).rev() {
            index[d] += 1;
            if index[d] < shape[d] {
                break;
            }
            index[d] = 0;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_are_followed() {
        // [2, 3] stored column-major
        assert_eq!(in_rows(&[0., 3., 1., 4., 2., 5.], &[2, 3], &[1, 2]), [0., 1., 2., 3., 4., 5.]);
    }

    #[test]
    fn tensors_are_read_where_they_are() {
        let mut file = tempfile::NamedTempFile::new().expect("file");
        let bytes: Vec<u8> = [9f32, 1.0, 2.0, 3.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        io::Write::write_all(&mut file, &bytes).expect("written");
        let tensors = Tensors { files: vec![SourceFile::open(file.path()).expect("opens")], entries: BTreeMap::new() };
        let entry = Entry { file: 0, number: Number::F32, shape: vec![3], strides: None, offset: 4 };
        assert_eq!(tensors.values(&entry).expect("reads"), Some(vec![1.0, 2.0, 3.0]));
        assert!(tensors.values(&Entry { offset: 8, ..entry.clone() }).is_err());
        assert_eq!(tensors.values(&Entry { number: Number::Other("I64".into()), ..entry }).expect("reads"), None);
    }
}
