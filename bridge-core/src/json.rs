//! JSON as files from elsewhere must be read: a key that stands twice is an error, not "the last one wins".

use std::cell::Cell;
use std::fmt;
use std::io::{self, Write};

use serde::Serialize;
use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::ser::{Formatter, PrettyFormatter};
use serde_json::{Map, Value};

/// Values of one text. No config has nearly as many; each may take a hundred bytes of memory for two of the text.
const MAX_VALUES: usize = 1 << 17;

/// Parses `text`; refuses duplicate keys, more than 131072 values, nesting deeper than serde_json's 128 and trailing text.
pub(crate) fn parse(text: &[u8]) -> Result<Value, serde_json::Error> {
    serde_json::from_slice::<Strict>(text).map(|strict| strict.0)
}

/// A value as [`parse`] reads it, within a text that is read otherwise.
pub(crate) struct Strict(pub(crate) Value);

/// `value` with two spaces of indent and floats as Python's `json` writes them, so that a config that was read and written
/// again differs only where it was changed.
pub(crate) fn as_python_writes(value: &impl Serialize) -> String {
    let mut bytes = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, Python::default());
    value
        .serialize(&mut serializer)
        .expect("maps, lists and plain values are JSON");
    bytes.push(b'\n');
    String::from_utf8(bytes).expect("JSON is UTF-8")
}

/// [`PrettyFormatter`] but for floats.
#[derive(Default)]
struct Python(PrettyFormatter<'static>);

impl Formatter for Python {
    fn write_f64<W: Write + ?Sized>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        let short = format!("{value:e}");
        let (digits, exponent) = short.split_once('e').unwrap_or((&short, "0"));
        let exponent: i32 = exponent.parse().unwrap_or_default();
        if (-4..16).contains(&exponent) {
            return write!(writer, "{value:?}");
        }
        let sign = if exponent < 0 { '-' } else { '+' };
        write!(writer, "{digits}e{sign}{:02}", exponent.abs())
    }

    fn begin_array<W: Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_array(writer)
    }

    fn end_array<W: Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array(writer)
    }

    fn begin_array_value<W: Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.0.begin_array_value(writer, first)
    }

    fn end_array_value<W: Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array_value(writer)
    }

    fn begin_object<W: Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object(writer)
    }

    fn end_object<W: Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object(writer)
    }

    fn begin_object_key<W: Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.0.begin_object_key(writer, first)
    }

    fn begin_object_value<W: Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object_value(writer)
    }

    fn end_object_value<W: Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object_value(writer)
    }
}

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let left = Cell::new(MAX_VALUES);
        Counted(&left).deserialize(deserializer).map(Strict)
    }
}

/// A value, and how many more its text may have.
#[derive(Clone, Copy)]
struct Counted<'a>(&'a Cell<usize>);

impl<'de> DeserializeSeed<'de> for Counted<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let Some(left) = self.0.get().checked_sub(1) else {
            return Err(D::Error::custom(format_args!(
                "it holds more than {MAX_VALUES} values"
            )));
        };
        self.0.set(left);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Counted<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(twice(&key));
            }
            let value = entries.next_value_seed(self)?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

/// The error of a key that stands twice in an object.
pub(crate) fn twice<E: Error>(key: &str) -> E {
    E::custom(format_args!("the key `{key}` stands twice"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_stands_twice_is_refused_at_any_depth() {
        assert!(parse(br#"{"a":1,"b":{"a":1}}"#).is_ok());
        let error = parse(br#"{"a":[{"b":1,"b":2}]}"#).unwrap_err();
        assert!(error.to_string().contains("`b` stands twice"), "{error}");
    }

    #[test]
    fn deep_nesting_is_refused_and_not_recursed_into() {
        let deep = "[".repeat(100_000);
        assert!(parse(deep.as_bytes()).is_err());
    }

    #[test]
    fn more_values_than_any_config_has_are_refused_and_not_kept() {
        let many = format!("[{}0]", "0,".repeat(MAX_VALUES - 2));
        assert!(parse(many.as_bytes()).is_ok());
        let many = format!("[{}0]", "0,".repeat(MAX_VALUES));
        let error = parse(many.as_bytes()).unwrap_err();
        assert!(
            error.to_string().contains("more than 131072 values"),
            "{error}"
        );
    }

    #[test]
    fn integers_are_exact_up_to_u64() {
        assert_eq!(
            parse(b"18446744073709551615").unwrap(),
            Value::from(u64::MAX)
        );
    }

    /// Python 3's `repr` of each.
    #[test]
    fn floats_are_spelled_as_python_spells_them() {
        for (value, wanted) in [
            (1e-6, "1e-06"),
            (1.5e-7, "1.5e-07"),
            (1e-4, "0.0001"),
            (1e7, "10000000.0"),
            (0.25, "0.25"),
            (0.0, "0.0"),
            (-1e-5, "-1e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e100, "1.25e+100"),
        ] {
            assert_eq!(as_python_writes(&value), format!("{wanted}\n"));
        }
        let nested = serde_json::json!({"a": [], "b": [1, {}], "c": null});
        assert_eq!(
            as_python_writes(&nested),
            "{\n  \"a\": [],\n  \"b\": [\n    1,\n    {}\n  ],\n  \"c\": null\n}\n"
        );
    }
}
