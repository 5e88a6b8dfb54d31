//! The command line: convert unshard.

use std::path::{Path, PathBuf};

use bridge_core::checkpoint::shard::{ShardFile, ShardInfo, ShardWriter};
use bridge_core::checkpoint::{Overwrite, TensorInfo, TensorSink, TensorSource};
use tests::golden;

use crate::shard::{checkpoint, convert, words};

/// Writes every stage of ranks `0..ranks` and gives the files.
fn write_set(name: &str, flags: &str, ranks: usize, stages: usize, dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for rank in 0..ranks {
        for stage in 0..stages {
            let file = dir.join(format!("rank{rank}.{stage}.safetensors"));
            let mut args = vec!["--hf-model".to_owned(), checkpoint(name)];
            args.extend(words(flags));
            args.extend(words(&format!(
                "--rank {rank} --vp-stage {stage} --output {}",
                file.display()
            )));
            let (code, _, stderr) = convert("shard", &args);
            assert_eq!(code, 0, "{stderr}");
            files.push(file);
        }
    }
    files
}

pub(crate) fn unshard(shards: &[PathBuf], name: &str, output: &Path, more: &str) -> (i32, String) {
    let mut args: Vec<String> = shards
        .iter()
        .map(|file| file.to_string_lossy().into_owned())
        .collect();
    args.extend(["--hf-model".to_owned(), checkpoint(name)]);
    args.extend([
        "--hf-path".to_owned(),
        output.to_string_lossy().into_owned(),
    ]);
    args.extend(words(more));
    let (code, stdout, stderr) = convert("unshard", &args);
    assert_eq!(stdout, "");
    (code, stderr)
}

/// The shards make no directory, and the error says these words.
fn assert_refused(shards: &[PathBuf], name: &str, output: &Path, words: &[&str]) {
    let (code, stderr) = unshard(shards, name, output, "");
    assert_eq!(code, 1, "{stderr}");
    for words in words {
        assert!(stderr.contains(words), "no `{words}` in {stderr}");
    }
    assert!(!output.exists());
}

