//! Rows with `conversations` (LLaVA, ShareGPT): turns `from` someone with a `value`, and `<image>` marks in it.

use serde_json::{Map, Value as Json, json};

use super::conversation::{Conversation, refuse_misspelt_keys, wrong_type};
use super::error::RowError;
use super::media_lists::{MediaLists, Newline};

const TURN_KEYS: [&str; 3] = ["from", "value", "loss"];

/// Reads the turns of a row; the number of marks must equal the number of media.
pub(crate) fn read(row: &Map<String, Json>, turns: &Json) -> Result<Conversation, RowError> {
    let Some(turns) = turns.as_array() else {
        return Err(wrong_type("`conversations`", turns, "a list of turns"));
    };
    let mut lists = MediaLists::from_row(row)?.always();
    lists.newline = Newline::DropOne;
    let mut conversation = Conversation::default();
    match row.get("system") {
        None | Some(Json::Null) => {}
        Some(Json::String(text)) if text.is_empty() => {}
        Some(Json::String(text)) => {
            conversation
                .messages
                .push(json!({"role": "system", "content": text}));
        }
        Some(other) => return Err(wrong_type("`system`", other, "a string")),
    }
    for (index, turn) in turns.iter().enumerate() {
        let Some(object) = turn.as_object() else {
            return Err(wrong_type(&format!("turn {index}"), turn, "an object"));
        };
        refuse_misspelt_keys(object, &TURN_KEYS, "a turn")?;
        let text = |key: &str| {
            let value = object.get(key).unwrap_or(&Json::Null);
            value
                .as_str()
                .ok_or_else(|| wrong_type(&format!("`{key}` of turn {index}"), value, "a string"))
        };
        let role = match text("from")? {
            "human" | "user" => "user",
            "gpt" | "assistant" => "assistant",
            "system" => "system",
            "tool" | "observation" => "tool",
            other => {
                return Err(RowError::UnknownSpeaker {
                    turn: index,
                    found: other.to_owned(),
                });
            }
        };
        if role == "assistant" {
            let counts = object.get("loss").and_then(Json::as_bool).unwrap_or(true);
            conversation.assistant_loss.push(counts);
        }
        let content = lists.place(text("value")?, &mut conversation)?;
        conversation
            .messages
            .push(json!({"role": role, "content": content}));
    }
    lists.finish()?;
    Ok(conversation)
}
