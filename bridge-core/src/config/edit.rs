//! A config changed on its way to another file.

use serde_json::{Map, Value};

use super::{HfConfig, unquantised};
use crate::Dtype;
use crate::json;

impl HfConfig {
    /// Says that weights are stored in `dtype`: at the top, with the language model, and wherever else the file says so.
    pub fn set_dtype(&mut self, dtype: Dtype) {
        let set = |object: &mut Map<String, Value>, always: bool| {
            // The older word.
            object.shift_remove("torch_dtype");
            if always || object.contains_key("dtype") {
                object.insert("dtype".to_owned(), dtype.torch_word().into());
            }
        };
        set(&mut self.raw, true);
        for (part, always) in [("text_config", true), ("vision_config", false)] {
            if let Some(Value::Object(part)) = self.raw.get_mut(part) {
                set(part, always);
            }
        }
        self.text.dtype = Some(dtype);
    }

    /// Says that there is no multi-token-prediction head.
    pub fn drop_mtp(&mut self) {
        self.text_object()
            .insert("mtp_num_hidden_layers".to_owned(), 0.into());
        self.text.mtp_num_hidden_layers = 0;
    }

    /// Says that weights are as their dtypes say: in no block-wise form.
    pub fn drop_quantization(&mut self) {
        self.raw = unquantised(&self.raw);
        self.quantization = None;
    }

    /// The file, in the form in which transformers writes it.
    #[must_use]
    pub fn to_json(&self) -> String {
        json::as_python_writes(&self.raw)
    }

    /// Where the language model is described.
    fn text_object(&mut self) -> &mut Map<String, Value> {
        if !self.raw.get("text_config").is_some_and(Value::is_object) {
            return &mut self.raw;
        }
        match &mut self.raw["text_config"] {
            Value::Object(text) => text,
            _ => unreachable!("it was an object a moment ago"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn config(text: Value, dtype: Value) -> HfConfig {
        let value = json!({
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "dtype": dtype,
            "text_config": text,
            "vision_config": {"out_hidden_size": 4096},
            "unknown": 1,
        });
        HfConfig::from_json(value, Path::new("config.json")).unwrap()
    }

    #[test]
    fn a_changed_dtype_is_said_at_the_top_and_with_the_language_model() {
        let mut both = config(json!({"torch_dtype": "bfloat16"}), json!("bfloat16"));
        both.set_dtype(Dtype::F32);
        assert_eq!(both.raw["dtype"], "float32");
        assert_eq!(both.raw["text_config"], json!({"dtype": "float32"}));
        let mut none = config(json!({}), Value::Null);
        none.set_dtype(Dtype::F16);
        assert_eq!(none.raw["text_config"], json!({"dtype": "float16"}));
        for changed in [both, none] {
            let value = serde_json::from_str(&changed.to_json()).unwrap();
            let read = HfConfig::from_json(value, Path::new("config.json")).unwrap();
            assert_eq!(read, changed);
        }
    }

    #[test]
    fn a_dropped_head_is_said_beside_the_other_keys() {
        let mut config = config(json!({"mtp_num_hidden_layers": 1}), Value::Null);
        config.drop_mtp();
        assert_eq!(
            config.raw["text_config"],
            json!({"mtp_num_hidden_layers": 0})
        );
        assert_eq!(config.raw["unknown"], 1);
        assert_eq!(config.text.mtp_num_hidden_layers, 0);
    }
}
