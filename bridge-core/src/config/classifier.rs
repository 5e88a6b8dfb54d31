//! The keys of a classifier of tokens.

use super::reader::Reader;

/// A classifier: one row of `score` a label.
#[derive(Debug, Clone, PartialEq)]
pub struct ClassifierConfig {
    /// Labels: those of `id2label`, else `num_labels`, else 2, as transformers has it.
    pub num_labels: usize,
    /// Dropout in front of it: `classifier_dropout`, else `hidden_dropout`, else 0.1.
    pub dropout: f64,
}

impl ClassifierConfig {
    pub(super) fn read(r: &mut Reader<'_>) -> Self {
        r.also_known(&["label2id", "problem_type"]);
        let named = r.object("id2label").map(serde_json::Map::len);
        let num_labels = r.size("num_labels", named.unwrap_or(2));
        match named {
            Some(0) => {
                let reason = "a classifier needs at least one label".to_owned();
                r.inconsistent("id2label", "empty", reason);
            }
            Some(named) if named != num_labels => {
                r.inconsistent(
                    "num_labels",
                    num_labels,
                    format!("id2label names {named} labels"),
                );
            }
            _ => {}
        }
        let hidden = r.float("hidden_dropout", 0.1);
        Self {
            num_labels,
            dropout: r.float("classifier_dropout", hidden),
        }
    }
}
