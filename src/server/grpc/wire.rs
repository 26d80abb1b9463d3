//! Decodes `ModelInferRequest`: tensors stay slices of the message, and everything else is counted before it is kept.
//! The generated type would turn an empty entry, two bytes on the wire, into a hundred bytes of memory.
//!
//! Accepts whatever the generated type accepts: the last scalar wins, repeated fields may be packed or not, unknown
//! fields are skipped.

use bytes::Bytes;
use serde_json::Value;

use super::super::bodies::Limits;
use super::super::oip::datatype::Datatype;
use super::super::oip::framing::{MAX_DIMENSIONS, MAX_TENSORS, Room};
use super::super::oip::inference::{Contents, Inference, InputTensor, Parameters, Wanted, refuse_shared_memory};
use super::super::status::{ApiError, Code, cut};
use super::fields::{Field, Unread, every, fields, malformed, numbers};
use crate::infer::error::InferError;

/// Most parameters of a request or a tensor.
const PARAMETERS: usize = 64;
/// Most bytes of a parameter's name or string value.
const TEXT: usize = 4096;

fn invalid(text: impl Into<String>) -> Unread {
    ApiError::new(Code::InvalidRequest, text).into()
}

/// The fields of a message that are needed before the rest of it can be limited.
#[derive(Debug, Default)]
pub(super) struct Envelope {
    pub(super) model: String,
    pub(super) version: String,
    /// Bytes of all descriptions of inputs: large if they hold the values.
    pub(super) inputs: usize,
}

/// Decodes names and lengths only: takes microseconds for any message.
pub(super) fn envelope(message: &[u8]) -> Result<Envelope, Unread> {
    let (mut model, mut version, mut inputs) = ("", "", 0);
    fields(message, |number, field| {
        match number {
            1 => model = field.text()?,
            2 => version = field.text()?,
            5 => inputs += field.bytes()?.len(),
            _ => {}
        }
        Ok(())
    })?;
    Ok(Envelope { model: cut(model).into_owned(), version: cut(version).into_owned(), inputs })
}

/// Decodes a request. The flag is true if its tensors came in typed fields: then the response's do as well.
pub(super) fn read(message: &Bytes, limits: &Limits, room: Room<'_>) -> Result<(Inference, bool), Unread> {
    let mut id = "";
    let (mut named, mut inputs, mut outputs, mut raw) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    fields(message, |number, field| {
        match number {
            3 => id = field.text()?,
            4 => few(&mut named, field.bytes()?, PARAMETERS, "parameters")?,
            5 => few(&mut inputs, field.bytes()?, MAX_TENSORS, "inputs")?,
            6 => few(&mut outputs, field.bytes()?, MAX_TENSORS, "outputs")?,
            7 => few(&mut raw, field.bytes()?, MAX_TENSORS, "raw contents")?,
            _ => {}
        }
        Ok(())
    })?;
    if !raw.is_empty() && raw.len() != inputs.len() {
        let (raw, inputs) = (raw.len(), inputs.len());
        return Err(invalid(format!("{raw} raw contents came for {inputs} inputs; send one for each")));
    }
    let mut inference = Inference { id: (!id.is_empty()).then(|| cut(id).into_owned()), ..Inference::default() };
    let mut typed = false;
    let mut raw_of = raw.iter();
    for input in inputs {
        let input = Input::read(input)?;
        typed |= raw.is_empty() && !input.contents.is_empty();
        let raw = raw_of.next().map(|bytes| message.slice_ref(bytes));
        inference.inputs.push(input.tensor(raw, message, limits, room)?);
    }
    for output in outputs {
        let (mut name, mut named) = ("", Vec::new());
        fields(output, |number, field| {
            match number {
                1 => name = field.text()?,
                2 => few(&mut named, field.bytes()?, PARAMETERS, "parameters")?,
                _ => {}
            }
            Ok(())
        })?;
        inference.outputs.push(Wanted::new(cut(name).into_owned(), &parameters(&named)?)?);
    }
    Ok((inference.with_parameters(&parameters(&named)?)?, typed))
}

