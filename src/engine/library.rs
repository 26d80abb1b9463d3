//! Finds the ONNX Runtime library and keeps the process's one environment of it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ort::environment::Environment;

use super::EngineError;

/// Environment variable naming the ONNX Runtime library to load.
pub const LIBRARY_VARIABLE: &str = "ORT_DYLIB_PATH";

/// The process's one ONNX Runtime environment, made on first use.
pub(super) fn environment() -> Result<&'static Environment, EngineError> {
    static ENVIRONMENT: OnceLock<Result<Environment, EngineFault>> = OnceLock::new();
    ENVIRONMENT.get_or_init(start).as_ref().map_err(EngineFault::to_error)
}

/// Why there is no environment, kept for every later caller ([`EngineError`] holds sources that can't be cloned).
#[derive(Debug)]
enum EngineFault {
    Missing(String),
    Unusable(PathBuf, String),
}

impl EngineFault {
    fn to_error(&self) -> EngineError {
        match self {
            Self::Missing(looked) => EngineError::NoLibrary { looked: looked.clone() },
            Self::Unusable(path, reason) => EngineError::BadLibrary { path: path.clone(), reason: reason.clone() },
        }
    }
}

fn start() -> Result<Environment, EngineFault> {
    let path = find_library()?;
    let unusable = |reason: String| EngineFault::Unusable(path.clone(), reason);
    let builder = ort::init_from(&path).map_err(|e| unusable(e.to_string()))?;
    builder.with_name("nfold").with_telemetry(false).build().map_err(|e| unusable(e.to_string()))
}

/// `ORT_DYLIB_PATH`, beside the executable, `.ort/` (`.ort-gpu/` in GPU builds) of the working directory and of the
/// executable's ancestors (so that a development build finds the project's), then the system's own search.
fn find_library() -> Result<PathBuf, EngineFault> {
    if let Some(named) = std::env::var_os(LIBRARY_VARIABLE).filter(|v| !v.is_empty()) {
        let path = PathBuf::from(named);
        return match path.is_file() {
            true => Ok(absolute(&path)),
            false => Err(EngineFault::Missing(format!("{LIBRARY_VARIABLE}={}", path.display()))),
        };
    }
    let file = if cfg!(target_os = "macos") { "libonnxruntime.dylib" } else { "libonnxruntime.so" };
    let folders: &[&str] = if cfg!(feature = "gpu") { &[".ort-gpu", ".ort"] } else { &[".ort"] };
    let mut looked = Vec::new();
    if let Ok(executable) = std::env::current_exe() {
        looked.extend(executable.parent().map(|folder| folder.join(file)));
        let roots = std::iter::once(PathBuf::from(".")).chain(executable.ancestors().skip(1).map(Path::to_path_buf));
        looked.extend(roots.flat_map(|root| folders.iter().map(move |f| root.join(f).join(file))));
    }
    let system =
        ["/usr/local/lib", "/usr/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/opt/homebrew/lib"];
    looked.extend(system.iter().map(|folder| Path::new(folder).join(file)));
    match looked.iter().find(|path| path.is_file()) {
        Some(path) => Ok(absolute(path)),
        None => {
            Err(EngineFault::Missing(looked.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")))
        }
    }
}

/// How to get the library: a clone of the project fetches it, anybody else has its wheel.
pub(super) fn how_to_get() -> String {
    const FETCH: &str = "deploy/onnxruntime/fetch";
    let executable = std::env::current_exe().unwrap_or_default();
    let mut roots = std::iter::once(Path::new(".")).chain(executable.ancestors().skip(1));
    match roots.find(|root| root.join(FETCH).is_file() && root.join("Makefile").is_file()) {
        Some(root) if root == Path::new(".") => "fetch 1.28.0 with `make ort`".into(),
        Some(root) => format!("fetch 1.28.0 with `make ort` in `{}`", root.display()),
        None => format!(
            "get 1.28.0 with `pip install onnxruntime==1.28.0` and set {LIBRARY_VARIABLE} to the wheel's \
             onnxruntime/capi/libonnxruntime.so.1.28.0"
        ),
    }
}

/// A relative path would be looked up beside the executable first.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.into())
}
