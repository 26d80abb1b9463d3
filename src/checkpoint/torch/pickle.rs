//! Reads pickles without running anything: opcodes build plain nodes, and only globals of a short list are known, none of
//! which is ever called. What a pickle may cost is bounded: bytes, nodes, and no recursion anywhere.

mod globals;
mod machine;

use std::io::Read;

/// Most bytes of a pickle that holds no weights itself: ImageNet training states stay below a hundredth of it.
pub const LARGEST: u64 = 32 << 20;
/// Most nodes: an unending list of small things is no checkpoint either.
const MOST_NODES: usize = 1 << 19;

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

/// Reads one pickle from `input`, at most `budget` bytes of it, which are taken from the budget.
pub fn read(input: &mut dyn Read, budget: &mut u64) -> Result<(Arena, Id), PickleError> {
    machine::read(input, budget)
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
