//! Checks an untrusted graph before a runtime opens it: all weights are inside the file, each is as large as its shape
//! says, and nothing refers to other files.
//!
//! A runtime follows references to external data, to files and even to memory, and allocates what a shape says before
//! it looks at the data. Graphs that nfold writes have no external data, no tensors in attributes and no subgraphs, so
//! all of these are refused.

use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// Fields of an ONNX message that contain further messages, by number; and fields that are refused.
struct Message {
    name: &'static str,
    inner: &'static [(u32, &'static Message)],
    refused: &'static [(u32, &'static str)],
}

static MODEL: Message =
    Message { name: "model", inner: &[(7, &GRAPH)], refused: &[(20, "training graphs"), (25, "functions of its own")] };
static GRAPH: Message =
    Message { name: "graph", inner: &[(1, &NODE), (5, &TENSOR)], refused: &[(15, "sparse weights")] };
static NODE: Message = Message { name: "node", inner: &[(5, &ATTRIBUTE)], refused: &[] };
static ATTRIBUTE: Message = Message {
    name: "attribute",
    inner: &[],
    refused: &[
        (5, "a tensor in an attribute"),
        (6, "a graph in an attribute"),
        (10, "tensors in an attribute"),
        (11, "graphs in an attribute"),
        (22, "a sparse tensor in an attribute"),
        (23, "sparse tensors in an attribute"),
    ],
};
static TENSOR: Message = Message {
    name: "tensor",
    inner: &[],
    refused: &[(3, "weights in segments"), (13, "weights outside of it"), (14, "weights outside of it")],
};

/// Checks an ONNX graph; the error says what is wrong.
pub fn check(onnx: &[u8]) -> Result<(), String> {
    walk(onnx, &MODEL)
}

fn walk(mut bytes: &[u8], message: &Message) -> Result<(), String> {
    let broken = |e: prost::DecodeError| format!("its {} can't be read: {e}", message.name);
    let mut tensor = Tensor::default();
    while !bytes.is_empty() {
        let (field, wire) = decode_key(&mut bytes).map_err(broken)?;
        if wire != WireType::LengthDelimited {
            let value = (wire == WireType::Varint).then(|| decode_varint(&mut &*bytes).ok()).flatten();
            // `data_location` 0 means inside the tensor
            if let Some((_, what)) = message.refused.iter().find(|(refused, _)| *refused == field && value != Some(0)) {
                return Err(format!("it has {what}, which nfold never writes"));
            }
            if let (1, Some(dimension)) = (field, value) {
                tensor.dims.push(dimension);
            }
            skip_field(wire, field, &mut bytes, DecodeContext::default()).map_err(broken)?;
            continue;
        }
        let length = decode_varint(&mut bytes).map_err(broken)?;
        let length = usize::try_from(length).ok().filter(|&length| length <= bytes.len());
        let length = length.ok_or_else(|| format!("its {} ends before its data does", message.name))?;
        let (value, rest) = bytes.split_at(length);
        bytes = rest;
        if let Some((_, what)) = message.refused.iter().find(|(refused, _)| *refused == field) {
            return Err(format!("it has {what}, which nfold never writes"));
        }
        if let Some((_, inner)) = message.inner.iter().find(|(inner, _)| *inner == field) {
            walk(value, inner)?;
        }
        match field {
            1 => tensor.packed_dims(value).map_err(broken)?,
            8 => tensor.name = String::from_utf8_lossy(value).chars().take(100).collect(),
            4..=11 => tensor.data += value.len() as u64,
            _ => {}
        }
    }
    if std::ptr::eq(message, &TENSOR) { tensor.check() } else { Ok(()) }
}

/// Shape and size of a tensor.
#[derive(Default)]
struct Tensor {
    name: String,
    dims: Vec<u64>,
    /// Bytes of all fields that can hold its data.
    data: u64,
}

impl Tensor {
    fn packed_dims(&mut self, mut bytes: &[u8]) -> Result<(), prost::DecodeError> {
        while !bytes.is_empty() && self.dims.len() <= MOST_DIMENSIONS {
            self.dims.push(decode_varint(&mut bytes)?);
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        let name = self.name.escape_debug();
        if self.dims.len() > MOST_DIMENSIONS {
            return Err(format!("weight `{name}` has more than {MOST_DIMENSIONS} dimensions"));
        }
        // at least one byte per element, as nfold writes no 4-bit types; empty tensors have none
        let elements = self.dims.iter().try_fold(1_u64, |all, &dim| all.checked_mul(dim));
        match elements {
            Some(elements) if elements <= self.data => Ok(()),
            _ => Err(format!(
                "weight `{name}` has {} bytes of data, less than its shape {:?} needs",
                self.data, self.dims
            )),
        }
    }
}

/// Most dimensions of a weight.
const MOST_DIMENSIONS: usize = 8;
