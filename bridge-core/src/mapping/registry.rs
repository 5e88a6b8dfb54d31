//! All rows of one model, expanded.

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
    pub pattern: Pattern,
    /// The full shape.
    pub shape: Vec<usize>,
    /// Names and shapes of its Hugging Face tensors, in the rule's order.
    pub sources: Vec<(String, Vec<usize>)>,
    /// The layer, where it is in one.
    pub layer: Option<usize>,
    /// The expert, where it is one's.
    pub expert: Option<usize>,
    /// How many experts the layer has; 0 where it is no expert's.
    pub num_experts: usize,
    /// The part of the model.
    pub part: Part,
    /// The name of the output layer that is tied to it.
    pub tied_output: Option<String>,
    /// The row it comes from.
    pub row: Row,
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
            match &section.layers {
                Some(layers) => {
                    for layer in layers {
                        registry.expand(section, Some(*layer))?;
                    }
                }
                None => registry.expand(section, None)?,
            }
        }
        registry.sections = sections;
        Ok(registry)
    }

    fn expand(&mut self, section: &Section, layer: Option<usize>) -> Result<(), RegistryError> {
        for row in &section.rows {
            if row.megatron.has_expert() {
                for expert in 0..section.num_experts {
                    self.add(section, row, layer, Some(expert))?;
                }
            } else {
                self.add(section, row, layer, None)?;
            }
        }
        Ok(())
    }

    fn add(
        &mut self,
        section: &Section,
        row: &Row,
        layer: Option<usize>,
        expert: Option<usize>,
    ) -> Result<(), RegistryError> {
        let part = row.part.unwrap_or(section.part);
        let pattern = row.megatron.behind(&section.megatron_prefix);
        let megatron_name = pattern.name(layer, expert);
        let mut sources = Vec::with_capacity(row.hf.len());
        for hf in &row.hf {
            let name = hf.pattern.behind(&section.hf_prefix).name(layer, expert);
            match self.hf.entry(name.clone()) {
                Entry::Vacant(entry) => {
                    entry.insert(HfParameter {
                        shape: hf.shape.clone(),
                        init: row.init,
                        stored: row.stored,
                        part,
                        megatron_name: megatron_name.clone(),
                    });
                }
                // All experts read the packed tensor; each its own slice of it.
                Entry::Occupied(_) if row.rule.is_packed() && expert > Some(0) => {}
                Entry::Occupied(entry) => {
                    return Err(RegistryError::DuplicateHf {
                        hf_name: name,
                        first: entry.get().megatron_name.clone(),
                        second: megatron_name,
                    });
                }
            }
            sources.push((name, hf.shape.clone()));
        }
        let shapes: Vec<Vec<usize>> = row.hf.iter().map(|hf| hf.shape.clone()).collect();
        let parameter = Parameter {
            megatron_name: megatron_name.clone(),
            pattern,
            shape: row.rule.target_shape(&shapes),
            sources,
            layer,
            expert,
            num_experts: expert.map_or(0, |_| section.num_experts),
            part,
            tied_output: row
                .tied_output
                .as_ref()
                .map(|tied| tied.behind(&section.megatron_prefix).name(layer, expert)),
            row: row.clone(),
        };
        match self.parameters.insert(megatron_name.clone(), parameter) {
            None => Ok(()),
            Some(_) => Err(RegistryError::DuplicateMegatron {
                name: megatron_name,
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
