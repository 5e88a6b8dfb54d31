//! tokenizer.json, completed by the added tokens that only tokenizer_config.json knows.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value as Json};
use tokenizers::{AddedToken, PostProcessorWrapper, Tokenizer};

use super::error::{DataError, RowError};

/// Text to ids and back, with the checkpoint's own control tokens.
#[derive(Debug)]
pub struct ChatTokenizer {
    tokenizer: Tokenizer,
    /// Tokens marked special, longest first.
    special: Vec<String>,
    pad_token_id: Option<i64>,
    image_token: (String, i64),
    video_token: (String, i64),
    vision_markers: (String, String),
}

/// Ids and, for each, the byte of the text at which it starts.
#[derive(Debug, Default)]
pub(crate) struct Encoded {
    pub(crate) ids: Vec<i64>,
    pub(crate) starts: Vec<usize>,
}

impl ChatTokenizer {
    /// Reads `tokenizer.json` of a checkpoint directory and adds what only `tokenizer_config.json` lists.
    ///
    /// # Errors
    /// When a file is missing or broken, or an added token would get another id than the checkpoint gives it.
    pub fn from_dir(dir: &Path) -> Result<Self, DataError> {
        Self::new(dir, &read_config(dir)?)
    }

    pub(crate) fn new(dir: &Path, config: &Map<String, Json>) -> Result<Self, DataError> {
        let file = dir.join("tokenizer.json");
        let bytes = match fs_err::read(&file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(DataError::MissingFile {
                    dir: dir.to_owned(),
                    name: "tokenizer.json",
                    purpose: "turn text into token ids",
                });
            }
            Err(source) => return Err(DataError::Read { file, source }),
        };
        let broken = |error: Box<dyn std::error::Error + Send + Sync>| DataError::Tokenizer {
            file: file.clone(),
            detail: error.to_string(),
        };
        let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(broken)?;
        // A post-processor may trim offsets; labels need the true ones. No token is added by any of these models.
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        tokenizer.with_truncation(None).map_err(broken)?;
        tokenizer.with_padding(None);
        add_missing_tokens(&mut tokenizer, dir, config)?;

        let mut special: Vec<String> = tokenizer
            .get_added_tokens_decoder()
            .into_values()
            .filter(|token| token.special)
            .map(|token| token.content)
            .collect();
        special.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
        let named =
            |name: &str, usual: &str| config_token(config, name).unwrap_or(usual).to_owned();
        let with_id = |name: &str, usual: &str| {
            let token = named(name, usual);
            let id = tokenizer.token_to_id(&token).map_or(-1, i64::from);
            (token, id)
        };
        Ok(Self {
            pad_token_id: config_token(config, "pad_token")
                .and_then(|token| tokenizer.token_to_id(token))
                .map(i64::from),
            image_token: with_id("image_token", "<|image_pad|>"),
            video_token: with_id("video_token", "<|video_pad|>"),
            vision_markers: (
                named("vision_bos_token", "<|vision_start|>"),
                named("vision_eos_token", "<|vision_end|>"),
            ),
            special,
            tokenizer,
        })
    }

    /// The ids of `text`; nothing is added before or after.
    ///
    /// # Errors
    /// [`RowError::Tokenize`] with the tokenizer's own words.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>, RowError> {
        let encoding = self
            .tokenizer
            .encode_fast(text, false)
            .map_err(tokenize_error)?;
        Ok(encoding.get_ids().iter().copied().map(i64::from).collect())
    }

    pub(crate) fn encode_with_starts(&self, text: &str) -> Result<Encoded, RowError> {
        let encoding = self.tokenizer.encode(text, false).map_err(tokenize_error)?;
        Ok(Encoded {
            ids: encoding.get_ids().iter().copied().map(i64::from).collect(),
            starts: encoding
                .get_offsets()
                .iter()
                .map(|&(start, _)| start)
                .collect(),
        })
    }

    /// The text of `ids`; ids that no token has become nothing, broken UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[i64], skip_special_tokens: bool) -> String {
        let ids: Vec<u32> = ids
            .iter()
            .filter_map(|&id| u32::try_from(id).ok())
            .collect();
        self.tokenizer
            .decode(&ids, skip_special_tokens)
            .unwrap_or_default()
    }

    /// The id of a whole token, such as `<|im_end|>`.
    pub fn token_id(&self, token: &str) -> Option<i64> {
        self.tokenizer.token_to_id(token).map(i64::from)
    }

    /// The id that fills short rows of a batch, if the checkpoint names one.
    pub fn pad_token_id(&self) -> Option<i64> {
        self.pad_token_id
    }

    /// The placeholder of images and its id (-1 when the vocabulary lacks it).
    pub(crate) fn image_token(&self) -> (&str, i64) {
        (&self.image_token.0, self.image_token.1)
    }

    /// The placeholder of videos and its id (-1 when the vocabulary lacks it).
    pub(crate) fn video_token(&self) -> (&str, i64) {
        (&self.video_token.0, self.video_token.1)
    }

    /// The tokens that stand before and after the placeholders of a picture.
    pub(crate) fn vision_markers(&self) -> (&str, &str) {
        (&self.vision_markers.0, &self.vision_markers.1)
    }

    /// The first special token that is written out in `text`.
    pub(crate) fn special_token_in(&self, text: &str) -> Option<&str> {
        if !text.contains('<') {
            // Every special token of these models starts so; others are still looked for below.
            return self
                .special
                .iter()
                .find(|token| !token.starts_with('<') && text.contains(token.as_str()))
                .map(String::as_str);
        }
        self.special
            .iter()
            .find(|token| text.contains(token.as_str()))
            .map(String::as_str)
    }
}

