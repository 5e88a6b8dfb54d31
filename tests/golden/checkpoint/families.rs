//! Language models alone and classifiers that do not fit their config.

use super::*;

fn tensor(name: &str, shape: [usize; 2]) -> (String, TensorInfo, Vec<u8>) {
    let info = TensorInfo {
        dtype: Dtype::F32,
        shape: shape.to_vec(),
    };
    let bytes = vec![0; shape[0] * shape[1] * 4];
    (name.to_owned(), info, bytes)
}

/// Read as flat, every size of such a file would silently be a default.
#[test]
fn the_config_of_a_vision_language_model_is_refused_under_the_name_of_a_language_model() {
    let dir = changed(
        "dense_vl",
        |_| {},
        |config| config["architectures"][0] = "Qwen3_5ForCausalLM".into(),
    );
    assert_says(
        &refusal(&dir.path().join("model")),
        &["`text_config`", "`vision_config`", "at the top level"],
    );
}

#[test]
fn a_misspelt_key_of_a_flat_config_is_named_without_a_prefix() {
    let dir = changed(
        "dense_text",
        |_| {},
        |config| {
            let map = config.as_object_mut().unwrap();
            let layers = map.remove("num_hidden_layers").unwrap();
            map.insert("num_hiden_layers".to_owned(), layers);
            map.insert("attention_bias".to_owned(), true.into());
        },
    );
    assert_says(
        &refusal(&dir.path().join("model")),
        &[
            "`num_hiden_layers` is unknown; did you mean `num_hidden_layers`?",
            "`attention_bias` is true",
        ],
    );
}

/// A vision tower beside a language model alone would be lost.
#[test]
fn pictures_tensors_of_a_language_model_alone_are_refused() {
    let name = "model.visual.patch_embed.proj.weight";
    let dir = changed(
        "dense_text",
        |tensors| tensors.push(tensor(name, [4, 4])),
        |_| {},
    );
    assert_says(&refusal(&dir.path().join("model")), &[name, "no row"]);
}

#[test]
fn prefixes_of_other_tools_are_read_as_those_of_a_language_model_alone() {
    for prefix in ["model.language_model.", "language_model.model."] {
        let dir = changed(
            "moe_text",
            |tensors| {
                for (name, ..) in tensors {
                    if let Some(rest) = name.strip_prefix("model.") {
                        *name = format!("{prefix}{rest}");
                    }
                }
            },
            |_| {},
        );
        let bridge = AutoBridge::from_hf_pretrained(&dir.path().join("model")).unwrap();
        let plan = bridge.plan(&PlanOptions::default()).unwrap();
        let embedding = plan.tensor("embedding.word_embeddings.weight").unwrap();
        assert_eq!(embedding.sources[0].name, "model.embed_tokens.weight");
    }
}

#[test]
fn a_classifier_with_an_output_layer_or_a_head_is_refused_with_the_reason() {
    let dir = changed(
        "dense_token_classification",
        |tensors| {
            tensors.push(tensor("lm_head.weight", [1024, 64]));
            tensors.push(tensor("mtp.fc.weight", [64, 128]));
        },
        |_| {},
    );
    assert_says(
        &refusal(&dir.path().join("model")),
        &[
            "score.weight in the place of the output layer",
            "a classifier has no MTP head",
        ],
    );
}

#[test]
fn a_classifier_under_the_name_of_a_generator_is_refused_with_the_architecture() {
    let dir = changed(
        "dense_token_classification",
        |_| {},
        |config| {
            config["architectures"][0] = "Qwen3_5ForConditionalGeneration".into();
            config["text_config"]["mtp_num_hidden_layers"] = 0.into();
        },
    );
    assert_says(
        &refusal(&dir.path().join("model")),
        &[
            "`score.weight`",
            "Qwen3_5ForTokenClassification",
            "lm_head.weight",
        ],
    );
}

#[test]
fn the_labels_are_those_of_id2label_and_must_be_the_rows_of_the_classifier() {
    let dir = changed(
        "dense_token_classification",
        |_| {},
        |config| {
            config["id2label"].as_object_mut().unwrap().remove("4");
        },
    );
    assert_says(
        &refusal(&dir.path().join("model")),
        &["`score.weight`", "[5, 64]", "[4, 64]", "`score.bias`"],
    );
    let dir = changed(
        "dense_token_classification",
        |_| {},
        |config| config["num_labels"] = 3.into(),
    );
    assert_says(
        &refusal(&dir.path().join("model")),
        &["`num_labels` is 3", "id2label names 5 labels"],
    );
}

/// A config that was made from a tied model still says so; the classifier has nothing to tie.
#[test]
fn a_classifier_is_never_tied_and_its_dropout_has_transformers_order() {
    let dir = changed(
        "dense_token_classification",
        |_| {},
        |config| {
            config["tie_word_embeddings"] = true.into();
            config["hidden_dropout"] = 0.25.into();
        },
    );
    let bridge = AutoBridge::from_hf_pretrained(&dir.path().join("model")).unwrap();
    let plan = bridge.plan(&PlanOptions::default()).unwrap();
    assert!(plan.tensor("language_model.output_layer.bias").is_some());
    let provider = serde_json::to_value(bridge.to_megatron_provider()).unwrap();
    assert_eq!(provider["share_embeddings_and_output_weights"], false);
    assert_eq!(provider["classifier_dropout"], 0.25);
}
