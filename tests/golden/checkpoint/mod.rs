//! Hugging Face directories: round trips, what went wrong elsewhere, and crash-safe writing.

mod families;
mod fp8;
mod hostile;
mod import_export;
mod refusals;
mod staging;
mod write_files;

use std::path::{Path, PathBuf};

use bridge_core::checkpoint::hf::{HfCheckpoint, HfLayout, HfWriter};
use bridge_core::checkpoint::{Links, Overwrite, TensorInfo, TensorSource};
use bridge_core::convert::{ExecuteOptions, copy_tensors, execute};
use bridge_core::plan::PlanOptions;
use bridge_core::{AutoBridge, Dtype};
use tests::golden;
use tests::tensors::{Tensors, read_all};

use crate::mapping::memory_for;

/// The directory of a golden checkpoint; those that are renamings of others are made in `scratch`.
pub(crate) fn directory(name: &str, scratch: &Path) -> PathBuf {
    let own = golden(&format!("checkpoints/{name}"));
    if own.is_dir() {
        return own;
    }
    let made = golden(&format!("megatron/checkpoints/{name}"));
    if made.join("model.safetensors").is_file() {
        return made;
    }
    derived(name, scratch)
}

/// Writes `tensors` as one directory of one or more files, with the config of `config_of`.
pub(crate) fn write(tensors: &Tensors, config: &Path, target: &Path) {
    let infos = tensors
        .iter()
        .map(|(name, info, _)| (name.clone(), info.clone()))
        .collect();
    let layout = HfLayout::sharded(infos, 2 << 20);
    let writer = HfWriter::create(&layout, target, Overwrite::No).unwrap();
    for (name, _, bytes) in tensors {
        bridge_core::checkpoint::TensorSink::write(&writer, name, 0, bytes).unwrap();
    }
    writer.copy_file(config).unwrap();
    writer.finish().unwrap();
}

/// The checkpoints that the goldens made from others by renaming (tests/goldens/README.md, megatron).
pub(crate) fn derived(name: &str, scratch: &Path) -> PathBuf {
    let config = golden(&format!("megatron/checkpoints/{name}/config.json"));
    let base = if name.starts_with("dense") {
        "dense_vl"
    } else {
        "moe_vl"
    };
    let base = HfCheckpoint::open(&golden(&format!("checkpoints/{base}"))).unwrap();
    let mut tensors = read_all(&base);
    match name {
        "dense_vl_deepstack" => tensors.extend(one_file(name, "deepstack.safetensors", scratch)),
        "dense_text" | "moe_text" => tensors = without_vision(tensors),
        "dense_token_classification" => {
            tensors.retain(|(name, ..)| !name.starts_with("mtp.") && name != "lm_head.weight");
            tensors.extend(one_file(name, "score.safetensors", scratch));
        }
        "moe_vl_mtp_packed" => tensors = pack_experts(tensors, "mtp.layers.0.mlp.experts."),
        "moe_vl_per_expert" => tensors = unpack_experts(tensors),
        other => panic!("no recipe for {other}"),
    }
    let target = scratch.join(name);
    write(&tensors, &config, &target);
    target
}

/// The tensors of a file beside the config of a derived checkpoint.
fn one_file(checkpoint: &str, file: &str, scratch: &Path) -> Tensors {
    let file = golden(&format!("megatron/checkpoints/{checkpoint}/{file}"));
    let alone = scratch.join("one_file");
    fs_err::create_dir(&alone).unwrap();
    fs_err::copy(file, alone.join("model.safetensors")).unwrap();
    read_all(&HfCheckpoint::open(&alone).unwrap())
}

fn without_vision(tensors: Tensors) -> Tensors {
    tensors
        .into_iter()
        .filter(|(name, ..)| !name.starts_with("model.visual."))
        .map(|(name, info, bytes)| (name.replace("model.language_model.", "model."), info, bytes))
        .collect()
}

