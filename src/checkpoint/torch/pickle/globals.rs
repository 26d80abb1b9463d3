//! Classes and functions that a pickle may name.

/// Whether state dictionaries and training checkpoints use this class or function. None is called; each becomes a node.
pub(super) fn known(name: &str) -> bool {
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

/// Whether this is a name of a torch storage class.
pub(super) fn storage_kind(leaf: &str) -> bool {
    const KINDS: [&str; 11] =
        ["Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexFloat"];
    leaf.strip_suffix("Storage").is_some_and(|kind| KINDS.contains(&kind))
}
