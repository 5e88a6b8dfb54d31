//! What a `torch_dist` directory holds: the whole model under stored keys.
//!
//! Megatron-Core stores global tensors, whatever the layout of the ranks that write them. A key is the parameter's name
//! with global numbers, but for three things that the tables say as data: another prefix or name
//! ([`crate::mapping::Section::key_prefix`], [`crate::mapping::Row::key`]), layers or experts stacked along an axis in
//! front, and sections of a fused tensor under keys of their own ([`crate::mapping::Rule::section_words`]).

use std::ops::Range;

use indexmap::{IndexMap, IndexSet};

use super::build::{Cut, PlanOptions, build_tensor};
use super::copy::{Copy, merge};
use super::error::PlanError;
use super::model_plan::{Fill, ModelPlan, Role, SourceTensor, TensorPlan};
use crate::Dtype;
use crate::mapping::{Parameter, Pattern, Registry, Split, Transform};

/// Which of a parameter's possible keys a plan uses.
#[derive(Clone, Copy, Default)]
pub enum KeyStyle<'a> {
    /// What Megatron-Core writes.
    #[default]
    Written,
    /// The first that exists: directories of other versions number the layers of the vision tower, name the layer of
    /// the multi-token-prediction head `mtp_model_layer`, or hold norms apart that Megatron fuses into the linear layer
    /// behind them (`input_layernorm`, `pre_mlp_layernorm`). What exists under no key has the first one.
    Found(&'a dyn Fn(&str) -> bool),
}

/// Plans every stored tensor of `registry`. `dtype_of` gives the dtype of a Hugging Face tensor.
///
/// `options.cut` plays no part: keys and shapes are the same for every layout.
///
/// # Errors
/// [`PlanError`] when a parameter cannot be padded as asked, or the plan breaks conservation.
pub fn build_stored(
    registry: &Registry,
    dtype_of: &dyn Fn(&str) -> Dtype,
    options: &PlanOptions,
    keys: KeyStyle<'_>,
) -> Result<ModelPlan, PlanError> {
    let options = PlanOptions {
        cut: Cut::default(),
        ..options.clone()
    };
    let mut stored: IndexMap<String, Stored> = IndexMap::new();
    for parameter in registry.parameters() {
        let name = parameter.megatron_name.clone();
        let whole = build_tensor(parameter, name, dtype_of, &options)?;
        let key = Key::choose(parameter, keys);
        for part in parts(parameter, &whole) {
            let own = part
                .sources(&whole)
                .map(|source| source.dtype)
                .reduce(Dtype::widest)
                .unwrap_or(whole.dtype);
            let dtype = options.dtype_of(&whole.name, own);
            stored
                .entry(key.section(part.word))
                .or_insert_with(|| Stored::new(&key, &part, &whole, dtype))
                .add(&key, &part, &whole, dtype);
        }
    }
    let plan = ModelPlan {
        tensors: stored
            .into_iter()
            .map(|(name, stored)| stored.plan(name))
            .collect(),
        left_out: Vec::new(),
    };
    plan.validate_whole_model()?;
    Ok(plan)
}

/// Keys of the objects that say "no extra state" for each module of `registry` that could have one.
///
/// Megatron-Core's default strictness wants an object for each linear layer and norm of Transformer Engine; norms that are
/// fused into a linear layer share its.
#[must_use]
pub fn extra_states(registry: &Registry) -> Vec<String> {
    let modules: IndexSet<String> = registry
        .parameters()
        .filter(|parameter| parameter.row.extra_state)
        .map(|parameter| Key::new(parameter, &parameter.keys[0].module()).extra_state())
        .collect();
    modules.into_iter().collect()
}

/// A key and the place of a parameter in the tensor under it.
struct Key {
    name: String,
    /// Index and length of each axis in front.
    stacked: Vec<(usize, usize)>,
}

impl Key {
    fn new(parameter: &Parameter, pattern: &Pattern) -> Self {
        let mut stacked = Vec::new();
        if parameter.pattern.has_layer() && !pattern.has_layer() {
            stacked.push(parameter.layer_place);
        }
        if let Some(expert) = parameter.expert
            && !pattern.has_expert()
        {
            stacked.push((expert, parameter.num_experts));
        }
        Self {
            name: pattern.name(parameter.layer, parameter.expert),
            stacked,
        }
    }

