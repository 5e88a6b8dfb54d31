//! Hugging Face directories: round trips, and what is refused.

use std::path::{Path, PathBuf};

use bridge_core::AutoBridge;
use bridge_core::checkpoint::hf::{HfCheckpoint, HfLayout, HfWriter, Overwrite};
use bridge_core::checkpoint::{MemoryTensors, TensorInfo, TensorSource};
use bridge_core::convert::{ExecuteOptions, execute};
use bridge_core::plan::PlanOptions;
use tests::golden;

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

type Tensors = Vec<(String, TensorInfo, Vec<u8>)>;

fn read_all(checkpoint: &HfCheckpoint) -> Tensors {
    checkpoint
        .tensors()
        .map(|(name, info)| {
            let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
            checkpoint.read(name, 0, &mut bytes).unwrap();
            (name.to_owned(), info.clone(), bytes)
        })
        .collect()
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
        "dense_vl_deepstack" => {
            let file = golden("megatron/checkpoints/dense_vl_deepstack/deepstack.safetensors");
            let alone = scratch.join("deepstack");
            fs_err::create_dir(&alone).unwrap();
            fs_err::copy(file, alone.join("model.safetensors")).unwrap();
            tensors.extend(read_all(&HfCheckpoint::open(&alone).unwrap()));
        }
        "moe_vl_mtp_packed" => tensors = pack_experts(tensors, "mtp.layers.0.mlp.experts."),
        "moe_vl_per_expert" => tensors = unpack_experts(tensors),
        other => panic!("no recipe for {other}"),
    }
    let target = scratch.join(name);
    write(&tensors, &config, &target);
    target
}

fn pack_experts(tensors: Tensors, prefix: &str) -> Tensors {
    let mut kept: Tensors = Vec::new();
    let mut experts: Vec<[Option<(TensorInfo, Vec<u8>)>; 3]> = Vec::new();
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
pub(crate) const ALL: [&str; 8] = [
    "dense_vl",
    "dense_vl_tied_bf16",
    "moe_vl",
    "moe_vl_bf16",
    "dense_vl_kv2",
    "moe_vl_mtp_packed",
    "moe_vl_per_expert",
    "dense_vl_deepstack",
];

/// HF -> Megatron in memory -> HF directory.
fn round_trip(source: &Path, target: &Path) {
    let bridge = AutoBridge::from_hf_pretrained(source).unwrap();
    let checkpoint = bridge.checkpoint().unwrap();
    let plan = bridge.plan(&PlanOptions::default()).unwrap();
    let mut megatron = MemoryTensors::default();
    for tensor in &plan.tensors {
        let info = TensorInfo {
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
        };
        megatron.insert(&tensor.name, info);
    }
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
