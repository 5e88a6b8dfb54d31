//! Directories that torch and Megatron-Core wrote, against what they hold.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bridge_core::Dtype;
use bridge_core::checkpoint::Overwrite;
use bridge_core::checkpoint::torch_dist::{
    Plain, TorchDistCheckpoint, TorchDistLayout, TorchDistProblem, TorchDistWriter,
};
use bridge_core::checkpoint::{CheckpointError, TensorSink, TensorSource};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tests::golden;

fn directories() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(golden("torch_dist"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .map(|path| {
            let iteration = path.join("iter_0000007");
            if iteration.is_dir() { iteration } else { path }
        })
        .collect();
    found.sort();
    assert_eq!(found.len(), 11);
    found
}

fn expected(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("expected.json")).unwrap()).unwrap()
}

fn whole(source: &impl TensorSource, name: &str) -> Vec<u8> {
    let num_bytes = source.info(name).unwrap().num_bytes();
    let mut bytes = vec![0xaa; usize::try_from(num_bytes).unwrap()];
    source.read(name, 0, &mut bytes).unwrap();
    bytes
}

fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A copy that a test may damage.
fn copied(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        fs::write(
            copy.path().join(path.file_name().unwrap()),
            fs::read(&path).unwrap(),
        )
        .unwrap();
    }
    copy
}

fn problems(error: CheckpointError) -> Vec<TorchDistProblem> {
    match error {
        CheckpointError::TorchDist { problems, .. } => problems,
        other => panic!("{other}"),
    }
}

#[test]
fn every_directory_assembles_to_the_bytes_that_torch_loads() {
    for dir in directories() {
        let checkpoint = TorchDistCheckpoint::open(&dir).unwrap();
        let expected = expected(&dir);
        let tensors = expected["tensors"].as_object().unwrap();
        assert_eq!(
            checkpoint.tensors().len(),
            tensors.len(),
            "{}",
            dir.display()
        );
        for (name, info) in checkpoint.tensors() {
            let golden = &tensors[name];
            let context = format!("{name} of {}", dir.display());
            assert_eq!(info.dtype.torch_word(), golden["dtype"], "{context}");
            assert_eq!(serde_json::json!(info.shape), golden["shape"], "{context}");
            assert_eq!(
                sha256(&whole(&checkpoint, name)),
                golden["sha256"],
                "{context}"
            );
        }
        let objects: BTreeMap<&str, u64> = checkpoint.objects().collect();
        let lengths: BTreeMap<&str, u64> = expected["objects"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, object)| (name.as_str(), object["length"].as_u64().unwrap()))
            .collect();
        assert_eq!(objects, lengths, "{}", dir.display());
        checkpoint.verify().unwrap();
    }
}

#[test]
fn any_range_of_any_tensor_is_that_part_of_the_whole() {
    for name in ["hand_dense", "hand_moe", "hand_moe_2p", "minimal_no_torch"] {
        let checkpoint = TorchDistCheckpoint::open(&golden("torch_dist").join(name)).unwrap();
        for (name, _) in checkpoint.tensors() {
            let bytes = whole(&checkpoint, name);
            let mut state = 12345usize;
            for _ in 0..60.min(bytes.len()) {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let start = (state >> 20) % bytes.len();
                let end = start + (state >> 40) % (bytes.len() - start + 1);
                let mut part = vec![0x55; end - start];
                checkpoint.read(name, start as u64, &mut part).unwrap();
                assert_eq!(part, bytes[start..end], "{name} {start}..{end}");
            }
        }
    }
}

