//! Makes a graph to time of a network named on the command line: initialised and folded here, folded from a checkpoint,
//! or read from a file.

use std::path::Path;

use anyhow::{Context as _, anyhow, bail};

use crate::bench::accuracy::published;
use crate::bench::engine::{Contender, Setting};
use crate::checkpoint::init::{InitOptions, init_active};
use crate::checkpoint::{CONFIG_FILE, Checkpoint};
use crate::engine::{EngineOptions, Kernels, OrtBackend};
use crate::files::DraftFolder;
use crate::fold::{FoldOptions, Size, fold};
use crate::model::{Gate, MANIFEST_FILE, Manifest, ModelDir, Precision, regular_file};
use crate::nets;

/// Input size in pixels of a dynamic graph, if none is given: timm's default.
const DYNAMIC: usize = 224;
/// Most bytes of a file of `--onnx`: protobuf's limit for a message.
const LARGEST_ONNX: u64 = (1 << 31) - 1;

/// `MODEL[@SIZE][:VARIANT[+SETTING…]]`: an architecture, a checkpoint folder, a model of the repository, or a
/// folded version folder.
pub fn model(text: &str, repository: &Path, seed: u64) -> anyhow::Result<Contender> {
    let (rest, variant) = match text.rsplit_once(':') {
        Some((rest, variant)) if !variant.contains('/') => (rest, variant),
        _ => (text, "folded"),
    };
    let (variant, settings) = settings(text, variant)?;
    Ok(Contender { settings, ..graph(text, rest, variant, repository, seed)? })
}

/// Parses `VARIANT[+VARIANT…][+SETTING…]`: how the network is folded, and how its session is opened.
fn settings<'a>(text: &str, variant: &'a str) -> anyhow::Result<(&'a str, Vec<Setting>)> {
    let named = |name: &str| Setting::ALL.into_iter().find(|setting| setting.name() == name);
    let at = variant
        .match_indices('+')
        .find(|(at, _)| named(variant[at + 1..].split('+').next().unwrap_or_default()).is_some());
    let Some((at, _)) = at else { return Ok((variant, Vec::new())) };
    let setting = |name: &str| {
        let known = Setting::ALL.map(Setting::name).join(", ");
        named(name).ok_or_else(|| anyhow!("`{text}`: `{name}` is no setting of a session; take {known}"))
    };
    Ok((&variant[..at], variant[at + 1..].split('+').map(setting).collect::<anyhow::Result<_>>()?))
}

fn graph(text: &str, rest: &str, variant: &str, repository: &Path, seed: u64) -> anyhow::Result<Contender> {
    let (name, size) = sized(rest)?;
    let path = Path::new(name);
    // an architecture's name means the architecture, even if the repository has a model of that name
    let is_architecture = nets::architectures().contains(&nets::base_name(name));
    let in_repository = match path.components().count() {
        1 if !is_architecture && !path.join(CONFIG_FILE).is_file() => ModelDir::open(repository, Some(name), None).ok(),
        _ => None,
    };
    if in_repository.is_some() || path.join(MANIFEST_FILE).is_file() {
        let folded = in_repository.map_or_else(|| ModelDir::open_path(path), Ok)?;
        if !matches!(variant, "folded" | "unpadded" | "runtime") {
            bail!("`{text}`: a folded model can't be folded as {variant}; name its checkpoint");
        }
        let onnx = folded.read_onnx()?;
        let label = match folded.manifest.precision {
            _ if variant != "folded" => variant,
            Precision::Fp16 => "fp16",
            Precision::Fp32 => "folded",
            Precision::Int8 => "int8",
        };
        // by its own name, as several models may share an architecture
        return Ok(Contender { model: folded.name, ..contender(onnx, &folded.manifest, label, size) });
    }
    let options = options(text, variant, size)?;
    if path.join(CONFIG_FILE).is_file() {
        return folded(&Checkpoint::open(path)?, &options, variant);
    }
    if !is_architecture && path.is_file() {
        bail!("`{name}` is a file; name the folder that it is in, or an ONNX file with --onnx");
    }
    if !is_architecture {
        bail!(
            "`{name}` is neither a folder with {CONFIG_FILE} or {MANIFEST_FILE}, nor a model of the repository, nor an \
             architecture; the nearest of these: {} (`nfold init --help` lists all)",
            nets::nearest(name)
        );
    }
    let folder = DraftFolder::scratch().context("no temporary folder for a fresh checkpoint")?;
    let fresh = folder.path().join(name);
    // with the usual zero initialisation, folding would remove the residual branches
    init_active(&fresh, &InitOptions { architecture: name.into(), seed, model_args: serde_json::Map::new() })?;
    let contender = folded(&Checkpoint::open(&fresh)?, &options, variant)?;
    // published figures are for the architecture's own weights, not for a user's
    Ok(Contender { published: published(&contender.model, contender.height, contender.width), ..contender })
}

