//! The command line: records of checksums.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tests::golden;

use crate::program::trainer;
use crate::shard::{checkpoint, convert, words};
use crate::verify::copied;

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn record(path: &Path) {
    let (code, _, stderr) = trainer(["inspect", &text(path), "--checksum", "--record"]);
    assert_eq!(code, 0, "{stderr}");
}

/// Exit code and stdout of a checkpoint held against its record.
fn check(path: &Path) -> (i32, String) {
    let (code, stdout, stderr) = trainer(["verify", &text(path)]);
    assert_eq!(stderr, "", "{stdout}");
    (code, stdout)
}

/// Every file, one bit of it at several places.
fn every_flipped_bit_is_found(root: &Path, files: &Path, more: usize) {
    record(root);
    assert_eq!(check(root).0, 0);
    let mut checked = 0;
    for entry in fs_err::read_dir(files).unwrap() {
        let file = entry.unwrap().path();
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        if name == "checksums.json" {
            continue;
        }
        let kept = fs_err::read(&file).unwrap();
        for place in 0..more {
            let mut bytes = kept.clone();
            let at = (kept.len() - 1) * place / (more - 1).max(1);
            bytes[at] ^= 0x10;
            fs_err::write(&file, &bytes).unwrap();
            let (code, stdout) = check(root);
            assert_eq!(code, 1, "byte {at} of {name}: {stdout}");
            let words = format!("file `{name}`: its bytes are not those that were recorded");
            assert!(stdout.contains(&words), "byte {at} of {name}: {stdout}");
        }
        fs_err::write(&file, &kept[..kept.len() - 1]).unwrap();
        assert_eq!(check(root).0, 1, "{name} cut short");
        fs_err::remove_file(&file).unwrap();
        let (code, stdout) = check(root);
        assert_eq!(code, 1);
        assert!(
            stdout.contains(&format!("file `{name}`: it is missing")),
            "{stdout}"
        );
        fs_err::write(&file, &kept).unwrap();
        checked += 1;
    }
    assert!(checked >= 3);
    let (code, stdout) = check(root);
    assert_eq!(code, 0);
    assert!(
        stdout.contains(&format!("as recorded: {checked} files")),
        "{stdout}"
    );
}

#[test]
fn one_flipped_bit_in_any_file_of_a_model_is_found() {
    let scratch = tempfile::tempdir().unwrap();
    let ours = scratch.path().join("model");
    copied(&golden("checkpoints/moe_vl"), &ours);
    every_flipped_bit_is_found(&ours, &ours, 5);
}

/// Bytes between the archives of tensors belong to no value; the record has them all the same.
#[test]
fn one_flipped_bit_in_any_file_of_a_torch_dist_directory_is_found() {
    let scratch = tempfile::tempdir().unwrap();
    let ours = scratch.path().join("hand");
    copied(&golden("torch_dist/hand_dense"), &ours);
    every_flipped_bit_is_found(&ours, &ours, 40);
    let run = scratch.path().join("run");
    copied(&golden("torch_dist/mcore_dense_tp2pp2"), &run);
    every_flipped_bit_is_found(&run.join("iter_0000007"), &run.join("iter_0000007"), 2);
    // The record of an iteration is found by way of the run, too.
    assert_eq!(check(&run).0, 0);
}