/// Keeps `one` more element of at most `most`.
fn few<'a>(kept: &mut Vec<&'a [u8]>, one: &'a [u8], most: usize, what: &str) -> Result<(), Unread> {
    if kept.len() == most {
        return Err(invalid(format!("more than {most} {what} in one place; no model here has a use for them")));
    }
    kept.push(one);
    Ok(())
}

/// Decodes a map of parameters; the last value of a name wins.
fn parameters(entries: &[&[u8]]) -> Result<Parameters, Unread> {
    let mut parameters = Parameters::new();
    for entry in entries {
        let (mut name, mut value) = ("", Value::Null);
        fields(entry, |number, field| {
            match number {
                1 => name = field.text()?,
                2 => value = parameter(field.bytes()?)?,
                _ => {}
            }
            Ok(())
        })?;
        if name.len() > TEXT {
            return Err(invalid(format!(
                "the name of a parameter is {} bytes long, at most {TEXT} are taken",
                name.len()
            )));
        }
        match value {
            // a parameter without a value
            Value::Null => drop(parameters.remove(name)),
            value => drop(parameters.insert(name.into(), value)),
        }
    }
    Ok(parameters)
}

fn parameter(message: &[u8]) -> Result<Value, Unread> {
    let mut value = Value::Null;
    fields(message, |number, field| {
        value = match number {
            1 => Value::Bool(field.varint()? != 0),
            2 => (field.varint()? as i64).into(),
            3 => {
                let text = field.text()?;
                if text.len() > TEXT {
                    let length = text.len();
                    return Err(invalid(format!("a parameter is {length} bytes long, at most {TEXT} are taken")));
                }
                text.into()
            }
            4 => match field {
                Field::Fixed64(bytes) => f64::from_le_bytes(bytes).into(),
                _ => return Err(malformed("a field has another type")),
            },
            5 => field.varint()?.into(),
            _ => return Ok(()),
        };
        Ok(())
    })?;
    Ok(value)
}

/// A tensor as encoded in the message.
struct Input<'a> {
    name: &'a str,
    datatype: &'a str,
    shape: Vec<i64>,
    parameters: Vec<&'a [u8]>,
    /// Typed contents; several messages are concatenated.
    contents: Vec<&'a [u8]>,
}

impl<'a> Input<'a> {
    fn read(message: &'a [u8]) -> Result<Self, Unread> {
        let (mut name, mut datatype) = ("", "");
        let (mut shape, mut parameters, mut contents) = (Vec::new(), Vec::new(), Vec::new());
        fields(message, |number, field| {
            match number {
                1 => name = field.text()?,
                2 => datatype = field.text()?,
                3 => numbers(field, &mut |side| {
                    if shape.len() == MAX_DIMENSIONS {
                        return Err(invalid(format!("a shape of more than {MAX_DIMENSIONS} dimensions")));
                    }
                    shape.push(side as i64);
                    Ok(())
                })?,
                4 => few(&mut parameters, field.bytes()?, PARAMETERS, "parameters")?,
                5 => few(&mut contents, field.bytes()?, MAX_TENSORS, "contents")?,
                _ => {}
            }
            Ok(())
        })?;
        Ok(Self { name, datatype, shape, parameters, contents })
    }

    fn tensor(
        self,
        raw: Option<Bytes>,
        message: &Bytes,
        limits: &Limits,
        room: Room<'_>,
    ) -> Result<InputTensor, Unread> {
        let Self { name, datatype, shape, parameters: named, contents } = self;
        let name = cut(name);
        refuse_shared_memory(&parameters(&named)?, &name)?;
        let shown = name.escape_debug().to_string();
        let known = Datatype::parse(datatype)
            .ok_or_else(|| invalid(format!("`{}` is no datatype of the protocol", cut(datatype).escape_debug())))?;
        let contents = match (raw, contents.is_empty()) {
            (Some(_), false) => return Err(invalid(format!("input `{shown}` has both typed and raw contents"))),
            (Some(raw), true) => Contents::Raw(known, raw),
            (None, true) => return Err(invalid(format!("input `{shown}` has no contents"))),
            (None, false) => match known {
                Datatype::Fp32 => Contents::Fp32(floats(&contents, message, limits, room)?),
                Datatype::Bytes => Contents::Elements(elements(&contents, message, limits)?),
                Datatype::Uint8 => Contents::Raw(known, narrow(&contents, &shown, limits, room)?),
                Datatype::Fp16 | Datatype::Bf16 => {
                    return Err(invalid(format!(
                        "input `{shown}`: {datatype} has no typed field; send raw_input_contents"
                    )));
                }
                // refused with a better error text once the model is known
                other => Contents::Raw(other, Bytes::new()),
            },
        };
        Ok(InputTensor { name: name.into_owned(), shape, contents })
    }
}