fn pack_experts(tensors: Tensors, prefix: &str) -> Tensors {
    /// Gate, up and down of one expert.
    type Parts = [Option<(TensorInfo, Vec<u8>)>; 3];
    let mut kept: Tensors = Vec::new();
    let mut experts: Vec<Parts> = Vec::new();
    for (name, info, bytes) in tensors {
        let Some(rest) = name.strip_prefix(prefix) else {
            kept.push((name, info, bytes));
            continue;
        };
        let (expert, word) = rest.split_once('.').unwrap();
        let expert: usize = expert.parse().unwrap();
        experts.resize_with(experts.len().max(expert + 1), Default::default);
        let place = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
            .iter()
            .position(|known| *known == word)
            .unwrap();
        experts[expert][place] = Some((info, bytes));
    }
    let (mut gate_up, mut down) = (Vec::new(), Vec::new());
    let first = experts[0][0].as_ref().unwrap().0.clone();
    for parts in &experts {
        gate_up.extend_from_slice(&parts[0].as_ref().unwrap().1);
        gate_up.extend_from_slice(&parts[1].as_ref().unwrap().1);
        down.extend_from_slice(&parts[2].as_ref().unwrap().1);
    }
    let (width, hidden, count) = (first.shape[0], first.shape[1], experts.len());
    for (word, shape, bytes) in [
        ("gate_up_proj", vec![count, 2 * width, hidden], gate_up),
        ("down_proj", vec![count, hidden, width], down),
    ] {
        let dtype = first.dtype;
        kept.push((
            format!("{prefix}{word}"),
            TensorInfo { dtype, shape },
            bytes,
        ));
    }
    kept
}

fn unpack_experts(tensors: Tensors) -> Tensors {
    let mut list: Tensors = Vec::new();
    for (name, info, bytes) in tensors {
        let packed = ["gate_up_proj", "down_proj"]
            .into_iter()
            .find(|word| name.ends_with(&format!(".mlp.experts.{word}")));
        let Some(word) = packed else {
            list.push((name, info, bytes));
            continue;
        };
        let prefix = name.strip_suffix(word).unwrap();
        let halves = if word == "gate_up_proj" {
            vec!["gate_proj", "up_proj"]
        } else {
            vec!["down_proj"]
        };
        let shape = vec![info.shape[1] / halves.len(), info.shape[2]];
        let size = shape[0] * shape[1] * info.dtype.size_bytes();
        for expert in 0..info.shape[0] {
            for (half, word) in halves.iter().enumerate() {
                let start = (expert * halves.len() + half) * size;
                list.push((
                    format!("{prefix}{expert}.{word}.weight"),
                    TensorInfo {
                        dtype: info.dtype,
                        shape: shape.clone(),
                    },
                    bytes[start..start + size].to_vec(),
                ));
            }
        }
    }
    list
}

/// Every golden checkpoint that has a table.
pub(crate) const ALL: [&str; 11] = [
    "dense_vl",
    "dense_vl_tied_bf16",
    "moe_vl",
    "moe_vl_bf16",
    "dense_vl_kv2",
    "moe_vl_mtp_packed",
    "moe_vl_per_expert",
    "dense_vl_deepstack",
    "dense_text",
    "moe_text",
    "dense_token_classification",
];

/// HF -> Megatron in memory -> HF directory.
fn round_trip(source: &Path, target: &Path) {
    let bridge = AutoBridge::from_hf_pretrained(source).unwrap();
    let checkpoint = bridge.checkpoint().unwrap();
    let plan = bridge.plan(&PlanOptions::default()).unwrap();
    let megatron = memory_for(&plan);
    let report = execute(&plan, checkpoint, &megatron, &ExecuteOptions::default()).unwrap();
    assert_eq!(report.rounded, [], "{}", source.display());
    let writer = HfWriter::like(checkpoint, target, Overwrite::No).unwrap();
    execute(
        &plan.inverted(),
        &megatron,
        &writer,
        &ExecuteOptions::default(),
    )
    .unwrap();
    writer.finish().unwrap();
}

#[test]
fn hf_to_megatron_and_back_is_byte_identical() {
    for name in ALL {
        let scratch = tempfile::tempdir().unwrap();
        let source = directory(name, scratch.path());
        let target = scratch.path().join("back");
        round_trip(&source, &target);
        let mut files = 0;
        for entry in fs_err::read_dir(&target).unwrap() {
            let entry = entry.unwrap();
            let wanted = fs_err::read(source.join(entry.file_name())).unwrap();
            let found = fs_err::read(entry.path()).unwrap();
            assert!(wanted == found, "{name}: {:?} differs", entry.file_name());
            files += 1;
        }
        let wanted = fs_err::read_dir(&source).unwrap().count();
        assert_eq!(files, wanted, "{name}: every file is there");
    }
}

