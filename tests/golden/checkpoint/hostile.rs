//! Hostile safetensors files: each lie is one error with the file's name, without a panic or a large allocation.

use super::*;

/// A file with this length field, header and data.
fn file_with(length: u64, header: &[u8], data: &[u8]) -> Vec<u8> {
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    bytes.extend_from_slice(data);
    bytes
}

fn open_bytes(bytes: &[u8]) -> Result<HfCheckpoint, String> {
    let dir = tempfile::tempdir().unwrap();
    fs_err::write(dir.path().join("model.safetensors"), bytes).unwrap();
    let opened = HfCheckpoint::open(dir.path()).map_err(|error| text(&error));
    // What the safetensors library refuses, other tools would refuse too.
    let theirs = safetensors::SafeTensors::read_metadata(bytes);
    assert!(opened.is_err() || theirs.is_ok(), "{theirs:?}");
    opened
}

fn open_header(header: &str, data: usize) -> Result<HfCheckpoint, String> {
    let header = header.as_bytes();
    open_bytes(&file_with(header.len() as u64, header, &vec![0; data]))
}

#[test]
fn lies_about_the_header_are_refused() {
    for len in 0..8 {
        let message = open_bytes(&vec![0; len]).unwrap_err();
        assert_says(&message, &["model.safetensors", "8 bytes"]);
    }
    for length in [3, 100, 1 << 63, u64::MAX] {
        let message = open_bytes(&file_with(length, b"{}", b"")).unwrap_err();
        assert_says(
            &message,
            &["model.safetensors", "fetch it again", &length.to_string()],
        );
    }
    assert_says(
        &open_bytes(&file_with(0, b"", b"")).unwrap_err(),
        &["begin with"],
    );
    for header in ["\u{feff}{}", "  {}", "[]", "{", "{\"a\":}", "\u{0}"] {
        let message = open_header(header, 0).unwrap_err();
        assert_says(&message, &["header is not valid"]);
    }
    assert!(open_header("{}      ", 0).is_ok(), "padding is allowed");
    let invalid_utf8 = file_with(4, b"{\"\xff\"", b"");
    assert_says(&open_bytes(&invalid_utf8).unwrap_err(), &["not valid"]);
}

#[test]
fn a_header_above_the_limit_is_refused_before_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let file = std::fs::File::create(&path).unwrap();
    std::io::Write::write_all(&mut &file, &100_000_001u64.to_le_bytes()).unwrap();
    // A hole: no disk space is used.
    file.set_len(200_000_000).unwrap();
    let message = text(&HfCheckpoint::open(dir.path()).unwrap_err());
    assert_says(&message, &["100000001", "100000000"]);
}

