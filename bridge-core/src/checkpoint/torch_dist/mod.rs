//! `torch_dist`: the checkpoint directories of Megatron-Core, read and written without Python.
//!
//! `.metadata` (a pickle) is the table of contents: every tensor under its global name and shape, cut into chunks, each
//! an archive of its own at some place of some `.distcp` file. [`TorchDistCheckpoint`] puts any range of any tensor
//! together from the chunks it touches; [`TorchDistWriter`] writes directories that Megatron-Core loads at any layout.
//!
//! Everything in such a directory is untrusted: pickles are read as plain data, sums and products are checked, chunks
//! make up their tensors exactly, and file names stay in the directory. This room knows no model.

mod archive;
mod boxes;
mod common;
mod cover;
mod directory;
mod encode;
mod item;
mod metadata;
mod pickle;
mod problem;
mod reader;
mod writer;

pub use common::Plain;
pub use pickle::PickleProblem;
pub use problem::TorchDistProblem;
pub use reader::{Chunk, TorchDistCheckpoint};
pub use writer::{TorchDistLayout, TorchDistWriter};
