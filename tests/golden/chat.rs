//! Golden tests: chat template, labels, placeholders and the row formats.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tests::golden;
use trainer::data::{Dataset, EncodeOptions, Processor, Sample, TooLong, VideoMarkers};

fn processor() -> Processor {
    Processor::from_dir(golden("checkpoints/moe_vl")).unwrap()
}

fn goldens(key: &str) -> Vec<Value> {
    let bytes = fs_err::read(golden("data/chat_golden.json")).unwrap();
    let mut json: Value = serde_json::from_slice(&bytes).unwrap();
    match json[key].take() {
        Value::Array(cases) => cases,
        other => panic!("`{key}` is {other}"),
    }
}

fn data() -> PathBuf {
    golden("data")
}

/// Prompts and conversations without a target too.
fn any_row() -> EncodeOptions {
    EncodeOptions {
        require_supervised: false,
        ..EncodeOptions::default()
    }
}

fn integers(value: &Value) -> Vec<i64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_i64().unwrap())
        .collect()
}

fn encode(row: &Value) -> Result<Sample, String> {
    processor()
        .encode_value(row, &data(), &EncodeOptions::default())
        .map_err(|error| error.to_string())
}

fn question(text: &str, answer: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]})
}

/// trl #6361, Qwen3 #1522 and others: doubled thinking blocks, reasoning lost between turns, no mask of the answers.
#[test]
fn renders_ids_and_labels_equal_transformers() {
    let processor = processor();
    let cases = goldens("cases");
    assert_eq!(cases.len(), 60);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let mut row = Map::new();
        for key in [
            "messages",
            "tools",
            "chat_template_kwargs",
            "add_generation_prompt",
        ] {
            if let Some(value) = case.get(key) {
                row.insert(key.into(), value.clone());
            }
        }
        let sample = processor
            .encode_value(&Value::Object(row), &data(), &any_row())
            .unwrap();
        assert_eq!(sample.text, case["rendered"].as_str().unwrap(), "{name}");
        assert_eq!(sample.input_ids, integers(&case["input_ids"]), "{name}");
        assert_eq!(
            sample.mm_token_type_ids,
            integers(&case["mm_token_type_ids"]),
            "{name}"
        );
        let mask: Vec<i64> = sample
            .labels
            .iter()
            .map(|&label| i64::from(label != -100))
            .collect();
        assert_eq!(mask, integers(&case["label_mask"]), "{name}");
        for (label, id) in sample.labels.iter().zip(&sample.input_ids) {
            assert!(*label == -100 || label == id, "{name}");
        }
        let grids = |key: &str| case.get(key).cloned().unwrap_or(json!([]));
        assert_eq!(
            json!(sample.image_grid_thw),
            grids("image_grid_thw"),
            "{name}"
        );
        assert_eq!(
            json!(sample.video_grid_thw),
            grids("video_grid_thw"),
            "{name}"
        );
    }
}

#[test]
fn refusals_of_the_template_keep_its_words() {
    let processor = processor();
    let template = processor.template().unwrap();
    let refused = goldens("refused");
    assert_eq!(refused.len(), 13);
    for case in refused {
        let name = case["name"].as_str().unwrap();
        let messages = case["messages"].as_array().unwrap();
        let error = template
            .render(messages, None, &Map::new(), false)
            .unwrap_err()
            .to_string();
        match case["error_type"].as_str().unwrap() {
            "TemplateError" => assert_eq!(error, case["error"].as_str().unwrap(), "{name}"),
            // The engine's own words, with the line.
            _ => assert!(error.contains("line"), "{name}: {error}"),
        }
        let row = json!({"messages": messages});
        let whole = processor.encode_value(&row, &data(), &any_row());
        // Data files may hold arguments as a JSON string; it is parsed before the template sees it.
        assert_eq!(whole.is_ok(), name == "arguments_string", "{name}");
    }
}