#[test]
fn a_range_reads_no_byte_behind_it() {
    let copy = copied(&golden("torch_dist/minimal_no_torch"));
    let checkpoint = TorchDistCheckpoint::open(copy.path()).unwrap();
    let name = "decoder.layers.0.self_attention.linear_qkv.weight";
    let bytes = whole(&checkpoint, name);
    let path = copy.path().join("__0_0.distcp");
    let file = fs::read(&path).unwrap();
    let at = file
        .windows(bytes.len())
        .position(|window| window == bytes)
        .unwrap();
    let row_bytes = 16 * 4;
    let cut = fs::OpenOptions::new().write(true).open(&path).unwrap();
    cut.set_len((at + 5 * row_bytes) as u64).unwrap();
    let mut rows = vec![0; 2 * row_bytes];
    checkpoint
        .read(name, 3 * row_bytes as u64, &mut rows)
        .unwrap();
    assert_eq!(rows, bytes[3 * row_bytes..5 * row_bytes]);
    assert!(
        checkpoint
            .read(name, 4 * row_bytes as u64, &mut rows)
            .is_err()
    );
}

#[test]
fn a_run_opens_at_its_newest_iteration() {
    for name in [
        "torch_dist/mcore_dense_tp2pp2",
        "torch_dist/mcore_moe_bf16_tp2pp2ep2",
        "megatron/torch_dist_bridge/dense_vl_kv2",
    ] {
        let checkpoint = TorchDistCheckpoint::open(&golden(name)).unwrap();
        assert!(checkpoint.dir().parent().unwrap().ends_with(name));
        let bridge = !name.contains("dense_tp2pp2");
        assert_eq!(checkpoint.run_config().is_some(), bridge, "{name}");
    }
}

#[test]
fn a_directory_of_megatron_bridge_holds_the_keys_of_its_model() {
    let dir = golden("megatron/torch_dist_bridge/dense_vl_kv2");
    let checkpoint = TorchDistCheckpoint::open(&dir).unwrap();
    let text = fs::read(golden("megatron/sharded.dense_vl_kv2.json")).unwrap();
    let sharded: Value = serde_json::from_slice(&text).unwrap();
    let mut shapes: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for entry in sharded["ranks"][0]["entries"].as_array().unwrap() {
        if entry[3] != "object" {
            let shape = entry[4].as_array().unwrap();
            let shape = shape.iter().map(|size| size.as_u64().unwrap()).collect();
            shapes.insert(entry[2].as_str().unwrap(), shape);
        }
    }
    let found: BTreeMap<&str, Vec<u64>> = checkpoint
        .model_tensors()
        .map(|(name, info)| (name, info.shape.iter().map(|size| *size as u64).collect()))
        .collect();
    assert_eq!(found, shapes);
    checkpoint.verify().unwrap();
}

#[test]
fn common_state_is_read_as_plain_data() {
    let open = |name: &str| TorchDistCheckpoint::open(&golden("torch_dist").join(name)).unwrap();
    for name in [
        "mcore_dense_tp2pp2",
        "mcore_dense_dp2_optim",
        "minimal_no_torch",
    ] {
        let common = open(name).common().unwrap().unwrap();
        assert_eq!(common.get("iteration"), Some(&Plain::Int(7)), "{name}");
        assert_eq!(
            common.get("checkpoint_version"),
            Some(&Plain::Float(3.0)),
            "{name}"
        );
    }
    let common = open("mcore_dense_tp2pp2").common().unwrap().unwrap();
    let args = common.get("args").unwrap();
    assert!(matches!(args, Plain::Object(class, _) if class == "argparse.Namespace"));
    assert_eq!(args.get("num_layers"), Some(&Plain::Int(4)));
    assert_eq!(open("hand_dense").common().unwrap(), None);
}

#[test]
fn optimizer_states_are_no_model_tensors() {
    let dir = golden("torch_dist/mcore_dense_dp2_optim");
    let checkpoint = TorchDistCheckpoint::open(&dir).unwrap();
    let model = checkpoint.model_tensors().count();
    assert!(model > 0 && model < checkpoint.tensors().len());
    assert!(
        checkpoint
            .model_tensors()
            .all(|(name, _)| !name.contains("exp_avg"))
    );
}

