//! The command line: convert shard.

use std::collections::BTreeMap;
use std::path::Path;

use bridge_core::checkpoint::TensorSource;
use bridge_core::checkpoint::shard::ShardFile;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tests::golden;

use crate::program::trainer;

/// Exit code, stdout, stderr of `trainer convert COMMAND`.
pub(crate) fn convert(command: &str, args: &[String]) -> (i32, String, String) {
    let words = ["convert", command].into_iter();
    trainer(words.chain(args.iter().map(String::as_str)))
}

pub(crate) fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

pub(crate) fn checkpoint(name: &str) -> String {
    let dir = golden(&format!("checkpoints/{name}"));
    dir.to_string_lossy().into_owned()
}

fn shard(name: &str, flags: &str, output: &Path) -> (i32, String, String) {
    let mut args = vec!["--hf-model".to_owned(), checkpoint(name)];
    args.push("--output".to_owned());
    args.push(output.to_string_lossy().into_owned());
    args.extend(words(flags));
    convert("shard", &args)
}

/// The flags that ask for a golden's layout.
pub(crate) fn flags(entry: &Map<String, Value>) -> Vec<String> {
    let mut flags = Vec::new();
    let mut add = |flag: &str, value: &Value| match value {
        Value::Null | Value::Bool(false) => {}
        Value::Bool(true) => flags.push(format!("--{flag}")),
        Value::String(text) => flags.extend([format!("--{flag}"), text.clone()]),
        other => flags.extend([format!("--{flag}"), other.to_string()]),
    };
    for size in ["tp", "cp", "pp", "vpp", "ep", "etp"] {
        add(size, &entry[size]);
    }
    for (key, value) in entry["overrides"].as_object().unwrap() {
        match key.as_str() {
            "mtp_num_layers" => add("no-mtp", &true.into()),
            "moe_grouped_gemm" => add("sequential-experts", &true.into()),
            "should_pad_vocab" => {}
            other => add(&other.replace('_', "-"), value),
        }
    }
    flags
}