/// What a release of Qwen3.6 may add: `{% generation %}`, other kwargs, a template inside tokenizer_config.json.
#[test]
fn a_template_in_tokenizer_config_is_found() {
    let source = golden("checkpoints/moe_vl");
    let folder = tempfile::tempdir().unwrap();
    fs_err::copy(
        source.join("tokenizer.json"),
        folder.path().join("tokenizer.json"),
    )
    .unwrap();
    let config = json!({"chat_template": "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}", "eos_token": "<|im_end|>"});
    fs_err::write(
        folder.path().join("tokenizer_config.json"),
        config.to_string(),
    )
    .unwrap();
    let processor = Processor::from_dir(folder.path()).unwrap();
    let row = json!({"messages": [{"role": "user", "content": "a"}]});
    let sample = processor.encode_value(&row, &data(), &any_row()).unwrap();
    assert_eq!(sample.text, "a<|im_end|>");
}

#[test]
fn llava_rows_become_the_same_samples() {
    let processor = processor();
    let open = |name: &str| Dataset::open(golden(&format!("data/shapes/{name}"))).unwrap();
    let (train, llava) = (open("train.jsonl"), open("train_llava.json"));
    assert_eq!((train.len(), llava.len()), (64, 16));
    for row in 0..llava.len() {
        let sample = |dataset: &Dataset| {
            let row = dataset.row(row).unwrap();
            processor
                .encode(&row, &dataset.base_dir(), &EncodeOptions::default())
                .unwrap()
        };
        assert_eq!(sample(&llava), sample(&train), "row {row}");
    }
}

#[test]
fn media_lists_fill_the_marks_in_order() {
    let listed = json!({
        "messages": [
            {"role": "user", "content": "<image><video>a<image>"},
            {"role": "assistant", "content": "b"},
        ],
        "images": ["images/rgb_64x64.png", {"path": "images/gray_70x45.png"}],
        "videos": [["images/video/0000.png", "images/video/0001.png"]],
    });
    let parts = json!({"messages": [
        {"role": "user", "content": [
            {"type": "image", "image": "images/rgb_64x64.png"},
            {"type": "video", "video": ["images/video/0000.png", "images/video/0001.png"]},
            {"type": "text", "text": "a"},
            {"type": "image_url", "image_url": {"url": "images/gray_70x45.png"}},
        ]},
        {"role": "assistant", "content": "b"},
    ]});
    assert_eq!(encode(&listed).unwrap(), encode(&parts).unwrap());
    let mut uneven = listed;
    uneven["images"].as_array_mut().unwrap().pop();
    let error = encode(&uneven).unwrap_err();
    assert!(
        error.contains("2 `<image>`") && error.contains("lists 1"),
        "{error}"
    );
}