/// Writes the tensors of a directory anew, in pieces of odd sizes from the back to the front.
fn rewritten(checkpoint: &TorchDistCheckpoint, layout: &TorchDistLayout) -> tempfile::TempDir {
    let out = tempfile::tempdir().unwrap();
    let writer = TorchDistWriter::create(layout, &out.path().join("run"), Overwrite::No).unwrap();
    for (name, _) in &layout.tensors {
        let bytes = whole(checkpoint, name);
        for start in (0..bytes.len()).step_by(777).rev() {
            let piece = &bytes[start..bytes.len().min(start + 777)];
            writer.write(name, start as u64, piece).unwrap();
        }
    }
    writer.finish().unwrap();
    out
}

fn layout_of(checkpoint: &TorchDistCheckpoint) -> TorchDistLayout {
    TorchDistLayout {
        tensors: checkpoint
            .tensors()
            .map(|(name, info)| (name.to_owned(), info.clone()))
            .collect(),
        iteration: 7,
        ..TorchDistLayout::default()
    }
}

#[test]
fn what_is_written_reads_back_equal_at_any_chunk_size() {
    for dir in directories() {
        let checkpoint = TorchDistCheckpoint::open(&dir).unwrap();
        for max_chunk_bytes in [100, 5000, 1 << 30] {
            let mut layout = layout_of(&checkpoint);
            layout.max_chunk_bytes = max_chunk_bytes;
            layout.extra_states = vec!["a._extra_state/shard_0_1".to_owned()];
            let out = rewritten(&checkpoint, &layout);
            let again = TorchDistCheckpoint::open(&out.path().join("run")).unwrap();
            assert!(
                again.tensors().eq(checkpoint.tensors()),
                "{}",
                dir.display()
            );
            for (name, _) in checkpoint.tensors() {
                assert_eq!(whole(&again, name), whole(&checkpoint, name), "{name}");
                assert!(again.chunks(name).count() > 0 || again.info(name).unwrap().numel() == 0);
            }
            assert_eq!(again.objects().count(), 1);
            again.verify().unwrap();
            let common = again.common().unwrap().unwrap();
            assert_eq!(common.get("iteration"), Some(&Plain::Int(7)));
        }
    }
}

#[test]
fn written_items_are_those_of_the_smallest_writer_byte_for_byte() {
    let dir = golden("torch_dist/minimal_no_torch");
    let checkpoint = TorchDistCheckpoint::open(&dir).unwrap();
    let out = rewritten(&checkpoint, &layout_of(&checkpoint));
    let again = TorchDistCheckpoint::open(&out.path().join("run")).unwrap();
    let (theirs, ours) = (
        fs::read(dir.join("__0_0.distcp")).unwrap(),
        fs::read(again.dir().join("__0_0.distcp")).unwrap(),
    );
    let mut compared = 0;
    for (name, info) in checkpoint.tensors() {
        let (golden, written): (Vec<_>, Vec<_>) = (
            checkpoint.chunks(name).collect(),
            again.chunks(name).collect(),
        );
        if golden.len() != 1 || written.len() != 1 {
            continue;
        }
        let item = |bytes: &[u8], offset: u64, len: u64| {
            bytes[usize::try_from(offset).unwrap()..][..usize::try_from(len).unwrap()].to_vec()
        };
        let golden = item(&theirs, golden[0].file_offset, golden[0].num_bytes);
        let written = item(&ours, written[0].file_offset, written[0].num_bytes);
        assert!(golden == written, "{name} {info:?}");
        compared += 1;
    }
    assert!(compared >= 17, "{compared}");
}