/// Every file of one directory equals that of the other.
pub(crate) fn assert_same_directory(found: &Path, wanted: &Path) {
    let list = |dir: &Path| {
        let mut names: Vec<_> = fs_err::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    assert_eq!(list(found), list(wanted));
    for name in list(wanted) {
        let same =
            fs_err::read(found.join(&name)).unwrap() == fs_err::read(wanted.join(&name)).unwrap();
        assert!(same, "{}", name.display());
    }
}

/// Shards a golden and puts it together again.
fn comes_back(name: &str, flags: &str, ranks: usize, stages: usize) {
    let scratch = tempfile::tempdir().unwrap();
    let mut files = write_set(name, flags, ranks, stages, scratch.path());
    files.reverse();
    let output = scratch.path().join("out");
    let (code, stderr) = unshard(&files, name, &output, "");
    assert_eq!(code, 0, "{name} {flags}: {stderr}");
    assert!(stderr.contains("copies of parameters agree"), "{stderr}");
    assert_same_directory(&output, &golden(&format!("checkpoints/{name}")));
}

#[test]
fn dense_models_come_back_byte_for_byte_from_any_layout() {
    comes_back("dense_vl", "", 1, 1);
    comes_back("dense_vl", "--tp 4", 4, 1);
    comes_back("dense_vl", "--tp 2 --pp 2 --vpp 2", 4, 2);
    comes_back("dense_vl", "--pp 4 --pipeline-layout Et|t*3|m|L", 4, 1);
    // A stage without a single parameter is a file too.
    comes_back("dense_vl", "--pp 4 --pipeline-layout Et*2||t*2|mL", 4, 1);
    let padded = "--tp 2 --make-vocab-size-divisible-by 96";
    comes_back("dense_vl", padded, 2, 1);
    comes_back("dense_vl_tied_bf16", "--tp 2 --pp 2 --vpp 2", 4, 2);
}

/// Elsewhere a model saved with EP 4 and TP 2 came back on one machine with its experts not gathered, or wrong.
#[test]
fn experts_saved_with_ep4_and_tp2_come_back_as_they_were() {
    comes_back("moe_vl", "--ep 4 --tp 2", 4, 1);
    comes_back("moe_vl", "--tp 2 --pp 2 --ep 2 --etp 2", 8, 1);
    comes_back("moe_vl", "--tp 2 --etp 4 --sequential-experts", 4, 1);
    comes_back("moe_vl_bf16", "--pp 2 --vpp 2 --ep 2", 4, 2);
}

/// Context- and data-parallel ranks hold what others hold; a set may have them or not.
#[test]
fn replicas_are_taken_and_compared() {
    comes_back("moe_vl_bf16", "--tp 2 --cp 2 --ep 2 --dp 2", 8, 1);
    let scratch = tempfile::tempdir().unwrap();
    let files = write_set("moe_vl", "--tp 2 --dp 2 --ep 2", 4, 1, scratch.path());
    let output = scratch.path().join("out");
    // Ranks 0 and 1 hold everything.
    let (code, stderr) = unshard(&files[..2], "moe_vl", &output, "");
    assert_eq!(code, 0, "{stderr}");
    // One bit of a tensor-parallel replica, and one of a data-parallel one.
    for (file, rank, tensor) in [
        (
            1,
            1,
            "language_model.decoder.layers.3.self_attention.q_layernorm.weight",
        ),
        (
            2,
            2,
            "language_model.decoder.layers.0.mlp.experts.linear_fc1.weight0",
        ),
    ] {
        let kept = fs_err::read(&files[file]).unwrap();
        flip(&files[file], tensor);
        let (code, stderr) = unshard(&files, "moe_vl", &output, "--overwrite");
        assert_eq!(code, 1);
        let words = format!("`{tensor}` of rank {rank} (tp_rank");
        assert!(stderr.contains(&words), "no `{words}` in {stderr}");
        assert!(stderr.contains("of rank 0 (tp_rank 0"), "{stderr}");
        assert!(stderr.contains("from element 2 on"), "{stderr}");
        fs_err::write(&files[file], kept).unwrap();
    }
    assert_same_directory(&output, &golden("checkpoints/moe_vl"));
}

/// Changes a byte of element 2 of a tensor.
fn flip(file: &Path, tensor: &str) {
    let mut bytes = fs_err::read(file).unwrap();
    let (length, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let start = 8 + length + header.info(tensor).unwrap().data_offsets.0;
    bytes[start + 2 * 4] ^= 1;
    fs_err::write(file, bytes).unwrap();
}

#[test]
fn a_rank_that_is_missing_doubled_or_foreign_is_named() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("out");
    let sets = scratch.path().join("sets");
    let make = |folder: &str, name: &str, flags: &str, ranks: usize| {
        let dir = sets.join(folder);
        fs_err::create_dir_all(&dir).unwrap();
        write_set(name, flags, ranks, 1, &dir)
    };
    let files = make("moe", "moe_vl", "--tp 2 --pp 2", 4);
    let refused = |shards: &[PathBuf], words: &[&str]| {
        assert_refused(shards, "moe_vl", &output, words);
    };
    let three = [files[0].clone(), files[1].clone(), files[3].clone()];
    refused(
        &three,
        &[
            "1 of 4 rank files are missing, first that of rank 2 (tp_rank 0, pp_rank 1, vp_stage 0, ep_rank 0, etp_rank 0)",
        ],
    );
    let copy = sets.join("moe/again.safetensors");
    fs_err::copy(&files[2], &copy).unwrap();
    refused(
        &[sets.join("moe")],
        &[
            "again.safetensors and",
            "both hold rank 2 (tp_rank 0, pp_rank 1",
        ],
    );
    fs_err::remove_file(&copy).unwrap();
    for (folder, flags, words) in [
        ("sizes", "--tp 4 --pp 2", "parallel sizes TP 4 CP 1 PP 2"),
        ("head", "--tp 2 --pp 2 --no-mtp", "without_mtp true"),
        (
            "dtype",
            "--tp 2 --pp 2 --torch-dtype bfloat16",
            "torch_dtype bfloat16",
        ),
        (
            "names",
            "--tp 2 --pp 2 --sequential-experts",
            "sequential_experts true",
        ),
        (
            "split",
            "--tp 2 --pp 2 --num-layers-in-first-pipeline-stage 3",
            "the pipeline options",
        ),
        (
            "rows",
            "--tp 2 --pp 2 --make-vocab-size-divisible-by 96",
            "padded_vocab_size 1152",
        ),
    ] {
        let foreign = make(folder, "moe_vl", flags, 1);
        let mut mixed = files.clone();
        mixed[0] = foreign[0].clone();
        mixed.rotate_left(1);
        refused(
            &mixed,
            &[words, "a set comes from one model and one layout"],
        );
    }
    let dense = make("dense", "dense_vl", "--tp 2 --pp 2", 4);
    refused(&dense, &["architecture Qwen3_5ForConditionalGeneration"]);
    refused(
        &[files[0].clone(), dense[1].clone()],
        &[
            "architecture Qwen3_5ForConditionalGeneration",
            "rank0.0.safetensors for Qwen3_5Moe",
        ],
    );
}

#[test]
fn a_head_that_was_left_out_is_missed_or_copied_on_request() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("out");
    let files = write_set("moe_vl", "--tp 2 --no-mtp", 2, 1, scratch.path());
    let (code, stderr) = unshard(&files, "moe_vl", &output, "");
    assert_eq!(code, 1);
    assert!(stderr.contains("first `mtp."), "{stderr}");
    assert!(stderr.contains("pass --missing copy"), "{stderr}");
    assert!(!output.exists());
    let (code, stderr) = unshard(&files, "moe_vl", &output, "--missing copy");
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stderr.contains("that the shards lack are the reference's"),
        "{stderr}"
    );
    assert_same_directory(&output, &golden("checkpoints/moe_vl"));
}