#[test]
fn lies_about_tensors_are_refused_by_name() {
    let one = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    for (header, data, words) in [
        (one("F32", "[2]", "[0,8]"), 7, "ends at byte"),
        (one("F32", "[2]", "[0,8]"), 9, "1 bytes behind"),
        (one("F32", "[2]", "[8,0]"), 8, "no range"),
        (one("F32", "[2]", "[0,4]"), 4, "8 by dtype and shape"),
        (one("F32", "[3]", "[0,8]"), 8, "12 by dtype and shape"),
        (one("F32", "[2]", "[4,12]"), 12, "belong to no tensor"),
        (one("F32", "[-1]", "[0,8]"), 8, "`w`: invalid value: integer `-1`"),
        (one("F32", "[2.0]", "[0,8]"), 8, "`w`: invalid type: floating point `2.0`"),
        (one("F32", "[2]", "[0.0,8]"), 8, "`w`: invalid type: floating point `0.0`"),
        (one("F32", "[2]", "[-8,0]"), 8, "`w`: invalid value: integer `-8`"),
        (one("F32", "[2]", "[0]"), 8, "`w`: invalid length 1"),
        (one("U8", "[1,1,1,1,1,1,1,1,1]", "[0,1]"), 1, "`w`: invalid length 9, expected a list of at most 8 sizes"),
        (one("F32", "[4294967296,4294967296]", "[0,8]"), 8, "overflows"),
        (one("F32", "[9223372036854775807]", "[0,8]"), 8, "overflows"),
        (one("F32", "[2]", "[0,18446744073709551615]"), 8, "no range"),
        (one("F99", "[2]", "[0,8]"), 8, "`F99` is not supported"),
        (one("float32", "[2]", "[0,8]"), 8, "not supported"),
        (r#"{"w":1}"#.to_owned(), 0, "`w`: invalid type: integer `1`, expected an object with dtype, shape and data_offsets"),
        (r#"{"w":{"shape":[],"data_offsets":[0,4]}}"#.to_owned(), 4, "`w`: missing field `dtype`"),
        (r#"{"__metadata__":{"a":1}}"#.to_owned(), 0, "texts"),
        (
            r#"{"w":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}"#.to_owned(),
            1,
            "`w`: duplicate field `shape`",
        ),
        (
            r#"{"__metadata__":{},"__metadata__":{}}"#.to_owned(),
            0,
            "`__metadata__` stands twice",
        ),
        (
            r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}}"#.to_owned(),
            1,
            "`w`: unknown field `x`",
        ),
        (
            r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#
                .to_owned(),
            2,
            "`w` stands twice",
        ),
        (
            r#"{"v":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"w":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#
                .to_owned(),
            6,
            "`w` begins at byte 2",
        ),
        (
            r#"{"v":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#
                .to_owned(),
            4,
            "begins at byte 0",
        ),
    ] {
        let message = open_header(&header, data).unwrap_err();
        assert_says(&message, &["model.safetensors", words]);
    }
    // Nothing, and scalars, are tensors too.
    let empty = open_header(&one("F32", "[0,5]", "[0,0]"), 0).unwrap();
    assert_eq!(empty.info("w").unwrap().num_bytes(), 0);
    let scalar = open_header(&one("F64", "[]", "[0,8]"), 8).unwrap();
    assert_eq!(scalar.info("w").unwrap().numel(), 1);
}

#[test]
fn a_file_cut_at_any_length_is_refused() {
    let whole = fs_err::read(golden(
        "megatron/checkpoints/dense_vl_kv2/model.safetensors",
    ))
    .unwrap();
    for len in (0..whole.len()).step_by(whole.len() / 97) {
        assert!(open_bytes(&whole[..len]).is_err(), "{len}");
    }
    assert!(open_bytes(&whole).is_ok());
}

/// Rewrites the index of a copy of a sharded checkpoint and says what opening it says.
fn with_index(change: impl FnOnce(&Path, &mut serde_json::Value)) -> String {
    let dir = copy_of("moe_vl");
    let path = dir.path().join("model.safetensors.index.json");
    let mut index = serde_json::from_slice(&fs_err::read(&path).unwrap()).unwrap();
    change(dir.path(), &mut index);
    fs_err::write(&path, index.to_string()).unwrap();
    text(&HfCheckpoint::open(dir.path()).unwrap_err())
}

#[test]
fn an_index_that_disagrees_with_its_shards_is_refused() {
    const HEAD: &str = "lm_head.weight";
    let absent = with_index(|dir, _| {
        fs_err::remove_file(dir.join("model-00002-of-00003.safetensors")).unwrap();
    });
    assert_says(
        &absent,
        &["model-00002-of-00003.safetensors", "missing", "tensors"],
    );
    let elsewhere = with_index(|_, index| {
        index["weight_map"][HEAD] = "model-00003-of-00003.safetensors".into();
    });
    assert_says(
        &elsewhere,
        &[
            HEAD,
            "does not hold it",
            "which the index does not place there",
        ],
    );
    let lost = with_index(|_, index| {
        index["weight_map"].as_object_mut().unwrap().remove(HEAD);
    });
    assert_says(&lost, &[HEAD, "does not place there"]);
    let invented = with_index(|_, index| {
        index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors".into();
    });
    assert_says(&invented, &["ghost", "does not hold it"]);
}

#[test]
fn an_index_with_a_tensor_twice_is_refused() {
    let dir = copy_of("moe_vl");
    let path = dir.path().join("model.safetensors.index.json");
    let index = fs_err::read_to_string(&path).unwrap();
    let twice = index.replacen(
        "\"lm_head.weight\"",
        "\"lm_head.weight\": \"model-00002-of-00003.safetensors\", \"lm_head.weight\"",
        1,
    );
    fs_err::write(&path, twice).unwrap();
    let message = text(&HfCheckpoint::open(dir.path()).unwrap_err());
    assert_says(&message, &["index.json", "`lm_head.weight` stands twice"]);
}

#[test]
fn links_out_of_the_directory_are_refused_and_the_hub_cache_is_read() {
    use std::os::unix::fs::symlink;

    let scratch = tempfile::tempdir().unwrap();
    let weights = golden("megatron/checkpoints/dense_vl_kv2/model.safetensors");
    let outside = scratch.path().join("outside.safetensors");
    fs_err::copy(weights, &outside).unwrap();
    let linked = scratch.path().join("linked");
    fs_err::create_dir(&linked).unwrap();
    symlink(&outside, linked.join("model.safetensors")).unwrap();
    let message = text(&HfCheckpoint::open(&linked).unwrap_err());
    assert_says(&message, &["model.safetensors", "outside the directory"]);
    assert!(HfCheckpoint::open_with(&linked, Links::Anywhere).is_ok());

    let snapshot = scratch.path().join("repository/snapshots/main");
    let blobs = scratch.path().join("repository/blobs");
    fs_err::create_dir_all(&snapshot).unwrap();
    fs_err::create_dir_all(&blobs).unwrap();
    fs_err::rename(&outside, blobs.join("0123abcd")).unwrap();
    symlink("../../blobs/0123abcd", snapshot.join("model.safetensors")).unwrap();
    assert!(HfCheckpoint::open(&snapshot).is_ok());

    let circle = scratch.path().join("circle");
    fs_err::create_dir(&circle).unwrap();
    symlink("model.safetensors", circle.join("model.safetensors")).unwrap();
    assert!(HfCheckpoint::open(&circle).is_err());
}

#[test]
fn a_device_or_directory_in_place_of_a_file_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    fs_err::create_dir(scratch.path().join("model.safetensors")).unwrap();
    let message = text(&HfCheckpoint::open(scratch.path()).unwrap_err());
    assert_says(&message, &["model.safetensors", "not a regular file"]);
    let linked = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/dev/zero", linked.path().join("model.safetensors")).unwrap();
    let opened = HfCheckpoint::open_with(linked.path(), Links::Anywhere);
    assert_says(&text(&opened.unwrap_err()), &["not a regular file"]);
}

#[test]
fn an_index_that_is_a_link_out_of_the_directory_is_refused() {
    let dir = copy_of("moe_vl");
    let outside = tempfile::tempdir().unwrap();
    let index = dir.path().join("model.safetensors.index.json");
    let away = outside.path().join("index.json");
    fs_err::copy(&index, &away).unwrap();
    fs_err::remove_file(&index).unwrap();
    std::os::unix::fs::symlink(&away, &index).unwrap();
    let message = text(&HfCheckpoint::open(dir.path()).unwrap_err());
    assert_says(&message, &["index.json", "outside the directory"]);
    assert!(HfCheckpoint::open_with(dir.path(), Links::Anywhere).is_ok());
}
