//! Rows with `messages`: content as text or as parts, tools, reasoning, per-message `loss`.

use serde_json::{Map, Value as Json, json};

use super::conversation::{
    Conversation, ImageSource, VideoSource, refuse_misspelt_keys, wrong_type,
};
use super::error::RowError;
use super::media_lists::MediaLists;

const MESSAGE_KEYS: [&str; 12] = [
    "role",
    "content",
    "reasoning_content",
    "reasoning",
    "thinking",
    "tool_calls",
    "tool_call_id",
    "name",
    "loss",
    "refusal",
    "audio",
    "annotations",
];
const IMAGE_KEYS: [&str; 5] = ["image", "url", "path", "base64", "image_url"];
const VIDEO_KEYS: [&str; 5] = ["video", "url", "path", "frames", "video_url"];

/// Reads the messages of a row; media lists beside them fill the places that the texts mark.
pub(crate) fn read(row: &Map<String, Json>, messages: &Json) -> Result<Conversation, RowError> {
    let Some(messages) = messages.as_array() else {
        return Err(wrong_type("`messages`", messages, "a list of messages"));
    };
    let mut lists = MediaLists::from_row(row)?;
    let mut conversation = Conversation::default();
    for (index, message) in messages.iter().enumerate() {
        let Some(message) = message.as_object() else {
            return Err(wrong_type(
                &format!("message {index}"),
                message,
                "an object",
            ));
        };
        refuse_misspelt_keys(message, &MESSAGE_KEYS, "a message")?;
        read_message(index, message, &mut lists, &mut conversation)?;
    }
    lists.finish()?;
    Ok(conversation)
}

fn read_message(
    index: usize,
    message: &Map<String, Json>,
    lists: &mut MediaLists,
    conversation: &mut Conversation,
) -> Result<(), RowError> {
    let mut out = Map::new();
    for (key, value) in message.iter().filter(|(_, value)| !value.is_null()) {
        match key.as_str() {
            "loss" | "reasoning_content" | "thinking" | "reasoning" => {}
            "content" => {
                let content = read_content(index, value, lists, conversation)?;
                out.insert(key.clone(), content);
            }
            "tool_calls" => {
                out.insert(key.clone(), with_parsed_arguments(index, value)?);
            }
            _ => {
                out.insert(key.clone(), value.clone());
            }
        }
    }
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .find_map(|key| message.get(*key).filter(|value| !value.is_null()));
    if let Some(reasoning) = reasoning {
        out.insert("reasoning_content".into(), reasoning.clone());
    }
    let counts = match message.get("loss") {
        None | Some(Json::Null) => true,
        Some(Json::Bool(counts)) => *counts,
        Some(Json::Number(number)) if number.as_f64() == Some(0.0) => false,
        Some(Json::Number(number)) if number.as_f64() == Some(1.0) => true,
        Some(other) => {
            return Err(wrong_type(
                &format!("`loss` of message {index}"),
                other,
                "true or false",
            ));
        }
    };
    if out.get("role").and_then(Json::as_str) == Some("assistant") {
        conversation.assistant_loss.push(counts);
    }
    conversation.messages.push(Json::Object(out));
    Ok(())
}

fn read_content(
    index: usize,
    content: &Json,
    lists: &mut MediaLists,
    conversation: &mut Conversation,
) -> Result<Json, RowError> {
    match content {
        Json::String(text) => lists.place(text, conversation),
        Json::Array(parts) => {
            let parts: Result<Vec<Json>, RowError> = parts
                .iter()
                .map(|part| read_part(index, part, lists, conversation))
                .collect();
            parts.map(Json::Array)
        }
        // Anything else is the template's to refuse.
        other => Ok(other.clone()),
    }
}

fn read_part(
    index: usize,
    part: &Json,
    lists: &mut MediaLists,
    conversation: &mut Conversation,
) -> Result<Json, RowError> {
    let Some(object) = part.as_object() else {
        return Ok(part.clone());
    };
    let kind = object
        .get("type")
        .and_then(Json::as_str)
        .unwrap_or_default();
    let has = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
    if matches!(kind, "video" | "video_url") || has("video") || has("video_url") {
        let source = match VideoSource::from_json(part)? {
            Some(source) => source,
            None => lists.next_video().ok_or(RowError::NoSource {
                kind: "a video",
                keys: &VIDEO_KEYS,
            })?,
        };
        conversation.videos.push(source);
        return Ok(json!({"type": "video", "video": ""}));
    }
    if matches!(kind, "image" | "image_url") || has("image") || has("image_url") {
        let given = object
            .get("image_url")
            .filter(|value| !value.is_null())
            .unwrap_or(part);
        let source = match ImageSource::from_json(given) {
            Some(source) => source,
            None => lists.next_image().ok_or(RowError::NoSource {
                kind: "an image",
                keys: &IMAGE_KEYS,
            })?,
        };
        conversation.images.push(source);
        return Ok(json!({"type": "image", "image": ""}));
    }
    if kind == "text" && object.get("text").is_some_and(|text| !text.is_string()) {
        return Err(wrong_type(
            &format!("`text` in message {index}"),
            &object["text"],
            "a string",
        ));
    }
    Ok(part.clone())
}

/// Data files hold `arguments` as a JSON string as often as as an object; templates want the object.
fn with_parsed_arguments(index: usize, calls: &Json) -> Result<Json, RowError> {
    let mut calls = calls.clone();
    for call in calls.as_array_mut().into_iter().flatten() {
        let Some(call) = call.as_object_mut() else {
            continue;
        };
        let function = match call.get_mut("function") {
            Some(Json::Object(function)) => function,
            _ => call,
        };
        if let Some(Json::String(text)) = function.get("arguments") {
            let parsed: Json = if text.trim().is_empty() {
                json!({})
            } else {
                serde_json::from_str(text).map_err(RowError::Json)?
            };
            if !parsed.is_object() {
                let place = format!("`arguments` of a tool call in message {index}");
                return Err(wrong_type(&place, &parsed, "an object"));
            }
            function.insert("arguments".into(), parsed);
        }
    }
    Ok(calls)
}
