//! A row, whatever its format, as the messages that the template renders and the media that they hold.

use serde_json::{Map, Value as Json};

use super::error::RowError;
use super::tokenizer::ChatTokenizer;
use super::video::VideoSampling;
use super::{llava, openai};

/// One conversation.
#[derive(Debug, Default)]
pub(crate) struct Conversation {
    pub(crate) messages: Vec<Json>,
    /// For each assistant message, whether it counts in the loss.
    pub(crate) assistant_loss: Vec<bool>,
    pub(crate) tools: Option<Json>,
    pub(crate) documents: Option<Json>,
    pub(crate) template_kwargs: Map<String, Json>,
    pub(crate) add_generation_prompt: bool,
    /// In the order of their places in the text.
    pub(crate) images: Vec<ImageSource>,
    /// In the order of their places in the text.
    pub(crate) videos: Vec<VideoSource>,
}

/// Where an image comes from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ImageSource {
    Path(String),
    /// base64 text, or a whole `data:` address.
    Base64(String),
}

/// Where a video comes from, and at which rate its frames were taken.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct VideoSource {
    pub(crate) input: VideoInput,
    pub(crate) fps: Option<f64>,
    pub(crate) sampling: VideoSampling,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum VideoInput {
    /// A folder of frames or a video file.
    Path(String),
    Frames(Vec<ImageSource>),
}

/// Keys of a row that are known; any other is left alone unless it looks like one of these.
const ROW_KEYS: [&str; 11] = [
    "messages",
    "conversations",
    "images",
    "image",
    "videos",
    "video",
    "tools",
    "documents",
    "system",
    "chat_template_kwargs",
    "add_generation_prompt",
];

impl Conversation {
    /// Reads a row of any of the formats: `messages` with parts or with media lists, or `conversations`.
    ///
    /// # Errors
    /// What is wrong with the row.
    pub(crate) fn from_row(row: &Json) -> Result<Self, RowError> {
        let Some(object) = row.as_object() else {
            return Err(RowError::NotAnObject {
                found: type_name(row),
            });
        };
        refuse_misspelt_keys(object, &ROW_KEYS, "the row")?;
        let mut conversation = match (object.get("messages"), object.get("conversations")) {
            (Some(messages), _) => openai::read(object, messages)?,
            (None, Some(turns)) => llava::read(object, turns)?,
            (None, None) => {
                return Err(RowError::NoMessages {
                    keys: object.keys().cloned().collect(),
                });
            }
        };
        conversation.tools = match object.get("tools") {
            None | Some(Json::Null) => None,
            Some(Json::String(text)) if text.trim().is_empty() => None,
            Some(Json::String(text)) => Some(serde_json::from_str(text).map_err(RowError::Json)?),
            Some(tools @ Json::Array(_)) => Some(tools.clone()),
            Some(other) => return Err(wrong_type("`tools`", other, "a list of tools")),
        };
        conversation.documents = object
            .get("documents")
            .filter(|value| !value.is_null())
            .cloned();
        conversation.template_kwargs = match object.get("chat_template_kwargs") {
            None | Some(Json::Null) => Map::new(),
            Some(Json::Object(kwargs)) => kwargs.clone(),
            Some(other) => return Err(wrong_type("`chat_template_kwargs`", other, "an object")),
        };
        conversation.add_generation_prompt = match object.get("add_generation_prompt") {
            None | Some(Json::Null) => false,
            Some(Json::Bool(value)) => *value,
            Some(other) => {
                return Err(wrong_type(
                    "`add_generation_prompt`",
                    other,
                    "true or false",
                ));
            }
        };
        Ok(conversation)
    }

    /// Refuses texts in which a control token is written out: the tokenizer would take it as control, and whoever
    /// wrote the text could open turns of their own.
    pub(crate) fn refuse_control_tokens(&self, tokenizer: &ChatTokenizer) -> Result<(), RowError> {
        for (index, message) in self.messages.iter().enumerate() {
            refuse_in(message, &format!("message {index}"), tokenizer)?;
        }
        for (name, value) in [("`tools`", &self.tools), ("`documents`", &self.documents)] {
            if let Some(value) = value {
                refuse_in(value, name, tokenizer)?;
            }
        }
        for value in self.template_kwargs.values() {
            refuse_in(value, "`chat_template_kwargs`", tokenizer)?;
        }
        Ok(())
    }
}

fn refuse_in(value: &Json, place: &str, tokenizer: &ChatTokenizer) -> Result<(), RowError> {
    let check = |text: &str| match tokenizer.special_token_in(text) {
        None => Ok(()),
        Some(token) => Err(RowError::ControlToken {
            place: place.to_owned(),
            token: token.to_owned(),
        }),
    };
    match value {
        Json::String(text) => check(text),
        Json::Array(items) => items
            .iter()
            .try_for_each(|item| refuse_in(item, place, tokenizer)),
        Json::Object(object) => object.iter().try_for_each(|(key, value)| {
            check(key)?;
            refuse_in(value, place, tokenizer)
        }),
        _ => Ok(()),
    }
}

