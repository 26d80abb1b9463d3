//! Protobuf modules, generated from `proto/` at build time.

/// The ONNX format, as far as nfold writes it (`proto/onnx.proto`).
#[allow(missing_docs, clippy::doc_markdown)]
pub mod onnx {
    include!(concat!(env!("OUT_DIR"), "/nfold.onnx.rs"));
}