/// tokenizer_config.json of a directory, empty when there is none.
pub(crate) fn read_config(dir: &Path) -> Result<Map<String, Json>, DataError> {
    let file = dir.join("tokenizer_config.json");
    match fs_err::read(&file) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map_err(|source| DataError::Json { file, source })
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
        Err(source) => Err(DataError::Read { file, source }),
    }
}

fn config_token<'a>(config: &'a Map<String, Json>, name: &str) -> Option<&'a str> {
    let value = config.get(name)?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// Adds the entries of `added_tokens_decoder` that tokenizer.json lacks, in id order, and checks every id: the hub's
/// tokenizer.json files leave the audio tokens out, and a reader of that file alone takes them for text.
fn add_missing_tokens(
    tokenizer: &mut Tokenizer,
    dir: &Path,
    config: &Map<String, Json>,
) -> Result<(), DataError> {
    let file = dir.join("tokenizer_config.json");
    let Some(entries) = config.get("added_tokens_decoder") else {
        return Ok(());
    };
    let bad_setting = |found: &Json| DataError::Setting {
        file: file.clone(),
        key: "added_tokens_decoder",
        found: found.to_string(),
        expected: "an object of id to {\"content\": token, ...}",
    };
    let mut by_id = BTreeMap::new();
    for (id, entry) in entries.as_object().ok_or_else(|| bad_setting(entries))? {
        let id: u32 = id
            .parse()
            .map_err(|_| bad_setting(&Json::from(id.as_str())))?;
        let content = entry["content"]
            .as_str()
            .ok_or_else(|| bad_setting(entry))?;
        let flag = |name: &str| entry[name].as_bool().unwrap_or(false);
        let token = AddedToken::from(content, flag("special"))
            .single_word(flag("single_word"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .normalized(flag("normalized"));
        by_id.insert(id, token);
    }
    for (expected, token) in by_id {
        let content = token.content.clone();
        if tokenizer.token_to_id(&content).is_none() {
            let added = if token.special {
                tokenizer.add_special_tokens([token])
            } else {
                tokenizer.add_tokens([token])
            };
            added.map_err(|error| DataError::Tokenizer {
                file: file.clone(),
                detail: error.to_string(),
            })?;
        }
        let found = tokenizer.token_to_id(&content);
        if found != Some(expected) {
            return Err(DataError::AddedToken {
                file,
                token: content,
                expected,
                found: found.unwrap_or(u32::MAX),
            });
        }
    }
    Ok(())
}

fn tokenize_error(error: Box<dyn std::error::Error + Send + Sync>) -> RowError {
    RowError::Tokenize {
        detail: error.to_string(),
    }
}
