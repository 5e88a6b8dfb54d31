//! A plan carried out between a source and a sink, in parallel, with memory bounded by threads x buffer size.

mod diff;
mod difference;
mod element;
mod error;
mod execute;
mod fill;
mod planned;
mod scatter;
mod values;
mod verify;
mod write_files;

pub use diff::{Distance, distances};
pub use difference::{Difference, Element, Side};
pub use error::ConvertError;
pub use execute::{ExecuteOptions, NonFinite, Report, Rounded, Transforms, copy_tensors, execute};
pub use fill::{Filled, Target, fill};
pub use planned::Planned;
pub use scatter::{Given, scatter};
pub use verify::{Comparison, Padding, VerifyOptions, verify, verify_names};
pub use write_files::write_files;
