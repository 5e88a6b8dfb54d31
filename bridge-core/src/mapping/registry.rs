//! All rows of one model, expanded.

use std::sync::Arc;

use indexmap::IndexMap;
use indexmap::map::Entry;

use super::{Init, Part, Pattern, Row, Section, Stored};

/// A mistake in a table: it claims a name twice.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// Two rows give the same Megatron name.
    #[error("two rows give the Megatron parameter `{name}`")]
    DuplicateMegatron {
        /// The name.
        name: String,
    },
    /// Two parameters claim the same Hugging Face tensor (or the same expert of it).
    #[error("`{hf_name}` is claimed by `{first}` and by `{second}`")]
    DuplicateHf {
        /// The tensor.
        hf_name: String,
        /// The parameter that came first.
        first: String,
        /// The other.
        second: String,
    },
}

/// One Megatron parameter of the full model.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// The Megatron name, with global numbers.
    pub megatron_name: String,
    /// The pattern of that name.
    pub pattern: Arc<Pattern>,
    /// Patterns of its key in a `torch_dist` directory: the one that Megatron-Core writes, then those that other
    /// versions and settings of it write.
    pub keys: Arc<[Pattern]>,
    /// The full shape.
    pub shape: Vec<usize>,
    /// Names and shapes of its Hugging Face tensors, in the rule's order.
    pub sources: Vec<(String, Vec<usize>)>,
    /// The layer, where it is in one.
    pub layer: Option<usize>,
    /// Its place among the layers of its section, and how many those are; (0, 1) outside layers.
    pub layer_place: (usize, usize),
    /// The expert, where it is one's.
    pub expert: Option<usize>,
    /// How many experts the layer has; 0 where it is no expert's.
    pub num_experts: usize,
    /// The part of the model.
    pub part: Part,
    /// The name of the output layer that is tied to it.
    pub tied_output: Option<String>,
    /// The row it comes from.
    pub row: Arc<Row>,
}

/// One Hugging Face tensor of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HfParameter {
    /// Its shape.
    pub shape: Vec<usize>,
    /// How a new one is filled.
    pub init: Init,
    /// The dtype of a new one.
    pub stored: Stored,
    /// The part of the model.
    pub part: Part,
    /// The first Megatron parameter that reads it.
    pub megatron_name: String,
}

/// All sections of one model.
#[derive(Debug, Clone)]
pub struct Registry {
    sections: Vec<Section>,
    parameters: IndexMap<String, Parameter>,
    hf: IndexMap<String, HfParameter>,
}

impl Registry {
    /// Expands `sections`.
    ///
    /// # Errors
    /// [`RegistryError`] when a name is claimed twice.
    pub fn new(sections: Vec<Section>) -> Result<Self, RegistryError> {
        let mut registry = Self {
            sections: Vec::new(),
            parameters: IndexMap::new(),
            hf: IndexMap::new(),
        };
        for section in &sections {
            let rows: Vec<Prefixed> = section
                .rows
                .iter()
                .map(|row| Prefixed::new(section, row))
                .collect();
            match &section.layers {
                Some(layers) => {
                    for (index, layer) in layers.iter().enumerate() {
                        registry.expand(&rows, Some(*layer), (index, layers.len()))?;
                    }
                }
                None => registry.expand(&rows, None, (0, 1))?,
            }
        }
        registry.sections = sections;
        Ok(registry)
    }