/// FP32 values as little-endian bytes, as they are encoded: a slice of the message if they are packed.
fn floats(contents: &[&[u8]], message: &Bytes, limits: &Limits, room: Room<'_>) -> Result<Bytes, Unread> {
    let (mut runs, mut one, mut length): (usize, &[u8], usize) = (0, &[], 0);
    every(contents, 6, |field| {
        let run = match field {
            Field::Bytes(packed) if packed.len().is_multiple_of(4) => packed,
            Field::Fixed32(_) => &[0; 4],
            _ => return Err(malformed("a field has another type")),
        };
        (runs, one, length) = (runs + 1, run, length + run.len());
        if matches!(field, Field::Fixed32(_)) {
            // not a slice of the message: the values are copied below
            runs += 1;
        }
        Ok(())
    })?;
    if runs <= 1 {
        return Ok(if one.is_empty() { Bytes::new() } else { message.slice_ref(one) });
    }
    few_values(length / 4, limits)?;
    room(length)?;
    let mut bytes = Vec::with_capacity(length);
    every(contents, 6, |field| {
        match field {
            Field::Bytes(packed) => bytes.extend_from_slice(packed),
            Field::Fixed32(value) => bytes.extend_from_slice(&value),
            _ => {}
        }
        Ok(())
    })?;
    Ok(bytes.into())
}

/// Elements of BYTES, at most one per image.
fn elements(contents: &[&[u8]], message: &Bytes, limits: &Limits) -> Result<Vec<Bytes>, Unread> {
    let (mut elements, mut images, limit) = (Vec::new(), 0, limits.images);
    every(contents, 8, |field| {
        let element = field.bytes()?;
        images += 1;
        if images <= limit {
            elements.push(message.slice_ref(element));
        }
        Ok(())
    })?;
    if images > limit {
        return Err(ApiError::from(InferError::TooManyImages { images, limit }).into());
    }
    Ok(elements)
}

/// Integers of 32 bits that must fit into bytes.
fn narrow(contents: &[&[u8]], shown: &str, limits: &Limits, room: Room<'_>) -> Result<Bytes, Unread> {
    let mut count = 0;
    every(contents, 4, |field| {
        numbers(field, &mut |_| {
            count += 1;
            Ok(())
        })
    })?;
    few_values(count, limits)?;
    room(count)?;
    let mut bytes = Vec::with_capacity(count);
    every(contents, 4, |field| {
        numbers(field, &mut |number| {
            // the field is 32 bits wide
            let byte = u8::try_from(number as u32);
            bytes.push(byte.map_err(|_| invalid(format!("input `{shown}` has values above 255")))?);
            Ok(())
        })
    })?;
    Ok(bytes.into())
}