#[test]
fn a_damaged_or_foreign_file_is_an_error_with_its_name() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("out");
    let files = write_set("dense_vl", "--tp 2", 2, 1, scratch.path());
    let kept = fs_err::read(&files[1]).unwrap();
    let refused = |shards: &[PathBuf], words: &[&str]| {
        assert_refused(shards, "dense_vl", &output, words);
    };
    fs_err::write(&files[1], &kept[..kept.len() - 1]).unwrap();
    refused(&files, &["rank1.0.safetensors", "fetch it again"]);
    fs_err::copy(golden("checkpoints/dense_vl/model.safetensors"), &files[1]).unwrap();
    refused(
        &files,
        &[
            "rank1.0.safetensors",
            "does not say which rank it belongs to",
        ],
    );
    fs_err::write(&files[1], &kept).unwrap();
    refused(&[PathBuf::from("no/such/file")], &["no/such/file"]);
    let empty = scratch.path().join("empty");
    fs_err::create_dir(&empty).unwrap();
    // What a killed writer leaves is hidden and named otherwise.
    fs_err::copy(&files[0], empty.join(".rank0.safetensors.partial-x1")).unwrap();
    fs_err::copy(&files[0], empty.join(".rank0.safetensors")).unwrap();
    refused(&[empty], &["holds no .safetensors files"]);

    // Files that lie about themselves, written by the library.
    let first = ShardFile::open(&files[0]).unwrap();
    let info = first.shard().clone();
    let rewrite = |info: &ShardInfo, tensors: &[(String, TensorInfo)]| {
        let target = &files[1];
        let writer = ShardWriter::create(info, tensors, target, Overwrite::Yes).unwrap();
        for (name, info) in tensors {
            let bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
            writer.write(name, 0, &bytes).unwrap();
        }
        writer.finish().unwrap();
    };
    let real = ShardFile::open(&files[1]).unwrap();
    let tensors: Vec<(String, TensorInfo)> = real
        .tensors()
        .map(|(name, info)| (name.to_owned(), info.clone()))
        .collect();
    let mut elsewhere = real.shard().clone();
    elsewhere.rank.tp_rank = 0;
    rewrite(&elsewhere, &tensors);
    refused(
        &files,
        &[
            "rank1.0.safetensors calls itself rank 1 (tp_rank 0",
            "does not have",
        ],
    );
    elsewhere.rank = info.rank;
    elsewhere.vp_stage = 1;
    rewrite(&elsewhere, &tensors);
    refused(&files, &["vp_stage 1", "does not have"]);
    rewrite(real.shard(), &tensors[1..]);
    refused(
        &files,
        &[
            "does not hold the tensors of its rank",
            &tensors[0].0,
            "is missing",
        ],
    );
    let mut more = tensors.clone();
    more.push(("extra".to_owned(), tensors[0].1.clone()));
    rewrite(real.shard(), &more);
    refused(&files, &["`extra` is not part of it and would be lost"]);
    let mut narrow = tensors.clone();
    narrow[0].1.shape[0] -= 1;
    rewrite(real.shard(), &narrow);
    refused(&files, &["has shape", "the layout implies"]);
    assert!(first.info(&tensors[0].0).is_some());
}

/// A writer that stops, for whatever reason, leaves the destination as it was.
#[test]
fn an_unfinished_shard_is_not_there() {
    let scratch = tempfile::tempdir().unwrap();
    let files = write_set("dense_vl", "", 1, 1, scratch.path());
    let file = ShardFile::open(&files[0]).unwrap();
    let tensors: Vec<(String, TensorInfo)> = file
        .tensors()
        .map(|(name, info)| (name.to_owned(), info.clone()))
        .collect();
    let target = scratch.path().join("new.safetensors");
    let create = || ShardWriter::create(file.shard(), &tensors, &target, Overwrite::No).unwrap();
    let writer = create();
    writer.write(&tensors[0].0, 0, &[0; 4]).unwrap();
    let twice = writer.write(&tensors[0].0, 2, &[0; 4]).unwrap_err();
    assert!(twice.to_string().contains("written before"), "{twice}");
    let error = writer.finish().unwrap_err().to_string();
    assert!(error.contains("was written to 4 of its"), "{error}");
    drop(create());
    let left = fs_err::read_dir(scratch.path()).unwrap().count();
    assert_eq!(left, 1);
    // Somebody else made the destination meanwhile.
    let writer = create();
    for (name, info) in &tensors {
        let bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
        writer.write(name, 0, &bytes).unwrap();
    }
    fs_err::write(&target, "mine").unwrap();
    writer.finish().unwrap_err();
    assert_eq!(fs_err::read(&target).unwrap(), b"mine");
}
