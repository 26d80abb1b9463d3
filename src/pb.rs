//! Protobuf modules, generated from `proto/` at build time.

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
