//! The fields of a provider, by name.

use serde_json::{Map, Value};

use crate::error::FfiError;

/// A provider's fields in Megatron's order.
#[derive(Debug, Clone)]
pub struct Provider {
    class_name: &'static str,
    fields: Map<String, Value>,
}

impl Provider {
    pub(crate) fn new(provider: &bridge_core::provider::Provider) -> Self {
        let fields = match serde_json::to_value(provider) {
            Ok(Value::Object(fields)) => fields,
            _ => unreachable!("a provider is a struct of plain fields"),
        };
        Self {
            class_name: provider.class_name(),
            fields,
        }
    }

    /// Megatron Bridge's class.
    #[must_use]
    pub fn class_name(&self) -> &'static str {
        self.class_name
    }

    /// All fields as a JSON object.
    #[must_use]
    pub fn json(&self) -> String {
        Value::Object(self.fields.clone()).to_string()
    }

    /// The names of all fields.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.fields.keys().map(String::as_str)
    }

    /// Whether a field is there and not null.
    #[must_use]
    pub fn has(&self, field: &str) -> bool {
        self.fields.get(field).is_some_and(|value| !value.is_null())
    }

    /// An integer field.
    ///
    /// # Errors
    /// [`FfiError::Field`] when there is none, it is null, or of another type; so for the others.
    pub fn integer(&self, field: &str) -> Result<i64, FfiError> {
        self.of_type(field, "an integer", Value::as_i64)
    }

    /// A number field.
    ///
    /// # Errors
    /// As [`Provider::integer`].
    pub fn number(&self, field: &str) -> Result<f64, FfiError> {
        self.of_type(field, "a number", Value::as_f64)
    }

    /// A boolean field.
    ///
    /// # Errors
    /// As [`Provider::integer`].
    pub fn boolean(&self, field: &str) -> Result<bool, FfiError> {
        self.of_type(field, "a boolean", Value::as_bool)
    }

    /// A text field.
    ///
    /// # Errors
    /// As [`Provider::integer`].
    pub fn text(&self, field: &str) -> Result<String, FfiError> {
        self.of_type(field, "a text", |value| value.as_str().map(str::to_owned))
    }

    /// A field that is a list of integers.
    ///
    /// # Errors
    /// As [`Provider::integer`].
    pub fn integers(&self, field: &str) -> Result<Vec<i64>, FfiError> {
        self.of_type(field, "a list of integers", |value| {
            value.as_array()?.iter().map(Value::as_i64).collect()
        })
    }

    fn of_type<T>(
        &self,
        field: &str,
        what: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T, FfiError> {
        let problem = match self.fields.get(field) {
            None => match nearest(field, self.names()) {
                Some(name) => format!("does not exist; did you mean `{name}`?"),
                None => "does not exist".to_owned(),
            },
            Some(Value::Null) => "is null for this model".to_owned(),
            Some(value) => match read(value) {
                Some(value) => return Ok(value),
                None => format!("is {value}, not {what}"),
            },
        };
        Err(FfiError::Field {
            field: field.to_owned(),
            problem,
        })
    }
}

/// The name that is most like `wanted`, if one is.
pub(crate) fn nearest<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let likeness = |name: &str| strsim::normalized_damerau_levenshtein(wanted, name);
    names
        .map(|name| (likeness(name), name))
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}
