//! Reads pickles without running anything: opcodes build plain nodes, and only globals of a short list are known, none of
//! which is ever called. What a pickle may cost is bounded: bytes, nodes, and no recursion anywhere.

use std::collections::HashMap;
use std::io::Read;

/// Most bytes of a pickle that holds no weights itself: ImageNet training states stay below a hundredth of it.
pub const LARGEST: u64 = 32 << 20;
/// Most nodes: an unending list of small things is no checkpoint either.
const MOST_NODES: usize = 1 << 19;
/// Most dimensions of a tensor.
const MOST_DIMENSIONS: usize = 8;

/// Why a pickle is not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PickleError {
    /// The bytes end early or can't be read.
    #[error("the pickle ends early")]
    Truncated,
    /// More than a state dictionary needs.
    #[error("the pickle has more than {0}")]
    TooLarge(String),
    /// A class or function beyond the list.
    #[error(
        "the pickle wants `{0}`, which is not part of a state dictionary and is never loaded; save the weights alone: torch.save(model.state_dict(), PATH)"
    )]
    Global(String),
    /// An opcode that torch.save does not write.
    #[error("the pickle has opcode {0:#04x}, which torch.save does not write")]
    Opcode(u8),
    /// Opcodes that don't fit together.
    #[error("the pickle is damaged: {0}")]
    Damaged(&'static str),
}

/// A node's index.
pub type Id = usize;

/// What a pickle builds.
#[derive(Debug, Clone, PartialEq)]
pub enum Node {
    /// None.
    None,
    /// True or False.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A real number.
    Float(f64),
    /// Text.
    Str(String),
    /// Bytes, or a whole number of more than 64 bits: of no use here.
    Opaque,
    /// A tuple.
    Tuple(Vec<Id>),
    /// A list or set.
    List(Vec<Id>),
    /// A dictionary of any kind, in order.
    Dict(Vec<(Id, Id)>),
    /// A class or function of the list, `module.name`.
    Global(String),
    /// An instance: its class, its arguments, its state.
    Object {
        /// Class or function.
        class: Id,
        /// What it was made from.
        args: Id,
        /// What was set on it.
        state: Option<Id>,
    },
    /// A storage that the file keeps apart.
    Storage {
        /// Number format, by torch's name of the storage: `FloatStorage`.
        kind: String,
        /// Where the file keeps it.
        key: String,
        /// Values (bytes of an untyped one).
        count: u64,
    },
    /// A tensor over a storage.
    Tensor {
        /// The storage.
        storage: Id,
        /// First value.
        offset: u64,
        /// Shape.
        shape: Vec<u64>,
        /// Values between neighbours, by dimension.
        strides: Vec<u64>,
    },
}

/// All nodes of a pickle.
#[derive(Debug, Default)]
pub struct Arena {
    nodes: Vec<Node>,
}

impl Arena {
    /// A node by its index.
    pub fn get(&self, id: Id) -> &Node {
        self.nodes.get(id).unwrap_or(&Node::None)
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A node's text.
    pub fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Node::Str(text) => Some(text),
            _ => None,
        }
    }

    /// A whole number.
    pub fn int(&self, id: Id) -> Option<i64> {
        match self.get(id) {
            Node::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// Items of a tuple or list.
    pub fn items(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Node::Tuple(items) | Node::List(items) => Some(items),
            _ => None,
        }
    }

    /// A dictionary's pairs, or those of an object whose state is one (`argparse.Namespace`).
    pub fn pairs(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.get(id) {
            Node::Dict(pairs) => Some(pairs),
            Node::Object { state: Some(state), .. } => match self.get(*state) {
                Node::Dict(pairs) => Some(pairs),
                _ => None,
            },
            _ => None,
        }
    }

    /// A dictionary's last value under a text key.
    pub fn value(&self, id: Id, key: &str) -> Option<Id> {
        self.pairs(id)?.iter().rev().find(|(k, _)| self.text(*k) == Some(key)).map(|(_, value)| *value)
    }

    fn add(&mut self, node: Node) -> Result<Id, PickleError> {
        if self.nodes.len() >= MOST_NODES {
            return Err(PickleError::TooLarge(format!("{MOST_NODES} objects")));
        }
        self.nodes.push(node);
        Ok(self.nodes.len() - 1)
    }
}

