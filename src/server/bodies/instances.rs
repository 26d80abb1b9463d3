//! Images in the JSON of other contracts: `{"instances": […], "parameters": {…}}` (TensorFlow Serving, KServe v1, Vertex AI) and
//! `{"inputs": …, "parameters": {…}}` (Hugging Face).
//!
//! Read as `upload` reads its own: level by level, counted before anything is kept.

use bytes::Bytes;
use serde::de::Error as _;
use serde_json::value::RawValue;
use serde_json::{Error, Value};

use super::super::status::{ApiError, Code, cut};
use super::budget::Charge;
use super::json;
use super::upload::{Asked, Upload, decoded, some_images, unknown};
use crate::infer::error::InferError;
use crate::model::scoring::ScoreFunction;

/// Names that clients give to an instance's image.
const NAMES: [&str; 5] = ["b64", "image", "image_bytes", "data", "body"];

/// `{"instances": [IMAGE, …], "parameters": {"top_k": K}}`. An image is base64, `{"b64": base64}`, or such under a name.
pub(in crate::server) fn read_instances(body: &Bytes, most: usize, mut charge: Charge) -> Result<Upload, ApiError> {
    let other = |e: Error| invalid("{\"instances\":[{\"b64\":\"…\"}],\"parameters\":{\"top_k\":5}}", &e);
    let (mut instances, mut asked) = (None, Asked { is_list: true, ..Asked::default() });
    for (name, value) in json::document(body).map_err(other)? {
        match name.as_str() {
            "instances" => instances = Some(json::array(value, most).map_err(other)?),
            "parameters" => parameters(&mut asked, value, &["top_k"]).map_err(other)?,
            name => return Err(other(unknown(name, &["instances", "parameters"]))),
        }
    }
    let instances = instances.ok_or_else(|| other(Error::missing_field("instances")))?;
    let instances = instances.map_err(|images| InferError::TooManyImages { images, limit: most })?;
    let texts = instances.into_iter().map(|instance| text_of(instance, &NAMES).map_err(other));
    let images = texts.map(|text| decoded(text?, &mut charge)).collect::<Result<_, _>>()?;
    charge.shrink(body.len());
    some_images(Upload { images, asked, charge })
}

/// `{"inputs": IMAGE, "parameters": {"top_k": K, "function_to_apply": F}}`, or a list of images; an image is base64.
pub(in crate::server) fn read_inputs(body: &Bytes, most: usize, mut charge: Charge) -> Result<Upload, ApiError> {
    let other = |e: Error| invalid("{\"inputs\":\"base64 of the image\",\"parameters\":{\"top_k\":5}}", &e);
    let (mut inputs, mut asked) = (None, Asked::default());
    for (name, value) in json::document(body).map_err(other)? {
        match name.as_str() {
            "inputs" => inputs = Some(value),
            "parameters" => parameters(&mut asked, value, &["top_k", "function_to_apply"]).map_err(other)?,
            name => return Err(other(unknown(name, &["inputs", "parameters"]))),
        }
    }
    let inputs = inputs.ok_or_else(|| other(Error::missing_field("inputs")))?;
    asked.is_list = inputs.get().starts_with('[');
    let elements = if asked.is_list { json::array(inputs, most).map_err(other)? } else { Ok(vec![inputs]) };
    let elements = elements.map_err(|images| InferError::TooManyImages { images, limit: most })?;
    let mut images = Vec::with_capacity(elements.len());
    for element in elements {
        let text = text_of(element, &[]).map_err(other)?;
        if ["http:", "https:"].iter().any(|scheme| text.starts_with(scheme)) {
            let text = "this server fetches nothing: send the image in place of its address, in base64 or as the body";
            return Err(ApiError::new(Code::InvalidRequest, text));
        }
        images.push(decoded(text, &mut charge)?);
    }
    charge.shrink(body.len());
    some_images(Upload { images, asked, charge })
}

fn invalid(form: &str, error: &Error) -> ApiError {
    ApiError::new(Code::InvalidRequest, format!("the body is not the JSON that is taken here, {form}: {error}"))
}

/// What is between the quotes of an image's base64, in objects of one member of these names, or of no object.
fn text_of<'a>(image: &'a RawValue, names: &[&str]) -> Result<&'a str, Error> {
    if let Some(text) = json::quoted(image) {
        return Ok(text);
    }
    if names.is_empty() || !image.get().starts_with('{') {
        return Err(Error::custom("an image is a string of base64"));
    }
    let members = json::object(image.get().as_bytes())?;
    match members.as_slice() {
        [(name, value)] if names.contains(&name.as_str()) => {
            let inner: &[&str] = if name == "b64" { &[] } else { &["b64"] };
            text_of(value, inner)
        }
        [(name, _)] => Err(unknown(name, names)),
        _ => Err(Error::custom(format!("an image has one member, such as `{}`, not {}", names[0], members.len()))),
    }
}

/// Reads the parameters, which may be no others than `known`.
fn parameters(asked: &mut Asked, json: &RawValue, known: &[&str]) -> Result<(), Error> {
    for (name, value) in json::scalars("parameters", json)? {
        if !known.contains(&name.as_str()) {
            return Err(unknown(&name, known));
        }
        match (name.as_str(), &value) {
            (_, Value::Null) => {}
            ("top_k", value) => asked.top_k = Some(top_k(value)?),
            (_, Value::String(function)) => asked.scores = Some(scores(function)?),
            (name, _) => return Err(Error::custom(format!("`{name}` is no string"))),
        }
    }
    Ok(())
}

