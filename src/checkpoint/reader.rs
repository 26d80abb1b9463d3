//! Returns each tensor of a checkpoint once, with the shape that the network's plan expects, and refuses unread
//! tensors.

use std::cell::RefCell;
use std::collections::BTreeSet;

use super::CheckpointError;
use super::store::{Number, Tensors};

/// Returns tensors, and tracks the unread ones.
#[derive(Debug)]
pub struct Reader<'a> {
    tensors: &'a Tensors,
    left: RefCell<BTreeSet<String>>,
    architecture: &'a str,
}

impl<'a> Reader<'a> {
    pub(super) fn new(tensors: &'a Tensors, architecture: &'a str) -> Self {
        let left = RefCell::new(tensors.entries.keys().cloned().collect());
        Self { tensors, left, architecture }
    }

    /// Reads the tensor `name`, which must have `shape` and finite values, in double precision.
    pub fn take(&self, name: &str, shape: &[usize]) -> Result<Vec<f64>, CheckpointError> {
        let missing = || CheckpointError::Missing(name.into());
        if !self.left.borrow_mut().remove(name) {
            return Err(missing());
        }
        let entry = self.tensors.entries.get(name).ok_or_else(missing)?;
        if entry.shape != shape {
            let (found, expected) = (entry.shape.clone(), shape.to_vec());
            return Err(CheckpointError::Shape { name: name.into(), found, expected });
        }
        let file = self.tensors.files.get(entry.file).map(|f| f.path.clone()).unwrap_or_default();
        let values = self.tensors.values(entry).map_err(|source| CheckpointError::Read { path: file, source })?;
        let values = values.ok_or_else(|| {
            let dtype = if let Number::Other(dtype) = &entry.number { dtype.clone() } else { String::new() };
            CheckpointError::DataType { name: name.into(), dtype }
        })?;
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(index) => Err(CheckpointError::NotFinite { name: name.into(), index, value: values[index] }),
        }
    }

    /// Reads a scalar, stored with no dimension.
    pub fn take_scalar(&self, name: &str) -> Result<f64, CheckpointError> {
        let values = self.take(name, &[])?;
        values.first().copied().ok_or_else(|| CheckpointError::Missing(name.into()))
    }

    /// Marks a training counter as read, if the file has it.
    pub fn skip_counter(&self, name: &str) {
        self.left.borrow_mut().remove(name);
    }

    /// Returns an error if tensors are unread.
    pub fn finish(self) -> Result<(), CheckpointError> {
        let left = self.left.into_inner();
        match left.first() {
            None => Ok(()),
            Some(first) => Err(CheckpointError::Leftover {
                count: left.len(),
                first: first.clone(),
                architecture: self.architecture.into(),
            }),
        }
    }
}
