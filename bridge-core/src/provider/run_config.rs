//! run_config.yaml, in which Megatron Bridge keeps the provider of a checkpoint directory.

use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use serde_saphyr::NonFiniteFloatPolicy;

use super::Provider;
use crate::config::HfConfig;
use crate::regular_file;

/// Its name in the directory of an iteration.
pub const FILE: &str = "run_config.yaml";

/// Larger files are none of Megatron Bridge's; they are about 20 KB.
const MAX_BYTES: u64 = 16 << 20;

/// Why a run_config.yaml cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunConfigError {
    /// The system refused.
    #[error("cannot read {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// It is not what Megatron Bridge writes.
    #[error("{} cannot be used: {reason}", file.display())]
    Content {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// The `model` section: a provider's class and fields.
#[derive(Debug, Clone, PartialEq)]
pub struct RunConfig {
    model: Map<String, Value>,
}

/// A field of which run_config.yaml says something else.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// Its name.
    pub field: &'static str,
    /// What run_config.yaml says.
    pub found: Value,
    /// What the provider says.
    pub expected: Value,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` is {} instead of {}",
            self.field, self.found, self.expected
        )
    }
}

/// Fields that say which model it is. The others are a run's to choose.
const IDENTITY: [&str; 24] = [
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "share_embeddings_and_output_weights",
    "qk_layernorm",
    "attention_output_gate",
    "layernorm_epsilon",
    "linear_attention_freq",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "num_moe_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "rotary_base",
    "rotary_percent",
    "mrope_section",
];

impl RunConfig {
    /// What Megatron Bridge would write of a model that was saved by one rank.
    #[must_use]
    pub fn new(provider: &Provider, config: &HfConfig) -> Self {
        let fields = serde_json::to_value(provider).expect("a provider has plain fields");
        let Value::Object(mut model) = fields else {
            unreachable!("a struct becomes an object")
        };
        // Not a field of the class, which has kv_channels.
        model.remove("head_dim");
        model.insert("_target_".to_owned(), provider.target().into());
        model.insert(
            "activation_func".to_owned(),
            function("torch.nn.functional.silu"),
        );
        for size in [
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
        ] {
            model.insert(size.to_owned(), 1.into());
        }
        if let (Some(class), Some(vision)) =
            (provider.vision_class(), config.raw.get("vision_config"))
        {
            model.insert(
                "vision_config".to_owned(),
                json!({"_target_": format!("{class}.from_dict"), "_call_": true, "config_dict": vision}),
            );
        }
        let mut run = Self { model };
        run.set_dtype(&provider.common().params_dtype);
        run
    }

    /// Replaces a field.
    pub fn set(&mut self, field: &str, value: impl Into<Value>) {
        self.model.insert(field.to_owned(), value.into());
    }

    /// Sets the dtype of the parameters, `torch.bfloat16` for example.
    pub fn set_dtype(&mut self, dtype: &str) {
        self.set("params_dtype", function(dtype));
        self.set("bf16", dtype == "torch.bfloat16");
        self.set("fp16", dtype == "torch.float16");
    }

    /// The file.
    #[must_use]
    pub fn to_yaml(&self) -> String {
        let mut model = self.model.clone();
        model.sort_keys();
        let whole = json!({
            "_target_": "megatron.bridge.training.config.ConfigContainer",
            "checkpoint": {"ckpt_format": "torch_dist", "save_optim": false, "save_rng": false},
            "model": model,
        });
        serde_saphyr::to_string(&whole).expect("maps, lists and plain values are YAML")
    }

    /// Reads the file of a directory.
    ///
    /// # Errors
    /// [`RunConfigError`].
    pub fn read(file: &Path) -> Result<Self, RunConfigError> {
        let read = |source| RunConfigError::Read {
            file: file.to_owned(),
            source,
        };
        let content = |reason: String| RunConfigError::Content {
            file: file.to_owned(),
            reason,
        };
        let bytes = regular_file::read(file, MAX_BYTES).map_err(read)?;
        // Settings of an optimizer may be infinite; no field of a model is.
        let options = serde_saphyr::options! {
            non_finite_float_policy: NonFiniteFloatPolicy::AsString,
        };
        let whole: Value = serde_saphyr::from_slice_with_options(&bytes, options)
            .map_err(|error| content(error.to_string()))?;
        match whole.get("model") {
            Some(Value::Object(model)) => Ok(Self {
                model: model.clone(),
            }),
            _ => Err(content("it has no `model` section".to_owned())),
        }
    }

    /// The class of the provider, `megatron.bridge.....Qwen35VLModelProvider` for example.
    #[must_use]
    pub fn target(&self) -> Option<&str> {
        self.model.get("_target_").and_then(Value::as_str)
    }

    /// The Hugging Face model that it was made from.
    #[must_use]
    pub fn hf_model_id(&self) -> Option<&str> {
        self.model.get("hf_model_id").and_then(Value::as_str)
    }

    /// Fields in which it names another model than `provider`. What it does not say is no difference.
    #[must_use]
    pub fn differences(&self, provider: &Provider) -> Vec<Difference> {
        let expected = Self {
            model: match serde_json::to_value(provider) {
                Ok(Value::Object(fields)) => fields,
                _ => Map::new(),
            },
        };
        IDENTITY
            .into_iter()
            .filter_map(|field| {
                let found = self.identity(field, provider)?;
                let expected = expected.identity(field, provider)?;
                (!same(&found, &expected)).then_some(Difference {
                    field,
                    found,
                    expected,
                })
            })
            .collect()
    }

    fn identity(&self, field: &str, provider: &Provider) -> Option<Value> {
        let value = self.model.get(field).filter(|value| !value.is_null())?;
        // One full-attention layer in so many, where it is not a list.
        if let ("linear_attention_freq", Some(every)) = (field, value.as_u64()) {
            let layers = 1..=provider.common().num_layers as u64;
            return Some(
                layers
                    .map(|layer| u8::from(layer % every.max(1) != 0))
                    .collect(),
            );
        }
        Some(value.clone())
    }
}

/// An integer equals a float of the same value.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// How a function or dtype is written.
fn function(path: &str) -> Value {
    json!({"_target_": path, "_call_": false})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: Value) -> HfConfig {
        let value = json!({
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "text_config": text,
            "vision_config": {"depth": 2, "out_hidden_size": 4096},
        });
        HfConfig::from_json(value, Path::new("config.json")).unwrap()
    }

    fn read(text: &str) -> Result<RunConfig, RunConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        fs_err::write(&file, text).unwrap();
        RunConfig::read(&file)
    }

    #[test]
    fn what_is_written_is_read_and_names_the_same_model() {
        let config = config(json!({"rms_norm_eps": 1e-6, "dtype": "bfloat16"}));
        let provider = Provider::from_config(&config);
        let written = RunConfig::new(&provider, &config);
        let found = read(&written.to_yaml()).unwrap();
        assert_eq!(found.target(), Some(provider.target().as_str()));
        assert_eq!(found.differences(&provider), []);
        let dtype = &found.model["params_dtype"];
        assert_eq!(dtype, &function("torch.bfloat16"));
        assert_eq!(found.model["vision_config"]["config_dict"]["depth"], 2);
        assert_eq!(found.model["bf16"], true);
    }

    #[test]
    fn the_pattern_of_layers_may_be_a_number_and_floats_integers() {
        let provider = Provider::from_config(&config(json!({"num_hidden_layers": 8})));
        let same = "model:\n  linear_attention_freq: 4\n  rotary_base: 10000\n  lr: .inf\n";
        assert_eq!(read(same).unwrap().differences(&provider), []);
        let other = read("model:\n  linear_attention_freq: 2\n  hidden_size: 3\n").unwrap();
        let fields: Vec<&str> = other
            .differences(&provider)
            .iter()
            .map(|one| one.field)
            .collect();
        assert_eq!(fields, ["hidden_size", "linear_attention_freq"]);
    }

    #[test]
    fn what_is_no_run_config_is_refused() {
        for (text, wanted) in [
            ("a: [1", "cannot be used"),
            ("other: 1", "no `model` section"),
            ("model: 1", "no `model` section"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