/// Classes and functions that state dictionaries and training checkpoints are made of. None is called: each stands for a
/// node.
fn known(name: &str) -> bool {
    const TORCH: [&str; 12] = [
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._tensor._rebuild_from_type_v2",
        "torch.nn.parameter.Parameter",
        "torch.Tensor",
        "torch.Size",
        "torch.device",
        "torch.storage.UntypedStorage",
        "torch.storage.TypedStorage",
        "torch.serialization._get_layout",
    ];
    const PLAIN: [&str; 21] = [
        "collections.OrderedDict",
        "collections.defaultdict",
        "collections.Counter",
        "argparse.Namespace",
        "builtins.set",
        "builtins.dict",
        "builtins.list",
        "builtins.int",
        "builtins.float",
        "builtins.bytearray",
        "__builtin__.set",
        "_codecs.encode",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib._local.PosixPath",
        "numpy.dtype",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "lightning_fabric.utilities.data.AttributeDict",
        "lightning.fabric.utilities.data.AttributeDict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
    ];
    const TYPES: [&str; 12] = [
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "double",
        "half",
    ];
    let leaf = name.strip_prefix("torch.").unwrap_or_default();
    TORCH.contains(&name) || PLAIN.contains(&name) || TYPES.contains(&leaf) || storage_kind(leaf)
}

/// Names of torch's storage classes.
fn storage_kind(leaf: &str) -> bool {
    const KINDS: [&str; 11] =
        ["Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexFloat"];
    leaf.strip_suffix("Storage").is_some_and(|kind| KINDS.contains(&kind))
}

/// Reads one pickle from `input`, at most `budget` bytes of it, which are taken from the budget.
pub fn read(input: &mut dyn Read, budget: &mut u64) -> Result<(Arena, Id), PickleError> {
    let mut machine = Machine {
        input: Input { input, budget },
        arena: Arena::default(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        copied: 0,
    };
    let root = machine.run()?;
    Ok((machine.arena, root))
}

struct Input<'a> {
    input: &'a mut dyn Read,
    budget: &'a mut u64,
}

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        self.spend(N as u64)?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(|_| PickleError::Truncated)?;
        Ok(bytes)
    }

    /// So many bytes: checked against the budget before they are asked for.
    fn read(&mut self, count: u64) -> Result<Vec<u8>, PickleError> {
        self.spend(count)?;
        let mut bytes = Vec::new();
        let read = self.input.take(count).read_to_end(&mut bytes).map_err(|_| PickleError::Truncated)?;
        if read as u64 == count { Ok(bytes) } else { Err(PickleError::Truncated) }
    }

    fn text(&mut self, count: u64) -> Result<Node, PickleError> {
        // torch's own text is UTF-8, Python's may hold lone surrogates
        Ok(Node::Str(String::from_utf8_lossy(&self.read(count)?).into_owned()))
    }

    fn line(&mut self) -> Result<String, PickleError> {
        let mut line = Vec::new();
        loop {
            match self.bytes::<1>()? {
                [b'\n'] => break,
                [byte] if line.len() < 1024 => line.push(byte),
                _ => return Err(PickleError::Damaged("a line without end")),
            }
        }
        String::from_utf8(line).map_err(|_| PickleError::Damaged("a line that is no text"))
    }

    fn spend(&mut self, count: u64) -> Result<(), PickleError> {
        let left = self.budget.checked_sub(count);
        *self.budget = left.ok_or_else(|| PickleError::TooLarge(format!("{} MiB", LARGEST >> 20)))?;
        Ok(())
    }
}