/// Name to dtype, shape and hash.
fn contents(file: &ShardFile) -> BTreeMap<String, Value> {
    let entry = |(name, info): (&str, &bridge_core::checkpoint::TensorInfo)| {
        let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
        file.read(name, 0, &mut bytes).unwrap();
        let hash: String = Sha256::digest(&bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let word = info.dtype.safetensors_word();
        (name.to_owned(), serde_json::json!([word, info.shape, hash]))
    };
    file.tensors().map(entry).collect()
}

/// Every stage of every rank of a golden's layout, through the command. Odd ranks are asked for by their coordinates.
fn every_stage_is_megatrons(name: &str, layouts: &[&str], more: &[&str]) {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("rank.safetensors");
    let file = golden(&format!("megatron/shards.{name}.json"));
    let wanted: Value = serde_json::from_slice(&fs_err::read(file).unwrap()).unwrap();
    for layout in layouts {
        let entry = wanted["layouts"][*layout].as_object().unwrap();
        let ranks = wanted["ranks"].as_array().unwrap();
        for rank in ranks.iter().filter(|rank| rank["layout"] == *layout) {
            let number = rank["rank"].as_u64().unwrap();
            for stage in rank["stages"].as_array().unwrap() {
                let mut args = vec!["--hf-model".to_owned(), checkpoint(name)];
                args.extend(flags(entry));
                args.extend(more.iter().map(|word| (*word).to_owned()));
                args.extend(words(&format!(
                    "--overwrite --vp-stage {} --output {}",
                    stage["vpp"].as_u64().unwrap_or(0),
                    output.display()
                )));
                args.extend(words(&match number % 2 {
                    0 => format!("--rank {number}"),
                    _ => format!(
                        "--tp-rank {} --pp-rank {} --ep-rank {} --etp-rank {}",
                        rank["tp"], rank["pp"], rank["ep"], rank["etp"]
                    ),
                }));
                let (code, stdout, stderr) = convert("shard", &args);
                assert_eq!((code, stdout.as_str()), (0, ""), "{stderr}");
                let found = contents(&ShardFile::open(&output).unwrap());
                let params = stage["params"].as_array().unwrap();
                let place = format!("{name} {layout} rank {number}");
                assert_eq!(found.len(), params.len(), "{place}");
                for param in params {
                    let wanted = serde_json::json!([param[1], param[2], param[3]]);
                    let name = param[0].as_str().unwrap();
                    assert_eq!(found.get(name), Some(&wanted), "{place} {name}");
                }
            }
        }
    }
}

#[test]
fn shards_of_a_moe_model_are_megatrons_byte_for_byte() {
    let layouts = [
        "tp2_pp2_ep2_etp2",
        "tp2_cp2_pp2_ep2_etp1",
        "tp2_etp4",
        "seq_nomtp_tp2_ep2_etp2",
        "pp2_vpp2_layout",
        "pp2_vpp2_first2",
        "pp3_account_embedding",
        "pad96_tp2",
    ];
    every_stage_is_megatrons("moe_vl", &layouts, &[]);
}

#[test]
fn shards_of_a_dense_model_are_megatrons_byte_for_byte() {
    let layouts = [
        "tp4",
        "pp2_vpp2_layout",
        "pp2_account_both",
        "pp2_last1",
        "pad96_tp2",
        "pp4_layout_nomtp",
        "pp4_layout_empty",
    ];
    every_stage_is_megatrons("dense_vl", &layouts, &[]);
}

/// Megatron Bridge casts everything to the config's dtype; without the flag each tensor keeps its own.
#[test]
fn torch_dtype_casts_every_tensor_as_megatron_bridge_does() {
    let cast = ["--torch-dtype", "bfloat16"];
    every_stage_is_megatrons("moe_vl_bf16", &["tp2_pp2_ep2_etp1"], &cast);
    every_stage_is_megatrons("dense_vl_tied_bf16", &["pp2_vpp2", "tp2_pp2"], &cast);
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("rank.safetensors");
    let (code, _, stderr) = shard("moe_vl_bf16", "--tp 2", &output);
    assert_eq!(code, 0, "{stderr}");
    let file = ShardFile::open(&output).unwrap();
    let dtype = |end: &str| {
        let (_, info) = file
            .tensors()
            .find(|(name, _)| name.ends_with(end))
            .unwrap();
        info.dtype.to_string()
    };
    assert_eq!(dtype("self_attention.A_log"), "F32");
    assert_eq!(dtype("self_attention.in_proj.weight"), "BF16");
}

#[test]
fn a_shard_says_whose_part_it_is() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("new folder/rank.safetensors");
    let flags = "--tensor-parallel-size 2 --pipeline-parallel-size 2 --vpp 2 --pp-rank 1 --vp-stage 1 \
                 --tp-rank 1 --make-vocab-size-divisible-by 96 --no-mtp";
    let (code, _, stderr) = shard("dense_vl", flags, &output);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("rank 3 of 4"), "{stderr}");
    let file = ShardFile::open(&output).unwrap();
    let info = file.shard();
    assert_eq!(info.architecture, "Qwen3_5ForConditionalGeneration");
    assert_eq!((info.rank.global_rank, info.vp_stage), (3, 1));
    assert_eq!((info.rank.tp_rank, info.rank.pp_rank), (1, 1));
    assert_eq!(info.padded_vocab_size, 1152);
    assert_eq!(info.spec.sizes.vpp_size, Some(2));
    assert!(info.spec.without_mtp);
    // Any reader of safetensors opens it.
    let bytes = fs_err::read(&output).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
}

