//! A plan carried out between a source and a sink, in parallel, with memory bounded by threads x buffer size.

mod element;
mod error;
mod execute;
mod write_files;

pub use error::ConvertError;
pub use execute::{ExecuteOptions, NonFinite, Report, Rounded, Transforms, copy_tensors, execute};
pub use write_files::write_files;
