//! Protobuf modules, generated from `proto/` at build time, and how their enumerations are spelt in JSON.

use serde::Serializer;

use self::open_inference as oip;

/// The ONNX format, as far as nfold writes it (`proto/onnx.proto`).
#[allow(missing_docs, clippy::doc_markdown)]
pub mod onnx {
    include!(concat!(env!("OUT_DIR"), "/nfold.onnx.rs"));
}

/// The Open Inference Protocol over gRPC, client and server (`proto/open_inference.proto`).
#[allow(missing_docs, clippy::all)]
pub mod open_inference {
    include!(concat!(env!("OUT_DIR"), "/inference.rs"));

    /// The service's description, for reflection.
    pub const DESCRIPTOR: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/open_inference.bin"));
}

fn data_type<S: Serializer>(number: &i32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(oip::DataType::try_from(*number).unwrap_or_default().as_str_name())
}

fn format<S: Serializer>(number: &i32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(oip::model_input::Format::try_from(*number).unwrap_or_default().as_str_name())
}

fn kind<S: Serializer>(number: &i32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(oip::model_instance_group::Kind::try_from(*number).unwrap_or_default().as_str_name())
}

fn timeout_action<S: Serializer>(number: &i32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer
        .serialize_str(oip::model_queue_policy::TimeoutAction::try_from(*number).unwrap_or_default().as_str_name())
}