#[test]
fn wrong_use_of_a_layout_is_refused_with_the_numbers_and_code_2() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("rank.safetensors");
    for (flags, words) in [
        (
            "--tp 3",
            "linear_num_key_heads 4 is not divisible by TP 3 (tensor_model_parallel_size), only by 1, 2, 4",
        ),
        ("--ep 3", "num_experts 8 is not divisible by EP 3"),
        (
            "--etp 64",
            "moe_intermediate_size 32 is not divisible by ETP 64",
        ),
        ("--pp 3", "num_layers 8 is not divisible by PP 3"),
        ("--tp 0", "tensor_model_parallel_size is 0"),
        ("--vpp 2", "pipeline_model_parallel_size is 1"),
        ("--tp 2 --rank 2", "rank 2 does not exist, there are 2"),
        (
            "--pp 2 --pp-rank 2",
            "pp_rank 2 does not exist, there are 2",
        ),
        (
            "--pp 2 --vp-stage 1",
            "vp_stage 1 does not exist, there are 1",
        ),
        (
            "--tp 2 --ep 2 --ep-rank 1",
            "no rank has tp_rank 0, ep_rank 1",
        ),
        (
            "--tp 2 --rank 1 --tp-rank 1",
            "cannot be used with '--tp-rank",
        ),
        (
            "--pipeline-layout Etx|L",
            "Invalid layer character 'x' in stage 0",
        ),
        (
            "--pp 2 --pipeline-layout Et*7|mL",
            "number of decoder layers 7 in pipeline_model_parallel_layout must match num_layers 8",
        ),
        ("--torch-dtype int8", "choose bfloat16, float16 or float32"),
    ] {
        let (code, stdout, stderr) = shard("moe_vl", flags, &output);
        assert_eq!((code, stdout.as_str()), (2, ""), "{flags}: {stderr}");
        assert!(stderr.contains(words), "{flags}: no `{words}` in {stderr}");
        assert!(!output.exists(), "{flags}");
    }
}

/// Short names, Megatron's and Megatron Bridge's are the same flags; a global rank is the same as its coordinates.
#[test]
fn every_spelling_of_a_layout_gives_the_same_file() {
    let scratch = tempfile::tempdir().unwrap();
    let spellings = [
        "--tp 2 --pp 2 --vpp 2 --ep 2 --etp 2 --cp 1 --dp 2 --rank 7 --vp-stage 1",
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 \
         --virtual-pipeline-model-parallel-size 2 --expert-model-parallel-size 2 \
         --expert-tensor-parallel-size 2 --context-parallel-size 1 --data-parallel-size 2 \
         --tp-rank 1 --pp-rank 1 --ep-rank 1 --etp-rank 1 --vp-stage 1",
        "--tensor-parallel-size 2 --pipeline-parallel-size 2 --vpp 2 --expert-parallel-size 2 \
         --expert-tensor-parallel-size 2 --data-parallel-size 2 --rank 7 --vp-stage 1",
    ];
    let files = spellings.map(|flags| {
        let output = scratch.path().join("rank.safetensors");
        let (code, _, stderr) = shard("moe_vl", &format!("{flags} --overwrite"), &output);
        assert_eq!(code, 0, "{flags}: {stderr}");
        fs_err::read(&output).unwrap()
    });
    assert!(files[0] == files[1] && files[1] == files[2]);
    let written = ["Et*3|t|t*3|tmL", "E,ttt|t|(t)*3|t,mL"].map(|layout| {
        let output = scratch.path().join("rank.safetensors");
        let flag = if layout.contains(',') {
            "--pipeline-model-parallel-layout"
        } else {
            "--pipeline-layout"
        };
        let flags = format!("--pp 2 {flag} {layout} --vp-stage 1 --overwrite");
        let (code, _, stderr) = shard("moe_vl", &flags, &output);
        assert_eq!(code, 0, "{flags}: {stderr}");
        fs_err::read(&output).unwrap()
    });
    assert!(written[0] == written[1]);
}

