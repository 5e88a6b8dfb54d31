//! Which rank holds what: parallel sizes, rank coordinates, pipeline splits, experts and the vocabulary.
//!
//! [`ParallelLayout::new`] checks sizes and options against the facts of a model once; what it returns is valid forever.
//! Numbers and words are Megatron-Core's (`parallel_state`, `transformer_config`, `pipeline_parallel_layer_layout`).
//! This room knows no tensors and no files: [`crate::plan`] cuts parameters by it.
//!
//! Invariants: every decoder layer is in exactly one chunk, chunks hold consecutive layers in stage order, and the
//! coordinates of ranks are a bijection in the dense grid and in the expert grid.

mod chunk;
mod error;
mod grid;
mod model_facts;
mod parallel_layout;
mod pipeline_layout;
mod sizes;
mod spec;
mod split;
mod vocabulary;

pub use chunk::Chunk;
pub use error::{Indivisible, LayoutError, LayoutProblem};
pub use grid::RankCoord;
pub use model_facts::{Axis, CutSize, ModelFacts};
pub use parallel_layout::ParallelLayout;
pub use pipeline_layout::{LayerWord, PipelineLayout, PipelineLayoutError};
pub use sizes::{ParallelSizes, World};
pub use spec::LayoutSpec;
pub use split::PipelineOptions;
pub use vocabulary::{default_vocab_divisor, padded_vocab_size};
