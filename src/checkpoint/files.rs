//! Finds a checkpoint's files (a folder, one file, shards with an index) and opens each by the format that its first
//! bytes identify.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::store::{SourceFile, Tensors};
use super::torch::{self, Training};
use super::{CONFIG_FILE, CheckpointError, WEIGHTS_FILE, read, safetensors_file};
use crate::model::{hex, regular_file};
use crate::printable::brief;

/// File name of PyTorch weights in a folder of the hub.
const TORCH_FILE: &str = "pytorch_model.bin";
/// Suffix of the name of a shard index.
const INDEX: &str = ".index.json";
/// File names of weights in a folder of the hub, in order of preference.
pub const HUB_WEIGHTS: [&str; 4] =
    [WEIGHTS_FILE, "model.safetensors.index.json", TORCH_FILE, "pytorch_model.bin.index.json"];
/// Most bytes of a configuration or a shard index.
const LARGEST_TEXT: u64 = 16 << 20;
/// Most shards.
const MOST_SHARDS: usize = 1000;

/// Paths of a checkpoint.
#[derive(Debug)]
pub struct Location {
    /// Weights file, or index of its shards.
    pub weights: PathBuf,
    /// Configuration, if there is one.
    pub config: Option<PathBuf>,
    /// Name of the model.
    pub name: String,
}

/// Opened weights; no tensor is read yet.
#[derive(Debug, Default)]
pub struct Opened {
    /// Tensors by their names in the file.
    pub tensors: Tensors,
    /// SHA-256 of the file in hexadecimal; of shards, SHA-256 of their digests.
    pub sha256: String,
    /// Architecture, and the field that names it.
    pub architecture: Option<(String, String)>,
    /// What the training script recorded.
    pub training: Training,
    /// Other contents of the file.
    pub unused: Vec<String>,
    /// Key of EMA weights that the file has but the caller didn't ask for.
    pub ema: Option<String>,
    /// Whether the tensors are the EMA weights.
    pub averaged: bool,
}

/// Finds weights and configuration of a folder or a file.
pub fn locate(path: &Path) -> Result<Location, CheckpointError> {
    let whole = fs::canonicalize(path).map_err(read(path))?;
    let own = |p: &Path| p.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
    let config_in = |folder: &Path| Some(folder.join(CONFIG_FILE)).filter(|p| p.is_file());
    if !whole.is_dir() {
        let folder = whole.parent().unwrap_or(Path::new("/"));
        // a file with one of the hub's names belongs to the configuration beside it
        let of_hub = HUB_WEIGHTS.contains(&own(&whole).as_str());
        let config = if of_hub { config_in(folder) } else { None };
        let name = if config.is_some() { own(folder) } else { stem(&own(&whole)) };
        return Ok(Location { weights: path.into(), config, name });
    }
    let Some(weights) = HUB_WEIGHTS.iter().map(|file| path.join(file)).find(|p| p.is_file()) else {
        let entries = fs::read_dir(path).map_err(read(path))?;
        let names = entries.filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned()));
        let ends = [".safetensors", ".bin", ".pth", ".pt", ".tar", ".ckpt"];
        let mut others: Vec<String> = names.filter(|n| ends.iter().any(|end| n.ends_with(end))).take(1000).collect();
        others.sort();
        return Err(match others.first() {
            None => read(&path.join(WEIGHTS_FILE))(std::io::ErrorKind::NotFound.into()),
            Some(first) => CheckpointError::OtherNames { folder: path.into(), first: path.join(first) },
        });
    };
    Ok(Location { weights, config: config_in(path), name: own(&whole) })
}

/// A file name without its extensions.
fn stem(name: &str) -> String {
    let mut name = name;
    for end in [INDEX, ".tar", ".safetensors", ".bin", ".pth", ".pt", ".ckpt"] {
        name = name.strip_suffix(end).filter(|rest| !rest.is_empty()).unwrap_or(name);
    }
    name.to_string()
}

/// Reads a small text file. A Git LFS pointer is an error of its own.
pub fn text(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let bytes = regular_file::read(path, LARGEST_TEXT).map_err(read(path))?;
    if is_pointer(&bytes) { Err(CheckpointError::LfsPointer(path.into())) } else { Ok(bytes) }
}

fn is_pointer(bytes: &[u8]) -> bool {
    bytes.starts_with(b"version https://git-lfs")
}

/// Opens weights of any supported format.
pub fn open(path: &Path, use_ema: bool) -> Result<Opened, CheckpointError> {
    if is_index(&path.to_string_lossy()) {
        return shards(path, use_ema);
    }
    let source = SourceFile::open(path).map_err(read(path))?;
    let mut opened = one(&source, 0, use_ema)?;
    opened.sha256 = hex(&source.digest().map_err(read(path))?);
    opened.tensors.files.push(source);
    Ok(opened)
}

/// Refuses a file that is something else than weights by its first bytes.
pub fn check(path: &Path) -> Result<(), CheckpointError> {
    if is_index(&path.to_string_lossy()) {
        return Ok(());
    }
    start(&SourceFile::open(path).map_err(read(path))?).map(drop)
}

/// The first bytes, which are a file's of torch.save or safetensors.
fn start(source: &SourceFile) -> Result<Vec<u8>, CheckpointError> {
    let path = &source.path;
    let start = source.start(512).map_err(read(path))?;
    if is_pointer(&start) {
        return Err(CheckpointError::LfsPointer(path.clone()));
    }
    if let Some(what) = other_kind(&start) {
        return Err(CheckpointError::Kind { path: path.clone(), what });
    }
    let is_safetensors = path.to_string_lossy().ends_with(".safetensors") || start.get(8) == Some(&b'{');
    if !is_torch(&start) && !is_safetensors {
        let what = "neither a file of torch.save nor safetensors, or cut short";
        return Err(CheckpointError::Kind { path: path.clone(), what });
    }
    Ok(start)
}

