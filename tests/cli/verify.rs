//! The command line: verify.

use std::path::Path;

use bridge_core::checkpoint::hf::HfCheckpoint;
use bridge_core::checkpoint::torch_dist::{TorchDistCheckpoint, TorchDistLayout, TorchDistWriter};
use bridge_core::checkpoint::{Overwrite, TensorSink, TensorSource};
use serde_json::Value;
use tests::golden;

use crate::program::{model, two, two_json};
use crate::shard::{checkpoint, convert, words};

fn verify(a: &Path, b: &Path, more: &str) -> (i32, String, String) {
    two("verify", a, b, more)
}

fn compared(a: &Path, b: &Path, more: &str) -> Value {
    two_json("verify", a, b, more)
}

/// A copy of a directory whose files may be changed.
pub(crate) fn copied(from: &Path, to: &Path) {
    fs_err::create_dir_all(to).unwrap();
    for entry in fs_err::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            copied(&entry.path(), &to.join(entry.file_name()));
        } else {
            fs_err::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

fn flip(file: &Path, byte: usize, bit: u8) {
    let mut bytes = fs_err::read(file).unwrap();
    bytes[byte] ^= 1 << bit;
    fs_err::write(file, bytes).unwrap();
}

/// The first byte of a tensor in its safetensors file.
fn start_of(file: &Path, tensor: &str) -> usize {
    let bytes = fs_err::read(file).unwrap();
    let (length, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    8 + length + header.info(tensor).unwrap().data_offsets.0
}

#[test]
fn a_checkpoint_equals_itself_and_says_what_was_compared() {
    for name in ["dense_vl", "moe_vl_bf16"] {
        let (code, stdout, stderr) = verify(&model(name), &model(name), "");
        assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
        let tensors = HfCheckpoint::open(&model(name)).unwrap().names().len();
        assert!(
            stdout.contains(&format!("equal: {tensors} tensors compared")),
            "{stdout}"
        );
        assert!(stdout.contains("B: "), "{stdout}");
    }
}

/// The lowest bit of one value, at several places of every weight file.
#[test]
fn one_flipped_bit_in_any_weight_file_is_found_and_placed() {
    let scratch = tempfile::tempdir().unwrap();
    let ours = scratch.path().join("model");
    copied(&model("moe_vl"), &ours);
    let mut flipped = 0;
    for number in 1..=3 {
        let file = ours.join(format!("model-0000{number}-of-00003.safetensors"));
        let kept = fs_err::read(&file).unwrap();
        let (length, header) = safetensors::SafeTensors::read_metadata(&kept).unwrap();
        let mut tensors: Vec<_> = header.tensors().into_iter().collect();
        tensors.sort_by_key(|(name, _)| name.clone());
        for (name, info) in tensors.iter().step_by(17) {
            let last = info.data_offsets.1 - info.data_offsets.0 - 4;
            flip(&file, 8 + length + info.data_offsets.0 + last, 0);
            let found = compared(&model("moe_vl"), &ours, "");
            let differences = found["differences"].as_array().unwrap();
            assert_eq!(differences.len(), 1, "{name}");
            let one = &differences[0];
            assert_eq!(
                (&one["kind"], &one["tensor"]),
                (&"values".into(), &name.as_str().into())
            );
            assert_eq!(one["elements"], 1);
            let index: Vec<usize> = info.shape.iter().map(|size| size - 1).collect();
            assert_eq!(one["index"], serde_json::json!(index));
            assert_ne!(one["a"]["bits"], one["b"]["bits"]);
            fs_err::write(&file, &kept).unwrap();
            flipped += 1;
        }
    }
    assert!(flipped > 8);
    assert_eq!(verify(&model("moe_vl"), &ours, "").0, 0);
}

/// Relax 148 and others: files that do not fit each other.
#[test]
fn cut_swapped_and_contradictory_files_are_errors_that_name_them() {
    let scratch = tempfile::tempdir().unwrap();
    let ours = scratch.path().join("model");
    let shard = |number: usize| ours.join(format!("model-0000{number}-of-00003.safetensors"));
    let index = ours.join("model.safetensors.index.json");
    let edit = |change: &dyn Fn(&mut Value)| {
        let mut value: Value = serde_json::from_slice(&fs_err::read(&index).unwrap()).unwrap();
        change(&mut value["weight_map"]);
        fs_err::write(&index, value.to_string()).unwrap();
    };
    let refused = |words: &[&str]| {
        for (a, b) in [(&model("moe_vl"), &ours), (&ours, &model("moe_vl"))] {
            let (code, stdout, stderr) = verify(a, b, "");
            assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
            for words in words {
                assert!(stderr.contains(words), "no `{words}` in {stderr}");
            }
        }
    };
    copied(&model("moe_vl"), &ours);
    let bytes = fs_err::read(shard(2)).unwrap();
    fs_err::write(shard(2), &bytes[..bytes.len() - 1]).unwrap();
    refused(&["model-00002-of-00003", "cut short, fetch it again"]);

    copied(&model("moe_vl"), &ours);
    fs_err::rename(shard(1), scratch.path().join("aside")).unwrap();
    fs_err::rename(shard(2), shard(1)).unwrap();
    fs_err::rename(scratch.path().join("aside"), shard(2)).unwrap();
    refused(&["the index places `", "in model-00001-of-00003.safetensors"]);

    copied(&model("moe_vl"), &ours);
    edit(&|map| map["mtp.absent.weight"] = "model-00003-of-00003.safetensors".into());
    refused(&[
        "places `mtp.absent.weight` in model-00003-of-00003.safetensors, which does not hold",
    ]);

    copied(&model("moe_vl"), &ours);
    edit(&|map| {
        map.as_object_mut().unwrap().remove("lm_head.weight");
    });
    refused(&["holds `lm_head.weight`, which the index does not place there"]);
}

#[test]
fn tensors_that_one_side_lacks_and_other_shapes_and_dtypes_are_differences() {
    let found = compared(&model("dense_vl"), &model("dense_vl_tied_bf16"), "");
    let of = |kind: &str| -> Vec<&Value> {
        let differences = found["differences"].as_array().unwrap().iter();
        differences.filter(|one| one["kind"] == kind).collect()
    };
    let missing = of("missing");
    assert_eq!(missing.len(), 1);
    assert_eq!(missing[0]["tensor"], "lm_head.weight");
    assert_eq!(missing[0]["from"], "b");
    assert!(
        of("dtype")
            .iter()
            .all(|one| one["a"] == "F32" && one["b"] == "BF16")
    );
    assert!(of("dtype").len() > 60 && of("values").len() > 60);
    let (code, stdout, _) = verify(&model("dense_vl_tied_bf16"), &model("dense_vl"), "");
    assert_eq!(code, 1);
    assert!(
        stdout.contains("`lm_head.weight`: missing in A"),
        "{stdout}"
    );
    assert!(stdout.contains("dtype BF16 in A, F32 in B"), "{stdout}");
    assert!(stdout.contains("\nand "), "{stdout}");
    let found = compared(
        &model("dense_vl"),
        &golden("megatron/checkpoints/dense_vl_kv2"),
        "",
    );
    let differences = found["differences"].as_array().unwrap();
    assert!(differences.iter().any(|one| one["kind"] == "shape"
        && one["tensor"] == "model.language_model.embed_tokens.weight"
        && one["a"][0] == 1024
        && one["b"][0] == 256));
}

/// What Megatron-Core and Megatron Bridge saved holds the values of the models it was made from.
#[test]
fn directories_of_megatron_equal_the_models_they_were_made_from() {
    for (name, saved, more) in [
        ("checkpoints/dense_vl", "torch_dist/mcore_dense_tp2pp2", ""),
        (
            "checkpoints/dense_vl_tied_bf16",
            "torch_dist/mcore_dense_tied_bf16_tp1/iter_0000007",
            "--torch-dtype bfloat16",
        ),
        (
            "checkpoints/moe_vl_bf16",
            "torch_dist/mcore_moe_bf16_tp2pp2ep2",
            "--torch-dtype bfloat16",
        ),
        (
            "megatron/checkpoints/dense_vl_kv2",
            "megatron/torch_dist_bridge/dense_vl_kv2",
            "--torch-dtype bfloat16",
        ),
    ] {
        let (model, saved) = (golden(name), golden(saved));
        for (a, b) in [(&model, &saved), (&saved, &model)] {
            let (code, stdout, stderr) = verify(a, b, more);
            assert_eq!(code, 0, "{name}: {stdout} {stderr}");
            assert!(stdout.contains("torch_dist directory"), "{stdout}");
        }
    }
    // Megatron-Core's bfloat16 model keeps parameters in bfloat16 that are float32 in the checkpoint.
    let saved = golden("torch_dist/mcore_dense_tied_bf16_tp1");
    let found = compared(&model("dense_vl_tied_bf16"), &saved, "");
    let differences = found["differences"].as_array().unwrap();
    let dtypes = differences.iter().filter(|one| one["kind"] == "dtype");
    assert!(dtypes.clone().count() == 6);
    assert!(dtypes.into_iter().all(|one| {
        let key = one["tensor"].as_str().unwrap();
        key.ends_with(".A_log") || key.ends_with(".out_norm.weight")
    }));
}

#[test]
fn an_optimizer_is_passed_over_and_what_is_missing_is_named() {
    let saved = golden("torch_dist/mcore_dense_dp2_optim");
    let found = compared(&saved, &model("dense_vl"), "");
    assert_eq!(found["not_compared"]["optimizer_tensors"], 44);
    assert_eq!(found["not_compared"]["extra_states"], 5);
    let differences = found["differences"].as_array().unwrap();
    assert!(
        differences
            .iter()
            .all(|one| one["kind"] == "missing" && one["from"] == "a")
    );
    assert!(differences.len() > 50);
    // By name an optimizer is compared where both have one.
    let own = compared(&saved, &saved, "");
    assert_eq!(own["equal"], true);
    assert_eq!(own["not_compared"]["optimizer_tensors"], 0);
    assert!(own["tensors"].as_u64().unwrap() >= 44 + 22);
}

/// Values, and the checksums in its archives: bits that belong to no value are found too.
#[test]
fn one_flipped_bit_in_a_torch_dist_directory_is_found() {
    let scratch = tempfile::tempdir().unwrap();
    let ours = scratch.path().join("megatron");
    let saved = golden("torch_dist/mcore_dense_tp2pp2");
    copied(&saved, &ours);
    let mut files = 0;
    for entry in fs_err::read_dir(ours.join("iter_0000007")).unwrap() {
        let file = entry.unwrap().path();
        if file.extension().is_none_or(|end| end != "distcp") {
            continue;
        }
        files += 1;
        let kept = fs_err::read(&file).unwrap();
        for at in [kept.len() / 3, kept.len() / 2, kept.len() - kept.len() / 5] {
            flip(&file, at, 3);
            let (code, stdout, stderr) = verify(&model("dense_vl"), &ours, "");
            assert_eq!(code, 1, "{stdout} {stderr}");
            let said = format!("{stdout}{stderr}");
            let damage = ["values differ", "the file is damaged", "is malformed"];
            assert!(damage.iter().any(|words| said.contains(words)), "{said}");
            fs_err::write(&file, &kept).unwrap();
        }
        fs_err::write(&file, &kept[..kept.len() - 1]).unwrap();
        let (code, _, stderr) = verify(&model("dense_vl"), &ours, "");
        assert_eq!(code, 1);
        assert!(stderr.contains("cut short, fetch it again"), "{stderr}");
        fs_err::write(&file, &kept).unwrap();
    }
    assert_eq!(files, 8);
    assert_eq!(verify(&model("dense_vl"), &ours, "").0, 0);
}

fn shard(name: &str, flags: &str, output: &Path) {
    let mut args = vec!["--hf-model".to_owned(), checkpoint(name)];
    args.extend(words(flags));
    args.extend(words(&format!("--output {} --overwrite", output.display())));
    let (code, _, stderr) = convert("shard", &args);
    assert_eq!(code, 0, "{stderr}");
}

#[test]
fn every_rank_of_a_layout_equals_its_part_of_the_model_and_of_the_directory() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("rank.safetensors");
    let saved = golden("torch_dist/mcore_moe_bf16_tp2pp2ep2");
    let model_dir = model("moe_vl_bf16");
    let reference = format!(
        "--torch-dtype bfloat16 --hf-model {}/config.json",
        model_dir.display()
    );
    let padded = "--make-vocab-size-divisible-by 96";
    let mut padding = 0;
    for rank in 0..4 {
        shard(
            "moe_vl_bf16",
            &format!("--tp 2 --pp 2 --ep 2 --rank {rank} {padded}"),
            &file,
        );
        let found = compared(&model_dir, &file, "");
        assert_eq!(found["equal"], true, "{found}");
        padding += found["not_compared"]["padding_elements"].as_u64().unwrap();
        for (a, b) in [(&saved, &file), (&file, &saved)] {
            let (code, stdout, stderr) = verify(a, b, &reference);
            assert_eq!(code, 0, "{stdout} {stderr}");
        }
    }
    // Of the embedding, of the head's copy of it, and of the output layer.
    assert_eq!(padding, 3 * 128 * 64);
    let tensor = "language_model.output_layer.weight";
    flip(&file, start_of(&file, tensor) + 2 * 70 + 1, 6);
    for (a, b, more) in [(&model_dir, &file, ""), (&saved, &file, reference.as_str())] {
        let (code, stdout, _) = verify(a, b, more);
        assert_eq!(code, 1);
        let words = format!("`{tensor}`: 1 of ");
        assert!(stdout.contains(&words), "no `{words}` in {stdout}");
        assert!(stdout.contains("first at [1, 6]"), "{stdout}");
    }
    let (code, _, stderr) = verify(&saved, &file, "");
    assert_eq!(code, 1);
    assert!(stderr.contains("--hf-model"), "{stderr}");
    // A file in another dtype than the model's is equal in its own.
    shard(
        "dense_vl",
        "--tp 2 --rank 1 --torch-dtype bfloat16 --no-mtp",
        &file,
    );
    assert_eq!(compared(&model("dense_vl"), &file, "")["equal"], false);
    let found = compared(&file, &model("dense_vl"), "--torch-dtype bfloat16");
    assert_eq!(found["equal"], true, "{found}");
    assert!(found["not_compared"]["left_out"].as_u64().unwrap() > 5);
    let (code, _, stderr) = verify(&model("moe_vl"), &file, "");
    assert_eq!(code, 1);
    assert!(
        stderr.contains("Qwen3_5MoeForConditionalGeneration"),
        "{stderr}"
    );
}

#[test]
fn a_path_without_a_checkpoint_is_an_error() {
    let scratch = tempfile::tempdir().unwrap();
    let (code, stdout, stderr) = verify(&model("dense_vl"), scratch.path(), "");
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert!(
        stderr.contains("neither model.safetensors.index.json"),
        "{stderr}"
    );
    let (code, stdout, _) = verify(scratch.path(), &model("dense_vl"), "--json");
    assert_eq!(code, 1);
    let error: Value = serde_json::from_str(&stdout).unwrap();
    assert!(error["error"].as_str().unwrap().contains("Hugging Face"));
}

/// Experts packed in one directory and stored one by one in the other, and what `import` makes of both.
#[test]
fn forms_of_a_model_equal_each_other() {
    let scratch = tempfile::tempdir().unwrap();
    let (megatron, other) = (
        scratch.path().join("megatron"),
        scratch.path().join("other"),
    );
    let original = model("moe_vl");
    let mut args = words("--no-progress --make-vocab-size-divisible-by 100 --hf-model");
    args.push(checkpoint("moe_vl"));
    args.extend([
        "--megatron-path".to_owned(),
        megatron.to_string_lossy().into_owned(),
    ]);
    let (code, _, stderr) = convert("import", &args);
    assert_eq!(code, 0, "{stderr}");
    for form in ["packed", "per-expert"] {
        let mut args = words(&format!(
            "--no-progress --overwrite --expert-layout {form} --hf-model"
        ));
        args.push(checkpoint("moe_vl"));
        args.extend([
            "--megatron-path".to_owned(),
            megatron.to_string_lossy().into_owned(),
        ]);
        args.extend(["--hf-path".to_owned(), other.to_string_lossy().into_owned()]);
        let (code, _, stderr) = convert("export", &args);
        assert_eq!(code, 0, "{stderr}");
        for (a, b) in [
            (&original, &other),
            (&megatron, &other),
            (&original, &megatron),
        ] {
            let found = compared(a, b, "");
            assert_eq!(found["equal"], true, "{form}: {found}");
            assert!(found["tensors"].as_u64().unwrap() > 100);
        }
        assert!(compared(&megatron, &other, "")["not_compared"]["padding_elements"] != 0);
        let file = other.join("model-00001-of-00003.safetensors");
        let bytes = fs_err::read(&file).unwrap();
        flip(&file, bytes.len() - 2, 0);
        for a in [&original, &megatron] {
            let found = compared(a, &other, "");
            let differences = found["differences"].as_array().unwrap();
            assert_eq!(differences.len(), 1, "{form}: {found}");
            assert_eq!(differences[0]["elements"], 1);
        }
    }
}

/// Newer versions call the layer of the head `mtp_model_layer`. By name nothing of it is there; through the mapping all is.
#[test]
fn both_words_for_the_layer_of_the_head_are_one() {
    let scratch = tempfile::tempdir().unwrap();
    let saved = golden("torch_dist/mcore_dense_tp2pp2");
    let source = TorchDistCheckpoint::open(&saved).unwrap();
    let newer = |key: &str| key.replace("transformer_layer", "mtp_model_layer");
    let tensors = source.tensors();
    let layout = TorchDistLayout {
        tensors: tensors
            .map(|(key, info)| (newer(key), info.clone()))
            .collect(),
        ..TorchDistLayout::default()
    };
    let ours = scratch.path().join("newer");
    let writer = TorchDistWriter::create(&layout, &ours, Overwrite::No).unwrap();
    for (key, info) in source.tensors() {
        let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
        source.read(key, 0, &mut bytes).unwrap();
        writer.write(&newer(key), 0, &bytes).unwrap();
    }
    writer.finish().unwrap();
    let head = source
        .tensors()
        .filter(|(key, _)| key.contains("transformer_layer"))
        .count();
    assert!(head > 5);
    let differences = |more: &str| {
        let found = compared(&saved, &ours, more);
        found["differences"].as_array().unwrap().len()
    };
    assert_eq!(differences(""), 2 * head);
    let reference = model("dense_vl").join("config.json");
    assert_eq!(
        differences(&format!("--hf-model {}", reference.display())),
        0
    );
    assert_eq!(compared(&ours, &model("dense_vl"), "")["equal"], true);
}
