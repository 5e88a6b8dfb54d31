//! What can be wrong with a set of rank files.

use std::fmt;
use std::path::PathBuf;

use crate::BridgeError;
use crate::checkpoint::CheckpointError;
use crate::first_ten::first_ten;
use crate::layout::{LayoutError, RankCoord};
use crate::plan::PlanError;

/// The place of a file in a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Coordinates {
    /// The rank.
    pub rank: RankCoord,
    /// Its virtual pipeline stage.
    pub vp_stage: usize,
}

impl fmt::Display for Coordinates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RankCoord {
            global_rank,
            tp_rank,
            pp_rank,
            ep_rank,
            etp_rank,
            ..
        } = self.rank;
        let vp_stage = self.vp_stage;
        write!(
            f,
            "rank {global_rank} (tp_rank {tp_rank}, pp_rank {pp_rank}, vp_stage {vp_stage}, ep_rank {ep_rank}, etp_rank {etp_rank})"
        )
    }
}

/// Why files are not a full set of a model's ranks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShardSetError {
    /// A file cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The reference cannot be planned.
    #[error(transparent)]
    Bridge(#[from] BridgeError),
    /// The plans do not cover the model.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// No file.
    #[error("there are no shards; name the files, or a directory that holds them")]
    Empty,
    /// The layout in a file does not fit the reference.
    #[error("{} has a layout that does not fit the reference: {source}; is it the model that the shards were made from?", file.display())]
    Layout {
        /// The file.
        file: PathBuf,
        /// What does not fit.
        #[source]
        source: LayoutError,
    },
    /// The file belongs to another model or layout than the first one or the reference.
    #[error("{} was made for {what} {found}, {} for {expected}; a set comes from one model and one layout", file.display(), other.display())]
    Foreign {
        /// The file.
        file: PathBuf,
        /// What it was compared with: the first file, or the reference.
        other: PathBuf,
        /// The first difference.
        what: &'static str,
        /// In the file.
        found: String,
        /// In the other.
        expected: String,
    },
    /// The file's coordinates contradict its layout.
    #[error("{} calls itself {found}, which its layout does not have; the file is damaged, write it again", file.display())]
    NoSuchRank {
        /// The file.
        file: PathBuf,
        /// What it says.
        found: Coordinates,
    },
    /// Parts of the model that no file holds.
    #[error(
        "{missing} of {needed} rank files are missing, first that of {first}; write it with `trainer convert shard`"
    )]
    Missing {
        /// The first.
        first: Coordinates,
        /// How many there are.
        missing: usize,
        /// How many the layout has.
        needed: usize,
    },
    /// Two files of the same rank and stage.
    #[error("{} and {} both hold {coordinates}; name only one of them", first.display(), second.display())]
    Repeated {
        /// One.
        first: PathBuf,
        /// The other.
        second: PathBuf,
        /// What both say.
        coordinates: Coordinates,
    },
    /// A file does not hold what its rank should.
    #[error("{} does not hold the tensors of its rank: {}", file.display(), first_ten(problems))]
    Tensors {
        /// The file.
        file: PathBuf,
        /// All that was found.
        problems: Vec<String>,
    },
    /// Two ranks that should hold the same bytes do not.
    #[error(
        "`{name}` of {replica} differs from `{primary_name}` of {primary} from element {element} on; ranks that hold the same parameter have drifted apart or a file is damaged"
    )]
    Replica {
        /// The tensor.
        name: String,
        /// Whose.
        replica: Box<Coordinates>,
        /// The tensor it should equal.
        primary_name: String,
        /// Whose.
        primary: Box<Coordinates>,
        /// The first element that differs; 0 where dtypes differ.
        element: u64,
    },
}
