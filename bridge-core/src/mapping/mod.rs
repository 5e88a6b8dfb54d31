//! How Megatron parameters are made of Hugging Face tensors, as data.
//!
//! A [`Row`] is one parameter of a model: its two names (with `{layer}` and `{expert}`), the shapes on the
//! Hugging Face side and the [`Rule`] that lays it out. A [`Section`] gives rows their prefixes and the layers they
//! exist on; a [`Registry`] is all sections of one model, expanded to one [`Parameter`] a tensor.
//! This room knows no model's names (those are in [`crate::models`]) and no files.
//!
//! Invariants: no two parameters of a registry have the same Megatron name, and each Hugging Face tensor (or each
//! expert's slice of a packed one) belongs to exactly one parameter.

mod pattern;
mod registry;
mod row;
mod rule;

pub use pattern::{Captures, Pattern};
pub use registry::{HfParameter, Parameter, Registry, RegistryError};
pub use row::{HfTensor, Init, Part, Place, Row, Section, Stored, Transform, row, section, tensor};
pub use rule::{Block, Group, Rule, Split};
