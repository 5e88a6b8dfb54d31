//! Small files that stand beside the input, so that its parser is reached.

/// A safetensors file with one tensor of four bytes.
pub(super) fn shard(name: &str) -> Vec<u8> {
    let header = format!(r#"{{"{name}":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}}}"#);
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], header.as_bytes(), &[1, 2, 3, 4]].concat()
}

/// A table of contents with one float32 tensor `t` of shape [2, 3], stored in the first `len` bytes of `__0_0.distcp`;
/// without tensors for a length of 0.
pub(super) fn metadata(len: usize) -> Vec<u8> {
    const MODULE: &str = "torch.distributed.checkpoint.metadata";
    let tensor = dict(&[
        (
            "properties",
            object(
                MODULE,
                "TensorProperties",
                &dict(&[("dtype", global("torch", "float32"))]),
            ),
        ),
        ("size", size(&[2, 3])),
        (
            "chunks",
            [
                b"](".to_vec(),
                object(
                    MODULE,
                    "ChunkStorageMetadata",
                    &dict(&[("offsets", size(&[0, 0])), ("sizes", size(&[2, 3]))]),
                ),
                b"e".to_vec(),
            ]
            .concat(),
        ),
    ]);
    let index = object(
        MODULE,
        "MetadataIndex",
        &dict(&[("fqn", text("t")), ("offset", size(&[0, 0]))]),
    );
    let place = object(
        "torch.distributed.checkpoint.filesystem",
        "_StorageInfo",
        &dict(&[
            ("relative_path", text("__0_0.distcp")),
            ("offset", int(0)),
            ("length", int(len)),
        ]),
    );
    let (described, stored) = if len == 0 {
        (b"}".to_vec(), b"}".to_vec())
    } else {
        (
            dict(&[("t", object(MODULE, "TensorStorageMetadata", &tensor))]),
            [b"}".to_vec(), index, place, b"s".to_vec()].concat(),
        )
    };
    let state = dict(&[("state_dict_metadata", described), ("storage_data", stored)]);
    [
        b"\x80\x02".to_vec(),
        object(MODULE, "Metadata", &state),
        b".".to_vec(),
    ]
    .concat()
}

fn global(module: &str, name: &str) -> Vec<u8> {
    format!("c{module}\n{name}\n").into_bytes()
}

fn object(module: &str, class: &str, state: &[u8]) -> Vec<u8> {
    [&global(module, class)[..], b")\x81", state, b"b"].concat()
}

fn text(value: &str) -> Vec<u8> {
    let len = u8::try_from(value.len()).expect("texts here are short");
    [&[0x8c, len], value.as_bytes()].concat()
}

fn int(value: usize) -> Vec<u8> {
    [b"\x8a\x08", &(value as u64).to_le_bytes()[..]].concat()
}

fn size(axes: &[usize]) -> Vec<u8> {
    let items: Vec<u8> = axes.iter().flat_map(|axis| int(*axis)).collect();
    [&global("torch", "Size")[..], b"(", &items, b"t\x85R"].concat()
}

fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let pairs = entries
        .iter()
        .map(|(key, value)| [text(key), value.clone(), b"s".to_vec()].concat());
    std::iter::once(b"}".to_vec())
        .chain(pairs)
        .collect::<Vec<_>>()
        .concat()
}