    fn expand(
        &mut self,
        rows: &[Prefixed<'_>],
        layer: Option<usize>,
        layer_place: (usize, usize),
    ) -> Result<(), RegistryError> {
        for row in rows {
            let experts = if row.row.megatron.has_expert() {
                (0..row.section.num_experts).map(Some).collect()
            } else {
                vec![None]
            };
            for expert in experts {
                self.add(row.parameter(layer, layer_place, expert))?;
            }
        }
        Ok(())
    }

    fn add(&mut self, parameter: Parameter) -> Result<(), RegistryError> {
        let row = &parameter.row;
        for (name, shape) in &parameter.sources {
            match self.hf.entry(name.clone()) {
                Entry::Vacant(entry) => {
                    entry.insert(HfParameter {
                        shape: shape.clone(),
                        init: row.init,
                        stored: row.stored,
                        part: parameter.part,
                        megatron_name: parameter.megatron_name.clone(),
                    });
                }
                // All experts read the packed tensor; each its own slice of it.
                Entry::Occupied(_) if row.rule.is_packed() && parameter.expert > Some(0) => {}
                Entry::Occupied(entry) => {
                    return Err(RegistryError::DuplicateHf {
                        hf_name: name.clone(),
                        first: entry.get().megatron_name.clone(),
                        second: parameter.megatron_name.clone(),
                    });
                }
            }
        }
        match self.parameters.entry(parameter.megatron_name.clone()) {
            Entry::Vacant(entry) => {
                entry.insert(parameter);
                Ok(())
            }
            Entry::Occupied(entry) => Err(RegistryError::DuplicateMegatron {
                name: entry.key().clone(),
            }),
        }
    }

    /// The sections as they were written.
    #[must_use]
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Every Megatron parameter, in the order of the table.
    pub fn parameters(&self) -> impl ExactSizeIterator<Item = &Parameter> {
        self.parameters.values()
    }

    /// The parameter of a Megatron name.
    #[must_use]
    pub fn parameter(&self, megatron_name: &str) -> Option<&Parameter> {
        self.parameters.get(megatron_name)
    }

    /// Every Hugging Face tensor, in the order of the table.
    pub fn hf_parameters(&self) -> impl ExactSizeIterator<Item = (&str, &HfParameter)> {
        self.hf.iter().map(|(name, hf)| (name.as_str(), hf))
    }

    /// The Hugging Face tensor of a name.
    #[must_use]
    pub fn hf_parameter(&self, hf_name: &str) -> Option<&HfParameter> {
        self.hf.get(hf_name)
    }

    /// Whether `name` is a row's Hugging Face name but for the numbers of its layer and expert.
    #[must_use]
    pub fn is_numbered_otherwise(&self, name: &str) -> bool {
        self.sections.iter().any(|section| {
            section.rows.iter().flat_map(|row| &row.hf).any(|hf| {
                let pattern = hf.pattern.behind(&section.hf_prefix);
                pattern.captures(name).is_some()
            })
        })
    }

    /// The Hugging Face name of the table that is closest to `name`.
    #[must_use]
    pub fn nearest_hf_name(&self, name: &str) -> Option<&str> {
        self.hf
            .keys()
            .map(|known| (strsim::osa_distance(known, name), known.as_str()))
            .min()
            .map(|(_, known)| known)
    }
}

/// A row with the names of its section, shared by all parameters that it stands for.
struct Prefixed<'a> {
    section: &'a Section,
    row: Arc<Row>,
    pattern: Arc<Pattern>,
    keys: Arc<[Pattern]>,
    hf: Vec<Pattern>,
    tied_output: Option<Pattern>,
    shape: Vec<usize>,
}

impl<'a> Prefixed<'a> {
    fn new(section: &'a Section, row: &Row) -> Self {
        let megatron = section.megatron_prefix.as_str();
        let shapes: Vec<Vec<usize>> = row.hf.iter().map(|hf| hf.shape.clone()).collect();
        Self {
            section,
            pattern: Arc::new(row.megatron.behind(megatron)),
            keys: keys(section, row).into(),
            hf: row
                .hf
                .iter()
                .map(|hf| hf.pattern.behind(&section.hf_prefix))
                .collect(),
            tied_output: row.tied_output.as_ref().map(|tied| tied.behind(megatron)),
            shape: row.rule.target_shape(&shapes),
            row: Arc::new(row.clone()),
        }
    }

    fn parameter(
        &self,
        layer: Option<usize>,
        layer_place: (usize, usize),
        expert: Option<usize>,
    ) -> Parameter {
        let sources = self.hf.iter().zip(&self.row.hf);
        Parameter {
            megatron_name: self.pattern.name(layer, expert),
            pattern: Arc::clone(&self.pattern),
            keys: Arc::clone(&self.keys),
            shape: self.shape.clone(),
            sources: sources
                .map(|(pattern, hf)| (pattern.name(layer, expert), hf.shape.clone()))
                .collect(),
            layer,
            layer_place,
            expert,
            num_experts: expert.map_or(0, |_| self.section.num_experts),
            part: self.row.part.unwrap_or(self.section.part),
            tied_output: self
                .tied_output
                .as_ref()
                .map(|tied| tied.name(layer, expert)),
            row: Arc::clone(&self.row),
        }
    }
}

/// Under the prefix of stored keys and under Megatron's own, each with its layers numbered and stacked; what a norm is
/// called as a module of its own comes last.
fn keys(section: &Section, row: &Row) -> Vec<Pattern> {
    let key = row.key.as_ref().unwrap_or(&row.megatron);
    let prefixes = [section.key_prefix.as_ref(), Some(&section.megatron_prefix)];
    let mut keys: Vec<Pattern> = Vec::new();
    for name in [Some(key), row.separate_norm.as_ref()]
        .into_iter()
        .flatten()
    {
        // Layers of several sections share the name of a norm of its own: stacked, their tensors would be one.
        let stacks = name == key || section.key_prefix.is_some();
        for prefix in prefixes.into_iter().flatten() {
            let numbered = name.behind(prefix);
            let stacked = stacks.then(|| numbered.without_layer());
            for key in std::iter::once(numbered).chain(stacked) {
                if !keys.contains(&key) {
                    keys.push(key);
                }
            }
        }
    }
    keys
}