/// A directory with the files of a golden checkpoint, to be damaged.
pub(crate) fn copy_of(name: &str) -> tempfile::TempDir {
    let scratch = tempfile::tempdir().unwrap();
    for entry in fs_err::read_dir(golden(&format!("checkpoints/{name}"))).unwrap() {
        let entry = entry.unwrap();
        fs_err::copy(entry.path(), scratch.path().join(entry.file_name())).unwrap();
    }
    scratch
}

/// A golden checkpoint, or one made of it by renaming, with its tensors changed by `change`, its config by `config`.
pub(crate) fn changed(
    name: &str,
    change: impl FnOnce(&mut Tensors),
    config: impl FnOnce(&mut serde_json::Value),
) -> tempfile::TempDir {
    let scratch = tempfile::tempdir().unwrap();
    let source = directory(name, scratch.path());
    let mut tensors = read_all(&HfCheckpoint::open(&source).unwrap());
    change(&mut tensors);
    let text = fs_err::read(source.join("config.json")).unwrap();
    let mut value: serde_json::Value = serde_json::from_slice(&text).unwrap();
    config(&mut value);
    let file = scratch.path().join("config.json");
    fs_err::write(&file, value.to_string()).unwrap();
    write(&tensors, &file, &scratch.path().join("model"));
    scratch
}

/// The message with its causes, as the binary prints it.
pub(crate) fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

/// What planning (or opening) says.
pub(crate) fn refusal(dir: &Path) -> String {
    match AutoBridge::from_hf_pretrained(dir) {
        Ok(bridge) => text(&bridge.plan(&PlanOptions::default()).unwrap_err()),
        Err(error) => text(&error),
    }
}

pub(crate) fn assert_says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "no `{word}` in: {message}");
    }
}

/// Half-made directories.
fn leftovers(dir: &Path) -> Vec<String> {
    fs_err::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains("partial"))
        .collect()
}

// What went wrong elsewhere.

/// Both layouts of MTP experts are found by name, mapped to the same parameters, and written back as they were.
#[test]
fn mtp_experts_one_by_one_or_packed_give_the_same_parameters() {
    let scratch = tempfile::tempdir().unwrap();
    let packed = derived("moe_vl_mtp_packed", scratch.path());
    let one_by_one = golden("checkpoints/moe_vl");
    let bytes = |dir: &Path| {
        let bridge = AutoBridge::from_hf_pretrained(dir).unwrap();
        let plan = bridge.plan(&PlanOptions::default()).unwrap();
        let memory = memory_for(&plan);
        execute(
            &plan,
            bridge.checkpoint().unwrap(),
            &memory,
            &ExecuteOptions::default(),
        )
        .unwrap();
        let bytes: Vec<_> = memory
            .names()
            .map(|name| (name.to_owned(), memory.bytes(name).unwrap()))
            .collect();
        bytes
    };
    assert!(bytes(&packed) == bytes(&one_by_one));
}

#[test]
fn experts_in_both_layouts_are_refused() {
    let dir = changed(
        "moe_vl",
        |tensors| {
            let (mut name, info, _) = tensors
                .iter()
                .find(|(name, ..)| name.ends_with("layers.0.mlp.experts.gate_up_proj"))
                .unwrap()
                .clone();
            name = name.replace("gate_up_proj", "0.gate_proj.weight");
            let shape = vec![info.shape[1] / 2, info.shape[2]];
            let bytes = vec![0; shape[0] * shape[1] * 4];
            let dtype = info.dtype;
            tensors.push((name, TensorInfo { dtype, shape }, bytes));
        },
        |_| {},
    );
    let message = refusal(&dir.path().join("model"));
    assert_says(
        &message,
        &[
            "experts.0.gate_proj.weight",
            "packed or one by one, not both",
        ],
    );
}

#[test]
fn a_config_that_claims_an_mtp_head_without_its_weights_is_refused() {
    let dir = changed(
        "dense_vl",
        |tensors| tensors.retain(|(name, ..)| !name.starts_with("mtp.")),
        |_| {},
    );
    let message = refusal(&dir.path().join("model"));
    assert_says(
        &message,
        &["mtp.fc.weight", "missing", "mtp_num_hidden_layers"],
    );
}