struct Machine<'a> {
    input: Input<'a>,
    arena: Arena,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    /// Pairs copied from lists into dictionaries so far.
    copied: usize,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Id, PickleError> {
        loop {
            let [opcode] = self.input.bytes()?;
            match opcode {
                b'.' => return self.pop(),
                0x80 => drop(self.input.bytes::<1>()?),
                0x95 => drop(self.input.bytes::<8>()?),
                b'(' => self.marks.push(self.stack.len()),
                b'0' => drop(self.pop()?),
                b'1' => drop(self.marked()?),
                b'2' => {
                    let top = *self.stack.last().ok_or(EMPTY)?;
                    self.stack.push(top);
                }
                b'N' => self.push(Node::None)?,
                0x88 => self.push(Node::Bool(true))?,
                0x89 => self.push(Node::Bool(false))?,
                b'J' => {
                    let value = i32::from_le_bytes(self.input.bytes()?);
                    self.push(Node::Int(value.into()))?;
                }
                b'K' => {
                    let [value] = self.input.bytes()?;
                    self.push(Node::Int(value.into()))?;
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.input.bytes()?);
                    self.push(Node::Int(value.into()))?;
                }
                0x8a => {
                    let [count] = self.input.bytes()?;
                    self.long(count.into())?;
                }
                0x8b => {
                    let count = u32::from_le_bytes(self.input.bytes()?);
                    self.long(count.into())?;
                }
                b'G' => {
                    let value = f64::from_be_bytes(self.input.bytes()?);
                    self.push(Node::Float(value))?;
                }
                b'X' => {
                    let count = u32::from_le_bytes(self.input.bytes()?);
                    let text = self.input.text(count.into())?;
                    self.push(text)?;
                }
                0x8c | b'U' => {
                    let [count] = self.input.bytes()?;
                    let text = self.input.text(count.into())?;
                    self.push(text)?;
                }
                0x8d => {
                    let count = u64::from_le_bytes(self.input.bytes()?);
                    let text = self.input.text(count)?;
                    self.push(text)?;
                }
                b'T' => {
                    let count = u32::from_le_bytes(self.input.bytes()?);
                    let text = self.input.text(count.into())?;
                    self.push(text)?;
                }
                b'B' => {
                    let count = u32::from_le_bytes(self.input.bytes()?);
                    self.opaque(count.into())?;
                }
                b'C' => {
                    let [count] = self.input.bytes()?;
                    self.opaque(count.into())?;
                }
                0x8e | 0x96 => {
                    let count = u64::from_le_bytes(self.input.bytes()?);
                    self.opaque(count)?;
                }
                b']' | 0x8f => self.push(Node::List(Vec::new()))?,
                b')' => self.push(Node::Tuple(Vec::new()))?,
                b'}' => self.push(Node::Dict(Vec::new()))?,
                b'l' => {
                    let items = self.marked()?;
                    self.push(Node::List(items))?;
                }
                b't' => {
                    let items = self.marked()?;
                    self.push(Node::Tuple(items))?;
                }
                b'd' => {
                    let items = self.marked()?;
                    let pairs = in_pairs(&items)?;
                    self.push(Node::Dict(pairs))?;
                }
                0x85..=0x87 => {
                    let count = usize::from(opcode - 0x84);
                    let at = self.stack.len().checked_sub(count).ok_or(EMPTY)?;
                    let items = self.stack.split_off(at);
                    self.push(Node::Tuple(items))?;
                }
                b'a' => {
                    let item = self.pop()?;
                    self.extend(vec![item])?;
                }
                b'e' | 0x90 => {
                    let items = self.marked()?;
                    self.extend(items)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set(vec![(key, value)])?;
                }
                b'u' => {
                    let items = self.marked()?;
                    let pairs = in_pairs(&items)?;
                    self.set(pairs)?;
                }
                b'q' => {
                    let [at] = self.input.bytes()?;
                    self.remember(at.into())?;
                }
                b'r' => {
                    let at = u32::from_le_bytes(self.input.bytes()?);
                    self.remember(at)?;
                }
                0x94 => self.remember(self.memo.len() as u32)?,
                b'h' => {
                    let [at] = self.input.bytes()?;
                    self.recall(at.into())?;
                }
                b'j' => {
                    let at = u32::from_le_bytes(self.input.bytes()?);
                    self.recall(at)?;
                }
                b'c' => {
                    let (module, name) = (self.input.line()?, self.input.line()?);
                    self.global(&module, &name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let text =
                        |id| self.arena.text(id).map(String::from).ok_or(PickleError::Damaged("a global without name"));
                    let (module, name) = (text(module)?, text(name)?);
                    self.global(&module, &name)?;
                }
                b'R' | 0x81 => {
                    let (args, class) = (self.pop()?, self.pop()?);
                    self.build(class, args)?;
                }
                0x92 => {
                    let (_keywords, args, class) = (self.pop()?, self.pop()?, self.pop()?);
                    self.build(class, args)?;
                }
                b'b' => {
                    let state = self.pop()?;
                    let target = *self.stack.last().ok_or(EMPTY)?;
                    if let Some(Node::Object { state: slot, .. }) = self.arena.nodes.get_mut(target) {
                        *slot = Some(state);
                    }
                }
                b'Q' => {
                    let id = self.pop()?;
                    let storage = self.storage(id)?;
                    self.push(storage)?;
                }
                other => return Err(PickleError::Opcode(other)),
            }
        }
    }

    fn push(&mut self, node: Node) -> Result<(), PickleError> {
        let id = self.arena.add(node)?;
        self.push_id(id)
    }

    fn push_id(&mut self, id: Id) -> Result<(), PickleError> {
        if self.stack.len() >= MOST_NODES {
            return Err(PickleError::TooLarge(format!("{MOST_NODES} objects")));
        }
        self.stack.push(id);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id, PickleError> {
        self.stack.pop().ok_or(EMPTY)
    }

    /// What was pushed since the last mark.
    fn marked(&mut self) -> Result<Vec<Id>, PickleError> {
        let at = self.marks.pop().ok_or(PickleError::Damaged("no mark"))?;
        if at > self.stack.len() {
            return Err(EMPTY);
        }
        Ok(self.stack.split_off(at))
    }

    fn long(&mut self, count: u64) -> Result<(), PickleError> {
        let bytes = self.input.read(count)?;
        let node = match bytes.len() {
            0 => Node::Int(0),
            1..=8 => {
                let fill = if bytes[bytes.len() - 1] & 0x80 == 0 { 0 } else { 0xff };
                let mut whole = [fill; 8];
                whole[..bytes.len()].copy_from_slice(&bytes);
                Node::Int(i64::from_le_bytes(whole))
            }
            // the magic number of an old file
            _ if bytes == MAGIC => Node::Str("torch.save".into()),
            _ => Node::Opaque,
        };
        self.push(node)
    }

    fn opaque(&mut self, count: u64) -> Result<(), PickleError> {
        self.input.read(count)?;
        self.push(Node::Opaque)
    }

    fn extend(&mut self, items: Vec<Id>) -> Result<(), PickleError> {
        let target = *self.stack.last().ok_or(EMPTY)?;
        match self.arena.nodes.get_mut(target) {
            Some(Node::List(list)) => list.extend(items),
            Some(Node::Object { .. }) => {}
            _ => return Err(PickleError::Damaged("items for what is no list")),
        }
        Ok(())
    }

    fn set(&mut self, pairs: Vec<(Id, Id)>) -> Result<(), PickleError> {
        let target = *self.stack.last().ok_or(EMPTY)?;
        match self.arena.nodes.get_mut(target) {
            Some(Node::Dict(dict)) => dict.extend(pairs),
            Some(Node::Object { .. }) => {}
            _ => return Err(PickleError::Damaged("pairs for what is no dictionary")),
        }
        Ok(())
    }

    fn remember(&mut self, at: u32) -> Result<(), PickleError> {
        let top = *self.stack.last().ok_or(EMPTY)?;
        self.memo.insert(at, top);
        if self.memo.len() > MOST_NODES {
            return Err(PickleError::TooLarge(format!("{MOST_NODES} objects")));
        }
        Ok(())
    }

    fn recall(&mut self, at: u32) -> Result<(), PickleError> {
        let id = *self.memo.get(&at).ok_or(PickleError::Damaged("a reference to nothing"))?;
        self.push_id(id)
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), PickleError> {
        let whole = format!("{module}.{name}");
        if !known(&whole) {
            return Err(PickleError::Global(whole));
        }
        self.push(Node::Global(whole))
    }

    /// What calling `class` with `args` would make.
    fn build(&mut self, class: Id, args: Id) -> Result<(), PickleError> {
        let Node::Global(name) = self.arena.get(class) else {
            return Err(PickleError::Damaged("a call of what is no class"));
        };
        let items = self.arena.items(args).ok_or(PickleError::Damaged("a call without arguments"))?;
        let node = match name.as_str() {
            "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor" => self.tensor(items)?,
            "torch._utils._rebuild_parameter"
            | "torch._utils._rebuild_parameter_with_state"
            | "torch.nn.parameter.Parameter" => {
                let tensor = *items.first().ok_or(PickleError::Damaged("a parameter without tensor"))?;
                return self.push_id(tensor);
            }
            "torch._tensor._rebuild_from_type_v2" => {
                let (Some(&function), Some(&inner)) = (items.first(), items.get(2)) else {
                    return Err(PickleError::Damaged("a tensor without arguments"));
                };
                // a tensor of a subclass: as the function makes it. Not itself again, so that this ends
                match self.arena.get(function) {
                    Node::Global(name) if name.starts_with("torch._utils._rebuild_") => {}
                    _ => return Err(PickleError::Damaged("a tensor of unknown kind")),
                }
                return self.build(function, inner);
            }
            "collections.OrderedDict" | "builtins.dict" => {
                let pairs = match items.first() {
                    None => Vec::new(),
                    Some(&list) => {
                        let list = self.arena.items(list).ok_or(PickleError::Damaged("a dictionary of no pairs"))?;
                        self.copied += list.len();
                        if self.copied > MOST_NODES {
                            return Err(PickleError::TooLarge(format!("{MOST_NODES} objects")));
                        }
                        let pair = |id: &Id| match self.arena.items(*id) {
                            Some(&[key, value]) => Ok((key, value)),
                            _ => Err(PickleError::Damaged("a dictionary of no pairs")),
                        };
                        list.iter().map(pair).collect::<Result<_, _>>()?
                    }
                };
                Node::Dict(pairs)
            }
            name if name.starts_with("collections.") || name.ends_with("AttributeDict") => Node::Dict(Vec::new()),
            _ => Node::Object { class, args, state: None },
        };
        self.push(node)
    }

    fn tensor(&self, items: &[Id]) -> Result<Node, PickleError> {
        const BAD: PickleError = PickleError::Damaged("a tensor that is no view of a storage");
        let [storage, offset, shape, strides, ..] = *items else { return Err(BAD) };
        if !matches!(self.arena.get(storage), Node::Storage { .. }) {
            return Err(BAD);
        }
        let number = |id: Id| self.arena.int(id).and_then(|v| u64::try_from(v).ok()).ok_or(BAD);
        let list = |id: Id| -> Result<Vec<u64>, PickleError> {
            let items = match self.arena.get(id) {
                // torch.Size
                Node::Object { args, .. } => self.arena.items(*args).and_then(|a| self.arena.items(*a.first()?)),
                _ => self.arena.items(id),
            };
            items.filter(|i| i.len() <= MOST_DIMENSIONS).ok_or(BAD)?.iter().map(|&i| number(i)).collect()
        };
        let (shape, strides) = (list(shape)?, list(strides)?);
        if shape.len() != strides.len() {
            return Err(BAD);
        }
        Ok(Node::Tensor { storage, offset: number(offset)?, shape, strides })
    }

    /// `('storage', torch.FloatStorage, key, location, count)`.
    fn storage(&self, id: Id) -> Result<Node, PickleError> {
        const BAD: PickleError = PickleError::Damaged("a reference that is no storage");
        let Some(&[word, kind, key, _location, count, ref view @ ..]) = self.arena.items(id) else { return Err(BAD) };
        // old files may say that a storage is a part of another
        if view.iter().any(|id| *self.arena.get(*id) != Node::None) {
            return Err(PickleError::Damaged("a storage inside another"));
        }
        let Node::Global(kind) = self.arena.get(kind) else { return Err(BAD) };
        let kind = kind.rsplit('.').next().unwrap_or_default().to_string();
        let count = self.arena.int(count).and_then(|v| u64::try_from(v).ok()).ok_or(BAD)?;
        match (self.arena.text(word), self.arena.text(key)) {
            (Some("storage"), Some(key)) if storage_kind(&kind) || kind == "UntypedStorage" => {
                Ok(Node::Storage { kind, key: key.into(), count })
            }
            _ => Err(BAD),
        }
    }
}