#[test]
fn tensors_that_changed_are_named() {
    let scratch = tempfile::tempdir().unwrap();
    let ours = scratch.path().join("model");
    copied(&golden("checkpoints/dense_vl"), &ours);
    record(&ours);
    let file = ours.join("model.safetensors");
    let mut bytes = fs_err::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs_err::write(&file, &bytes).unwrap();
    let (code, stdout, _) = trainer(["verify", &text(&ours), "--json"]);
    assert_eq!(code, 1);
    let found: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(
        (&found["equal"], &found["tensors"]),
        (&false.into(), &104.into())
    );
    let damage = found["damage"].as_array().unwrap();
    let kinds: Vec<&str> = damage
        .iter()
        .map(|one| one["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["file", "tensor"]);
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let tensors = header.tensors();
    let (wanted, _) = tensors
        .iter()
        .max_by_key(|(_, info)| info.data_offsets.1)
        .unwrap();
    assert_eq!(damage[1]["name"], wanted.as_str());
}

/// The record has what torch's own reader found.
#[test]
fn a_record_has_the_hashes_of_the_assembled_tensors() {
    let scratch = tempfile::tempdir().unwrap();
    let ours = scratch.path().join("hand");
    copied(&golden("torch_dist/hand_moe"), &ours);
    record(&ours);
    let json =
        |path: PathBuf| -> Value { serde_json::from_slice(&fs_err::read(path).unwrap()).unwrap() };
    let (found, expected) = (
        json(ours.join("checksums.json")),
        json(ours.join("expected.json")),
    );
    let expected = expected["tensors"].as_object().unwrap();
    assert_eq!(found["tensors"].as_object().unwrap().len(), expected.len());
    for (name, tensor) in expected {
        for key in ["dtype", "shape", "sha256"] {
            assert_eq!(found["tensors"][name][key], tensor[key], "{name}");
        }
    }
}

#[test]
fn conversions_leave_a_record_that_their_output_is_held_against() {
    let scratch = tempfile::tempdir().unwrap();
    let (megatron, out) = (scratch.path().join("megatron"), scratch.path().join("out"));
    let rank = scratch.path().join("rank.safetensors");
    let model = checkpoint("dense_vl");
    for (command, more) in [
        (
            "import",
            format!("--no-progress --megatron-path {}", megatron.display()),
        ),
        (
            "export",
            format!(
                "--no-progress --megatron-path {} --hf-path {}",
                megatron.display(),
                out.display()
            ),
        ),
        ("shard", format!("--tp 2 --output {}", rank.display())),
    ] {
        let mut args = vec![
            "--hf-model".to_owned(),
            model.clone(),
            "--checksum".to_owned(),
        ];
        args.extend(words(&more));
        let (code, _, stderr) = convert(command, &args);
        assert_eq!(code, 0, "{command}: {stderr}");
    }
    for (path, file) in [
        (&megatron, megatron.join("iter_0000000/common.pt")),
        (&out, out.join("config.json")),
        (&rank, rank.clone()),
    ] {
        assert_eq!(check(path).0, 0, "{}", path.display());
        let mut bytes = fs_err::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs_err::write(&file, bytes).unwrap();
        assert_eq!(check(path).0, 1, "{}", file.display());
    }
}

/// Beside a file, not in it: it would stay behind and call the new file damaged.
#[test]
fn a_record_goes_with_the_shard_that_it_was_made_of() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("rank.safetensors");
    let shard = |more: &str| {
        let mut args = words(more);
        args.extend(["--hf-model".to_owned(), checkpoint("dense_vl")]);
        args.extend(["--output".to_owned(), text(&file)]);
        let (code, _, stderr) = convert("shard", &args);
        assert_eq!(code, 0, "{stderr}");
    };
    let record = scratch.path().join("rank.safetensors.checksums.json");
    shard("--tp 2 --checksum");
    assert!(record.is_file());
    shard("--tp 2 --rank 1 --overwrite");
    assert!(!record.exists());
    shard("--tp 2 --rank 1 --overwrite --checksum");
    assert_eq!(check(&file).0, 0);
}

#[test]
fn without_a_record_or_with_a_broken_one_there_is_an_error() {
    let scratch = tempfile::tempdir().unwrap();
    let ours = scratch.path().join("model");
    copied(&golden("checkpoints/dense_vl"), &ours);
    let refused = |words: &str| {
        let (code, stdout, stderr) = trainer(["verify", &text(&ours)]);
        assert_eq!((code, stdout.as_str()), (1, ""));
        assert!(stderr.contains(words), "no `{words}` in {stderr}");
    };
    refused("--checksum --record");
    record(&ours);
    let file = ours.join("checksums.json");
    let kept = fs_err::read_to_string(&file).unwrap();
    fs_err::write(&file, &kept[..kept.len() / 2]).unwrap();
    refused("is no record of checksums");
    fs_err::write(
        &file,
        kept.replace("\"schema_version\": 1", "\"schema_version\": 2"),
    )
    .unwrap();
    refused("has schema_version 2");
    for name in ["../config.json", "/etc/hostname", "..", "a\\\\b"] {
        fs_err::write(&file, kept.replace("config.json", name)).unwrap();
        refused("a plain name in the same directory");
    }
    let (code, _, stderr) = trainer(["verify", &text(&ours), "--torch-dtype", "bfloat16"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("<B>"), "{stderr}");
    let (code, _, _) = trainer(["inspect", &text(&ours), "--record"]);
    assert_eq!(code, 2);
}