#[test]
fn an_mtp_head_that_the_config_does_not_claim_is_refused() {
    let dir = changed(
        "dense_vl",
        |_| {},
        |config| config["text_config"]["mtp_num_hidden_layers"] = 0.into(),
    );
    let message = refusal(&dir.path().join("model"));
    assert_says(&message, &["mtp.fc.weight", "mtp_num_hidden_layers"]);
}

/// A head that is switched off is left out of the model by name, and carried into the saved checkpoint.
#[test]
fn an_mtp_head_that_is_switched_off_is_carried_through() {
    let scratch = tempfile::tempdir().unwrap();
    let source = golden("checkpoints/moe_vl");
    let bridge = AutoBridge::from_hf_pretrained(&source).unwrap();
    let checkpoint = bridge.checkpoint().unwrap();
    let options = PlanOptions {
        without_mtp: true,
        ..PlanOptions::default()
    };
    let plan = bridge.plan(&options).unwrap();
    let head = checkpoint.names().filter(|name| name.starts_with("mtp."));
    let mut left_out = plan.left_out.clone();
    left_out.sort();
    assert_eq!(left_out, head.map(str::to_owned).collect::<Vec<_>>());
    let memory = memory_for(&plan);
    let default = ExecuteOptions::default();
    execute(&plan, checkpoint, &memory, &default).unwrap();
    let target = scratch.path().join("out");

    // Forgetting the head is an error that names it, and leaves nothing.
    let writer = HfWriter::like(checkpoint, &target, Overwrite::No).unwrap();
    execute(&plan.inverted(), &memory, &writer, &default).unwrap();
    assert_says(&text(&writer.finish().unwrap_err()), &["mtp.", "0 of its"]);
    assert!(!target.exists());

    let writer = HfWriter::like(checkpoint, &target, Overwrite::No).unwrap();
    execute(&plan.inverted(), &memory, &writer, &default).unwrap();
    copy_tensors(&plan.left_out, checkpoint, &writer, &default).unwrap();
    writer.finish().unwrap();
    for entry in fs_err::read_dir(&target).unwrap() {
        let entry = entry.unwrap();
        let wanted = fs_err::read(source.join(entry.file_name())).unwrap();
        assert!(wanted == fs_err::read(entry.path()).unwrap());
    }
}

#[test]
fn q_proj_of_a_model_without_output_gate_is_refused_with_the_reason() {
    let dir = changed(
        "dense_vl",
        |tensors| {
            for (name, info, bytes) in tensors {
                if name == "mtp.layers.0.self_attn.q_proj.weight" {
                    info.shape[0] /= 2;
                    bytes.truncate(bytes.len() / 2);
                }
            }
        },
        |_| {},
    );
    let message = refusal(&dir.path().join("model"));
    assert_says(
        &message,
        &[
            "mtp.layers.0.self_attn.q_proj.weight",
            "[256, 64]",
            "[512, 64]",
            "gate",
        ],
    );
}

#[test]
fn a_log_and_out_norm_stay_in_float32_beside_bfloat16() {
    let bridge = AutoBridge::from_hf_pretrained(&golden("checkpoints/moe_vl_bf16")).unwrap();
    let plan = bridge.plan(&PlanOptions::default()).unwrap();
    let mut kept = 0;
    for tensor in &plan.tensors {
        let float32 = tensor.name.ends_with(".A_log") || tensor.name.ends_with(".out_norm.weight");
        let wanted = if float32 { Dtype::F32 } else { Dtype::Bf16 };
        assert_eq!(tensor.dtype, wanted, "{}", tensor.name);
        kept += usize::from(float32);
    }
    assert_eq!(kept, 12);
    // Also when the run asks for bfloat16 and names the exceptions.
    let options = PlanOptions {
        dtype: Some(Dtype::Bf16),
        overrides: vec![("A_log".to_owned(), Dtype::F32)],
        ..PlanOptions::default()
    };
    for tensor in &bridge.plan(&options).unwrap().tensors {
        let wanted = if tensor.name.ends_with("A_log") {
            Dtype::F32
        } else {
            Dtype::Bf16
        };
        assert_eq!(tensor.dtype, wanted, "{}", tensor.name);
    }
}

