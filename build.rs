//! Compiles proto/*.proto to Rust with protox, a protobuf compiler in Rust: no `protoc` needs to be installed.

use std::path::PathBuf;

use prost::Message as _;

/// Messages that HTTP answers with, too.
const TOLD_IN_JSON: [&str; 15] = [
    "ServerMetadataResponse",
    "ModelMetadataResponse",
    "ModelConfig",
    "ModelInput",
    "ModelOutput",
    "ModelInstanceGroup",
    "ModelQueuePolicy",
    "ModelDynamicBatching",
    "ModelParameter",
    "ModelStatisticsResponse",
    "ModelStatistics",
    "InferStatistics",
    "InferBatchStatistics",
    "StatisticDuration",
    "RepositoryIndexResponse",
];

/// Their fields that are numbers of an enumeration, and what spells these out in JSON.
const ENUM_FIELDS: [(&str, &str); 5] = [
    ("ModelInput.data_type", "data_type"),
    ("ModelInput.format", "format"),
    ("ModelOutput.data_type", "data_type"),
    ("ModelInstanceGroup.kind", "kind"),
    ("ModelQueuePolicy.timeout_action", "timeout_action"),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);

    let onnx = protox::compile(["proto/onnx.proto"], ["proto"])?;
    prost_build::Config::new().bytes([".nfold.onnx.TensorProto.raw_data"]).compile_fds(onnx)?;

    let open_inference = protox::compile(["proto/open_inference.proto"], ["proto"])?;
    // for gRPC's reflection service
    std::fs::write(out.join("open_inference.bin"), open_inference.encode_to_vec())?;
    let mut messages = tonic_prost_build::configure().bytes(".inference");
    // what both protocols tell is told from the same messages
    for message in TOLD_IN_JSON {
        let attributes = "#[derive(serde::Serialize, utoipa::ToSchema)]";
        messages = messages.message_attribute(format!(".inference.{message}"), attributes);
    }
    for (field, of) in ENUM_FIELDS {
        let attributes = format!("#[serde(serialize_with = \"crate::pb::{of}\")] #[schema(value_type = String)]");
        messages = messages.field_attribute(format!(".inference.{field}"), attributes);
    }
    messages.compile_fds(open_inference)?;
    Ok(())
}
