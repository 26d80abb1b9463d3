//! Encodes the response to an inference as a framed message.

use bytes::Bytes;

use super::super::bodies::budget::Charge;
use super::super::oip::inference::{Answered, OutputData};
use super::super::served::Served;
use super::frames::framed;
use crate::pb::open_inference as pb;
use pb::model_infer_response::InferOutputTensor;

/// A response, and what the access log records of it.
pub(super) struct Reply {
    /// The message with its length prefix.
    pub(super) frame: Bytes,
    pub(super) served: Served,
    pub(super) charge: Charge,
}

/// Encodes a response; tensors are in typed fields if the request's were. In a stream it is wrapped in
/// `ModelStreamInferResponse`.
pub(super) fn reply(answered: Answered, typed: bool, streamed: bool) -> Reply {
    let Answered { model, id, outputs, served, charge, .. } = answered;
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
                OutputData::Numbers(fp32_contents) => pb::InferTensorContents { fp32_contents, ..Default::default() },
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
    let frame = if streamed {
        framed(&pb::ModelStreamInferResponse { error_message: String::new(), infer_response: Some(message) })
    } else {
        framed(&message)
    };
    Reply { frame, served, charge }
}