/// In [0.5, 2] minus one and plus one are exact in float32; elsewhere the rounding is reported by name.
#[test]
fn a_norm_outside_half_to_two_is_reported_as_rounded() {
    let dir = changed(
        "dense_vl",
        |tensors| {
            let (.., bytes) = tensors
                .iter_mut()
                .find(|(name, ..)| name.ends_with("layers.0.linear_attn.norm.weight"))
                .unwrap();
            bytes[..4].copy_from_slice(&1e-8f32.to_le_bytes());
        },
        |_| {},
    );
    let bridge = AutoBridge::from_hf_pretrained(&dir.path().join("model")).unwrap();
    let plan = bridge.plan(&PlanOptions::default()).unwrap();
    let memory = memory_for(&plan);
    let source = bridge.checkpoint().unwrap();
    let report = execute(&plan, source, &memory, &ExecuteOptions::default()).unwrap();
    assert_eq!(report.rounded.len(), 1);
    let rounded = &report.rounded[0];
    let name = "language_model.decoder.layers.0.self_attention.out_norm.weight";
    assert_eq!((rounded.name.as_str(), rounded.elements), (name, 1));
    assert!(rounded.max_error > 0.0 && rounded.max_error < 1e-7);
}

/// Names under the prefixes of other tools are read as the published ones, and written as those.
#[test]
fn prefixes_of_other_tools_are_read_and_the_published_ones_written() {
    let published: Vec<String> = HfCheckpoint::open(&golden("checkpoints/dense_vl"))
        .unwrap()
        .names()
        .map(str::to_owned)
        .collect();
    for (language, vision) in [
        ("model.", "visual."),
        ("model.language_model.language_model.", "model.visual."),
        ("language_model.model.", "visual."),
    ] {
        let dir = changed(
            "dense_vl",
            |tensors| {
                for (name, ..) in tensors {
                    *name = name
                        .replace("model.language_model.", language)
                        .replace("model.visual.", vision);
                }
            },
            |_| {},
        );
        let target = dir.path().join("back");
        round_trip(&dir.path().join("model"), &target);
        let mut names: Vec<String> = HfCheckpoint::open(&target)
            .unwrap()
            .names()
            .map(str::to_owned)
            .collect();
        names.sort();
        assert_eq!(names, published, "{language}");
    }
}

#[test]
fn a_taken_destination_is_kept_and_overwriting_replaces_it_at_once() {
    let scratch = tempfile::tempdir().unwrap();
    let source = HfCheckpoint::open(&golden("megatron/checkpoints/dense_vl_kv2")).unwrap();
    let target = scratch.path().join("out");
    fs_err::create_dir(&target).unwrap();
    fs_err::write(target.join("precious"), "old").unwrap();
    let message = text(&HfWriter::like(&source, &target, Overwrite::No).unwrap_err());
    assert_says(&message, &["out", "--overwrite"]);

    let names: Vec<&str> = source.names().collect();
    let writer = HfWriter::like(&source, &target, Overwrite::Yes).unwrap();
    copy_tensors(&names, &source, &writer, &ExecuteOptions::default()).unwrap();
    assert!(
        target.join("precious").exists(),
        "untouched until it is complete"
    );
    writer.finish().unwrap();
    assert!(!target.join("precious").exists());
    assert!(HfCheckpoint::open(&target).is_ok());
    assert_eq!(leftovers(scratch.path()), Vec::<String>::new());
}

#[test]
fn saving_over_the_directory_that_is_being_read_gives_the_right_result() {
    let dir = copy_of("dense_vl");
    let before = fs_err::read(dir.path().join("model.safetensors")).unwrap();
    let source = HfCheckpoint::open(dir.path()).unwrap();
    let names: Vec<&str> = source.names().collect();
    let writer = HfWriter::like(&source, dir.path(), Overwrite::Yes).unwrap();
    copy_tensors(&names, &source, &writer, &ExecuteOptions::default()).unwrap();
    writer.finish().unwrap();
    assert!(fs_err::read(dir.path().join("model.safetensors")).unwrap() == before);
}
