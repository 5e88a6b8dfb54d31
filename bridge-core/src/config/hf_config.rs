//! The whole `config.json`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::reader::Reader;
use super::{ConfigError, TextConfig, VisionConfig};
use crate::{json, regular_file};

/// The architectures that have a table of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Dense vision-language model.
    Qwen35Vl,
    /// Mixture-of-experts vision-language model.
    Qwen35VlMoe,
}

impl Architecture {
    /// Every supported architecture.
    pub const ALL: [Architecture; 2] = [Architecture::Qwen35Vl, Architecture::Qwen35VlMoe];

    /// The name in `architectures` of `config.json`.
    #[must_use]
    pub fn hf_name(self) -> &'static str {
        match self {
            Self::Qwen35Vl => "Qwen3_5ForConditionalGeneration",
            Self::Qwen35VlMoe => "Qwen3_5MoeForConditionalGeneration",
        }
    }

    /// Whether its MLPs are mixtures of experts.
    #[must_use]
    pub fn is_moe(self) -> bool {
        self == Self::Qwen35VlMoe
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
    /// The vision tower.
    pub vision: Option<VisionConfig>,
    /// Whether the output layer is the embedding (there is no `lm_head.weight` then).
    pub tie_word_embeddings: bool,
    /// Placeholder of one merged visual token of an image.
    pub image_token_id: i64,
    /// Placeholder of one merged visual token of a video.
    pub video_token_id: i64,
    /// Stands before the placeholders.
    pub vision_start_token_id: i64,
    /// Stands after the placeholders.
    pub vision_end_token_id: i64,
    /// Stands for audio in the mixture-of-experts models.
    pub audio_token_id: i64,
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
        let text = regular_file::read(file).map_err(|source| ConfigError::Read {
            file: file.to_owned(),
            source,
        })?;
        let value = json::parse(&text).map_err(|source| ConfigError::Json {
            file: file.to_owned(),
            source,
        })?;
        Self::from_json(value, file)
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
        let text_map = r.object("text_config").unwrap_or(&empty);
        let vision_map = r.object("vision_config").unwrap_or(&empty);
        let (mut text, text_problems) = TextConfig::read(text_map, architecture.is_moe());
        let (vision, vision_problems) = VisionConfig::read(vision_map, text.hidden_size);
        r.also_known(&["architectures", "model_type"]);
        let outer_dtype = r.dtype();
        text.dtype = text.dtype.or(outer_dtype);
        let config = Self {
            architecture,
            text,
            vision: Some(vision),
            tie_word_embeddings: r.boolean("tie_word_embeddings", false),
            image_token_id: r.integer("image_token_id").unwrap_or(248_056),
            video_token_id: r.integer("video_token_id").unwrap_or(248_057),
            vision_start_token_id: r.integer("vision_start_token_id").unwrap_or(248_053),
            vision_end_token_id: r.integer("vision_end_token_id").unwrap_or(248_054),
            audio_token_id: r.integer("audio_token_id").unwrap_or(248_076),
            raw: raw.clone(),
            file: file.clone(),
        };
        let mut problems = r.finish();
        problems.extend(text_problems);
        problems.extend(vision_problems);
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(ConfigError::Problems { file, problems })
        }
    }
}