const EMPTY: PickleError = PickleError::Damaged("the stack is empty");
/// The number that files of torch before 1.6 begin with.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

fn in_pairs(items: &[Id]) -> Result<Vec<(Id, Id)>, PickleError> {
    match items.as_chunks() {
        (pairs, []) => Ok(pairs.iter().map(|&[key, value]| (key, value)).collect()),
        _ => Err(PickleError::Damaged("a key without value")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(bytes: &[u8]) -> Result<(Arena, Id), PickleError> {
        read(&mut &bytes[..], &mut { LARGEST })
    }

    #[test]
    fn plain_values_are_read() {
        // pickle.dumps({"a": [1, -2, 3.5, None, True], "b": ("x", 70000)}, protocol=2), memo left out
        let bytes = b"\x80\x02}(X\x01\x00\x00\x00a](K\x01J\xfe\xff\xff\xffG@\x0c\x00\x00\x00\x00\x00\x00N\x88eX\x01\x00\x00\x00bX\x01\x00\x00\x00x\x8a\x03p\x11\x01\x86u.";
        let (arena, root) = parse(bytes).expect("reads");
        let list = arena.items(arena.value(root, "a").expect("a")).expect("list");
        assert_eq!((arena.int(list[0]), arena.int(list[1])), (Some(1), Some(-2)));
        assert_eq!(arena.get(list[2]), &Node::Float(3.5));
        let tuple = arena.items(arena.value(root, "b").expect("b")).expect("tuple");
        assert_eq!((arena.text(tuple[0]), arena.int(tuple[1])), (Some("x"), Some(70000)));
    }

    #[test]
    fn nothing_beyond_the_list_is_known() {
        for global in [
            "os\nsystem",
            "builtins\neval",
            "__builtin__\nexec",
            "posix\nsystem",
            "torch\nload",
            "timm.models.nfnet\nNormFreeNet",
        ] {
            let bytes = [b"\x80\x02c", global.as_bytes(), b"\nX\x02\x00\x00\x00id\x85R."].concat();
            let error = parse(&bytes).expect_err(global);
            assert_eq!(error, PickleError::Global(global.replace('\n', ".")), "{global}");
        }
    }

    #[test]
    fn bombs_are_bounded() {
        // a list that is doubled by reference again and again: as many nodes as opcodes, nothing is copied
        let laughs = [b"\x80\x02]q\x00".as_slice(), &b"](h\x00h\x00h\x00h\x00eq\x00".repeat(50_000), b"."].concat();
        assert!(parse(&laughs).is_ok());
        // 400,000 tuples inside each other: no recursion, neither in reading nor in dropping
        let deep = [b"\x80\x02".as_slice(), b")", &b"\x85".repeat(400_000), b"."].concat();
        assert!(parse(&deep).is_ok());
        let many = [b"\x80\x02(".as_slice(), &b"N".repeat(MOST_NODES + 1), b"t."].concat();
        assert!(matches!(parse(&many), Err(PickleError::TooLarge(_))));
        // 2^63 bytes of text in a file of twelve
        let long = [b"\x80\x02\x8d".as_slice(), &(1u64 << 63).to_le_bytes(), b"a."].concat();
        assert!(matches!(parse(&long), Err(PickleError::TooLarge(_))));
        let short = [b"\x80\x02X".as_slice(), &(1u32 << 20).to_le_bytes(), b"a."].concat();
        assert_eq!(parse(&short).map(|_| ()), Err(PickleError::Truncated));
        // a tensor that is rebuilt from itself
        let knot = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x00h\x00h\x00h\x00\x87q\x01R.";
        assert!(parse(knot).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }

        /// Bytes that are mostly opcodes.
        #[test]
        fn any_opcodes_are_answered(picks in prop::collection::vec((0usize..40, any::<u8>()), 0..80)) {
            const OPCODES: &[u8] = b".(012N\x88\x89JKM\x8a\x8bGX\x8c])}ltd\x85\x86\x87aesuqrhjcR\x81bQ";
            let bytes: Vec<u8> = picks.iter().flat_map(|(at, byte)| [OPCODES[at % OPCODES.len()], *byte % 4]).collect();
            let _ = parse(&bytes);
        }
    }
}
