//! The command line: plan.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tests::golden;

use crate::program::trainer;
use crate::shard::{checkpoint, flags, words};

/// Exit code, stdout, stderr.
fn plan(model: &str, args: &[String]) -> (i32, String, String) {
    let words = ["plan", model].into_iter();
    trainer(words.chain(args.iter().map(String::as_str)))
}

fn config(name: &str) -> String {
    let file = golden(&format!("configs/{name}.json"));
    file.to_string_lossy().into_owned()
}

fn plan_json(model: &str, args: &str) -> Value {
    let mut args = words(args);
    args.push("--json".to_owned());
    let (code, stdout, stderr) = plan(model, &args);
    assert_eq!((code, stderr.as_str()), (0, ""));
    serde_json::from_str(&stdout).unwrap()
}

#[test]
fn every_published_size_is_counted_from_its_config() {
    let counts = fs_err::read(golden("configs/parameter_counts.json")).unwrap();
    let counts: Value = serde_json::from_slice(&counts).unwrap();
    for (name, wanted) in counts.as_object().unwrap() {
        let found = plan_json(&config(name), "--tp 2 --rank 1");
        assert_eq!(found["total"]["parameters"], wanted["total"], "{name}");
    }
    let found = plan_json(&config("Qwen3.5-27B"), "");
    assert_eq!(found["total"]["parameters"], 27_781_427_952u64);
    assert_eq!(found["ranks"][0]["parameters"], 27_781_427_952u64);
    let found = plan_json(&config("Qwen3.5-397B-A17B"), "--tp 8 --pp 4 --ep 8");
    assert_eq!(found["ranks"].as_array().unwrap().len(), 32);
}

/// Names, shapes and dtypes of every rank are those of Megatron's own model classes, for every golden layout.
#[test]
fn every_rank_of_every_layout_is_megatrons() {
    let mut ranks_seen = 0;
    for name in ["dense_vl", "moe_vl"] {
        let file = golden(&format!("megatron/shards.{name}.json"));
        let wanted: Value = serde_json::from_slice(&fs_err::read(file).unwrap()).unwrap();
        for (layout, entry) in wanted["layouts"].as_object().unwrap() {
            let args = flags(entry.as_object().unwrap()).join(" ");
            let found = plan_json(&checkpoint(name), &args);
            let theirs = wanted["ranks"].as_array().unwrap();
            let theirs = theirs.iter().filter(|rank| rank["layout"] == *layout);
            let ours = found["ranks"].as_array().unwrap();
            assert_eq!(Some(ours.len() as u64), entry["world"].as_u64());
            for (ours, theirs) in ours.iter().zip(theirs) {
                ranks_seen += 1;
                let place = format!("{name} {layout} rank {}", ours["rank"]);
                assert_eq!(ours["rank"], theirs["rank"], "{place}");
                for axis in ["tp", "cp", "dp", "pp", "ep", "etp", "edp"] {
                    assert_eq!(ours[format!("{axis}_rank")], theirs[axis], "{place} {axis}");
                }
                let mut held: BTreeMap<(u64, String), Value> = BTreeMap::new();
                let (mut parameters, mut bytes) = (0, 0);
                for tensor in ours["tensors"].as_array().unwrap() {
                    let shape = tensor["shape"].as_array().unwrap();
                    let numel: u64 = shape.iter().map(|dim| dim.as_u64().unwrap()).product();
                    parameters += numel;
                    bytes += 4 * numel;
                    let stage = tensor
                        .get("vp_stage")
                        .map_or(0, |stage| stage.as_u64().unwrap());
                    let name = tensor["name"].as_str().unwrap().to_owned();
                    let value = json!([tensor["dtype"], tensor["shape"]]);
                    assert_eq!(held.insert((stage, name), value), None, "{place}");
                }
                assert_eq!(ours["parameters"], parameters, "{place}");
                assert_eq!(ours["bytes"], bytes, "{place}");
                for stage in theirs["stages"].as_array().unwrap() {
                    let vp_stage = stage["vpp"].as_u64().unwrap_or(0);
                    for param in stage["params"].as_array().unwrap() {
                        let name = param[0].as_str().unwrap().to_owned();
                        let found = held.remove(&(vp_stage, name));
                        assert_eq!(found, Some(json!([param[1], param[2]])), "{place} {param}");
                    }
                }
                assert!(held.is_empty(), "{place} {held:?}");
            }
        }
    }
    assert_eq!(ranks_seen, 155);
}

