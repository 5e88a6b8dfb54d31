//! Values as Python writes them: `str()`, `repr()` and `json.dumps`, which chat templates count on.

use std::fmt::Write;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};
use serde_json::Value as Json;

/// How `json.dumps` lays out its output.
#[derive(Debug, Clone)]
pub(crate) struct JsonStyle {
    indent: Option<usize>,
    item_separator: String,
    key_separator: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Default for JsonStyle {
    /// The `tojson` of chat templates: `ensure_ascii=False`, separators `", "` and `": "`.
    fn default() -> Self {
        Self {
            indent: None,
            item_separator: ", ".into(),
            key_separator: ": ".into(),
            ensure_ascii: false,
            sort_keys: false,
        }
    }
}

impl JsonStyle {
    /// The style that the filter's keyword arguments ask for.
    pub(crate) fn from_kwargs(kwargs: &Kwargs) -> Result<Self, Error> {
        let mut style = Self::default();
        if let Some(indent) = kwargs.get::<Option<usize>>("indent")? {
            style.indent = Some(indent.min(16));
            style.item_separator = ",".into();
        }
        if let Some(ensure_ascii) = kwargs.get::<Option<bool>>("ensure_ascii")? {
            style.ensure_ascii = ensure_ascii;
        }
        if let Some(sort_keys) = kwargs.get::<Option<bool>>("sort_keys")? {
            style.sort_keys = sort_keys;
        }
        if let Some(separators) = kwargs.get::<Option<Vec<String>>>("separators")? {
            let [item, key] = <[String; 2]>::try_from(separators).map_err(|_| {
                Error::new(ErrorKind::InvalidOperation, "separators are two strings")
            })?;
            style.item_separator = item;
            style.key_separator = key;
        }
        kwargs.assert_all_used()?;
        Ok(style)
    }
}

/// JSON as the template sees it; objects keep the order of their keys.
pub(crate) fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::from(integer),
            (None, Some(integer)) => Value::from(integer),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(value).collect(),
        Json::Object(object) => {
            Value::from_pairs(object.iter().map(|(key, item)| (key.as_str(), value(item))))
        }
    }
}

/// `json.dumps(value)`.
///
/// # Errors
/// A value that JSON cannot hold (an undefined one, a function).
pub(crate) fn json(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let mut out = String::new();
    write_json(&mut out, value, style, 0)?;
    Ok(out)
}

/// `str(value)`.
pub(crate) fn string(value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => repr(value),
    }
}

/// `repr(value)` of a float: the shortest digits that read back, with an exponent below 1e-4 and from 1e16.
pub(crate) fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.into();
    }
    if value == 0.0 {
        return if value.is_sign_negative() {
            "-0.0"
        } else {
            "0.0"
        }
        .into();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        if plain.contains('.') {
            plain
        } else {
            plain + ".0"
        }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{digits}e{sign}{:02}", exponent.abs())
    }
}

/// A number that is not an integer, as a float.
pub(crate) fn as_float(value: &Value) -> Option<f64> {
    if value.kind() == ValueKind::Number && !value.is_integer() {
        f64::try_from(value.clone()).ok()
    } else {
        None
    }
}

fn repr(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    write_repr(&mut out, value, 0)?;
    Ok(out)
}

/// Rows are at most 128 levels deep; a template can build deeper values.
const MAX_DEPTH: usize = 256;

fn too_deep() -> Error {
    Error::new(ErrorKind::InvalidOperation, "a value is nested too deeply")
}

fn write_repr(out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(too_deep());
    }
    match value.kind() {
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') {
                '"'
            } else {
                '\''
            };
            out.push(quote);
            for c in text.chars() {
                match c {
                    '\\' => out.push_str("\\\\"),
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    c if c == quote => out.extend(['\\', c]),
                    c if u32::from(c) < 0x20 || c == '\x7f' => {
                        let _ = write!(out, "\\x{:02x}", u32::from(c));
                    }
                    c => out.push(c),
                }
            }
            out.push(quote);
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (index, item) in value.try_iter()?.enumerate() {
                if index > 0 {
                    out.push_str(", ");
                }
                write_repr(out, &item, depth + 1)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                if index > 0 {
                    out.push_str(", ");
                }
                write_repr(out, &key, depth + 1)?;
                out.push_str(": ");
                write_repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        _ => match as_float(value) {
            Some(number) => out.push_str(&float(number)),
            None => {
                let _ = write!(out, "{value}");
            }
        },
    }
    Ok(())
}

fn write_json(
    out: &mut String,
    value: &Value,
    style: &JsonStyle,
    depth: usize,
) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(too_deep());
    }
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => match as_float(value) {
            Some(number) if number.is_nan() => out.push_str("NaN"),
            Some(number) if number.is_infinite() => {
                out.push_str(if number > 0.0 {
                    "Infinity"
                } else {
                    "-Infinity"
                });
            }
            Some(number) => out.push_str(&float(number)),
            None => {
                let _ = write!(out, "{value}");
            }
        },
        ValueKind::String => write_json_string(out, value.as_str().unwrap_or_default(), style),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut empty = true;
            for item in value.try_iter()? {
                if !empty {
                    out.push_str(&style.item_separator);
                }
                empty = false;
                line(out, depth + 1);
                write_json(out, &item, style, depth + 1)?;
            }
            if !empty {
                line(out, depth);
            }
            out.push(']');
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort_keys {
                keys.sort();
            }
            out.push('{');
            for (index, key) in keys.iter().enumerate() {
                if index > 0 {
                    out.push_str(&style.item_separator);
                }
                line(out, depth + 1);
                match key.as_str() {
                    Some(text) => write_json_string(out, text, style),
                    None => write_json_string(out, &json(key, style)?, style),
                }
                out.push_str(&style.key_separator);
                write_json(out, &value.get_item(key)?, style, depth + 1)?;
            }
            if !keys.is_empty() {
                line(out, depth);
            }
            out.push('}');
        }
        kind => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("a value of type {kind} is not JSON serializable"),
            ));
        }
    }
    Ok(())
}

fn write_json_string(out: &mut String, text: &str, style: &JsonStyle) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            c if u32::from(c) < 0x20 => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c if style.ensure_ascii && !c.is_ascii() => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_read_as_in_python() {
        for (value, text) in [
            (2.0, "2.0"),
            (1.5, "1.5"),
            (1e-7, "1e-07"),
            (1.25e-5, "1.25e-05"),
            (0.0001, "0.0001"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-1.5e300, "-1.5e+300"),
            (0.1, "0.1"),
            (-0.0, "-0.0"),
        ] {
            assert_eq!(float(value), text);
        }
    }

    #[test]
    fn json_keeps_html_and_other_scripts_as_they_are() {
        let value = super::value(
            &serde_json::json!({"b": "<ä&>'\"\u{1}", "a": [1, 2.0, null, true], "e": {}}),
        );
        assert_eq!(
            json(&value, &JsonStyle::default()).unwrap(),
            r#"{"b": "<ä&>'\"\u0001", "a": [1, 2.0, null, true], "e": {}}"#
        );
    }

    #[test]
    fn str_of_a_list_is_its_repr() {
        let value = super::value(&serde_json::json!([1, "it's", null, {"k": false}]));
        assert_eq!(
            string(&value).unwrap(),
            r#"[1, "it's", None, {'k': False}]"#
        );
    }
}