/// Checks that `count` values are no more than the model's images may have, before they are copied.
fn few_values(count: usize, limits: &Limits) -> Result<(), Unread> {
    let most = limits.images.saturating_mul(limits.values);
    if count <= most {
        return Ok(());
    }
    Err(invalid(format!(
        "{count} values in one tensor; the {} images that are taken at once have {most}",
        limits.images
    )))
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::super::fields::FIELDS;
    use super::*;
    use crate::pb::open_inference as pb;

    const LIMITS: Limits = Limits { images: 4, values: 12 };

    fn read(message: &[u8]) -> Result<(Inference, bool), Unread> {
        super::read(&Bytes::copy_from_slice(message), &LIMITS, &mut |_| Ok(()))
    }

    /// A length-delimited field.
    fn ld(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut field = vec![number << 3 | 2];
        prost::encoding::encode_varint(bytes.len() as u64, &mut field);
        field.extend_from_slice(bytes);
        field
    }

    fn typed(datatype: &str, contents: pb::InferTensorContents) -> pb::ModelInferRequest {
        use pb::model_infer_request::InferInputTensor;
        let (name, datatype) = ("input".into(), datatype.into());
        let input =
            InferInputTensor { name, datatype, shape: vec![1, -2], contents: Some(contents), ..Default::default() };
        pb::ModelInferRequest { model_name: "m".into(), id: "i".into(), inputs: vec![input], ..Default::default() }
    }

    #[test]
    fn typed_contents_are_read_packed_and_not() {
        let values = [1.5_f32, -0.0, f32::NAN];
        let packed = typed("FP32", pb::InferTensorContents { fp32_contents: values.to_vec(), ..Default::default() });
        let (inference, is_typed) = read(&packed.encode_to_vec()).expect("message");
        let bytes: Bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        assert!(is_typed && inference.id.as_deref() == Some("i"));
        assert_eq!(
            (&inference.inputs[0].contents, &inference.inputs[0].shape),
            (&Contents::Fp32(bytes.clone()), &vec![1, -2])
        );

        let one_by_one: Vec<u8> = values.iter().flat_map(|v| [&[6 << 3 | 5][..], &v.to_le_bytes()].concat()).collect();
        let tensor = [ld(1, b"input"), ld(2, b"FP32"), ld(5, &one_by_one), ld(5, b"")].concat();
        let (inference, _) = read(&ld(5, &tensor)).expect("message");
        assert_eq!(inference.inputs[0].contents, Contents::Fp32(bytes));

        let pixels = pb::InferTensorContents { uint_contents: vec![0, 7, 255], ..Default::default() };
        let (inference, _) = read(&typed("UINT8", pixels).encode_to_vec()).expect("message");
        assert_eq!(inference.inputs[0].contents, Contents::Raw(Datatype::Uint8, Bytes::from_static(&[0, 7, 255])));
        let wide = pb::InferTensorContents { uint_contents: vec![256], ..Default::default() };
        assert!(read(&typed("UINT8", wide).encode_to_vec()).is_err_and(|e| !e.malformed));
    }

    #[test]
    fn counts_are_limited_before_anything_is_kept() {
        let tensor = |more: Vec<u8>| ld(5, &[ld(1, b"input"), ld(2, b"FP32"), more].concat());
        let floods = [
            ("inputs", [0x2a, 0].repeat(MAX_TENSORS + 1), false),
            ("outputs", [0x32, 0].repeat(MAX_TENSORS + 1), false),
            ("raw contents", [0x3a, 0].repeat(MAX_TENSORS + 1), false),
            ("parameters", [0x22, 0].repeat(PARAMETERS + 1), false),
            ("unknown fields", [0x78, 0].repeat(FIELDS + 1), true),
            ("groups", [0x63].repeat(1_000_000), true),
            ("a shape", tensor(ld(3, &[1; MAX_DIMENSIONS + 1])), false),
            ("a tensor's parameters", tensor([0x22, 0].repeat(PARAMETERS + 1)), false),
            ("contents", tensor([0x2a, 0].repeat(MAX_TENSORS + 1)), false),
            ("a tensor's unknown fields", tensor([0x78, 0].repeat(FIELDS + 1)), true),
            ("an output's parameters", ld(6, &[0x12, 0].repeat(PARAMETERS + 1)), false),
            ("a long name", ld(4, &[ld(1, &[b'a'; TEXT + 1]), ld(2, &[8, 1])].concat()), false),
            ("a long value", ld(4, &[ld(1, b"a"), ld(2, &ld(3, &[b'a'; TEXT + 1]))].concat()), false),
        ];
        for (what, message, malformed) in floods {
            let unread = read(&message).expect_err(what);
            assert_eq!(unread.malformed, malformed, "{what}: {unread:?}");
        }
        let many = pb::InferTensorContents { bytes_contents: vec![Bytes::new(); 1000], ..Default::default() };
        let error = read(&typed("BYTES", many).encode_to_vec()).expect_err("too many").error;
        assert!(error.message.contains("1000 images") && error.message.contains("at most 4"), "{error:?}");
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for bad in [
            &[0x0a][..],
            &[0x0a, 5, b'a'],
            &[0x0a, 2, 0xff, 0xfe],
            &[0xff; 11],
            &[0x08, 1],
            &[0x2a, 2, 0x0a],
            &[0x00, 1],
            &[0x0f],
            &[0x64],
            &[0x63, 0x6c],
            &[0x0b],
        ] {
            let unread = envelope(bad).err().or_else(|| read(bad).err());
            assert!(unread.is_some_and(|unread| unread.malformed), "{bad:?}");
        }
        // an unknown group is skipped
        assert!(read(&[0x63, 0x08, 1, 0x64]).is_ok());
    }

    /// Compares each field with what the generated type decodes.
    #[test]
    fn later_scalars_win_and_maps_too() {
        let entry = |name: &[u8], value: &[u8]| ld(4, &[ld(1, name), ld(2, value)].concat());
        let message = [
            ld(1, b"x"),
            entry(b"priority", &[0x10, 9]),
            entry(b"timeout", &ld(3, b"77")),
            ld(1, b"m"),
            entry(b"priority", &[0x10, 3, 0x28, 4]),
            ld(3, b"1"),
            ld(3, b"2"),
        ]
        .concat();
        assert_eq!(envelope(&message).expect("message").model, "m");
        let (inference, _) = read(&message).expect("message");
        assert_eq!((inference.priority, inference.id.as_deref()), (4, Some("2")));
        assert_eq!(inference.timeout, Some(std::time::Duration::from_micros(77)));
        let generated = pb::ModelInferRequest::decode(&message[..]).expect("message");
        assert_eq!((generated.model_name.as_str(), generated.id.as_str(), generated.parameters.len()), ("m", "2", 2));
    }

    /// 64 images of the largest size that timm's Normalizer-Free networks are trained for.
    #[test]
    fn a_large_request_is_a_slice() {
        let limits = Limits { images: 256, values: 3 * 288 * 288 };
        let values = vec![0.5; 64 * limits.values];
        let contents = pb::InferTensorContents { fp32_contents: values, ..Default::default() };
        let message = Bytes::from(typed("FP32", contents).encode_to_vec());
        let (inference, _) = super::read(&message, &limits, &mut |_| panic!("nothing is copied")).expect("message");
        let Contents::Fp32(bytes) = &inference.inputs[0].contents else { panic!("floats") };
        assert_eq!(bytes.len(), 64 * 4 * limits.values);
        assert!(message.as_ptr_range().contains(&bytes.as_ptr()));
    }

    proptest::proptest! {
        /// What the generated type can decode is never malformed.
        #[test]
        fn what_the_generated_type_reads_is_read(flips in proptest::collection::vec((0_usize..200, 0_u8..), 0..4), cut in 0_usize..400) {
            let contents = pb::InferTensorContents {
                bool_contents: vec![true], int_contents: vec![-1], int64_contents: vec![-1], uint_contents: vec![1, 300],
                uint64_contents: vec![u64::MAX], fp32_contents: vec![1.0, 2.0], fp64_contents: vec![1.0],
                bytes_contents: vec![Bytes::from_static(b"x")],
            };
            let mut message = typed("FP32", contents);
            let choices = [
                pb::infer_parameter::ParameterChoice::BoolParam(true),
                pb::infer_parameter::ParameterChoice::StringParam("s".into()),
                pb::infer_parameter::ParameterChoice::DoubleParam(0.5),
            ];
            let named = |(i, choice)| (format!("p{i}"), pb::InferParameter { parameter_choice: Some(choice) });
            message.parameters = choices.into_iter().enumerate().map(named).collect();
            let mut bytes = message.encode_to_vec();
            for (at, to) in flips {
                let at = at % bytes.len();
                bytes[at] = to;
            }
            bytes.truncate(cut.max(1));
            let generated = pb::ModelInferRequest::decode(&bytes[..]);
            let malformed = envelope(&bytes).err().or_else(|| read(&bytes).err()).filter(|unread| unread.malformed);
            proptest::prop_assert!(generated.is_err() || malformed.is_none(), "{malformed:?}: {bytes:?}");
        }
    }
}
