//! Reads a graph's constants and attributes.

use std::collections::HashMap;

use crate::graph::FLOAT;
use crate::pb::onnx::{GraphProto, NodeProto, TensorProto};

/// ONNX element types.
pub const UINT8: i32 = 2;
/// See [`UINT8`].
pub const INT8: i32 = 3;
/// See [`UINT8`].
pub const INT32: i32 = 6;

/// A graph's constants by name.
#[derive(Debug)]
pub struct Constants<'a>(HashMap<&'a str, &'a TensorProto>);

impl<'a> Constants<'a> {
    /// Those of `graph`.
    pub fn of(graph: &'a GraphProto) -> Self {
        Self(graph.initializer.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect())
    }

    /// A constant.
    pub fn get(&self, name: &str) -> Option<&'a TensorProto> {
        self.0.get(name).copied()
    }

    /// A constant's shape.
    pub fn dims(&self, name: &str) -> Option<Vec<usize>> {
        self.get(name)?.dims.iter().map(|&side| usize::try_from(side).ok()).collect()
    }

    /// Its values, if they are in single precision and as many as its shape says.
    pub fn singles(&self, name: &str) -> Option<Vec<f32>> {
        let tensor = self.get(name).filter(|tensor| tensor.data_type == FLOAT)?;
        let values = match tensor.raw_data.as_chunks() {
            ([], []) => tensor.float_data.clone(),
            (values, []) => values.iter().map(|value| f32::from_le_bytes(*value)).collect(),
            _ => return None,
        };
        (values.len() == self.count(name)?).then_some(values)
    }

    /// Its one value in single precision.
    pub fn single(&self, name: &str) -> Option<f32> {
        match self.singles(name)?[..] {
            [value] => Some(value),
            _ => None,
        }
    }

    /// Its values, if they are u8 or s8 and as many as its shape says.
    pub fn bytes(&self, name: &str, data_type: i32) -> Option<&'a [u8]> {
        let tensor = self.get(name).filter(|tensor| tensor.data_type == data_type)?;
        (tensor.raw_data.len() == self.count(name)?).then_some(&tensor.raw_data[..])
    }

    /// Its values, if they are s32 and as many as its shape says.
    pub fn integers(&self, name: &str) -> Option<Vec<i32>> {
        let tensor = self.get(name).filter(|tensor| tensor.data_type == INT32)?;
        let (values, []) = tensor.raw_data.as_chunks() else { return None };
        (values.len() == self.count(name)?).then(|| values.iter().map(|value| i32::from_le_bytes(*value)).collect())
    }

    fn count(&self, name: &str) -> Option<usize> {
        self.dims(name)?.iter().try_fold(1_usize, |product, &side| product.checked_mul(side))
    }
}

/// An attribute that is a list of so many sizes.
pub fn sizes<const N: usize>(node: &NodeProto, name: &str) -> Option<[usize; N]> {
    let attribute = node.attribute.iter().find(|attribute| attribute.name == name)?;
    let values: Vec<usize> = attribute.ints.iter().map(|&v| usize::try_from(v).ok()).collect::<Option<_>>()?;
    values.try_into().ok()
}

/// An attribute that is a number, or what it is if it is missing.
pub fn number(node: &NodeProto, name: &str, default: i64) -> i64 {
    node.attribute.iter().find(|attribute| attribute.name == name).map_or(default, |attribute| attribute.i)
}

/// An attribute that is a number in single precision.
pub fn real(node: &NodeProto, name: &str) -> Option<f32> {
    node.attribute.iter().find(|attribute| attribute.name == name).map(|attribute| attribute.f)
}

/// Whether there is such an attribute.
pub fn says(node: &NodeProto, name: &str) -> bool {
    node.attribute.iter().any(|attribute| attribute.name == name)
}