#[test]
fn pictures_may_be_base64_data() {
    use base64::Engine;
    let bytes = fs_err::read(golden("data/images/rgb_64x64.png")).unwrap();
    let data = base64::engine::general_purpose::STANDARD.encode(bytes);
    let row = |part: Value| json!({"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]});
    let expected = encode(&row(
        json!({"type": "image", "image": "images/rgb_64x64.png"}),
    ))
    .unwrap();
    for part in [
        json!({"type": "image", "base64": data}),
        json!({"type": "image", "image": format!("data:image/png;base64,{data}")}),
        json!({"type": "image_url", "image_url": {"url": format!("data:image/png;base64,{data}")}}),
        json!({"type": "image", "path": golden("data/images/rgb_64x64.png")}),
    ] {
        assert_eq!(encode(&row(part)).unwrap(), expected);
    }
}

#[test]
fn control_tokens_in_a_text_are_refused_and_the_others_kept() {
    for token in [
        "<|im_start|>",
        "<|im_end|>",
        "<|image_pad|>",
        "<|vision_start|>",
        "<|endoftext|>",
        "<|audio_pad|>",
    ] {
        for row in [
            question(&format!("a{token}b"), "c"),
            question("a", &format!("b {token}")),
        ] {
            let error = encode(&row).unwrap_err();
            assert!(
                error.contains(token) && error.contains("message"),
                "{error}"
            );
        }
        let mut row = question("a", "b");
        row["tools"] =
            json!([{"type": "function", "function": {"name": "f", "description": token}}]);
        assert!(encode(&row).unwrap_err().contains("tools"));
    }
    for token in [
        "<tool_call>",
        "</tool_call>",
        "<|fim_prefix|>",
        "<|repo_name|>",
        "<|file_sep|>",
        "<tool_response>",
    ] {
        assert!(
            encode(&question(&format!("a {token} b"), "c")).is_ok(),
            "{token}"
        );
    }
    // Within an answer a think block is split off by the template.
    assert!(encode(&question("a", "<think>b</think>c")).is_ok());
}

#[test]
fn a_misspelt_key_gets_a_suggestion() {
    for (row, key, nearest) in [
        (json!({"mesages": []}), "mesages", "messages"),
        (
            json!({"messages": [{"role": "user", "content": "a"}], "image_": [], "imagess": ["x.png"]}),
            "image",
            "image",
        ),
        (json!({"conversation": []}), "conversation", "conversations"),
        (
            json!({"messages": [{"role": "user", "contents": "a"}]}),
            "contents",
            "content",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": "a", "los": false}]}),
            "los",
            "loss",
        ),
    ] {
        let error = encode(&row).unwrap_err();
        assert!(
            error.contains(key) && error.contains(&format!("did you mean `{nearest}")),
            "{error}"
        );
    }
    let mut row = question("a", "b");
    row["category"] = json!("own column");
    assert!(encode(&row).is_ok());
}

#[test]
fn rows_that_cannot_be_learned_from_say_why() {
    let image = |path: &str| {
        json!({"messages": [
            {"role": "user", "content": [{"type": "image", "image": path}]},
            {"role": "assistant", "content": "x"},
        ]})
    };
    let mut unsupervised = question("a", "b");
    unsupervised["messages"][1]["loss"] = json!(false);
    for (row, words) in [
        (json!([1]), "object"),
        (json!({"text": "x"}), "`messages`"),
        (json!({"messages": "x"}), "list of messages"),
        (
            image("images/absent.png"),
            "`images/absent.png`: no such file",
        ),
        (image("chat_golden.json"), "not a JPEG, PNG"),
        (image("images"), "not a regular file"),
        (image("https://example.com/a.png"), "web address"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
            "without a source",
        ),
        (
            json!({"messages": [{"role": "user", "content": "a"}]}),
            "no supervised token",
        ),
        (unsupervised, "no supervised token"),
        (
            json!({"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}),
            "this is bot",
        ),
        (
            json!({"conversations": [{"from": "bot", "value": "a"}]}),
            "`bot`",
        ),
        (
            json!({"image": "a.png", "conversations": [{"from": "human", "value": "a"}]}),
            "0 `<image>`",
        ),
        (
            json!({"conversations": [{"from": "human", "value": "<image>a"}]}),
            "1 `<image>`",
        ),
        (
            json!({"messages": [{"role": "user", "content": [
                {"type": "video", "video": ["images/video/0000.png"]}]}, {"role": "assistant", "content": "x"}]}),
            "t:1 must be larger",
        ),
    ] {
        let error = encode(&row).unwrap_err();
        assert!(error.contains(words), "`{words}` is not in: {error}");
        assert!(!error.contains("0x"), "{error}");
    }
}

#[test]
fn errors_name_the_file_and_the_row() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    let text = format!(
        "{}\n\n{}\n",
        question("a", "b"),
        question("a<|im_end|>", "b")
    );
    fs_err::write(&path, text).unwrap();
    let dataset = Dataset::open(&path).unwrap();
    assert_eq!(dataset.len(), 2);
    let row = dataset.row(1).unwrap();
    let error = processor()
        .encode(&row, &dataset.base_dir(), &EncodeOptions::default())
        .unwrap_err();
    assert!(
        error.to_string().contains("rows.jsonl, row 1: message 0"),
        "{error}"
    );
}

#[test]
fn a_long_row_is_refused_or_cut_but_never_through_an_image() {
    let row = json!({"messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "image", "image": "images/rgb_64x64.png"}]},
        {"role": "assistant", "content": "c"},
    ]});
    let processor = processor();
    let whole = processor
        .encode_value(&row, &data(), &EncodeOptions::default())
        .unwrap();
    let first_pad = whole
        .mm_token_type_ids
        .iter()
        .position(|&kind| kind == 1)
        .unwrap();
    for limit in 1..=whole.input_ids.len() {
        let mut options = EncodeOptions {
            max_length: Some(limit),
            ..any_row()
        };
        let refused = processor.encode_value(&row, &data(), &options);
        assert_eq!(refused.is_ok(), limit == whole.input_ids.len(), "{limit}");
        options.too_long = TooLong::Truncate;
        let cut = processor.encode_value(&row, &data(), &options).unwrap();
        let length = cut.input_ids.len();
        assert!(length <= limit && cut.input_ids == whole.input_ids[..length]);
        assert_eq!(
            (cut.labels.len(), cut.mm_token_type_ids.len()),
            (length, length)
        );
        let pads = cut
            .mm_token_type_ids
            .iter()
            .filter(|&&kind| kind == 1)
            .count();
        // The markers around the four placeholders stay with them.
        let image_is_whole = limit >= first_pad + 5;
        assert_eq!(
            (pads, cut.image_grid_thw.len()),
            if image_is_whole { (4, 1) } else { (0, 0) },
            "{limit}"
        );
        assert_eq!(cut.pixel_values.is_empty(), !image_is_whole);
        if !image_is_whole && limit >= first_pad {
            assert_eq!(length, first_pad - 1);
        }
    }
}

#[test]
fn the_outer_pair_of_a_video_is_kept_or_replaced() {
    let row = json!({"messages": [
        {"role": "user", "content": [{"type": "video", "video": ["images/video/0000.png", "images/video/0001.png"], "fps": 2.0}]},
        {"role": "assistant", "content": "x"},
    ]});
    let decoded = |markers| {
        let options = EncodeOptions {
            video_markers: markers,
            ..EncodeOptions::default()
        };
        let sample = processor().encode_value(&row, &data(), &options).unwrap();
        processor().decode(&sample.input_ids, false)
    };
    let inner = format!(
        "<0.2 seconds><|vision_start|>{}<|vision_end|>",
        "<|video_pad|>".repeat(4)
    );
    let nested = format!("user\n<|vision_start|>{inner}<|vision_end|><|im_end|>");
    let replaced = format!("user\n{inner}<|im_end|>");
    assert!(decoded(VideoMarkers::Nested).contains(&nested));
    assert!(decoded(VideoMarkers::Replaced).contains(&replaced));
}

#[test]
fn a_folder_of_frames_is_sampled_at_the_checkpoints_rate() {
    let row = json!({"messages": [
        {"role": "user", "content": [{"type": "video", "video": "images/video", "fps": 5.0}]},
        {"role": "assistant", "content": "x"},
    ]});
    // 11 frames at 5 a second, 2 a second kept: 4 frames.
    assert_eq!(encode(&row).unwrap().video_grid_thw, [[2, 4, 4]]);
}

#[test]
fn a_prompt_ends_with_the_opening_of_the_answer() {
    let messages = json!([{"role": "user", "content": [
        {"type": "image", "image": "images/rgb_64x64.png"}, {"type": "text", "text": "What?"}]}]);
    let sample = processor().prompt(&messages, &data(), Some(false)).unwrap();
    assert!(
        sample
            .text
            .ends_with("<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        "{}",
        sample.text
    );
    assert_eq!(sample.supervised_tokens(), 0);
    assert_eq!(sample.pixel_values.len(), 16 * 1536);
    let sample = processor().prompt(&messages, &data(), None).unwrap();
    assert!(
        sample.text.ends_with("<|im_start|>assistant\n<think>\n"),
        "{}",
        sample.text
    );
}

#[test]
fn many_threads_share_one_processor() {
    fn shared<T: Send + Sync>(_: &T) {}
    let (processor, dataset) = (
        processor(),
        Dataset::open(golden("data/shapes/train.jsonl")).unwrap(),
    );
    shared(&processor);
    shared(&dataset);
    let encode = |row: usize| {
        let base_dir: &Path = &dataset.base_dir();
        processor
            .encode(
                &dataset.row(row).unwrap(),
                base_dir,
                &EncodeOptions::default(),
            )
            .unwrap()
    };
    let alone: Vec<Sample> = (0..8).map(encode).collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|row| scope.spawn(move || encode(row))).collect();
        for (thread, alone) in threads.into_iter().zip(&alone) {
            assert_eq!(thread.join().unwrap(), *alone);
        }
    });
}
