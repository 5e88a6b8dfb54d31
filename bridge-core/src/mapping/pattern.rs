//! Names with `{layer}` and `{expert}`: the only place that takes names apart.

use std::fmt;

const LAYER: &str = "{layer}";
const EXPERT: &str = "{expert}";

/// A tensor name with placeholders for the layer and the expert.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pattern(String);

/// The numbers that a name had in a pattern's places.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Captures {
    /// In the place of `{layer}`.
    pub layer: Option<usize>,
    /// In the place of `{expert}`.
    pub expert: Option<usize>,
}

impl Pattern {
    /// A pattern; any text without placeholders is one too.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// This pattern behind a prefix; a name that begins with `/` is absolute.
    #[must_use]
    pub(crate) fn behind(&self, prefix: &str) -> Self {
        match self.0.strip_prefix('/') {
            Some(absolute) => Self(absolute.to_owned()),
            None => Self(format!("{prefix}{}", self.0)),
        }
    }

    /// The pattern's text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it has a place for the layer.
    #[must_use]
    pub fn has_layer(&self) -> bool {
        self.0.contains(LAYER)
    }

    /// This pattern without its place for the layer and the dot behind it: the key of layers that are stacked.
    #[must_use]
    pub(crate) fn without_layer(&self) -> Self {
        Self(self.0.replace("{layer}.", ""))
    }

    /// The pattern of the module that a parameter belongs to: all before the last dot.
    #[must_use]
    pub(crate) fn module(&self) -> Self {
        let end = self.0.rfind('.').unwrap_or(0);
        Self(self.0[..end].to_owned())
    }

    /// Whether it has a place for the expert.
    #[must_use]
    pub fn has_expert(&self) -> bool {
        self.0.contains(EXPERT)
    }

    /// The name with the numbers in their places.
    #[must_use]
    pub fn name(&self, layer: Option<usize>, expert: Option<usize>) -> String {
        let mut name = self.0.clone();
        if let Some(layer) = layer {
            name = name.replace(LAYER, &layer.to_string());
        }
        if let Some(expert) = expert {
            name = name.replace(EXPERT, &expert.to_string());
        }
        name
    }

    /// The numbers in `name` when it fits; places match plain decimal numbers only (no sign, no leading zero).
    #[must_use]
    pub fn captures(&self, name: &str) -> Option<Captures> {
        let mut captures = Captures::default();
        let mut pattern = self.0.as_str();
        let mut name = name;
        loop {
            let place = [LAYER, EXPERT]
                .into_iter()
                .filter_map(|word| pattern.find(word).map(|at| (at, word)))
                .min();
            let Some((at, word)) = place else {
                return (pattern == name).then_some(captures);
            };
            name = name.strip_prefix(&pattern[..at])?;
            pattern = &pattern[at + word.len()..];
            let digits = name.bytes().take_while(u8::is_ascii_digit).count();
            let (number, rest) = name.split_at(digits);
            if number.is_empty() || (number.len() > 1 && number.starts_with('0')) {
                return None;
            }
            let number = number.parse().ok()?;
            let slot = if word == LAYER {
                &mut captures.layer
            } else {
                &mut captures.expert
            };
            if slot.is_some_and(|seen| seen != number) {
                return None;
            }
            *slot = Some(number);
            name = rest;
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_match_plain_numbers_only() {
        let pattern = Pattern::new("layers.{layer}.experts.{expert}.weight");
        let found = pattern.captures("layers.12.experts.3.weight").unwrap();
        assert_eq!((found.layer, found.expert), (Some(12), Some(3)));
        for name in [
            "layers.x.experts.3.weight",
            "layers.-1.experts.3.weight",
            "layers.01.experts.3.weight",
            "layers.1.experts.3.weight2",
            "layers.1.experts.3",
            "layers.99999999999999999999999.experts.3.weight",
        ] {
            assert_eq!(pattern.captures(name), None, "{name}");
        }
    }

    #[test]
    fn a_name_made_from_a_pattern_gives_its_numbers_back() {
        let pattern = Pattern::new("a.{layer}.weight{expert}");
        let name = pattern.name(Some(7), Some(10));
        assert_eq!(name, "a.7.weight10");
        let found = pattern.captures(&name).unwrap();
        assert_eq!((found.layer, found.expert), (Some(7), Some(10)));
    }
}
