//! Reads torch.save files: a zip archive (torch 1.6 and newer) or a sequence of pickles (older), which hold a state
//! dictionary, bare or wrapped by a training script. Nothing in them is executed or unpacked: `pickle` reads plain
//! nodes, and tensors stay in the file.

pub mod pickle;

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Seek, SeekFrom};

use serde_json::{Map, Value};

use self::pickle::{Arena, Id, Node, PickleError};
use super::store::{Entry, Number, SourceFile};
use crate::printable::brief;

/// Most bytes of an archive that are read to find its entries; thousands of tensors need a fiftieth.
const DIRECTORY: u64 = 8 << 20;

/// Why a torch.save file can't be read.
#[derive(Debug, thiserror::Error)]
pub enum TorchError {
    /// The pickle can't be read.
    #[error(transparent)]
    Pickle(#[from] PickleError),
    /// The archive can't be read.
    #[error("the archive is damaged: {0}")]
    Archive(String),
    /// The file has another format.
    #[error("{0}")]
    Kind(String),
    /// No state dictionary was found under the keys that training scripts use.
    #[error("no state dictionary was found; the file holds {0}")]
    NoState(String),
    /// EMA weights were requested, but the file has none.
    #[error("{NO_EMA}")]
    NoEma,
    /// A tensor lies outside of its storage.
    #[error("tensor `{0}` does not lie in the file")]
    Outside(String),
    /// The system's error.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Message if EMA weights are requested but missing.
pub const NO_EMA: &str = "it has no averaged weights (`state_dict_ema`, `model_ema`); leave --use-ema out";

/// Contents of a torch.save file.
#[derive(Debug, Default)]
pub struct Contents {
    /// Tensors by their names in the file.
    pub entries: BTreeMap<String, Entry>,
    /// What the training script recorded.
    pub training: Training,
    /// Other contents.
    pub unused: Vec<String>,
    /// Key of EMA weights that the file has but the caller didn't ask for.
    pub ema: Option<String>,
    /// Whether the tensors are the EMA weights.
    pub averaged: bool,
}

/// What timm's train.py saves beside the weights.
#[derive(Debug, Default, PartialEq)]
pub struct Training {
    /// `arch`, or `args.model`.
    pub architecture: Option<String>,
    /// `args`: arguments of the script.
    pub args: Map<String, Value>,
}

/// Position of a storage in the file, in bytes.
#[derive(Debug, Clone, Copy)]
struct Span {
    offset: u64,
    len: u64,
}

/// Reads the file's index of tensors. `use_ema` requests the EMA weights.
pub fn open(source: &SourceFile, use_ema: bool) -> Result<Contents, TorchError> {
    if source.start(4)? == b"PK\x03\x04" { archive(source, use_ema) } else { pickles(source, use_ema) }
}

/// A reader that fails after `left` bytes, since a hostile archive could make the parser read without end.
struct Limited {
    file: std::fs::File,
    left: u64,
}

impl Read for Limited {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Err(io::Error::other("its directory is larger than any checkpoint's"));
        }
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.file.read(&mut buffer[..most])?;
        self.left -= read as u64;
        Ok(read)
    }
}

