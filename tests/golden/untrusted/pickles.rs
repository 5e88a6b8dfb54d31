//! Pickles that would run code or fill memory where they are loaded: `.metadata`, common.pt, the items of data files.

use std::path::Path;

use bridge_core::checkpoint::TensorSource;
use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;

use super::torch_dist;
use crate::checkpoint::{assert_says, text};

/// What opening a directory with this `.metadata` says.
fn metadata(dir: &Path, program: &[u8]) -> String {
    fs_err::write(dir.join(".metadata"), program).unwrap();
    text(&TorchDistCheckpoint::open(dir).unwrap_err())
}

/// What reading a common.pt with this pickle says.
fn common(dir: &Path, program: &[u8]) -> Result<(), String> {
    fs_err::write(dir.join("common.pt"), archive(program)).unwrap();
    let checkpoint = TorchDistCheckpoint::open(dir).unwrap();
    checkpoint.common().map(drop).map_err(|error| text(&error))
}

/// A zip archive as torch.save makes it, of one stored entry.
fn archive(pickle: &[u8]) -> Vec<u8> {
    let name = b"archive/data.pkl";
    let len = u32::try_from(pickle.len()).unwrap().to_le_bytes();
    let name_len = u16::try_from(name.len()).unwrap().to_le_bytes();
    let none = [0; 12];
    // Version, flags, method, time, date and CRC-32, which this reader has no use for; then both sizes.
    let sizes = [&none[..8], &len, &len, &name_len].concat();
    let local = [b"PK\x03\x04", &none[..6], &sizes, &none[..2], name, pickle].concat();
    let entry = [b"PK\x01\x02", &none[..8], &sizes, &none, &none[..4], name].concat();
    let start = u32::try_from(local.len()).unwrap().to_le_bytes();
    let directory_len = u32::try_from(entry.len()).unwrap().to_le_bytes();
    let end = [
        b"PK\x05\x06",
        &none[..4],
        &[1, 0, 1, 0],
        &directory_len,
        &start,
        &none[..2],
    ];
    [local, entry, end.concat()].concat()
}

/// Lists of the list before, twice each: 2^60 values to whoever follows them.
fn doubling() -> Vec<u8> {
    let mut program = b"]\x94".to_vec();
    for level in 0..60 {
        program.extend([b']', b'(', b'h', level, b'h', level, b'e', 0x94]);
    }
    // The outermost list is the value; the others are its parts, and in its way on the stack.
    let mut nested = b"(".to_vec();
    nested.extend(program);
    nested.extend(b"t.");
    nested
}

