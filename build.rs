//! Compiles proto/*.proto to Rust with protox, a protobuf compiler in Rust: no `protoc` needs to be installed.

use std::path::PathBuf;

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);

    let onnx = protox::compile(["proto/onnx.proto"], ["proto"])?;
    prost_build::Config::new().bytes([".nfold.onnx.TensorProto.raw_data"]).compile_fds(onnx)?;

    let open_inference = protox::compile(["proto/open_inference.proto"], ["proto"])?;
    // for gRPC's reflection service
    std::fs::write(out.join("open_inference.bin"), open_inference.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".inference").compile_fds(open_inference)?;
    Ok(())
}
