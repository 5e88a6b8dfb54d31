//! The words that model tables are written in.

use super::{Group, Pattern, Rule};

/// The part of the model that a parameter belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// The vision tower without its merger.
    Vision,
    /// The mergers: from the tower's width to the language model's.
    Projector,
    /// Embedding, decoder layers, final norm, output layer.
    Language,
    /// The multi-token-prediction head.
    Mtp,
}

impl Part {
    /// Every part, in the order of tables.
    pub const ALL: [Part; 4] = [Part::Vision, Part::Projector, Part::Language, Part::Mtp];

    /// The word that users type.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Vision => "vision",
            Self::Projector => "projector",
            Self::Language => "language",
            Self::Mtp => "mtp",
        }
    }
}

/// Arithmetic beside the copies, applied when importing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transform {
    /// `w - 1`: Megatron keeps the norm zero-centred.
    MinusOne,
    /// `w + 1`: the way back.
    PlusOne,
}

impl Transform {
    /// The transform of the way back.
    #[must_use]
    pub fn inverse(self) -> Self {
        match self {
            Self::MinusOne => Self::PlusOne,
            Self::PlusOne => Self::MinusOne,
        }
    }

    /// The value it gives.
    #[must_use]
    pub fn apply(self, value: f64) -> f64 {
        match self {
            Self::MinusOne => value - 1.0,
            Self::PlusOne => value + 1.0,
        }
    }

    /// A short name for tables.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::MinusOne => "minus one",
            Self::PlusOne => "plus one",
        }
    }
}

/// How a new Hugging Face tensor is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Init {
    /// Normal with the config's `initializer_range` (of the text or of the vision model).
    Normal,
    /// Zeros: biases and zero-centred norms.
    Zeros,
    /// Ones: plain norms and `dt_bias`.
    Ones,
    /// Logarithm of a uniform draw from (0, 16), never of 0.
    ALog,
}

/// The dtype in which a hub checkpoint stores a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stored {
    /// The checkpoint's own.
    AsModel,
    /// Float32 beside weights of 16 bits.
    Float32,
}

/// Which pipeline stage holds a parameter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Place {
    /// The stage of its layer, or of its part of the model.
    #[default]
    WithLayer,
    /// The first stage; a copy stands beside the multi-token-prediction head.
    Embedding,
    /// Behind the last decoder layer.
    FinalLayernorm,
    /// The last stage.
    OutputLayer,
}

/// A tensor on the Hugging Face side of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HfTensor {
    /// Its name.
    pub pattern: Pattern,
    /// Its full shape (with the experts' axis when packed).
    pub shape: Vec<usize>,
}

/// A Hugging Face tensor of a row.
#[must_use]
pub fn tensor(name: &str, shape: impl Into<Vec<usize>>) -> HfTensor {
    HfTensor {
        pattern: Pattern::new(name),
        shape: shape.into(),
    }
}

/// One parameter of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The Megatron name.
    pub megatron: Pattern,
    /// The layout.
    pub rule: Rule,
    /// The Hugging Face tensors, in the rule's order.
    pub hf: Vec<HfTensor>,
    /// Arithmetic on import.
    pub transform: Option<Transform>,
    /// How a new one is filled.
    pub init: Init,
    /// The dtype of a new one.
    pub stored: Stored,
    /// The part of the model, where it is not the section's.
    pub part: Option<Part>,
    /// The pipeline stage that holds it.
    pub place: Place,
    /// The Megatron name of the output layer that has the same bytes, where the two are tied. It exists only on a
    /// pipeline whose last stage is not the first.
    pub tied_output: Option<Pattern>,
    /// Its key in a `torch_dist` directory, where that is not the Megatron name. A key without a place that the name
    /// has (`{layer}`, `{expert}`) stands for all of them, stacked along an axis in front.
    pub key: Option<Pattern>,
    /// Its Megatron name where the norm is a module of its own and not a part of the linear layer behind it, as
    /// ModelOpt's layers have it. Directories with such keys are read, none is written.
    pub separate_norm: Option<Pattern>,
    /// Whether its module (a linear layer or a norm of Transformer Engine) may have a state beside its parameters.
    pub extra_state: bool,
}