#[test]
fn names_and_instructions_that_run_code_are_refused_by_name_and_place() {
    let dir = torch_dist();
    let harmless = "which is not on the list of harmless names for this file";
    let unneeded = "which no checkpoint needs";
    let not_a_class = "an instance is made of what is not a named class";
    let second = b"ctorch\nSize\n)\x81NbNb.";
    for (program, words) in [
        // GLOBAL and REDUCE, in the spellings of protocols 0 to 4.
        (
            &b"cos\nsystem\nX\x02\0\0\0ls\x85R."[..],
            ["`os.system` at byte 0", harmless],
        ),
        (
            b"\x80\x02cposix\nsystem\n.",
            ["`posix.system` at byte 2", harmless],
        ),
        (
            b"\x8c\x08builtins\x8c\x04eval\x93.",
            ["`builtins.eval` at byte 16", harmless],
        ),
        (b"cbuiltins\ngetattr\n.", ["`builtins.getattr`", harmless]),
        (b"ctorch\nload\n.", ["`torch.load`", harmless]),
        (b"ctorch.hub\nload\n.", ["`torch.hub.load`", harmless]),
        (b"csubprocess\nPopen\n)R.", ["`subprocess.Popen`", harmless]),
        // An attribute of a harmless name is another name.
        (
            b"ctorch.distributed.checkpoint.metadata\nMetadata.__init__\n.",
            [
                "`torch.distributed.checkpoint.metadata.Metadata.__init__`",
                harmless,
            ],
        ),
        // NEWOBJ of such a class.
        (b"cos\n_wrap_close\n)\x81.", ["`os._wrap_close`", harmless]),
        (b"N)R.", ["malformed at byte 2", not_a_class]),
        (
            b"ctorch\nSize\nNR.",
            ["malformed", "the arguments of a class are no tuple"],
        ),
        (b"ctorch\nSize\n)\x81)R.", ["malformed", not_a_class]),
        // BUILD on what was not made here, and a second one.
        (
            b"NNb.",
            [
                "malformed at byte 2",
                "a state is set on what is not an instance",
            ],
        ),
        (
            b"}Nb.",
            [
                "malformed at byte 2",
                "a state is set on what is not an instance",
            ],
        ),
        (
            second,
            ["malformed at byte 17", "an instance gets a second state"],
        ),
        // INST, OBJ, EXT1, EXT2, EXT4, NEWOBJ_EX, PERSID.
        (b"(ios\nsystem\n.", ["instruction 0x69 at byte 1", unneeded]),
        (b"(cos\nsystem\no.", ["`os.system` at byte 1", harmless]),
        (b"(No.", ["instruction 0x6f at byte 2", unneeded]),
        (b"\x82\x01.", ["instruction 0x82 at byte 0", unneeded]),
        (b"\x83\x01\x00.", ["instruction 0x83 at byte 0", unneeded]),
        (
            b"\x84\x01\x00\x00\x00.",
            ["instruction 0x84 at byte 0", unneeded],
        ),
        (b"N)}\x92.", ["instruction 0x92 at byte 3", unneeded]),
        (b"P0\n.", ["instruction 0x50 at byte 0", unneeded]),
        // LONG4 of 2 GB, and texts and bytes of as much.
        (
            b"\x8b\xff\xff\xff\x7f\x01.",
            ["instruction 0x8b at byte 0", unneeded],
        ),
        (b"X\xff\xff\xff\x7fa.", ["ends at byte 7", "cut short"]),
        (
            b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
            ["ends at byte 11", "cut short"],
        ),
        (b"B\xff\xff\xff\x7fa.", ["ends at byte 7", "cut short"]),
        // The memo: twice, out of order, far away, empty.
        (
            b"Nq\0q\0.",
            ["malformed at byte 3", "a memo entry is set twice"],
        ),
        (
            b"Nq\x01.",
            ["malformed at byte 1", "a memo entry is set out of order"],
        ),
        (
            b"Nr\xff\xff\xff\xff.",
            ["malformed at byte 1", "a memo entry is set out of order"],
        ),
        (
            b"h\0.",
            [
                "malformed at byte 0",
                "a memo entry is used that was never set",
            ],
        ),
        // What is left over, and what is not there.
        (b"N.N", ["malformed", "bytes follow the last instruction"]),
        (b"NN.", ["malformed", "values are left over at the end"]),
        (
            b"R.",
            ["malformed at byte 0", "takes a value that is not there"],
        ),
    ] {
        let message = metadata(dir.path(), program);
        let place = dir.path().display().to_string();
        assert_says(&message, &[&place, ".metadata: the pickle"]);
        assert_says(&message, &words);
    }
}

/// Whoever follows 2^60 values does not come back.
#[test]
fn pickles_that_unfold_or_nest_without_end_are_refused_at_once() {
    let dir = torch_dist();
    let many = 1 << 20;
    let shared = |count: usize| b"h\0".repeat(count);
    for (program, words) in [
        (doubling(), "it is no Metadata"),
        (b"]q\0h\0a.".to_vec(), "it is no Metadata"),
        (
            [b"N".to_vec(), b"\x85".repeat(many), b".".to_vec()].concat(),
            "packs more values into its 1048578 bytes",
        ),
        (
            b"]".repeat(many),
            "packs more values into its 1048576 bytes",
        ),
        (b"(".repeat(many), "before its last instruction"),
        (
            [b"]\x94(".to_vec(), shared(many), b"e.".to_vec()].concat(),
            "it is no Metadata",
        ),
    ] {
        assert_says(&metadata(dir.path(), &program), &[words]);
    }
    let dir = torch_dist();
    for (program, words) in [
        (doubling(), "it unfolds to more than its own length"),
        (
            b"]q\0h\0a.".to_vec(),
            "it unfolds to more than its own length",
        ),
        (
            [b"N".to_vec(), b"\x85".repeat(1000), b".".to_vec()].concat(),
            "nested too deeply",
        ),
        (b"cos\nsystem\n.".to_vec(), "`os.system` at byte 0"),
        (b"\x8b\xff\xff\xff\x7f\x01.".to_vec(), "instruction 0x8b"),
    ] {
        let message = common(dir.path(), &program).unwrap_err();
        assert_says(&message, &["common.pt", words]);
    }
    common(dir.path(), b"}.").unwrap();
}

