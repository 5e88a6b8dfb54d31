//! Golden tests: tokenizer.

use serde_json::Value;
use tests::golden;
use trainer::data::ChatTokenizer;

fn cases(key: &str) -> Vec<Value> {
    let bytes = fs_err::read(golden("data/tokenizer_golden.json")).unwrap();
    let mut json: Value = serde_json::from_slice(&bytes).unwrap();
    match json[key].take() {
        Value::Array(cases) => cases,
        other => panic!("`{key}` is {other}"),
    }
}

fn ids(value: &Value) -> Vec<i64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_i64().unwrap())
        .collect()
}

#[test]
fn ids_and_decoded_text_equal_transformers() {
    let tokenizer = ChatTokenizer::from_dir(&golden("checkpoints/moe_vl")).unwrap();
    let cases = cases("cases");
    assert_eq!(cases.len(), 230);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let found = tokenizer.encode(text).unwrap();
        assert_eq!(found, ids(&case["ids"]), "{text:?}");
        assert_eq!(
            tokenizer.decode(&found, false),
            case["decoded"].as_str().unwrap(),
            "{text:?}"
        );
        let without_special = case["decoded_skip_special"].as_str().unwrap();
        assert_eq!(tokenizer.decode(&found, true), without_special, "{text:?}");
    }
}

#[test]
fn broken_utf8_and_unused_ids_decode_as_in_transformers() {
    let tokenizer = ChatTokenizer::from_dir(&golden("checkpoints/moe_vl")).unwrap();
    for case in cases("decode_only") {
        let ids = ids(&case["ids"]);
        assert_eq!(
            tokenizer.decode(&ids, false),
            case["decoded"].as_str().unwrap(),
            "{ids:?}"
        );
    }
}

/// tokenizer.json of the hub leaves them out; a reader of that file alone takes them for text.
#[test]
fn audio_tokens_that_only_the_config_lists_are_single_ids() {
    let tokenizer = ChatTokenizer::from_dir(&golden("checkpoints/moe_vl")).unwrap();
    assert_eq!(
        tokenizer
            .encode("<|audio_start|><tts_pad><|audio_pad|>")
            .unwrap(),
        [986, 988, 992]
    );
    assert_eq!(tokenizer.pad_token_id(), Some(960));
}

#[test]
fn an_added_token_with_another_id_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source = golden("checkpoints/moe_vl");
    fs_err::copy(
        source.join("tokenizer.json"),
        folder.path().join("tokenizer.json"),
    )
    .unwrap();
    let config =
        r#"{"added_tokens_decoder": {"1500": {"content": "<|audio_start|>", "special": true}}}"#;
    fs_err::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    let error = ChatTokenizer::from_dir(folder.path())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("<|audio_start|>") && error.contains("1500"),
        "{error}"
    );
}