/// `FILE[@SIZE][:onnx+SETTING…]`: any ONNX file with one float32 input `[N, C, H, W]`.
pub fn file(text: &str) -> anyhow::Result<Contender> {
    let (rest, settings) = match text.rsplit_once(":onnx+") {
        Some((rest, _)) => (rest, settings(text, &text[rest.len() + 1..])?.1),
        None => (text, Vec::new()),
    };
    let (path, size) = sized(rest)?;
    let onnx = regular_file::read(Path::new(path), LARGEST_ONNX);
    let onnx = onnx.map_err(|e| anyhow!("can't read `{path}`: {e}; --onnx names an ONNX file"))?;
    let graph = OrtBackend::open(&onnx, path, &EngineOptions::default())?;
    let (channels, fixed) = (graph.input_channels().unwrap_or(3), graph.input_size());
    let (height, width) = match (fixed, size) {
        (Some(fixed), Some(wanted)) if fixed != wanted => {
            bail!("`{path}` takes only {}x{}, not {}x{}", fixed.0, fixed.1, wanted.0, wanted.1)
        }
        (fixed, wanted) => fixed.or(wanted).unwrap_or((DYNAMIC, DYNAMIC)),
    };
    let model = Path::new(path).file_stem().map_or_else(|| path.into(), |s| s.to_string_lossy().into_owned());
    Ok(Contender {
        model,
        variant: "onnx".into(),
        settings,
        channels,
        height,
        width,
        onnx,
        pad_channels: false,
        kernels: Kernels::Runtime,
        integers: false,
        parameters: None,
        gmacs: None,
        published: None,
    })
}

fn folded(checkpoint: &Checkpoint, options: &FoldOptions, variant: &str) -> anyhow::Result<Contender> {
    let folded = fold(checkpoint, options)?;
    Ok(contender(folded.onnx, &folded.manifest, variant, None))
}

fn contender(onnx: Vec<u8>, manifest: &Manifest, variant: &str, size: Option<(usize, usize)>) -> Contender {
    let model = nets::base_name(&manifest.architecture).to_string();
    let (height, width) = match (manifest.graph_height, size) {
        (None, Some(size)) => size,
        _ => (manifest.preprocessing.height as usize, manifest.preprocessing.width as usize),
    };
    Contender {
        variant: variant.into(),
        settings: Vec::new(),
        channels: manifest.preprocessing.channels(),
        height,
        width,
        onnx,
        pad_channels: variant != "unpadded",
        kernels: if variant == "runtime" { Kernels::Runtime } else { Kernels::Own },
        integers: manifest.precision == Precision::Int8,
        parameters: Some(manifest.fold.parameters),
        gmacs: Some(manifest.fold.gmacs),
        published: None,
        model,
    }
}

fn options(text: &str, variant: &str, size: Option<(usize, usize)>) -> anyhow::Result<FoldOptions> {
    let plain = FoldOptions {
        size: size.map_or(Size::Checkpoint, |(h, w)| Size::Fixed(h as u32, w as u32)),
        ..FoldOptions::default()
    };
    variant.split('+').try_fold(plain, |options, part| {
        Ok(match part {
            "folded" | "runtime" | "unpadded" => options,
            "unfolded" => FoldOptions { unfolded: true, ..options },
            "fp16" => FoldOptions { precision: Precision::Fp16, ..options },
            "broadcast" => FoldOptions { gate: Gate::Broadcast, ..options },
            other => {
                bail!("`{text}`: `{other}` is no variant; take folded, runtime, unpadded, unfolded, fp16 or broadcast")
            }
        })
    })
}

/// `NAME`, `NAME@H` or `NAME@HxW`: the name and the size in pixels.
fn sized(text: &str) -> anyhow::Result<(&str, Option<(usize, usize)>)> {
    let Some((name, size)) = text.rsplit_once('@').filter(|(_, size)| !size.contains('/')) else {
        return Ok((text, None));
    };
    let side = |s: &str| s.parse::<usize>().ok().filter(|s| (1..=4096).contains(s));
    let both = match size.split_once('x') {
        Some((height, width)) => side(height).zip(side(width)),
        None => side(size).map(|s| (s, s)),
    };
    let both = both.ok_or_else(|| anyhow!("`{text}`: `{size}` is no size; give H or HxW in pixels, as in 288x288"))?;
    Ok((name, Some(both)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(sized("a").expect("plain"), ("a", None));
        assert_eq!(sized("a@288").expect("square"), ("a", Some((288, 288))));
        assert_eq!(sized("x@y/a@288x256").expect("both"), ("x@y/a", Some((288, 256))));
        assert_eq!(sized("x@y/a").expect("a path"), ("x@y/a", None));
        for bad in ["a@", "a@0", "a@5000", "a@2x", "a@big"] {
            assert!(sized(bad).is_err(), "{bad}");
        }
    }
}