fn is_torch(start: &[u8]) -> bool {
    start.starts_with(b"PK") || start.starts_with(&[0x80]) && start.get(8) != Some(&b'{')
}

fn one(source: &SourceFile, file: usize, use_ema: bool) -> Result<Opened, CheckpointError> {
    let path = &source.path;
    if is_torch(&start(source)?) {
        let contents = torch::open(source, use_ema)
            .map_err(|reason| CheckpointError::Torch { path: path.clone(), reason: reason.to_string() })?;
        let mut opened = Opened {
            architecture: contents.training.architecture.clone().map(|a| (a, format!("`arch` in {}", shown(path)))),
            training: contents.training,
            unused: contents.unused,
            ema: contents.ema,
            averaged: contents.averaged,
            ..Opened::default()
        };
        opened.tensors.entries = contents.entries;
        return Ok(opened);
    }
    let header = safetensors_file::read(source, file)
        .map_err(|e| CheckpointError::Weights { path: path.clone(), reason: e.to_string() })?;
    let told =
        ["architecture", "arch", "model_name"].into_iter().find_map(|key| Some((key, header.metadata.get(key)?)));
    let mut opened = Opened {
        architecture: told.map(|(key, value)| (value.clone(), format!("metadata `{key}` of {}", shown(path)))),
        ..Opened::default()
    };
    opened.tensors.entries = header.entries;
    Ok(opened)
}

/// Formats that users mistake for checkpoints.
fn other_kind(start: &[u8]) -> Option<&'static str> {
    let kinds: [(&[u8], &str); 7] = [
        (b"\xff\xd8\xff", "an image; `nfold classify` takes images"),
        (b"\x89PNG", "an image; `nfold classify` takes images"),
        (b"\x89HDF", "an HDF5 file, of Keras perhaps, not weights of timm"),
        (b"GGUF", "a GGUF file, not weights of timm"),
        (b"\x1f\x8b", "compressed; unpack it first"),
        (b"<!DOCTYPE", "a web page: the download went wrong"),
        (b"<html", "a web page: the download went wrong"),
    ];
    // a protobuf message whose first fields are `ir_version` and `producer_name`
    if let [0x08, 1..=20, 0x12, ..] = start {
        return Some("an ONNX graph; give the checkpoint that it was made from");
    }
    let tar = start.get(257..262) == Some(b"ustar");
    let found = kinds.into_iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, what)| what);
    found.or(tar.then_some("a tar archive; unpack it first"))
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    fn parse(text: &[u8]) -> Result<Self, String> {
        let index: Self = serde_json::from_slice(text).map_err(|e| brief(format!("not an index of shards: {e}")))?;
        let names = index.shards();
        if names.is_empty() || names.len() > MOST_SHARDS {
            return Err(format!("it names {} shards, not 1 to {MOST_SHARDS}", names.len()));
        }
        match names.iter().find(|name| name.contains(['/', '\\']) || name.starts_with('.')) {
            Some(name) => Err(brief(format!("shard `{name}` is not a file beside it"))),
            None => Ok(index),
        }
    }

    fn shards(&self) -> BTreeSet<&String> {
        self.weight_map.values().collect()
    }
}

/// Whether a folder has the hub's checkpoint layout.
pub fn is_folder(path: &Path) -> bool {
    path.join(CONFIG_FILE).is_file() && HUB_WEIGHTS.iter().any(|file| path.join(file).is_file())
}

/// Whether a weights file is a shard index.
pub fn is_index(file: &str) -> bool {
    file.ends_with(INDEX)
}

/// Names of the shards that an index lists, sorted; the files lie beside it.
pub fn shards_of(text: &[u8]) -> Result<Vec<String>, String> {
    Ok(Index::parse(text)?.shards().into_iter().cloned().collect())
}

/// Opens shards. Every tensor must be in the shard that the index names.
fn shards(path: &Path, use_ema: bool) -> Result<Opened, CheckpointError> {
    let bad = |reason: String| CheckpointError::Config { path: path.into(), reason };
    let index = Index::parse(&text(path)?).map_err(bad)?;
    let names = index.shards();
    let folder = path.parent().unwrap_or(Path::new("."));
    let (mut all, mut digests) = (Opened::default(), String::new());
    for (file, name) in names.iter().enumerate() {
        let shard = folder.join(name);
        let source = SourceFile::open(&shard).map_err(read(&shard))?;
        let part = one(&source, file, use_ema)?;
        for (tensor, entry) in part.tensors.entries {
            if index.weight_map.get(&tensor) != Some(name) {
                return Err(bad(format!("tensor `{tensor}` is in `{name}`, where the index does not have it")));
            }
            all.tensors.entries.insert(tensor, super::store::Entry { file, ..entry });
        }
        digests += &format!("{}  {name}\n", hex(&source.digest().map_err(read(&shard))?));
        all.tensors.files.push(source);
        all.architecture = all.architecture.or(part.architecture);
    }
    if let Some((tensor, shard)) = index.weight_map.iter().find(|(t, _)| !all.tensors.entries.contains_key(*t)) {
        return Err(bad(format!("tensor `{tensor}` is not in `{shard}`")));
    }
    all.sha256 = crate::model::sha256(digests.as_bytes());
    Ok(all)
}

/// File name of a path, for messages.
pub fn shown(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lose_what_says_their_kind() {
        for (file, name) in [
            ("model_best.pth.tar", "model_best"),
            ("eca.v2.safetensors", "eca.v2"),
            ("model.safetensors.index.json", "model"),
            (".pth", ".pth"),
        ] {
            assert_eq!(stem(file), name);
        }
    }
}