#[test]
fn help_says_the_defaults_and_an_example() {
    for (command, example) in [
        (
            "shard",
            "trainer convert shard --hf-model Qwen3.5-9B/ --tp 2",
        ),
        ("unshard", "trainer convert unshard shards/ --hf-model"),
    ] {
        let (code, help, stderr) = convert(command, &words("--help"));
        assert_eq!((code, stderr.as_str()), (0, ""));
        // Lines are broken by width.
        let help: Vec<&str> = help.split_whitespace().collect();
        assert!(help.join(" ").contains(example), "{command}");
    }
    let (_, help, _) = convert("shard", &words("--help"));
    let help: Vec<&str> = help.split_whitespace().collect();
    let help = help.join(" ");
    for words in [
        "--tensor-model-parallel-size <N> Tensor-parallel size [default: 1] [aliases: --tp, --tensor-parallel-size]",
        "1 as in Megatron Bridge's scripts (Megatron-Core's own default is the TP size) [default: 1] [alias: --etp]",
        "[alias: --pipeline-model-parallel-layout]",
        "without it each keeps the source's (Megatron Bridge's default is bfloat16)",
        "Global rank in Megatron's order tp-cp-ep-dp-pp",
        "--num-layers-in-last-pipeline-stage <N>",
        "--account-for-loss-in-pipeline-split",
        "--make-vocab-size-divisible-by <N> Pad the vocabulary to a multiple of N x TP",
        "--sequential-experts",
        "--no-mtp",
    ] {
        assert!(help.contains(words), "no `{words}` in {help}");
    }
}

/// PROMISES: more tensor-parallel ranks than KV heads crash deep in a forward pass elsewhere.
#[test]
fn more_tensor_ranks_than_kv_heads_are_cut_by_rows_or_refused_at_start() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("rank.safetensors");
    // 2 KV heads, 8 query heads, 4 key heads.
    let (code, _, stderr) = shard("dense_vl", "--tp 4 --rank 3", &output);
    assert_eq!(code, 0, "{stderr}");
    let (code, _, stderr) = shard("dense_vl", "--tp 16 --overwrite", &output);
    assert_eq!(code, 2);
    assert!(
        stderr.contains("num_attention_heads 8 is not divisible by TP 16"),
        "{stderr}"
    );
}

#[test]
fn a_job_that_fails_leaves_the_output_as_it_was() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("rank.safetensors");
    fs_err::write(&output, "mine").unwrap();
    let (code, _, stderr) = shard("dense_vl", "", &output);
    assert_eq!(code, 1);
    assert!(
        stderr.contains("exists; choose another file or pass --overwrite"),
        "{stderr}"
    );
    assert_eq!(fs_err::read(&output).unwrap(), b"mine");

    // A weight that is not a number stops the job in the middle.
    let model = scratch.path().join("model");
    fs_err::create_dir(&model).unwrap();
    let source = golden("checkpoints/dense_vl");
    fs_err::copy(source.join("config.json"), model.join("config.json")).unwrap();
    let mut bytes = fs_err::read(source.join("model.safetensors")).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs_err::write(model.join("model.safetensors"), bytes).unwrap();
    let args = format!(
        "--hf-model {} --output {} --overwrite",
        model.display(),
        output.display()
    );
    let (code, _, stderr) = convert("shard", &words(&args));
    assert_eq!(code, 1);
    assert!(stderr.contains("is NaN"), "{stderr}");
    assert_eq!(fs_err::read(&output).unwrap(), b"mine");
    let left: Vec<_> = fs_err::read_dir(scratch.path()).unwrap().collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn a_place_without_weights_is_an_error() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("rank.safetensors");
    let config = golden("configs/Qwen3.5-0.8B.json");
    let args = format!(
        "--hf-model {} --output {}",
        config.display(),
        output.display()
    );
    let (code, _, stderr) = convert("shard", &words(&args));
    assert_eq!(code, 1);
    assert!(
        stderr.contains("a shard needs a directory with weights"),
        "{stderr}"
    );
    let (code, _, stderr) = convert(
        "shard",
        &words("--hf-model no/such/place --output x.safetensors"),
    );
    assert_eq!(code, 1);
    assert!(stderr.contains("no/such/place"), "{stderr}");
}
