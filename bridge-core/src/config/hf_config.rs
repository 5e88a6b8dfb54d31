//! The whole `config.json`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::reader::Reader;
use super::{ClassifierConfig, ConfigError, QuantizationConfig, TextConfig, VisionConfig};
use crate::{json, regular_file};

/// Larger files are no configs: those of a hundred thousand layers would fit.
const MAX_BYTES: u64 = 16 << 20;

/// The architectures that have a table of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Dense vision-language model.
    Qwen35Vl,
    /// Mixture-of-experts vision-language model.
    Qwen35VlMoe,
    /// Dense language model without a vision tower.
    Qwen35,
    /// Mixture-of-experts language model without a vision tower.
    Qwen35Moe,
    /// Dense vision-language model with a classifier of tokens in place of its output layer.
    Qwen35TokenClassification,
}

/// What an architecture is made of.
struct Form {
    architecture: Architecture,
    hf_name: &'static str,
    is_moe: bool,
    is_text_only: bool,
    is_classifier: bool,
}

const fn form(architecture: Architecture, hf_name: &'static str) -> Form {
    Form {
        architecture,
        hf_name,
        is_moe: false,
        is_text_only: false,
        is_classifier: false,
    }
}

/// One line an architecture.
const FORMS: [Form; 5] = [
    form(Architecture::Qwen35Vl, "Qwen3_5ForConditionalGeneration"),
    Form {
        is_moe: true,
        ..form(
            Architecture::Qwen35VlMoe,
            "Qwen3_5MoeForConditionalGeneration",
        )
    },
    Form {
        is_text_only: true,
        ..form(Architecture::Qwen35, "Qwen3_5ForCausalLM")
    },
    Form {
        is_moe: true,
        is_text_only: true,
        ..form(Architecture::Qwen35Moe, "Qwen3_5MoeForCausalLM")
    },
    Form {
        is_classifier: true,
        ..form(
            Architecture::Qwen35TokenClassification,
            "Qwen3_5ForTokenClassification",
        )
    },
];

impl Architecture {
    /// Every supported architecture.
    pub const ALL: [Architecture; FORMS.len()] = {
        let mut all = [Architecture::Qwen35Vl; FORMS.len()];
        let mut index = 0;
        while index < FORMS.len() {
            all[index] = FORMS[index].architecture;
            index += 1;
        }
        all
    };

    fn form(self) -> &'static Form {
        FORMS
            .iter()
            .find(|form| form.architecture == self)
            .expect("every architecture has its line in the table")
    }

    /// The name in `architectures` of `config.json`.
    #[must_use]
    pub fn hf_name(self) -> &'static str {
        self.form().hf_name
    }

    /// Whether its MLPs are mixtures of experts.
    #[must_use]
    pub fn is_moe(self) -> bool {
        self.form().is_moe
    }

    /// Whether it is a language model alone: its `config.json` is flat, and it has no vision tower.
    #[must_use]
    pub fn is_text_only(self) -> bool {
        self.form().is_text_only
    }

    /// Whether a classifier of tokens stands in the place of the output layer; it has no multi-token-prediction head.
    #[must_use]
    pub fn is_classifier(self) -> bool {
        self.form().is_classifier
    }

    /// The names of all, for messages.
    pub(crate) fn names() -> String {
        Self::ALL
            .map(|one| format!("`{}`", one.hf_name()))
            .join(", ")
    }

    fn from_hf_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.hf_name() == name)
    }
}

/// What `config.json` says.
#[derive(Debug, Clone, PartialEq)]
pub struct HfConfig {
    /// From `architectures[0]`.
    pub architecture: Architecture,
    /// The language model.
    pub text: TextConfig,
    /// The vision tower; `None` in a language model alone.
    pub vision: Option<VisionConfig>,
    /// The classifier of tokens in the place of the output layer.
    pub classifier: Option<ClassifierConfig>,
    /// Whether the output layer is the embedding (there is no `lm_head.weight` then). Never with a classifier.
    pub tie_word_embeddings: bool,
    /// Placeholder of one merged visual token of an image. The visual tokens mean nothing without a vision tower.
    pub image_token_id: i64,
    /// Placeholder of one merged visual token of a video.
    pub video_token_id: i64,
    /// Stands before the placeholders.
    pub vision_start_token_id: i64,
    /// Stands after the placeholders.
    pub vision_end_token_id: i64,
    /// Stands for audio in the mixture-of-experts models.
    pub audio_token_id: i64,
    /// How matrices are stored in fewer bits; the tensors themselves decide which ones are.
    pub quantization: Option<QuantizationConfig>,
    /// The file's content, unknown keys and key order included.
    pub raw: Map<String, Value>,
    /// The file.
    pub file: PathBuf,
}

