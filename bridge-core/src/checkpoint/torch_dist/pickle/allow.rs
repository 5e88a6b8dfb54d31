//! The names that a pickle may hold, file by file.

/// Which file a pickle comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// `.metadata`.
    Metadata,
    /// A tensor: an item of a `.distcp` file, or train_state.pt.
    Tensor,
    /// common.pt: everything that is neither tensor nor object.
    Common,
}

/// Modules with the names that are known in them.
type Names = &'static [(&'static str, &'static [&'static str])];

const METADATA: Names = &[
    (
        "torch.distributed.checkpoint.metadata",
        &[
            "Metadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
            "MEM_FORMAT_ENCODING",
        ],
    ),
    (
        "torch.distributed._shard.sharded_tensor.metadata",
        &["TensorProperties", "MEM_FORMAT_ENCODING"],
    ),
    ("torch.distributed.checkpoint.filesystem", &["_StorageInfo"]),
    (
        "torch.distributed.checkpoint.planner",
        &["SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"],
    ),
    (
        "megatron.core.dist_checkpointing.strategies.torch",
        &["MCoreSavePlan", "MCoreMetadata"],
    ),
    ("torch", &["Size"]),
    ("torch.serialization", &["_get_layout"]),
    ("pathlib", &["PosixPath", "PurePosixPath"]),
    ("pathlib._local", &["PosixPath", "PurePosixPath"]),
    ("collections", &["OrderedDict"]),
];

const TENSOR: Names = &[
    (
        "torch._utils",
        &[
            "_rebuild_tensor_v2",
            "_rebuild_tensor_v3",
            "_rebuild_parameter",
        ],
    ),
    ("torch.storage", &["UntypedStorage"]),
    ("collections", &["OrderedDict"]),
];

/// Beside the names of tensors and everything in Megatron's own modules: classes that stay opaque.
const COMMON: Names = &[
    ("argparse", &["Namespace"]),
    ("types", &["SimpleNamespace"]),
    ("signal", &["Signals"]),
    ("pathlib", &["PosixPath", "PurePosixPath"]),
    ("pathlib._local", &["PosixPath", "PurePosixPath"]),
    ("io", &["BytesIO"]),
    ("_io", &["BytesIO"]),
    ("_codecs", &["encode"]),
    ("numpy", &["ndarray", "dtype"]),
    ("numpy._core.multiarray", &["_reconstruct", "scalar"]),
    ("numpy.core.multiarray", &["_reconstruct", "scalar"]),
    ("torch", &["Size", "device"]),
    ("torch.serialization", &["_get_layout"]),
    ("collections", &["OrderedDict", "defaultdict"]),
];

/// The storage classes of `torch`, with the dtype of their elements.
pub(crate) const STORAGES: [(&str, &str); 10] = [
    ("FloatStorage", "float32"),
    ("BFloat16Storage", "bfloat16"),
    ("HalfStorage", "float16"),
    ("DoubleStorage", "float64"),
    ("LongStorage", "int64"),
    ("IntStorage", "int32"),
    ("ShortStorage", "int16"),
    ("CharStorage", "int8"),
    ("ByteStorage", "uint8"),
    ("BoolStorage", "bool"),
];

/// Every dtype that torch has a name for; those without a counterpart here are refused later, with the tensor's name.
const DTYPES: [&str; 22] = [
    "float32",
    "bfloat16",
    "float16",
    "float64",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
    "complex32",
    "complex64",
    "complex128",
];

/// Whether a file of this kind may hold the name.
pub(super) fn is_allowed(dialect: Dialect, module: &str, name: &str) -> bool {
    if module == "torch" && DTYPES.contains(&name) {
        return true;
    }
    let is_tensor = || {
        has(TENSOR, module, name)
            || (module == "torch" && STORAGES.iter().any(|(storage, _)| *storage == name))
    };
    match dialect {
        Dialect::Metadata => has(METADATA, module, name),
        Dialect::Tensor => is_tensor(),
        Dialect::Common => {
            is_tensor() || has(COMMON, module, name) || module.starts_with("megatron.")
        }
    }
}

fn has(names: Names, module: &str, name: &str) -> bool {
    names
        .iter()
        .any(|(known, names)| *known == module && names.contains(&name))
}