    fn choose(parameter: &Parameter, style: KeyStyle<'_>) -> Self {
        let word = parameter.row.rule.section_words().first().copied();
        let mut keys = parameter
            .keys
            .iter()
            .map(|pattern| Self::new(parameter, pattern));
        let found = match style {
            KeyStyle::Written => None,
            KeyStyle::Found(exists) => keys.find(|key| exists(&key.section(word))),
        };
        found.unwrap_or_else(|| Self::new(parameter, &parameter.keys[0]))
    }

    /// The key of a section.
    fn section(&self, word: Option<&str>) -> String {
        match word {
            Some(word) => format!("{}.{word}", self.name),
            None => self.name.clone(),
        }
    }

    /// The number of the parameter's slice, and how many there are.
    fn slice(&self) -> (usize, usize) {
        self.stacked
            .iter()
            .fold((0, 1), |(at, count), (index, len)| {
                (at * len + index, count * len)
            })
    }

    fn extra_state(&self) -> String {
        let dotted = |pick: fn(&(usize, usize)) -> usize, empty: &str| match self.stacked.as_slice()
        {
            [] => empty.to_owned(),
            axes => {
                let numbers: Vec<String> = axes.iter().map(|axis| pick(axis).to_string()).collect();
                numbers.join(".")
            }
        };
        let (index, len) = (dotted(|axis| axis.0, "0"), dotted(|axis| axis.1, "1"));
        format!("{}._extra_state/shard_{index}_{len}", self.name)
    }
}

/// A section of a parameter that is stored under a key of its own; the whole one where there are none.
struct Part {
    word: Option<&'static str>,
    shape: Vec<usize>,
    copies: Vec<Copy>,
}

impl Part {
    fn sources<'a>(&'a self, whole: &'a TensorPlan) -> impl Iterator<Item = &'a SourceTensor> {
        self.copies.iter().map(|copy| &whole.sources[copy.source])
    }
}

fn parts(parameter: &Parameter, whole: &TensorPlan) -> Vec<Part> {
    let rule = parameter.row.rule;
    let words = rule.section_words();
    if words.is_empty() {
        return vec![Part {
            word: None,
            shape: whole.shape.clone(),
            copies: whole.copies.clone(),
        }];
    }
    let row_elements: usize = whole.shape[1..].iter().product();
    let mut start = 0;
    words
        .iter()
        .zip(rule.sections(whole.shape[0]))
        .map(|(word, rows)| {
            let elements: Range<usize> = start..start + rows * row_elements;
            start = elements.end;
            let mut shape = whole.shape.clone();
            shape[0] = rows;
            let copies = whole.copies.iter().flat_map(|copy| copy.within(&elements));
            Part {
                word: Some(word),
                shape,
                copies: copies.collect(),
            }
        })
        .collect()
}

/// A stored tensor that is being put together.
struct Stored {
    shape: Vec<usize>,
    dtype: Dtype,
    split: Split,
    sources: IndexMap<String, SourceTensor>,
    copies: Vec<Copy>,
    fill: Option<Fill>,
    transforms: Vec<Transform>,
}

impl Stored {
    fn new(key: &Key, part: &Part, whole: &TensorPlan, dtype: Dtype) -> Self {
        let axes = key.stacked.iter().map(|(_, len)| *len);
        Self {
            shape: axes.chain(part.shape.iter().copied()).collect(),
            dtype,
            split: whole.split,
            sources: IndexMap::new(),
            copies: Vec::new(),
            fill: whole.fill,
            transforms: whole.transforms.clone(),
        }
    }

    /// Adds one slice. All slices of a tensor come from the same row, so they agree in shape and arithmetic.
    fn add(&mut self, key: &Key, part: &Part, whole: &TensorPlan, dtype: Dtype) {
        self.dtype = self.dtype.widest(dtype);
        let start = key.slice().0 * part.shape.iter().product::<usize>();
        for copy in &part.copies {
            let source = &whole.sources[copy.source];
            let index = match self.sources.get_index_of(&source.name) {
                Some(index) => index,
                None => {
                    self.sources
                        .insert_full(source.name.clone(), source.clone())
                        .0
                }
            };
            self.copies.push(Copy {
                source: index,
                target_start: start + copy.target_start,
                ..*copy
            });
        }
    }

    fn plan(self, name: String) -> TensorPlan {
        TensorPlan {
            name,
            dtype: self.dtype,
            shape: self.shape,
            role: Role::Primary,
            split: self.split,
            expert: None,
            sources: self.sources.into_values().collect(),
            copies: merge(self.copies),
            fill: self.fill,
            transforms: self.transforms,
        }
    }
}