/// A row that is filled with normal noise and changed by no arithmetic.
///
/// # Panics
/// When the number of tensors is not the rule's: a mistake in a table.
#[must_use]
pub fn row(megatron: &str, rule: Rule, hf: impl Into<Vec<HfTensor>>) -> Row {
    let hf = hf.into();
    assert_eq!(hf.len(), rule.num_sources(), "sources of row {megatron}");
    Row {
        megatron: Pattern::new(megatron),
        rule,
        hf,
        transform: None,
        init: Init::Normal,
        stored: Stored::AsModel,
        part: None,
        place: Place::WithLayer,
        tied_output: None,
        key: None,
        separate_norm: None,
        extra_state: true,
    }
}

impl Row {
    /// Sets the arithmetic on import.
    #[must_use]
    pub fn transform(self, transform: Transform) -> Self {
        Self {
            transform: Some(transform),
            ..self
        }
    }

    /// Sets how a new one is filled.
    #[must_use]
    pub fn init(self, init: Init) -> Self {
        Self { init, ..self }
    }

    /// Stores it in float32 whatever the checkpoint's dtype.
    #[must_use]
    pub fn float32(self) -> Self {
        Self {
            stored: Stored::Float32,
            ..self
        }
    }

    /// Counts it to another part than its section's.
    #[must_use]
    pub fn part(self, part: Part) -> Self {
        Self {
            part: Some(part),
            ..self
        }
    }

    /// Sets the pipeline stage, for a parameter outside layers.
    #[must_use]
    pub fn at(self, place: Place) -> Self {
        Self { place, ..self }
    }

    /// Ties an output layer of this Megatron name to it.
    #[must_use]
    pub fn tied_output(self, megatron: &str) -> Self {
        Self {
            tied_output: Some(Pattern::new(megatron)),
            ..self
        }
    }

    /// Sets the key in a `torch_dist` directory.
    #[must_use]
    pub fn key(self, key: &str) -> Self {
        Self {
            key: Some(Pattern::new(key)),
            ..self
        }
    }

    /// Sets the name that it has as a module of its own.
    #[must_use]
    pub fn separate_norm(self, megatron: &str) -> Self {
        Self {
            separate_norm: Some(Pattern::new(megatron)),
            ..self
        }
    }

    /// Says that its module has no state beside its parameters: an embedding, a router, a plain parameter.
    #[must_use]
    pub fn stateless(self) -> Self {
        Self {
            extra_state: false,
            ..self
        }
    }

    /// The ranks over which it is cut.
    #[must_use]
    pub fn group(&self) -> Group {
        if self.megatron.has_expert() {
            Group::ExpertTensor
        } else {
            Group::Tensor
        }
    }
}

/// Rows with common prefixes that exist on the same layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// What it is, for printed tables.
    pub title: &'static str,
    /// The part of the model.
    pub part: Part,
    /// Stands before Megatron names.
    pub megatron_prefix: String,
    /// Stands before Hugging Face names (not before those that begin with `/`).
    pub hf_prefix: String,
    /// Stands before keys of a `torch_dist` directory, where that is not the Megatron prefix.
    pub key_prefix: Option<String>,
    /// The layers; `None` for parameters outside layers.
    pub layers: Option<Vec<usize>>,
    /// How many experts a row with `{expert}` stands for.
    pub num_experts: usize,
    /// The rows.
    pub rows: Vec<Row>,
}

/// A section of rows that exist once.
#[must_use]
pub fn section(
    title: &'static str,
    part: Part,
    prefixes: (&str, &str),
    rows: impl Into<Vec<Row>>,
) -> Section {
    Section {
        title,
        part,
        megatron_prefix: prefixes.0.to_owned(),
        hf_prefix: prefixes.1.to_owned(),
        key_prefix: None,
        layers: None,
        num_experts: 0,
        rows: rows.into(),
    }
}

impl Section {
    /// Repeats the rows on each of `layers`.
    #[must_use]
    pub fn on(self, layers: impl IntoIterator<Item = usize>) -> Self {
        Self {
            layers: Some(layers.into_iter().collect()),
            ..self
        }
    }

    /// Sets the prefix of keys in a `torch_dist` directory.
    #[must_use]
    pub fn key_prefix(self, prefix: &str) -> Self {
        Self {
            key_prefix: Some(prefix.to_owned()),
            ..self
        }
    }

    /// Repeats rows with `{expert}` for each expert.
    #[must_use]
    pub fn experts(self, num_experts: usize) -> Self {
        Self {
            num_experts,
            ..self
        }
    }
}
