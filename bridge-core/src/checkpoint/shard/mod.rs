//! One rank's parameters in a safetensors file.
//!
//! Tensors have their local Megatron names. The header's `__metadata__` holds, beside `format`, a [`ShardInfo`]: what
//! the model was, how it was laid out, and whose part this is. With it, a set of files needs no other record of the layout.
//! The header is untrusted, as in a Hugging Face directory.

mod info;
mod reader;
mod writer;

pub use info::ShardInfo;
pub use reader::ShardFile;
pub use writer::ShardWriter;
