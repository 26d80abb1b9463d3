//! The `nfold` program: telemetry off, then the command line.

use std::process::ExitCode;

#[allow(unsafe_code)]
fn main() -> ExitCode {
    // ONNX Runtime from 1.29 on reports home unless this is set before the library is loaded; the pinned 1.28 does
    // not, but ORT_DYLIB_PATH may name another.
    // SAFETY: the first statement of the program; no other thread exists that could read the environment.
    unsafe { std::env::set_var("ORT_DISABLE_TELEMETRY", "1") };
    nfold::cli::main()
}