impl HfConfig {
    /// Reads `config.json` in a model directory.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn from_dir(dir: &Path) -> Result<Self, ConfigError> {
        Self::from_file(&dir.join("config.json"))
    }

    /// Reads a config file of any name.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn from_file(file: &Path) -> Result<Self, ConfigError> {
        let text = regular_file::read(file, MAX_BYTES).map_err(|source| ConfigError::Read {
            file: file.to_owned(),
            source,
        })?;
        let value = json::parse(&text).map_err(|source| ConfigError::Json {
            file: file.to_owned(),
            source,
        })?;
        Self::from_json(value, file)
    }

    /// Rows and columns of a block, for matrices in block-wise FP8.
    #[must_use]
    pub fn weight_block_size(&self) -> [usize; 2] {
        self.quantization.unwrap_or_default().weight_block_size
    }

    /// Reads a parsed config; `file` is what messages call it.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn from_json(value: Value, file: &Path) -> Result<Self, ConfigError> {
        let file: PathBuf = file.to_owned();
        let architecture_error = |found: &str| ConfigError::Architecture {
            file: file.clone(),
            found: found.to_owned(),
        };
        let Value::Object(raw) = value else {
            return Err(architecture_error("(not a JSON object)"));
        };
        let name = raw
            .get("architectures")
            .and_then(|list| list.get(0))
            .and_then(Value::as_str)
            .ok_or_else(|| architecture_error("(none)"))?;
        let architecture =
            Architecture::from_hf_name(name).ok_or_else(|| architecture_error(name))?;

        let empty = Map::new();
        let mut r = Reader::new("", &raw);
        let is_flat = architecture.is_text_only();
        let (text_path, text_map) = if is_flat {
            refuse_nested(&mut r);
            ("", &raw)
        } else {
            ("text_config", r.object("text_config").unwrap_or(&empty))
        };
        let (mut text, text_problems) =
            TextConfig::read(text_path, text_map, architecture.is_moe());
        let (vision, vision_problems) = if is_flat {
            (None, Vec::new())
        } else {
            let map = r.object("vision_config").unwrap_or(&empty);
            let (vision, problems) = VisionConfig::read(map, text.hidden_size);
            (Some(vision), problems)
        };
        r.also_known(&["architectures", "model_type"]);
        if !is_flat {
            let outer_dtype = r.dtype();
            text.dtype = text.dtype.or(outer_dtype);
        }
        let is_classifier = architecture.is_classifier();
        if is_classifier {
            // The class has no head, whatever its text_config took over from the model that it was made of.
            text.mtp_num_hidden_layers = 0;
        }
        let classifier = is_classifier.then(|| ClassifierConfig::read(&mut r));
        let (quantization, quantization_problems) = QuantizationConfig::read(&mut r);
        let config = Self {
            architecture,
            text,
            vision,
            classifier,
            tie_word_embeddings: r.boolean("tie_word_embeddings", false) && !is_classifier,
            image_token_id: r.integer("image_token_id").unwrap_or(248_056),
            video_token_id: r.integer("video_token_id").unwrap_or(248_057),
            vision_start_token_id: r.integer("vision_start_token_id").unwrap_or(248_053),
            vision_end_token_id: r.integer("vision_end_token_id").unwrap_or(248_054),
            audio_token_id: r.integer("audio_token_id").unwrap_or(248_076),
            quantization,
            raw: raw.clone(),
            file: file.clone(),
        };
        // The keys of a flat file are the language model's, which looked for misspelt ones among them.
        let mut problems = if is_flat { r.problems } else { r.finish() };
        problems.extend(text_problems);
        problems.extend(vision_problems);
        problems.extend(quantization_problems);
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(ConfigError::Problems { file, problems })
        }
    }
}

/// A flat config's keys are not looked for in sub-configs: their values would be lost, and defaults taken.
fn refuse_nested(r: &mut Reader<'_>) {
    for key in ["text_config", "vision_config"] {
        if r.get(key).is_some() {
            let reason = "a language model alone has its keys at the top level; \
                is this the config of a vision-language model?";
            r.inconsistent(key, "an object", reason.to_owned());
        }
    }
}