#[test]
fn json_has_the_stated_keys_and_no_others() {
    let keys = |value: &Value| -> Vec<String> {
        let mut keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    };
    let found = plan_json(&checkpoint("moe_vl"), "--tp 2 --ep 2 --rank 1");
    assert_eq!(keys(&found), ["ranks", "schema_version", "total"]);
    assert_eq!(found["schema_version"], 1);
    assert_eq!(keys(&found["total"]), ["bytes", "parameters"]);
    let ranks = found["ranks"].as_array().unwrap();
    assert_eq!((ranks.len(), &ranks[0]["rank"]), (1, &json!(1)));
    assert_eq!(
        keys(&ranks[0]),
        [
            "bytes",
            "cp_rank",
            "dp_rank",
            "edp_rank",
            "ep_rank",
            "etp_rank",
            "parameters",
            "pp_rank",
            "rank",
            "tensors",
            "tp_rank"
        ]
    );
    assert_eq!(keys(&ranks[0]["tensors"][0]), ["dtype", "name", "shape"]);
    let found = plan_json(&checkpoint("moe_vl"), "--pp 2 --vpp 2 --rank 1");
    let tensors = found["ranks"][0]["tensors"].as_array().unwrap();
    assert_eq!(tensors[0]["vp_stage"], 0);
    assert_eq!(tensors.last().unwrap()["vp_stage"], 1);
}

#[test]
fn tables_show_stages_equal_ranks_in_one_line_and_the_formula() {
    let args = words("--tp 8 --pp 4 --ep 8");
    let (code, stdout, stderr) = plan(&config("Qwen3.5-397B-A17B"), &args);
    assert_eq!((code, stderr.as_str()), (0, ""));
    for words in [
        "403,397,928,944 parameters",
        "32 ranks: TP 8 x CP 1 x DP 1 x PP 4; experts ETP 1 x EP 8 x EDP 1 x PP 4",
        "PP rank 1-2 | decoder*15",
        " 0-7     0-14 ",
        " 12,539,357,646 ",
        " 24-31   45-59 ",
        " all ",
        "in training",
        "12 of optimizer",
        "2 (PP - p - 1) + (V - 1) PP + 1",
    ] {
        assert!(stdout.contains(words), "no `{words}` in {stdout}");
    }
    // Images are asked for and count on the first stage only.
    let more = words("--tp 4 --pp 2 --vision-patches 16384");
    let (code, images, _) = plan(&config("Qwen3.5-27B"), &more);
    let (_, text, _) = plan(&config("Qwen3.5-27B"), &more[..4]);
    assert_eq!(code, 0);
    let changed = images.lines().zip(text.lines()).filter(|(a, b)| a != b);
    let changed: Vec<&str> = changed.map(|(line, _)| line).collect();
    assert_eq!(changed.len(), 1, "{changed:?}");
    assert!(changed[0].starts_with(" 0-3 "), "{changed:?}");
    // Nothing to read in a config.
    assert!(!stdout.contains("bytes read"), "{stdout}");
}

/// Data-parallel ranks are counted and not walked over: four thousand million of them take no longer than one.
#[test]
fn any_number_of_replicas_is_one_line() {
    let args = words("--tp 4 --pp 4 --dp 268435456");
    let (code, stdout, stderr) = plan(&config("Qwen3.5-27B"), &args);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("4294967296 ranks"), "{stdout}");
    assert!(stdout.contains(" 3221225472-4294967295 "), "{stdout}");
    let args = words("--tp 4 --pp 4 --dp 268435456 --rank 4294967295");
    let (code, stdout, stderr) = plan(&config("Qwen3.5-27B"), &args);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains(" 4294967295   48-63 "), "{stdout}");
    let args = words("--tp 4 --pp 4 --dp 268435457");
    let (code, _, stderr) = plan(&config("Qwen3.5-27B"), &args);
    assert_eq!(code, 2);
    assert!(
        stderr.contains("the number of ranks is more than 4294967296"),
        "{stderr}"
    );
}

