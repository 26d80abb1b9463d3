//! Finds the ONNX Runtime library and holds the process's only environment of it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ort::environment::Environment;
use ort::session::Session;

use super::EngineError;
use crate::graph::{Emission, GraphBuilder};
use crate::kernels::operators;
use crate::model::{Gate, Precision};

/// Environment variable with the path of the ONNX Runtime library.
pub const LIBRARY_VARIABLE: &str = "ORT_DYLIB_PATH";

/// The process's ONNX Runtime environment, created on first use.
pub(super) fn environment() -> Result<&'static Environment, EngineError> {
    static ENVIRONMENT: OnceLock<Result<Environment, EngineFault>> = OnceLock::new();
    ENVIRONMENT.get_or_init(start).as_ref().map_err(EngineFault::to_error)
}

/// Why there is no environment, kept for later callers ([`EngineError`] holds sources that can't be cloned).
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
    let environment = builder.with_name("nfold").with_telemetry(false).build().map_err(|e| unusable(e.to_string()))?;
    add_domain(&environment).map_err(|e| unusable(e.to_string()))?;
    Ok(environment)
}

/// Opens a session with our operators. ONNX Runtime keeps the names of their domain for the whole process, and of two sessions that
/// are the first to bring it at the same time one fails.
fn add_domain(environment: &Environment) -> ort::Result<()> {
    let emission = Emission {
        height: 1,
        width: 1,
        dynamic: false,
        precision: Precision::Fp32,
        gate: Gate::Resize,
        same_padding: false,
    };
    let (mut graph, image) = GraphBuilder::new(emission, 1);
    let sigmoid = graph.sigmoid(&image, "sigmoid");
    graph.output(&sigmoid);
    let onnx = graph.encode(&[]).map_err(|e| ort::Error::new(e.to_string()))?;
    let mut builder = Session::builder(environment)?.with_intra_threads(1)?.with_operators(operators::domain()?)?;
    builder.commit_from_memory(&onnx)?;
    Ok(())
}

/// Release of ONNX Runtime that nfold is tested with: the `onnxruntime` wheel that nfold's own wheel depends on.
const RELEASE: &str = "1.28.0";

/// Searches `ORT_DYLIB_PATH`; the executable's folder; package locations (see [`of_packages`]); `.ort/` (`.ort-gpu/` in
/// GPU builds) of the working directory and of the executable's ancestors, so that a development build finds the
/// project's; then the system's library folders.
fn find_library() -> Result<PathBuf, EngineFault> {
    if let Some(named) = std::env::var_os(LIBRARY_VARIABLE).filter(|v| !v.is_empty()) {
        let path = PathBuf::from(named);
        return if path.is_file() {
            Ok(absolute(&path))
        } else {
            Err(EngineFault::Missing(format!("{LIBRARY_VARIABLE}={}", path.display())))
        };
    }
    let file = if cfg!(target_os = "macos") { "libonnxruntime.dylib" } else { "libonnxruntime.so" };
    let folders: &[&str] = if cfg!(feature = "gpu") { &[".ort-gpu", ".ort"] } else { &[".ort"] };
    let mut looked = Vec::new();
    // a symbolic link to the program (pipx, uv) leads to the environment with the library
    if let Ok(executable) = std::env::current_exe().and_then(|path| path.canonicalize()) {
        if let Some(folder) = executable.parent() {
            looked.push(folder.join(file));
            looked.extend(of_packages(folder, file));
        }
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

/// Locations of the library for a program that a package installed in `bin`: `lib/nfold` (Debian), the `onnxruntime`
/// wheel in the `site-packages` of the same Python environment, or beside `bin` (`pip install --target`).
fn of_packages(bin: &Path, file: &str) -> Vec<PathBuf> {
    let Some(prefix) = bin.parent().filter(|_| bin.ends_with("bin")) else {
        return Vec::new();
    };
    let wheel = if cfg!(target_os = "macos") {
        format!("onnxruntime/capi/libonnxruntime.{RELEASE}.dylib")
    } else {
        format!("onnxruntime/capi/libonnxruntime.so.{RELEASE}")
    };
    let mut paths = vec![prefix.join("lib/nfold").join(file), prefix.join(&wheel)];
    for lib in ["lib", "lib64"] {
        // one folder per Python version of the environment: python3.11
        let Ok(entries) = prefix.join(lib).read_dir() else { continue };
        let pythons = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("python3."));
        for python in pythons {
            paths.extend(["site-packages", "dist-packages"].map(|packages| python.path().join(packages).join(&wheel)));
        }
    }
    paths
}

/// How to get the library: a clone of the project downloads it, an installed program needs the wheel.
pub(super) fn how_to_get() -> String {
    const FETCH: &str = "deploy/onnxruntime/fetch";
    let executable = std::env::current_exe().unwrap_or_default();
    let mut roots = std::iter::once(Path::new(".")).chain(executable.ancestors().skip(1));
    match roots.find(|root| root.join(FETCH).is_file() && root.join("Makefile").is_file()) {
        Some(root) if root == Path::new(".") => format!("fetch {RELEASE} with `make ort`"),
        Some(root) => format!("fetch {RELEASE} with `make ort` in `{}`", root.display()),
        None => format!(
            "get {RELEASE} with `pip install onnxruntime=={RELEASE}` and set {LIBRARY_VARIABLE} to the wheel's \
             onnxruntime/capi/libonnxruntime.so.{RELEASE}"
        ),
    }
}

/// Makes a path absolute, since a relative one would first be looked up beside the executable.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.into())
}
