//! Hugging Face Qwen3.5/3.6-VL checkpoints as Megatron-Core parameters, and back, with nothing lost.
//!
//! A model is a table of rows ([`models`]); a row says how one Megatron parameter is laid out from
//! Hugging Face tensors ([`mapping`]). A [`plan`] turns the rows into strided copies, and [`convert`]
//! carries a plan out between a source and a sink of bytes ([`checkpoint`]). The way back is the same
//! list of copies read the other way. [`AutoBridge`] is the front door.
//!
//! This crate knows no libtorch and never learns who calls it.

mod auto_bridge;
pub mod checkpoint;
pub mod config;
pub mod convert;
mod dtype;
mod first_ten;
mod float8;
mod json;
pub mod layout;
pub mod mapping;
pub mod models;
pub mod plan;
pub mod provider;
mod regular_file;
pub mod shards;
mod stage_planner;

pub use auto_bridge::{
    AutoBridge, BridgeError, Export, ExportError, ExportOptions, FoundPlan, Import, ImportOptions,
    KeyProblem, Missing,
};
pub use dtype::{Dtype, UnknownDtype};
pub use stage_planner::StagePlanner;