/// Google's clients write every number with a fraction.
fn top_k(value: &Value) -> Result<usize, Error> {
    let fraction = || value.as_f64().filter(|f| f.fract() == 0.0 && (0.0..1e15).contains(f)).map(|f| f as u64);
    let whole = value.as_u64().or_else(fraction).and_then(|k| usize::try_from(k).ok());
    whole.ok_or_else(|| Error::custom(super::super::query::no_number("top_k", &value.to_string())))
}

fn scores(function: &str) -> Result<ScoreFunction, Error> {
    match function {
        "softmax" => Ok(ScoreFunction::Softmax),
        "sigmoid" => Ok(ScoreFunction::Sigmoid),
        "none" => Ok(ScoreFunction::None),
        other => {
            let shown = cut(other).escape_debug().to_string();
            Err(Error::custom(format!("`function_to_apply` is `{shown}`; there is `softmax`, `sigmoid`, `none`")))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::budget::BodyBudget;
    use super::*;
    use crate::metrics::Metrics;

    fn charge() -> Charge {
        BodyBudget::new(1 << 20, &Arc::new(Metrics::new())).charge()
    }

    fn images(upload: &Upload) -> Vec<&[u8]> {
        upload.images.iter().map(|image| &image.as_ref().expect("base64")[..]).collect()
    }

    #[test]
    fn instances_come_in_the_forms_that_clients_send() {
        let body = r#"{"instances": ["YQ==", {"b64": "Yg"}, {"image": {"b64": "Yw=="}}, {"data": "ZA=="}, {"image_bytes": {"b64": "ZQ"}}],
            "parameters": {"top_k": 2.0}}"#;
        let upload = read_instances(&body.into(), 5, charge()).expect("instances");
        assert_eq!(images(&upload), [b"a", b"b", b"c", b"d", b"e"]);
        assert_eq!((upload.asked.top_k, upload.asked.is_list), (Some(2), true));
        assert!(read_instances(&body.into(), 4, charge()).is_err_and(|e| e.message.contains("5 images")));
        for (bad, due) in [
            (r#"{"instances": []}"#, "no image"),
            (r#"{"instances": [1]}"#, "an image is a string of base64"),
            (r#"{"instances": [{}]}"#, "one member, such as `b64`, not 0"),
            (r#"{"instances": [{"b64": {"b64": "YQ"}}]}"#, "an image is a string"),
            (r#"{"instances": [{"image": {"image": "YQ"}}]}"#, "`b64`"),
            (r#"{"instances": [{"img": "YQ"}]}"#, "there is no field `img`; `image` is meant?"),
            (r#"{"instance": ["YQ"]}"#, "there is no field `instance`; `instances` is meant?"),
            (r#"{"instances": ["YQ"], "parameters": {"topk": 1}}"#, "there is no field `topk`; `top_k` is meant?"),
            (r#"{"instances": ["YQ"], "parameters": {"top_k": 1.5}}"#, "`top_k` is `1.5`"),
            (r#"{"instances": ["YQ"], "parameters": {"top_k": "x"}}"#, "`top_k` is `\\\"x\\\"`"),
            (r#"{"parameters": {}}"#, "missing field `instances`"),
            ("[]", "an object is due"),
        ] {
            let error = read_instances(&bad.into(), 5, charge()).expect_err(bad);
            assert!(error.code == Code::InvalidRequest && error.message.contains(due), "{bad}: {}", error.message);
        }
    }

    #[test]
    fn inputs_are_one_or_a_list() {
        let one = read_inputs(&r#"{"inputs": "YQ==", "parameters": null}"#.into(), 2, charge()).expect("one");
        assert_eq!((images(&one), one.asked.is_list, one.asked.scores), (vec![&b"a"[..]], false, None));
        let body = r#"{"inputs": ["YQ", "data:image/png;base64,Yg=="], "parameters": {"top_k": 1, "function_to_apply": "sigmoid"}}"#;
        let two = read_inputs(&body.into(), 2, charge()).expect("two");
        assert_eq!((images(&two).len(), two.asked.is_list, two.asked.scores), (2, true, Some(ScoreFunction::Sigmoid)));
        for (bad, due) in [
            (r#"{"inputs": "https://a.test/cat.jpg"}"#, "fetches nothing"),
            (r#"{"inputs": {"b64": "YQ"}}"#, "a string of base64"),
            (r#"{"inputs": [[]]}"#, "a string of base64"),
            (r#"{"inputs": "YQ", "parameters": {"candidate_labels": "a"}}"#, "there is no field `candidate_labels`"),
            (r#"{"inputs": "YQ", "parameters": {"function_to_apply": "tanh"}}"#, "`function_to_apply` is `tanh`"),
            (r#"{"inputs": "YQ", "parameters": {"function_to_apply": 1}}"#, "`function_to_apply` is no string"),
            (r#"{"inputs": []}"#, "no image"),
            (r#"{"input": "YQ"}"#, "`inputs` is meant?"),
        ] {
            let error = read_inputs(&bad.into(), 2, charge()).expect_err(bad);
            assert!(error.code == Code::InvalidRequest && error.message.contains(due), "{bad}: {}", error.message);
        }
    }

    #[test]
    fn what_is_decoded_is_charged() {
        let small = || BodyBudget::new(100, &Arc::new(Metrics::new())).charge();
        let body: Bytes = format!("{{\"instances\": [\"{}\"]}}", "A".repeat(400)).into();
        assert_eq!(read_instances(&body, 5, small()).expect_err("no room").code, Code::Overloaded);
        let body: Bytes = format!("{{\"inputs\": \"{}\"}}", "A".repeat(400)).into();
        assert_eq!(read_inputs(&body, 5, small()).expect_err("no room").code, Code::Overloaded);
    }
}
