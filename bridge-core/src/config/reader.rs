//! Reads typed values out of a JSON object and collects what is wrong with them.

use serde_json::{Map, Value};

use super::ConfigProblem;
use crate::Dtype;

/// Sizes above this are no model's; it keeps every product of three of them checkable in `u128`.
const MAX_SIZE: u64 = 1 << 32;

/// One JSON object under its dotted path, with the problems found so far.
pub(super) struct Reader<'a> {
    path: String,
    map: &'a Map<String, Value>,
    known: Vec<&'static str>,
    pub(super) problems: Vec<ConfigProblem>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(path: impl Into<String>, map: &'a Map<String, Value>) -> Self {
        Self {
            path: path.into(),
            map,
            known: Vec::new(),
            problems: Vec::new(),
        }
    }

    /// The dotted path of `key`.
    pub(super) fn key(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    /// The value of `key`; null counts as absent, as it does in transformers.
    pub(super) fn get(&mut self, key: &'static str) -> Option<&'a Value> {
        self.known.push(key);
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn wrong_type(&mut self, key: &str, value: &Value, expected: &'static str) {
        self.problems.push(ConfigProblem::Type {
            key: self.key(key),
            found: value.to_string(),
            expected,
        });
    }

    /// Records that two values do not fit.
    pub(super) fn inconsistent(&mut self, key: &str, found: impl ToString, reason: String) {
        self.problems.push(ConfigProblem::Inconsistent {
            key: self.key(key),
            found: found.to_string(),
            reason,
        });
    }

    /// A size of at least 1.
    pub(super) fn size(&mut self, key: &'static str, default: usize) -> usize {
        self.size_at_most(key, default, MAX_SIZE)
    }

    /// A size from 1 to `most`.
    pub(super) fn size_at_most(&mut self, key: &'static str, default: usize, most: u64) -> usize {
        let Some(value) = self.get(key) else {
            return default;
        };
        match value.as_u64() {
            Some(size) if (1..=most).contains(&size) => usize::try_from(size).unwrap_or(default),
            _ => {
                self.wrong_type(
                    key,
                    value,
                    "a whole number of at least 1, of a model's size",
                );
                default
            }
        }
    }

    /// A count from 0 to `most`.
    pub(super) fn count(&mut self, key: &'static str, default: usize, most: u64) -> usize {
        match self.get(key) {
            Some(value) if value.as_u64() != Some(0) => self.size_at_most(key, default, most),
            Some(_) => 0,
            None => default,
        }
    }

    pub(super) fn float(&mut self, key: &'static str, default: f64) -> f64 {
        let Some(value) = self.get(key) else {
            return default;
        };
        match value.as_f64() {
            Some(number) if number.is_finite() && number >= 0.0 => number,
            _ => {
                self.wrong_type(key, value, "a number of at least 0");
                default
            }
        }
    }

    pub(super) fn boolean(&mut self, key: &'static str, default: bool) -> bool {
        let Some(value) = self.get(key) else {
            return default;
        };
        value.as_bool().unwrap_or_else(|| {
            self.wrong_type(key, value, "true or false");
            default
        })
    }

    pub(super) fn integer(&mut self, key: &'static str) -> Option<i64> {
        let value = self.get(key)?;
        // Some files list several ids (eos); the first one is the model's own.
        let first = value.as_array().and_then(|list| list.first());
        let number = first.unwrap_or(value).as_i64();
        if number.is_none() {
            self.wrong_type(key, value, "a whole number");
        }
        number
    }

    pub(super) fn text(&mut self, key: &'static str, default: &str) -> String {
        let Some(value) = self.get(key) else {
            return default.to_owned();
        };
        match value.as_str() {
            Some(text) => text.to_owned(),
            None => {
                self.wrong_type(key, value, "a text");
                default.to_owned()
            }
        }
    }

    pub(super) fn sizes(&mut self, key: &'static str) -> Option<Vec<usize>> {
        let value = self.get(key)?;
        let sizes = value.as_array().and_then(|list| {
            list.iter()
                .map(|item| item.as_u64().and_then(|size| usize::try_from(size).ok()))
                .collect()
        });
        if sizes.is_none() {
            self.wrong_type(key, value, "a list of whole numbers");
        }
        sizes
    }

    /// The object under `key`; an empty one when it is absent.
    pub(super) fn object(&mut self, key: &'static str) -> Option<&'a Map<String, Value>> {
        let value = self.get(key)?;
        let object = value.as_object();
        if object.is_none() {
            self.wrong_type(key, value, "an object");
        }
        object
    }

    /// `dtype`, or `torch_dtype` in older files; one that can hold weights.
    pub(super) fn dtype(&mut self) -> Option<Dtype> {
        let new = self.text("dtype", "");
        let old = self.text("torch_dtype", "");
        let word = if new.is_empty() { old } else { new };
        if word.is_empty() {
            return None;
        }
        let dtype = word.parse::<Dtype>().ok().filter(|dtype| dtype.is_float());
        if dtype.is_none() {
            self.problems.push(ConfigProblem::Unsupported {
                key: self.key("dtype"),
                found: word,
                supported: "float16, bfloat16, float32 or float64",
            });
        }
        dtype
    }

    /// Requires that `key`, when present, has the one `supported` value (given as JSON).
    pub(super) fn only(&mut self, key: &'static str, supported: &'static str) {
        if let Some(value) = self.get(key) {
            let wanted: Value = serde_json::from_str(supported)
                .expect("a supported value is written as JSON in this crate");
            if *value != wanted {
                self.problems.push(ConfigProblem::Unsupported {
                    key: self.key(key),
                    found: value.to_string(),
                    supported,
                });
            }
        }
    }

    /// Marks keys that this crate carries without reading them.
    pub(super) fn also_known(&mut self, keys: &[&'static str]) {
        self.known.extend(keys);
    }

    /// Ends the reading: an unknown key within two edits of a known key that is absent is a misspelling.
    pub(super) fn finish(mut self) -> Vec<ConfigProblem> {
        for key in self.map.keys() {
            if self.known.contains(&key.as_str()) {
                continue;
            }
            let nearest = self
                .known
                .iter()
                .filter(|known| known.len() >= 5 && !self.map.contains_key(**known))
                .map(|known| (strsim::osa_distance(key, known), *known))
                .filter(|(distance, _)| *distance <= 2)
                .min();
            if let Some((_, nearest)) = nearest {
                self.problems.push(ConfigProblem::Misspelt {
                    key: self.key(key),
                    nearest: nearest.to_owned(),
                });
            }
        }
        self.problems
    }
}