/// One list of chunks may serve many tensors in a pickle: each would get a copy of it.
#[test]
fn a_list_of_chunks_that_many_tensors_share_is_refused_by_its_length() {
    const MODULE: &[u8] = b"ctorch.distributed.checkpoint.metadata\n";
    let object =
        |class: &str, state: &[u8]| [MODULE, class.as_bytes(), b"\n)\x81", state, b"b"].concat();
    let text = |value: &str| {
        [
            &[0x8c, u8::try_from(value.len()).unwrap()],
            value.as_bytes(),
        ]
        .concat()
    };
    let dict = |entries: &[(&str, Vec<u8>)]| {
        let pairs = entries.iter();
        let pairs = pairs.flat_map(|(key, value)| [text(key), value.clone(), b"s".to_vec()]);
        [b"}".to_vec(), pairs.collect::<Vec<_>>().concat()].concat()
    };
    // An empty chunk needs no place in a file.
    let chunk = object(
        "ChunkStorageMetadata",
        &dict(&[
            ("offsets", b"K\0\x85".to_vec()),
            ("sizes", b"K\0\x85".to_vec()),
        ]),
    );
    let count = 2000;
    let chunks = [
        b"]\x94(".to_vec(),
        chunk,
        b"\x94".to_vec(),
        b"h\x01".repeat(count - 1),
        b"e".to_vec(),
    ];
    let properties = object(
        "TensorProperties",
        &dict(&[("dtype", b"ctorch\nfloat32\n".to_vec())]),
    );
    let tensor = |chunks: Vec<u8>| {
        let state = dict(&[
            ("properties", properties.clone()),
            ("size", b"K\0\x85".to_vec()),
            ("chunks", chunks),
        ]);
        object("TensorStorageMetadata", &state)
    };
    let mut described = b"}".to_vec();
    for number in 0..40 {
        let chunks = if number == 0 {
            chunks.concat()
        } else {
            b"h\0".to_vec()
        };
        described.extend([text(&format!("t{number}")), tensor(chunks), b"s".to_vec()].concat());
    }
    let state = dict(&[
        ("state_dict_metadata", described),
        ("storage_data", b"}".to_vec()),
    ]);
    let program = [object("Metadata", &state), b".".to_vec()].concat();
    assert!(program.len() < 40 * count);
    assert_says(
        &metadata(torch_dist().path(), &program),
        &[
            "`t9`: there are more chunks than .metadata has bytes",
            "and 25 more",
        ],
    );
}

/// The pickle of an item names what builds its tensor; it is a name like any other.
#[test]
fn a_name_off_the_list_in_a_data_file_is_refused_when_its_tensor_is_read() {
    let dir = torch_dist();
    let file = dir.path().join("__0_0.distcp");
    let bytes = fs_err::read(&file).unwrap();
    let (known, other) = (b"ctorch._utils\n_rebuild", b"cos.path._utl\n_rebuild");
    let at = bytes
        .windows(known.len())
        .position(|one| one == known)
        .unwrap();
    let mut changed = bytes.clone();
    changed[at..at + other.len()].copy_from_slice(other);
    fs_err::write(&file, changed).unwrap();
    let checkpoint = TorchDistCheckpoint::open(dir.path()).unwrap();
    let refused: Vec<String> = checkpoint
        .tensors()
        .filter_map(|(name, info)| {
            let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
            checkpoint.read(name, 0, &mut bytes).err()
        })
        .map(|error| text(&error))
        .collect();
    assert_eq!(refused.len(), 1, "the others are as they were");
    assert_says(
        &refused[0],
        &[
            "__0_0.distcp",
            "`os.path._utl._rebuild_tensor_v2`",
            "harmless names",
        ],
    );
}

/// A copy that broke off, at every byte.
#[test]
fn a_table_of_contents_that_ends_at_any_byte_says_that_it_was_cut_short() {
    let dir = torch_dist();
    let whole = fs_err::read(dir.path().join(".metadata")).unwrap();
    for len in 0..whole.len() {
        assert_says(
            &metadata(dir.path(), &whole[..len]),
            &[
                &format!("the pickle ends at byte {len}, before its last instruction"),
                "cut short",
            ],
        );
    }
    let dir = torch_dist();
    let file = dir.path().join("common.pt");
    let whole = fs_err::read(&file).unwrap();
    let checkpoint = TorchDistCheckpoint::open(dir.path()).unwrap();
    for len in 0..whole.len() {
        fs_err::write(&file, &whole[..len]).unwrap();
        let message = text(&checkpoint.common().unwrap_err());
        assert_says(&message, &["the archive of `common.pt` is malformed"]);
    }
}