#[test]
fn a_flipped_bit_is_found_and_named() {
    let copy = copied(&golden("torch_dist/minimal_no_torch"));
    let name = "strided.row_slice";
    let checkpoint = TorchDistCheckpoint::open(copy.path()).unwrap();
    let bytes = whole(&checkpoint, name);
    let item = usize::try_from(checkpoint.chunks(name).next().unwrap().file_offset).unwrap();
    let path = copy.path().join("__0_0.distcp");
    let mut file = fs::read(&path).unwrap();
    let within = file[item..]
        .windows(bytes.len())
        .position(|window| window == bytes)
        .unwrap();
    let at = item + within;
    file[at + 17] ^= 4;
    fs::write(&path, file).unwrap();
    let error = TorchDistCheckpoint::open(copy.path())
        .unwrap()
        .verify()
        .unwrap_err();
    let found = problems(error);
    assert_eq!(found.len(), 1);
    assert!(found[0].to_string().contains(name), "{}", found[0]);
}

#[test]
fn a_cut_or_missing_data_file_is_refused_when_opened() {
    let copy = copied(&golden("torch_dist/hand_moe"));
    let path = copy.path().join("__1_0.distcp");
    let file = fs::read(&path).unwrap();
    fs::write(&path, &file[..file.len() - 1]).unwrap();
    let found = problems(TorchDistCheckpoint::open(copy.path()).unwrap_err());
    assert!(
        matches!(found[..], [TorchDistProblem::Truncated { .. }]),
        "{found:?}"
    );
    fs::remove_file(&path).unwrap();
    let found = problems(TorchDistCheckpoint::open(copy.path()).unwrap_err());
    assert!(
        matches!(found[..], [TorchDistProblem::MissingFile { .. }]),
        "{found:?}"
    );
    fs::rename(
        copy.path().join(".metadata"),
        copy.path().join(".metadata.tmp"),
    )
    .unwrap();
    let found = problems(TorchDistCheckpoint::open(copy.path()).unwrap_err());
    assert_eq!(found, [TorchDistProblem::Interrupted]);
}

#[test]
fn an_unfinished_or_dropped_writer_leaves_nothing() {
    let checkpoint = TorchDistCheckpoint::open(&golden("torch_dist/hand_dense")).unwrap();
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("run");
    let layout = layout_of(&checkpoint);
    let writer = TorchDistWriter::create(&layout, &target, Overwrite::No).unwrap();
    let error = writer.finish().unwrap_err();
    assert!(
        matches!(error, CheckpointError::Unfinished { .. }),
        "{error}"
    );
    let writer = TorchDistWriter::create(&layout, &target, Overwrite::No).unwrap();
    writer.write("mask", 0, &[1, 0, 1]).unwrap();
    assert!(
        writer.write("mask", 2, &[1]).is_err(),
        "a byte is written twice"
    );
    assert!(writer.write("mask", 8, &[1, 1]).is_err(), "behind the end");
    drop(writer);
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
}

#[test]
fn another_backend_and_a_bad_tracker_are_refused() {
    let copy = copied(&golden("torch_dist/minimal_no_torch"));
    let json = r#"{"sharded_backend": "zarr", "sharded_backend_version": 1}"#;
    fs::write(copy.path().join("metadata.json"), json).unwrap();
    let found = problems(TorchDistCheckpoint::open(copy.path()).unwrap_err());
    assert!(
        found[0].to_string().contains("`zarr` version 1"),
        "{}",
        found[0]
    );
    let run = tempfile::tempdir().unwrap();
    for word in ["", "../../x", "-1", "7 8", "99999999999999999999999"] {
        fs::write(run.path().join("latest_checkpointed_iteration.txt"), word).unwrap();
        let found = problems(TorchDistCheckpoint::open(run.path()).unwrap_err());
        assert!(
            matches!(found[..], [TorchDistProblem::Tracker { .. }]),
            "{found:?}"
        );
    }
}

#[test]
fn every_dtype_of_the_goldens_is_known() {
    let checkpoint = TorchDistCheckpoint::open(&golden("torch_dist/hand_dense")).unwrap();
    let info = checkpoint.info("scale_e4m3").unwrap();
    assert_eq!((info.dtype, info.shape), (Dtype::F8E4M3, vec![8, 4]));
}
