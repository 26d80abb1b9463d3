//! Between protobuf messages and an inference: typed or raw contents in, the same kind out.

use bytes::Bytes;
use serde_json::Value;

use super::super::access::Served;
use super::super::oip::datatype::Datatype;
use super::super::oip::inference::{
    Answered, Contents, Inference, InputTensor, OutputData, Parameters, Wanted, refuse_shared_memory,
};
use super::super::status::{ApiError, Code};
use crate::pb::open_inference as pb;
use pb::infer_parameter::ParameterChoice;
use pb::model_infer_request::InferInputTensor;
use pb::model_infer_response::InferOutputTensor;

/// An answer, and what the access log wants to know of it.
pub(super) struct Reply {
    pub(super) message: pb::ModelInferResponse,
    pub(super) served: Served,
}

/// Whether the tensors came in typed fields: then that is how the client reads them, too.
pub(super) fn is_typed(request: &pb::ModelInferRequest) -> bool {
    request.raw_input_contents.is_empty() && request.inputs.iter().any(|input| input.contents.is_some())
}

fn invalid(text: impl Into<String>) -> ApiError {
    ApiError::new(Code::InvalidRequest, text)
}

/// What is asked for.
pub(super) fn parse(request: pb::ModelInferRequest) -> Result<Inference, ApiError> {
    let mut raw = request.raw_input_contents.into_iter();
    if raw.len() > 0 && raw.len() != request.inputs.len() {
        let (raw, inputs) = (raw.len(), request.inputs.len());
        return Err(invalid(format!("{raw} raw contents came for {inputs} inputs; send one for each")));
    }
    let mut inference = Inference { id: (!request.id.is_empty()).then_some(request.id), ..Inference::default() };
    for input in request.inputs {
        inference.inputs.push(tensor(input, raw.next())?);
    }
    for output in request.outputs {
        inference.outputs.push(Wanted::new(output.name, &parameters(output.parameters))?);
    }
    inference.with_parameters(&parameters(request.parameters))
}

fn tensor(input: InferInputTensor, raw: Option<Bytes>) -> Result<InputTensor, ApiError> {
    let InferInputTensor { name, datatype, shape, parameters: named, contents } = input;
    refuse_shared_memory(&parameters(named), &name)?;
    let shown = name.escape_debug().to_string();
    let known = Datatype::parse(&datatype)
        .ok_or_else(|| invalid(format!("`{}` is no datatype of the protocol", datatype.escape_debug())))?;
    let contents = match (raw, contents) {
        (Some(_), Some(_)) => return Err(invalid(format!("input `{shown}` has both typed and raw contents"))),
        (Some(raw), None) => Contents::Raw(known, raw),
        (None, None) => return Err(invalid(format!("input `{shown}` has no contents"))),
        (None, Some(typed)) => match known {
            Datatype::Fp32 => Contents::Fp32(typed.fp32_contents),
            Datatype::Bytes => Contents::Elements(typed.bytes_contents),
            Datatype::Uint8 => {
                let narrow = typed.uint_contents.iter().map(|&v| u8::try_from(v)).collect::<Result<Vec<u8>, _>>();
                let narrow = narrow.map_err(|_| invalid(format!("input `{shown}` has values above 255")))?;
                Contents::Raw(known, narrow.into())
            }
            Datatype::Fp16 | Datatype::Bf16 => {
                return Err(invalid(format!(
                    "input `{shown}`: {datatype} has no typed field; send raw_input_contents"
                )));
            }
            // refused with a better text once the model is known
            other => Contents::Raw(other, Bytes::new()),
        },
    };
    Ok(InputTensor { name, shape, contents })
}

fn parameters(named: std::collections::HashMap<String, pb::InferParameter>) -> Parameters {
    let value = |choice| match choice {
        ParameterChoice::BoolParam(on) => Value::Bool(on),
        ParameterChoice::Int64Param(number) => number.into(),
        ParameterChoice::StringParam(text) => Value::String(text),
        ParameterChoice::DoubleParam(number) => number.into(),
        ParameterChoice::Uint64Param(number) => number.into(),
    };
    named.into_iter().filter_map(|(name, parameter)| Some((name, value(parameter.parameter_choice?)))).collect()
}

/// The answer as a message; tensors in typed fields if the request's were.
pub(super) fn reply(answered: Answered, typed: bool) -> Reply {
    let Answered { model, id, outputs, served } = answered;
    let mut message = pb::ModelInferResponse {
        model_name: model.name.clone(),
        model_version: model.version.to_string(),
        id: id.unwrap_or_default(),
        ..Default::default()
    };
    for output in outputs {
        let datatype = output.data.datatype().name().into();
        let mut contents = None;
        if typed {
            contents = Some(match output.data {
                OutputData::Logits(fp32_contents) => pb::InferTensorContents { fp32_contents, ..Default::default() },
                OutputData::Classes(classes) => pb::InferTensorContents {
                    bytes_contents: classes.into_iter().map(Bytes::from).collect(),
                    ..Default::default()
                },
            });
        } else {
            message.raw_output_contents.push(output.data.to_bytes());
        }
        message.outputs.push(InferOutputTensor {
            name: output.name.into(),
            datatype,
            shape: output.shape.iter().map(|&n| n as i64).collect(),
            parameters: Default::default(),
            contents,
        });
    }
    Reply { message, served }
}