/// A rank reads what it holds, once, and from no file that it does not need.
#[test]
fn files_and_bytes_read_are_those_of_the_ranks_own_tensors() {
    let column = |args: &str, column: usize| -> Vec<String> {
        let (code, stdout, stderr) = plan(&checkpoint("moe_vl"), &words(args));
        assert_eq!(code, 0, "{stderr}");
        let lines = stdout
            .lines()
            .skip_while(|line| !line.contains("bytes read"));
        let lines = lines.skip(2).take_while(|line| !line.trim().is_empty());
        let cells = lines.map(|line| {
            let cells: Vec<&str> = line.split("  ").map(str::trim).collect();
            let cells: Vec<&str> = cells.into_iter().filter(|cell| !cell.is_empty()).collect();
            cells.get(column).copied().unwrap_or_default().to_owned()
        });
        cells.collect()
    };
    for args in ["--tp 2 --pp 2 --ep 2", "--pp 8", "--tp 4 --etp 4"] {
        // The last line, of all ranks, has no layers.
        let (mut held, mut read) = (column(args, 3), column(args, 5));
        assert!(held.len() > 1, "{held:?}");
        read.truncate(held.len() - 1);
        held.pop();
        assert_eq!(read, held, "{args}");
    }
    // Files of the checkpoint hold layers in order: a stage in the middle needs fewer than all three.
    let files = column("--pp 8 --no-mtp", 4);
    assert!(files.iter().any(|count| count == "1"), "{files:?}");
    // Padding is held and not read.
    let padded = "--make-vocab-size-divisible-by 4096";
    assert_ne!(column(padded, 5), column(padded, 3));
}

#[test]
fn options_change_the_totals() {
    let model = checkpoint("moe_vl");
    let number = |args: &str, key: &str| plan_json(&model, args)["total"][key].as_u64().unwrap();
    let whole = number("", "parameters");
    assert!(number("--no-mtp", "parameters") < whole);
    // Padding belongs to ranks and not to the model.
    assert_eq!(
        number("--make-vocab-size-divisible-by 4096", "parameters"),
        whole
    );
    assert_eq!(number("--torch-dtype bfloat16", "bytes"), 2 * whole);
    let found = plan_json(&model, "--sequential-experts");
    let tensors = found["ranks"][0]["tensors"].as_array().unwrap();
    let named = |part: &str| {
        let names = tensors
            .iter()
            .map(|tensor| tensor["name"].as_str().unwrap());
        names.filter(|name| name.contains(part)).count()
    };
    assert!(named("experts.local_experts.7.linear_fc1.weight") > 0);
    assert_eq!(named("experts.linear_fc1.weight7"), 0);
}

#[test]
fn wrong_use_is_refused_with_code_2_and_as_json_where_json_was_asked_for() {
    let model = config("Qwen3.5-27B");
    for (args, words) in [
        ("--tp 3", "linear_num_key_heads 16 is not divisible by TP 3"),
        ("--ep 2", "the model has no experts"),
        (
            "--tp 2 --rank 2",
            "rank 2 does not exist, there are 2, numbered from 0",
        ),
        ("--pipeline-layout Et(t", "Invalid layer character '('"),
        ("--tp 2 --dp 0", "data_parallel_size is 0"),
    ] {
        let args = self::words(args);
        let (code, stdout, stderr) = plan(&model, &args);
        assert_eq!((code, stdout.as_str()), (2, ""), "{args:?}");
        assert!(stderr.contains(words), "{args:?}: no `{words}` in {stderr}");
        let args: Vec<String> = args.into_iter().chain(["--json".to_owned()]).collect();
        let (code, stdout, stderr) = plan(&model, &args);
        assert_eq!((code, stderr.as_str()), (2, ""), "{args:?}");
        let error: Value = serde_json::from_str(&stdout).unwrap();
        assert!(error["error"].as_str().unwrap().contains(words), "{error}");
    }
    let (code, _, stderr) = plan("no/such/model", &[]);
    assert_eq!(code, 1);
    assert!(stderr.contains("no/such/model"), "{stderr}");
}