/// Refuses keys that differ from a known one by a letter or two, since a misspelt `images` would go unseen.
pub(crate) fn refuse_misspelt_keys(
    object: &Map<String, Json>,
    known: &'static [&'static str],
    place: &'static str,
) -> Result<(), RowError> {
    for key in object.keys() {
        if known.contains(&key.as_str()) {
            continue;
        }
        let allowed = match key.len() {
            0..=2 => 0,
            3..=5 => 1,
            _ => 2,
        };
        let nearest = known
            .iter()
            .map(|name| (strsim::osa_distance(&key.to_lowercase(), name), *name))
            .min()
            .filter(|&(distance, name)| distance <= allowed && name.len() > 3);
        if let Some((_, nearest)) = nearest {
            return Err(RowError::MisspeltKey {
                key: key.clone(),
                place,
                nearest,
            });
        }
    }
    Ok(())
}

impl ImageSource {
    /// A path, an address or base64 text; or an object that names one of them.
    pub(crate) fn from_json(value: &Json) -> Option<Self> {
        match value {
            Json::String(text) if text.starts_with("data:") => Some(Self::Base64(text.clone())),
            Json::String(text) => Some(Self::Path(
                text.strip_prefix("file://").unwrap_or(text).to_owned(),
            )),
            Json::Object(object) => {
                if let Some(Json::String(text)) =
                    object.get("base64").or_else(|| object.get("bytes"))
                {
                    return Some(Self::Base64(text.clone()));
                }
                ["image", "path", "url"]
                    .iter()
                    .filter_map(|key| object.get(*key).filter(|value| !value.is_null()))
                    .find_map(Self::from_json)
            }
            _ => None,
        }
    }

    /// What an error calls it.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Path(path) => format!("`{path}`"),
            Self::Base64(_) => "given as base64".into(),
        }
    }
}

impl VideoSource {
    /// A path, a list of frames, or an object that holds one of them beside `fps` and sampling options.
    pub(crate) fn from_json(value: &Json) -> Result<Option<Self>, RowError> {
        let plain = |input| Self {
            input,
            fps: None,
            sampling: VideoSampling::default(),
        };
        match value {
            Json::String(text) => {
                let path = text.strip_prefix("file://").unwrap_or(text).to_owned();
                Ok(Some(plain(VideoInput::Path(path))))
            }
            Json::Array(frames) => {
                let frames: Option<Vec<ImageSource>> =
                    frames.iter().map(ImageSource::from_json).collect();
                match frames {
                    Some(frames) => Ok(Some(plain(VideoInput::Frames(frames)))),
                    None => Err(wrong_type(
                        "a frame of a video",
                        value,
                        "a path or base64 data",
                    )),
                }
            }
            Json::Object(object) => {
                let inner = ["video", "video_url", "frames", "path", "url"]
                    .iter()
                    .filter_map(|key| object.get(*key).filter(|value| !value.is_null()))
                    .find_map(|inner| Self::from_json(inner).transpose());
                let Some(source) = inner.transpose()? else {
                    return Ok(None);
                };
                let sampling = VideoSampling {
                    do_sample_frames: option(
                        object,
                        "do_sample_frames",
                        Json::as_bool,
                        "true or false",
                    )?,
                    fps: option(object, "target_fps", Json::as_f64, "a number")?,
                    num_frames: option(object, "num_frames", Json::as_u64, "a number of frames")?
                        .and_then(|frames| usize::try_from(frames).ok()),
                };
                let fps = option(object, "fps", Json::as_f64, "a number")?;
                Ok(Some(Self {
                    fps: fps.or(source.fps),
                    sampling,
                    ..source
                }))
            }
            _ => Ok(None),
        }
    }

    /// What an error calls it.
    pub(crate) fn name(&self) -> String {
        match &self.input {
            VideoInput::Path(path) => format!("`{path}`"),
            VideoInput::Frames(frames) => match frames.first() {
                Some(first) => format!("of {} frames ({}, ...)", frames.len(), first.name()),
                None => "of 0 frames".into(),
            },
        }
    }
}

fn option<T>(
    object: &Map<String, Json>,
    key: &str,
    read: impl Fn(&Json) -> Option<T>,
    expected: &'static str,
) -> Result<Option<T>, RowError> {
    match object.get(key).filter(|value| !value.is_null()) {
        None => Ok(None),
        Some(value) => read(value)
            .map(Some)
            .ok_or_else(|| wrong_type(&format!("`{key}` of a video"), value, expected)),
    }
}

pub(crate) fn wrong_type(place: &str, found: &Json, expected: &'static str) -> RowError {
    RowError::WrongType {
        place: place.to_owned(),
        found: type_name(found),
        expected,
    }
}

pub(crate) fn type_name(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}
