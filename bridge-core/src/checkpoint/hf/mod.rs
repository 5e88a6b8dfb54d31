//! Hugging Face directories: safetensors files, an index, and the small files beside them.
//!
//! Everything in a header or an index is untrusted: every sum and product is checked, what is held grows with the
//! file and not with the numbers in it, and shard names stay in the directory.

mod fp8;
pub(in crate::checkpoint) mod header;
mod index;
mod layout;
mod reader;
mod shared_writer;
mod support_files;
mod writer;

pub use fp8::{AsWritten, UNQUANTISED};
pub use index::{INDEX, SINGLE, weight_files};
pub use layout::{HfLayout, LayoutFile};
pub use reader::HfCheckpoint;
pub use shared_writer::SharedHfWriter;
pub use support_files::{CONFIG, SUPPORT_FILES};
pub use writer::HfWriter;
