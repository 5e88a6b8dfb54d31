//! A full set of rank files, seen as one source of tensors.
//!
//! [`ShardSet::open`] finds out from the files' own descriptions which layout they belong to, and refuses a set with a rank
//! that is missing, stands twice or comes from elsewhere. [`ShardSet::plan`] then is the way back to Hugging Face tensors:
//! the inverse of the plans that the files were written by. Parameters that several ranks hold are read from one of
//! them; [`ShardSet::compare_replicas`] checks that the others agree. [`RankExport`] is that way back where the ranks still
//! run: each writes its own part, without files in between.

mod error;
mod export;
mod replicas;
mod set;

pub use error::{Coordinates, ShardSetError};
pub use export::{ExportState, Held, RankExport, RankExportError, RankExportOptions};
pub use set::ShardSet;
