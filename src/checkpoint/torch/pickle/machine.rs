//! The pickle machine: a stack, marks, a memo, and the nodes that opcodes build.

use std::collections::HashMap;
use std::io::Read;

use super::globals::{known, storage_kind};
use super::{Arena, Id, LARGEST, MOST_NODES, Node, PickleError};

/// Most dimensions of a tensor.
const MOST_DIMENSIONS: usize = 8;

/// Reads one pickle from `input`: at most `budget` bytes, which are deducted from the budget.
pub(super) fn read(input: &mut dyn Read, budget: &mut u64) -> Result<(Arena, Id), PickleError> {
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

    /// Reads `count` bytes, checked against the budget before memory is allocated.
    fn read(&mut self, count: u64) -> Result<Vec<u8>, PickleError> {
        self.spend(count)?;
        let mut bytes = Vec::new();
        let read = self.input.take(count).read_to_end(&mut bytes).map_err(|_| PickleError::Truncated)?;
        if read as u64 == count { Ok(bytes) } else { Err(PickleError::Truncated) }
    }

    fn text(&mut self, count: u64) -> Result<Node, PickleError> {
        // torch's strings are UTF-8; Python's may hold lone surrogates
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

    /// Values pushed since the last mark.
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
            // magic number of files of torch before 1.6
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

    /// Builds the node for a call of `class` with `args`.
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
                // a tensor subclass: build the inner tensor; this function itself is refused, so that recursion ends
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

    /// Reads a persistent ID: `('storage', torch.FloatStorage, key, location, count)`.
    fn storage(&self, id: Id) -> Result<Node, PickleError> {
        const BAD: PickleError = PickleError::Damaged("a reference that is no storage");
        let Some(&[word, kind, key, _location, count, ref view @ ..]) = self.arena.items(id) else { return Err(BAD) };
        // files of torch before 1.6 may declare a storage as a view of another
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
/// Magic number of files of torch before 1.6, little-endian.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

fn in_pairs(items: &[Id]) -> Result<Vec<(Id, Id)>, PickleError> {
    match items.as_chunks() {
        (pairs, []) => Ok(pairs.iter().map(|&[key, value]| (key, value)).collect()),
        _ => Err(PickleError::Damaged("a key without value")),
    }
}
