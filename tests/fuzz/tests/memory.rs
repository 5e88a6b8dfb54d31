//! How much memory parsers hold for the inputs that make them hold most, and for those of a real model.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use bridge_core::AutoBridge;
use bridge_core::config::HfConfig;
use bridge_core::plan::PlanOptions;

const MEGABYTE: usize = 1 << 20;

/// A safetensors file with this header, and bytes behind it.
fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], header.as_bytes(), &vec![0; data]].concat()
}

/// Entries of one byte each, as short as they can be.
fn shortest_entries() -> Vec<u8> {
    let mut header = String::from("{");
    let mut count = 0;
    while header.len() < MEGABYTE {
        header += &format!(
            r#""{count:x}":{{"dtype":"U8","shape":[],"data_offsets":[{count},{}]}},"#,
            count + 1
        );
        count += 1;
    }
    header.pop();
    header.push('}');
    safetensors(&header, count)
}

/// Entries with as many axes as there may be.
fn many_axes() -> Vec<u8> {
    let mut header = String::from("{");
    let mut count = 0;
    while header.len() < MEGABYTE {
        header += &format!(
            r#""{count:x}":{{"dtype":"U8","shape":[1,1,1,1,1,1,1,1],"data_offsets":[{count},{}]}},"#,
            count + 1
        );
        count += 1;
    }
    header.pop();
    header.push('}');
    safetensors(&header, count)
}

/// The tensors of the largest published model: names and shapes.
fn real_tensors() -> Vec<(String, Vec<usize>)> {
    let file =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../goldens/configs/Qwen3.5-397B-A17B.json");
    let bridge = AutoBridge::from_hf_config(HfConfig::from_file(&file).unwrap());
    let plan = bridge.plan(&PlanOptions::default()).unwrap();
    let targets = plan.inverted().targets().into_iter();
    targets.map(|(name, info)| (name, info.shape)).collect()
}

/// The header of all its tensors in one file; the data would be too much, so that it is refused when it is read to its end.
fn real_header() -> Vec<u8> {
    let mut end = 0u64;
    let entries: Vec<String> = real_tensors()
        .into_iter()
        .map(|(name, shape)| {
            let start = end;
            end += shape.iter().product::<usize>() as u64 * 2;
            format!(
                r#""{name}":{{"dtype":"BF16","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
            )
        })
        .collect();
    safetensors(&format!("{{{}}}", entries.join(",")), 0)
}

/// An index that places tensors in 94 shards, which are not there.
fn index(names: impl Iterator<Item = String>) -> Vec<u8> {
    let entries: Vec<String> = names
        .enumerate()
        .map(|(number, name)| {
            format!(
                r#""{name}":"model-{:05}-of-00094.safetensors""#,
                number % 94
            )
        })
        .collect();
    format!(
        r#"{{"metadata":{{"total_size":1}},"weight_map":{{{}}}}}"#,
        entries.join(",")
    )
    .into_bytes()
}

/// As many places as fit, in one shard or in one each.
fn shortest_places(one_shard: bool) -> Vec<u8> {
    let mut text = String::from(r#"{"weight_map":{"#);
    let mut count = 0;
    while text.len() < MEGABYTE {
        let shard = if one_shard { 0 } else { count };
        text += &format!(r#""{count:x}":"{shard:x}.safetensors","#);
        count += 1;
    }
    text.pop();
    text += "}}";
    text.into_bytes()
}

/// A list of one value again and again, in an object.
fn listed(item: &str) -> Vec<u8> {
    format!("{{\"a\":[{}0]}}", item.repeat(MEGABYTE / item.len())).into_bytes()
}

/// An object of many keys with one value, in the place of a key's value.
fn keys(count: usize, value: &dyn Fn(usize) -> String, outer: &str) -> Vec<u8> {
    let pairs: String = (0..count)
        .map(|n| format!("\"{n:x}\":{},", value(n)))
        .collect();
    format!("{{\"{outer}\":{{{pairs}\"\":\"\"}}}}").into_bytes()
}

fn header(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../goldens")
            .join(name),
    )
    .unwrap()
}

/// The inputs that hold the most values a byte, a megabyte each, within the stated multiples.
#[test]
fn the_densest_inputs_stay_within_the_stated_multiple() {
    fuzz::check("safetensors_header", &shortest_entries());
    fuzz::check("safetensors_header", &many_axes());
    let texts = |_| "\"\"".to_owned();
    fuzz::check(
        "safetensors_header",
        &header(&keys(120_000, &texts, "__metadata__")),
    );
    fuzz::check(
        "safetensors_header",
        &header(&keys(120_000, &|_| "0".to_owned(), "a")),
    );
    fuzz::check("index_json", &shortest_places(true));
    fuzz::check("index_json", &shortest_places(false));
    fuzz::check(
        "index_json",
        &keys(100_000, &|n| format!("\"/{n:x}\""), "weight_map"),
    );
    fuzz::check("index_json", &keys(120_000, &texts, "metadata"));
    fuzz::check("config_json", &keys(120_000, &texts, "a"));
    for item in ["0,", "[],", "{},"] {
        for name in ["index_json", "config_json"] {
            fuzz::check(name, &listed(item));
        }
        fuzz::check("safetensors_header", &header(&listed(item)));
    }
    let tuples = [b"N".to_vec(), b"\x85".repeat(MEGABYTE), b".".to_vec()].concat();
    for program in [b"N".repeat(MEGABYTE), b"]".repeat(MEGABYTE), tuples] {
        fuzz::check("torch_dist_metadata", &program);
    }
    fuzz::check("pipeline_layout", &b"t*9".repeat(MEGABYTE / 30));
    fuzz::check("pipeline_layout", b"|*262143");
}

/// What is read of a real model: the numbers are those that were measured, and little more.
#[test]
fn a_real_model_is_read_in_little_more_memory_than_its_files() {
    let names = real_tensors().into_iter().map(|(name, _)| name);
    let experts = (0..60).flat_map(|layer| {
        (0..512).flat_map(move |expert| {
            let words = ["gate_proj", "up_proj", "down_proj"];
            words.map(|word| {
                format!("model.language_model.layers.{layer}.mlp.experts.{expert}.{word}.weight")
            })
        })
    });
    let megatron = "torch_dist/mcore_moe_bf16_tp2pp2ep2/iter_0000007/.metadata";
    for (name, input, tenths) in [
        ("safetensors_header", real_header(), 32),
        ("index_json", index(names), 22),
        ("index_json", index(experts), 22),
        ("torch_dist_metadata", golden(megatron), 85),
        ("config_json", golden("configs/Qwen3.5-397B-A17B.json"), 120),
    ] {
        let target = fuzz::targets::ALL.iter().find(|target| target.name == name);
        let held = (target.unwrap().peak_of)(&input);
        let limit = input.len() * tenths / 10;
        assert!(held <= limit, "{name}: {held} bytes for {}", input.len());
    }
}
