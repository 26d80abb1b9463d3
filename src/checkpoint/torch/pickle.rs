//! Reads pickles without executing anything: opcodes build plain nodes, and only globals of a fixed list are accepted,
//! none of which is called. Bytes and nodes are limited, and nothing recurses.

mod globals;
mod machine;

use std::io::Read;

/// Most bytes of a pickle without weights; ImageNet training states need less than a hundredth.
pub const LARGEST: u64 = 32 << 20;
/// Most nodes of a pickle.
const MOST_NODES: usize = 1 << 19;

/// Why a pickle can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PickleError {
    /// The bytes end early or can't be read.
    #[error("the pickle ends early")]
    Truncated,
    /// The pickle exceeds a limit.
    #[error("the pickle has more than {0}")]
    TooLarge(String),
    /// A global that is not on the list.
    #[error(
        "the pickle wants `{0}`, which is not part of a state dictionary and is never loaded; save the weights alone: torch.save(model.state_dict(), PATH)"
    )]
    Global(String),
    /// An opcode that torch.save doesn't write.
    #[error("the pickle has opcode {0:#04x}, which torch.save does not write")]
    Opcode(u8),
    /// An invalid sequence of opcodes.
    #[error("the pickle is damaged: {0}")]
    Damaged(&'static str),
}

/// Index of a node.
pub type Id = usize;

/// A value that a pickle builds.
#[derive(Debug, Clone, PartialEq)]
pub enum Node {
    /// None.
    None,
    /// True or False.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A floating-point number.
    Float(f64),
    /// Text.
    Str(String),
    /// Bytes, or an integer of more than 64 bits; unused.
    Opaque,
    /// A tuple.
    Tuple(Vec<Id>),
    /// A list or set.
    List(Vec<Id>),
    /// A dictionary of any kind, in order.
    Dict(Vec<(Id, Id)>),
    /// A class or function on the list, `module.name`.
    Global(String),
    /// An instance: its class, its arguments, its state.
    Object {
        /// Class or function.
        class: Id,
        /// Arguments of the constructor.
        args: Id,
        /// State that was set after construction.
        state: Option<Id>,
    },
    /// A storage, whose values are outside of the pickle.
    Storage {
        /// torch's storage class, such as `FloatStorage`.
        kind: String,
        /// Key of the values in the file.
        key: String,
        /// Number of values (bytes for an untyped storage).
        count: u64,
    },
    /// A tensor over a storage.
    Tensor {
        /// The storage.
        storage: Id,
        /// Index of the first value in the storage.
        offset: u64,
        /// Shape.
        shape: Vec<u64>,
        /// Strides by dimension, in values.
        strides: Vec<u64>,
    },
}

/// All nodes of a pickle.
#[derive(Debug, Default)]
pub struct Arena {
    nodes: Vec<Node>,
}

impl Arena {
    /// The node with this index; `None` if there is none.
    pub fn get(&self, id: Id) -> &Node {
        self.nodes.get(id).unwrap_or(&Node::None)
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A string node's text.
    pub fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Node::Str(text) => Some(text),
            _ => None,
        }
    }

    /// An integer node's value.
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

    /// Pairs of a dictionary, or of an object whose state is one (`argparse.Namespace`).
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

    /// The last value that a dictionary has for a string key.
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

/// Reads one pickle from `input`: at most `budget` bytes, which are deducted from the budget.
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
        // a list doubled by reference many times: as many nodes as opcodes, no copies
        let laughs = [b"\x80\x02]q\x00".as_slice(), &b"](h\x00h\x00h\x00h\x00eq\x00".repeat(50_000), b"."].concat();
        assert!(parse(&laughs).is_ok());
        // 400,000 nested tuples: no recursion, neither in reading nor in dropping
        let deep = [b"\x80\x02".as_slice(), b")", &b"\x85".repeat(400_000), b"."].concat();
        assert!(parse(&deep).is_ok());
        let many = [b"\x80\x02(".as_slice(), &b"N".repeat(MOST_NODES + 1), b"t."].concat();
        assert!(matches!(parse(&many), Err(PickleError::TooLarge(_))));
        // 2^63 bytes of text in a file of twelve bytes
        let long = [b"\x80\x02\x8d".as_slice(), &(1u64 << 63).to_le_bytes(), b"a."].concat();
        assert!(matches!(parse(&long), Err(PickleError::TooLarge(_))));
        let short = [b"\x80\x02X".as_slice(), &(1u32 << 20).to_le_bytes(), b"a."].concat();
        assert_eq!(parse(&short).map(|_| ()), Err(PickleError::Truncated));
        // a tensor rebuilt from itself
        let knot = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x00h\x00h\x00h\x00\x87q\x01R.";
        assert!(parse(knot).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }

        /// Bytes of which most are opcodes.
        #[test]
        fn any_opcodes_are_answered(picks in prop::collection::vec((0usize..40, any::<u8>()), 0..80)) {
            const OPCODES: &[u8] = b".(012N\x88\x89JKM\x8a\x8bGX\x8c])}ltd\x85\x86\x87aesuqrhjcR\x81bQ";
            let bytes: Vec<u8> = picks.iter().flat_map(|(at, byte)| [OPCODES[at % OPCODES.len()], *byte % 4]).collect();
            let _ = parse(&bytes);
        }
    }
}