impl Seek for Limited {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

fn archive(source: &SourceFile, use_ema: bool) -> Result<Contents, TorchError> {
    let damaged = |e: zip::result::ZipError| TorchError::Archive(brief(e));
    let mut archive = zip::ZipArchive::new(Limited { file: source.reader()?, left: DIRECTORY }).map_err(damaged)?;
    let mut indices = HashMap::new();
    let names: Vec<String> =
        archive.file_names().map(|name| name.map(|n| n.into_owned())).collect::<Result<_, _>>().map_err(damaged)?;
    for (at, name) in names.into_iter().enumerate() {
        let outside = name.starts_with(['/', '\\']) || name.split(['/', '\\']).any(|part| part == "..");
        if outside {
            return Err(TorchError::Archive(format!("entry `{name}` points out of it")));
        }
        if indices.insert(name.clone(), at).is_some() {
            return Err(TorchError::Archive(format!("it has `{name}` twice")));
        }
    }
    let has = |end: &str| indices.keys().any(|name| name.ends_with(end));
    if has("/constants.pkl") || has("/version.json") {
        return Err(TorchError::Kind(
            "it is a TorchScript program, not a state dictionary; save model.state_dict()".into(),
        ));
    }
    if has(".npy") {
        return Err(TorchError::Kind("it is a NumPy archive, not a state dictionary of timm".into()));
    }
    let inner = |name: &&String| name.matches('/').count() <= 1 && (*name == "data.pkl" || name.ends_with("/data.pkl"));
    let Some(root) = indices.keys().find(inner).cloned() else {
        return Err(TorchError::Kind("it is a zip archive without `data.pkl`, so not of torch.save".into()));
    };
    let prefix = root.trim_end_matches("data.pkl").to_string();
    let mut span = |name: &str| -> Result<Option<Span>, TorchError> {
        let Some(&at) = indices.get(&format!("{prefix}{name}")) else { return Ok(None) };
        let entry = archive.by_index_raw(at).map_err(damaged)?;
        let bad = |reason: &str| Err(TorchError::Archive(format!("entry `{name}` {reason}")));
        if entry.compression() != zip::CompressionMethod::Stored || entry.encrypted() {
            return bad("is compressed or encrypted, which torch.save never does");
        }
        let Some(offset) = entry.data_start() else { return bad("has no data") };
        let len = entry.size();
        if len != entry.compressed_size() {
            return bad("has two sizes");
        }
        match offset.checked_add(len) {
            Some(end) if end <= source.len => Ok(Some(Span { offset, len })),
            _ => bad("reaches past the end of the file"),
        }
    };
    if let Some(order) = span("byteorder")? {
        let mut text = [0; 6];
        let length = order.len.min(6) as usize;
        source.read_at(order.offset, &mut text[..length])?;
        if text != *b"little" {
            return Err(TorchError::Kind("its numbers are big-endian; save it on another machine".into()));
        }
    }
    let Some(data) = span("data.pkl")? else {
        return Err(TorchError::Archive("`data.pkl` is gone".into()));
    };
    let mut file = source.reader()?;
    file.seek(SeekFrom::Start(data.offset))?;
    let (arena, root) = pickle::read(&mut io::BufReader::new(file.take(data.len)), &mut { pickle::LARGEST })?;
    let mut found: HashMap<String, Span> = HashMap::new();
    contents(&arena, root, use_ema, &mut |key| {
        if let Some(span) = found.get(key) {
            return Ok(Some(*span));
        }
        let span = span(&format!("data/{key}"))?;
        found.extend(span.map(|span| (key.to_string(), span)));
        Ok(span)
    })
}

/// Reads files of torch before 1.6: magic number, version, system information, the object, the keys of its storages;
/// then each storage, preceded by its number of values.
fn pickles(source: &SourceFile, use_ema: bool) -> Result<Contents, TorchError> {
    let mut file = io::BufReader::new(source.reader()?);
    let mut budget = pickle::LARGEST;
    let (arena, magic) = pickle::read(&mut file, &mut budget).map_err(|e| match e {
        PickleError::Opcode(_) | PickleError::Damaged(_) => TorchError::Kind("it is no file of torch.save".into()),
        e => e.into(),
    })?;
    if arena.text(magic) != Some("torch.save") {
        return Err(TorchError::Kind(
            "it is a plain pickle, not a file of torch.save; save it again: torch.save(state_dict, PATH)".into(),
        ));
    }
    let (arena, version) = pickle::read(&mut file, &mut budget)?;
    if arena.int(version) != Some(1001) {
        return Err(TorchError::Kind("it is of an unknown version of torch.save".into()));
    }
    let (arena, system) = pickle::read(&mut file, &mut budget)?;
    if arena.value(system, "little_endian").is_some_and(|id| *arena.get(id) == Node::Bool(false)) {
        return Err(TorchError::Kind("its numbers are big-endian; save it on another machine".into()));
    }
    let (arena, root) = pickle::read(&mut file, &mut budget)?;
    let (names, keys) = pickle::read(&mut file, &mut budget)?;
    let mut sizes = HashMap::new();
    for node in arena.nodes() {
        if let Node::Storage { kind, key, .. } = node {
            sizes.insert(key.as_str(), number(kind).1);
        }
    }
    let mut spans = HashMap::new();
    for &key in names.items(keys).unwrap_or_default() {
        let outside = || TorchError::Archive("its storages are not as its list of them says".into());
        let key = names.text(key).ok_or_else(outside)?;
        let size = sizes.get(key).copied().ok_or_else(outside)?;
        let mut count = [0; 8];
        file.read_exact(&mut count).map_err(|_| PickleError::Truncated)?;
        let offset = file.stream_position()?;
        let len = u64::from_le_bytes(count).checked_mul(size).ok_or_else(outside)?;
        if offset.checked_add(len).is_none_or(|end| end > source.len) {
            return Err(PickleError::Truncated.into());
        }
        file.seek_relative(i64::try_from(len).map_err(|_| outside())?)?;
        spans.insert(key.to_string(), Span { offset, len });
    }
    contents(&arena, root, use_ema, &mut |key| Ok(spans.get(key).copied()))
}

/// Keys that training scripts use for plain and for EMA weights, timm's first.
const PLAIN: [&str; 3] = ["state_dict", "model", "model_state_dict"];
const AVERAGED: [&str; 4] = ["state_dict_ema", "model_ema", "ema_state_dict", "ema"];

/// Finds a storage in the file by its key; `None` if there is none.
type FindStorage<'a> = &'a mut dyn FnMut(&str) -> Result<Option<Span>, TorchError>;

fn contents(arena: &Arena, root: Id, use_ema: bool, find: FindStorage<'_>) -> Result<Contents, TorchError> {
    let Some(pairs) = arena.pairs(root) else {
        return Err(TorchError::NoState("no dictionary".into()));
    };
    let mut out = Contents::default();
    let holds_tensors =
        |id: Id| arena.pairs(id).is_some_and(|p| p.iter().any(|(_, v)| matches!(arena.get(*v), Node::Tensor { .. })));
    let named = |names: &[&'static str]| -> Option<(&str, Id)> {
        names.iter().find_map(|name| Some((*name, arena.value(root, name).filter(|id| holds_tensors(*id))?)))
    };
    let averaged = named(&AVERAGED);
    // scripts of people's own call the weights anything; one dictionary of tensors can't be mistaken for another
    let only = || {
        let named = pairs.iter().filter_map(|&(key, id)| Some((arena.text(key)?, id)));
        let mut states = named.filter(|(key, id)| holds_tensors(*id) && !AVERAGED.contains(key));
        states.next().filter(|_| states.next().is_none())
    };
    let plain = if holds_tensors(root) { Some(("", root)) } else { named(&PLAIN).or_else(only) };
    let (key, state) = match (use_ema, averaged, plain) {
        (true, Some(found), _) => found,
        // EMA weights may still be recognised by their prefix
        (_, _, Some(found)) => found,
        (true, None, None) => return Err(TorchError::NoEma),
        (false, ..) => {
            let keys: Vec<&str> = pairs.iter().filter_map(|(key, _)| arena.text(*key)).take(12).collect();
            return Err(TorchError::NoState(if keys.is_empty() {
                "nothing that has a name".into()
            } else {
                format!("`{}`", keys.join("`, `"))
            }));
        }
    };
    out.averaged = averaged.is_some_and(|(name, _)| name == key) && use_ema;
    if !use_ema {
        out.ema = averaged.map(|(name, _)| name.to_string());
    }
    if state != root {
        let text = |key: &str| arena.value(root, key).and_then(|id| arena.text(id)).map(String::from);
        let args = arena.value(root, "args");
        if let Some(Value::Object(args)) = args.map(|args| json(arena, args, 4)) {
            out.training.args = args;
        }
        let model = out.training.args.get("model").and_then(Value::as_str);
        out.training.architecture = text("arch").or(model.map(String::from));
        let read = ["arch", "args"];
        let rest =
            pairs.iter().filter_map(|(name, _)| arena.text(*name)).filter(|name| *name != key && !read.contains(name));
        out.unused.extend(rest.map(String::from));
    }
    for &(name, value) in arena.pairs(state).unwrap_or_default() {
        let Some(name) = arena.text(name) else {
            return Err(TorchError::NoState("tensors whose names are no text".into()));
        };
        match arena.get(value) {
            Node::Tensor { storage, offset, shape, strides } => {
                let entry = entry(arena, *storage, *offset, shape, strides, find)?;
                let entry = entry.ok_or_else(|| TorchError::Outside(name.into()))?;
                out.entries.insert(name.into(), entry);
            }
            _ => out.unused.push(name.into()),
        }
    }
    Ok(out)
}

/// A tensor's location in the file; `None` if it exceeds its storage, or the storage exceeds the file.
fn entry(
    arena: &Arena,
    storage: Id,
    offset: u64,
    shape: &[u64],
    strides: &[u64],
    find: FindStorage<'_>,
) -> Result<Option<Entry>, TorchError> {
    let Node::Storage { kind, key, .. } = arena.get(storage) else { return Ok(None) };
    let Some(span) = find(key)? else { return Ok(None) };
    let (number, size) = number(kind);
    let held = span.len / size;
    let checked = || {
        let count = shape.iter().try_fold(1u64, |all, d| all.checked_mul(*d))?;
        let mut reach = 0u64;
        for (dim, stride) in shape.iter().zip(strides) {
            reach = reach.checked_add(dim.saturating_sub(1).checked_mul(*stride)?)?;
        }
        let end = if count == 0 { offset } else { reach.checked_add(offset)?.checked_add(1)? };
        // a tensor may not have more values than its storage, as strides of 0 would allow
        if end > held || count > held {
            return None;
        }
        span.offset.checked_add(offset.checked_mul(size)?)
    };
    let Some(start) = checked() else { return Ok(None) };
    let whole = |list: &[u64]| list.iter().map(|v| usize::try_from(*v).ok()).collect::<Option<Vec<_>>>();
    let (Some(shape), Some(strides)) = (whole(shape), whole(strides)) else { return Ok(None) };
    let mut follows = 1;
    let mut in_rows = true;
    for (dim, stride) in shape.iter().zip(&strides).rev() {
        in_rows &= *dim <= 1 || *stride == follows;
        follows *= (*dim).max(1);
    }
    Ok(Some(Entry { file: 0, number, shape, strides: (!in_rows).then_some(strides), offset: start }))
}

/// Data type of a storage, and bytes per value.
fn number(kind: &str) -> (Number, u64) {
    let size = match kind {
        "DoubleStorage" => return (Number::F64, 8),
        "FloatStorage" => return (Number::F32, 4),
        "HalfStorage" => return (Number::F16, 2),
        "BFloat16Storage" => return (Number::Bf16, 2),
        "LongStorage" | "ComplexFloatStorage" => 8,
        "IntStorage" => 4,
        "ShortStorage" => 2,
        _ => 1,
    };
    (Number::Other(kind.trim_end_matches("Storage").into()), size)
}

/// Plain nodes as JSON; other nodes, and those nested too deeply, become null.
fn json(arena: &Arena, id: Id, depth: usize) -> Value {
    let inner = |id: Id| if depth > 0 { json(arena, id, depth - 1) } else { Value::Null };
    match arena.get(id) {
        Node::Bool(value) => (*value).into(),
        Node::Int(value) => (*value).into(),
        Node::Float(value) => (*value).into(),
        Node::Str(text) => text.as_str().into(),
        Node::Tuple(items) | Node::List(items) if items.len() <= 64 => items.iter().map(|&id| inner(id)).collect(),
        _ => match arena.pairs(id) {
            Some(pairs) if pairs.len() <= 1024 => {
                let entries = pairs.iter().filter_map(|(k, v)| Some((arena.text(*k)?.to_string(), inner(*v))));
                Value::Object(entries.collect())
            }
            _ => Value::Null,
        },
    }
}
