//! The keys of a directory, held against those that the model would have.

use std::collections::HashSet;

use super::{ExportError, KeyProblem};
use crate::Dtype;
use crate::auto_bridge::{AutoBridge, BridgeError};
use crate::checkpoint::TensorSource;
use crate::checkpoint::torch_dist::TorchDistCheckpoint;
use crate::mapping::{Registry, Rule};
use crate::plan::{self, KeyStyle, ModelPlan, PlanOptions};

/// A directory, and how the model is stored in it.
pub(in crate::auto_bridge) struct StoredKeys<'a> {
    source: &'a TorchDistCheckpoint,
    options: PlanOptions,
    known: HashSet<String>,
}

impl<'a> StoredKeys<'a> {
    /// Looks at the keys of the whole model, `full`, for their style and for the padding of the vocabulary.
    pub(in crate::auto_bridge) fn new(
        bridge: &AutoBridge,
        source: &'a TorchDistCheckpoint,
        full: &Registry,
    ) -> Result<Self, BridgeError> {
        let options = PlanOptions {
            padded_vocab_size: stored_rows(source, full)?,
            ..PlanOptions::default()
        };
        let mut stored = Self {
            source,
            options,
            known: HashSet::new(),
        };
        let plan = stored.plan(full, &|name| bridge.hf_info(full, name).dtype)?;
        stored.known = plan.tensors.into_iter().map(|one| one.name).collect();
        Ok(stored)
    }

    /// Plans the stored tensors of `registry` under the keys that are there.
    pub(in crate::auto_bridge) fn plan(
        &self,
        registry: &Registry,
        dtype_of: &dyn Fn(&str) -> Dtype,
    ) -> Result<ModelPlan, BridgeError> {
        let exists = |key: &str| self.source.info(key).is_some();
        let keys = KeyStyle::Found(&exists);
        Ok(plan::build_stored(registry, dtype_of, &self.options, keys)?)
    }

    /// Stored tensors of another shape than `export` reads, or of a dtype that holds no weights.
    pub(in crate::auto_bridge) fn misshapen(&self, export: &ModelPlan) -> Vec<KeyProblem> {
        let mut seen = HashSet::new();
        let mut problems = Vec::new();
        let sources = export.tensors.iter().flat_map(|tensor| &tensor.sources);
        for source in sources.filter(|source| seen.insert(&source.name)) {
            let Some(found) = self.source.info(&source.name) else {
                continue;
            };
            let key = source.name.clone();
            if !found.dtype.is_float() {
                let found = found.dtype;
                problems.push(KeyProblem::Dtype { key, found });
            } else if found.shape != source.shape {
                problems.push(KeyProblem::Shape {
                    key,
                    found: found.shape,
                    expected: source.shape.clone(),
                });
            }
        }
        problems
    }

    /// Tensors of `export` that lack a key, each with the first one.
    pub(in crate::auto_bridge) fn missing(&self, export: &ModelPlan) -> Vec<(String, String)> {
        let absent = |key: &str| self.source.info(key).is_none();
        export
            .tensors
            .iter()
            .filter_map(|tensor| {
                let key = tensor.sources.iter().find(|source| absent(&source.name))?;
                Some((tensor.name.clone(), key.name.clone()))
            })
            .collect()
    }

    /// Keys that no tensor of the model has. States of optimizers and modules are not counted.
    pub(in crate::auto_bridge) fn unknown(&self) -> Vec<String> {
        self.source
            .model_tensors()
            .map(|(key, _)| key)
            .filter(|key| !self.known.contains(*key) && !key.contains("_extra_state"))
            .map(str::to_owned)
            .collect()
    }
}

/// Rows of the stored vocabulary, padding included; `None` where it is not stored.
fn stored_rows(
    source: &TorchDistCheckpoint,
    full: &Registry,
) -> Result<Option<usize>, BridgeError> {
    let vocabularies = full
        .parameters()
        .filter(|parameter| parameter.row.rule == Rule::Vocabulary);
    for parameter in vocabularies {
        for pattern in parameter.keys.iter() {
            let key = pattern.name(parameter.layer, parameter.expert);
            let Some(info) = source.info(&key) else {
                continue;
            };
            let rows = info.shape.first().copied().unwrap_or_default();
            if rows < parameter.shape[0] {
                return Err(BridgeError::Export(ExportError::Vocabulary {
                    dir: source.dir().to_owned(),
                    key,
                    rows,
                    vocab_size: parameter.shape[0],
                }));
            }
            return Ok(Some(rows));
        }
    }
    Ok(None)
}
