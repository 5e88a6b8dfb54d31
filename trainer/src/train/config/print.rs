//! A configuration as a TOML file that reads back, each line with its value's origin.

use std::collections::BTreeMap;

use serde_json::Value;

use super::layers::{Origin, Resolved, flatten, to_map};

impl Resolved {
    /// TOML, one key a line in the order of the documentation, `# origin` behind each; keys without a value are comments.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let map = to_map(&self.config);
        let mut text = String::new();
        let mut sections = String::new();
        for (key, value) in &map {
            match value {
                Value::Object(inner) => {
                    sections.push_str(&format!("\n[{key}]\n"));
                    for (inner_key, value) in flatten(inner) {
                        let origin = self.origins.get(&format!("{key}.{inner_key}"));
                        sections.push_str(&line(&inner_key, &value, origin));
                    }
                }
                _ => text.push_str(&line(key, value, self.origins.get(key))),
            }
        }
        text + &sections
    }

    /// The keys that are not at their default, with their origin.
    #[must_use]
    pub fn changed(&self) -> BTreeMap<&str, &Origin> {
        let set = self
            .origins
            .iter()
            .filter(|(_, origin)| **origin != Origin::Default);
        set.map(|(key, origin)| (key.as_str(), origin)).collect()
    }
}

fn line(key: &str, value: &Value, origin: Option<&Origin>) -> String {
    let setting = match value {
        Value::Null => format!("# {key} = (none)"),
        other => format!("{key} = {}", toml_value(other)),
    };
    let origin = origin.unwrap_or(&Origin::Default);
    format!("{setting:<48} # {origin}\n")
}

fn toml_value(value: &Value) -> String {
    match value {
        Value::Array(list) => {
            format!(
                "[{}]",
                list.iter().map(toml_value).collect::<Vec<_>>().join(", ")
            )
        }
        Value::String(text) => toml::Value::String(text.clone()).to_string(),
        Value::Number(number) => number.to_string(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Override, resolve};

    #[test]
    fn printed_configuration_reads_back_equal() {
        let settings = [
            "model=m",
            "data=d",
            "output=o",
            "learning_rate=1e-7",
            "max_length=77",
        ];
        let overrides: Vec<_> = settings
            .iter()
            .map(|s| Override::parse(s).unwrap())
            .collect();
        let resolved = resolve(None, None, &overrides).unwrap();
        let text = resolved.to_toml();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        fs_err::write(&path, &text).unwrap();
        let again = resolve(None, Some(&path), &[]).unwrap();
        assert_eq!(again.config, resolved.config);
        assert!(
            text.lines()
                .any(|line| line.starts_with("learning_rate = 1e-7")
                    && line.ends_with("# command line, learning_rate=1e-7"))
        );
        assert_eq!(resolved.changed().len(), 5);
    }
}
