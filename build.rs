//! Compiles proto/*.proto to Rust with protox, a protobuf compiler in Rust: no `protoc` needs to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/onnx.proto"], ["proto"])?;
    prost_build::Config::new().bytes([".nfold.onnx.TensorProto.raw_data"]).compile_fds(descriptors)?;
    Ok(())
}
