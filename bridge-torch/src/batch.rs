//! What the model reads: one padded or packed batch, and what can be wrong with it.

use tch::Tensor;

/// One batch of token ids with everything that belongs to them.
///
/// Padded: `[batch, seq]` with an `attention_mask` (left or right padding). Packed: `[1, total]` with
/// `cu_seqlens`; then no sample sees another one, positions start at 0 in each, and no loss crosses a border.
#[derive(Debug)]
pub struct Batch {
    /// `[batch, seq]`, integers.
    pub input_ids: Tensor,
    /// `[batch, seq]`, 1 at real tokens and 0 at padding. `None`: no padding.
    pub attention_mask: Option<Tensor>,
    /// `[batch, seq]`, aligned with `input_ids`; -100 is no target.
    pub labels: Option<Tensor>,
    /// `[batch, seq]`, 1 at image placeholders, 2 at video placeholders, else 0.
    pub mm_token_type_ids: Option<Tensor>,
    /// `[patches, channels * temporal_patch * patch * patch]`, all images after each other.
    pub pixel_values: Option<Tensor>,
    /// Frames, rows and columns of each image, in patches.
    pub image_grid_thw: Vec<[i64; 3]>,
    /// As `pixel_values`, for videos.
    pub pixel_values_videos: Option<Tensor>,
    /// Frame pairs, rows and columns of each video, in patches.
    pub video_grid_thw: Vec<[i64; 3]>,
    /// Borders of the samples of a packed batch, from 0 to `total`.
    pub cu_seqlens: Option<Vec<i64>>,
}

impl Batch {
    /// A batch of text without padding and without labels.
    #[must_use]
    pub fn new(input_ids: Tensor) -> Self {
        Self {
            input_ids,
            attention_mask: None,
            labels: None,
            mm_token_type_ids: None,
            pixel_values: None,
            image_grid_thw: Vec::new(),
            pixel_values_videos: None,
            video_grid_thw: Vec::new(),
            cu_seqlens: None,
        }
    }
}

/// What one grid belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Modality {
    /// An image.
    Image,
    /// A video.
    Video,
}

impl std::fmt::Display for Modality {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Image => "image",
            Self::Video => "video",
        })
    }
}

/// Why a batch cannot be computed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    /// A tensor of the batch has another shape.
    #[error("`{name}` has shape {found:?}, expected {expected}")]
    Shape {
        /// The batch's field.
        name: &'static str,
        /// Its shape.
        found: Vec<i64>,
        /// What would do, in words.
        expected: String,
    },
    /// A tensor of the batch has another type.
    #[error("`{name}` has type {found}, expected {expected}")]
    Type {
        /// The batch's field.
        name: &'static str,
        /// Its type.
        found: String,
        /// What would do, in words.
        expected: &'static str,
    },
    /// A number that may not stand where it stands.
    #[error("`{name}` holds {found} in sample {sample} at position {position}; {allowed}")]
    Value {
        /// The batch's field.
        name: &'static str,
        /// The number.
        found: i64,
        /// Row of the batch.
        sample: usize,
        /// Column of the batch.
        position: usize,
        /// What would do, in words.
        allowed: String,
    },
    /// Padding in the middle of a sample, which kernels do not skip.
    #[error(
        "`attention_mask` is 0 in sample {sample} at position {position}, between real tokens; the kernels of `gdn` take padding at the ends of rows, so move it there or use kernels `gdn=reference`"
    )]
    Hole {
        /// Row of the batch.
        sample: usize,
        /// Column of the batch.
        position: usize,
    },
    /// A batch without a token.
    #[error("`input_ids` is empty (shape {found:?}); a batch needs at least one token")]
    Empty {
        /// Shape of `input_ids`.
        found: Vec<i64>,
    },
    /// `cu_seqlens` that are not the borders of the samples.
    #[error(
        "cu_seqlens {found:?} must start at 0, never fall and end at {total}, the number of tokens"
    )]
    Borders {
        /// The borders.
        found: Vec<i64>,
        /// Tokens of the batch.
        total: i64,
    },
    /// A packed batch with more than one row, or with padding.
    #[error(
        "a packed batch (cu_seqlens) has one row and no padding, but input_ids has shape {found:?}{}",
        if *masked { " and attention_mask holds zeros" } else { "" }
    )]
    Packed {
        /// Shape of `input_ids`.
        found: Vec<i64>,
        /// Whether there is padding.
        masked: bool,
    },
    /// A grid that does not divide into merged tokens.
    #[error(
        "{modality} {index} has grid {grid:?}; frames must be at least 1, rows and columns positive multiples of {merge}"
    )]
    Grid {
        /// Image or video.
        modality: Modality,
        /// Number within the batch, from 0.
        index: usize,
        /// Frames, rows, columns.
        grid: [i64; 3],
        /// `spatial_merge_size`.
        merge: i64,
    },
    /// Grids and pixel rows disagree.
    #[error(
        "{modality} grids describe {described} patches, but the pixel values have {found} rows"
    )]
    Patches {
        /// Image or video.
        modality: Modality,
        /// Product of the grids, summed.
        described: i64,
        /// Rows of the pixel values.
        found: i64,
    },
    /// Pixels without grids, or the other way round.
    #[error("{modality} {present} are given without {absent}; the tower needs both")]
    Half {
        /// Image or video.
        modality: Modality,
        /// What is there.
        present: &'static str,
        /// What is not.
        absent: &'static str,
    },
    /// Placeholders and visual tokens disagree.
    #[error(
        "the batch holds {placeholders} {modality} placeholders (id {id}), but its {modality}s give {visual} visual tokens; \
         was the text expanded with another merge size, or cut through an {modality}?"
    )]
    Placeholders {
        /// Image or video.
        modality: Modality,
        /// The placeholder's token id.
        id: i64,
        /// Placeholders found in `input_ids`.
        placeholders: usize,
        /// Merged tokens that the tower makes.
        visual: usize,
    },
    /// A run of placeholders that is not one grid.
    #[error(
        "sample {sample}: the {modality} placeholders from position {position} are {found} tokens long, but {}",
        match expected {
            Some((grid, tokens)) => format!("the next grid {grid:?} makes {tokens} tokens; each {modality} needs a run of its own"),
            None => format!("the batch has no {modality} grid left for them"),
        }
    )]
    Run {
        /// Row of the batch (or number of the packed sample).
        sample: usize,
        /// Place of the run's first token among the sample's real tokens.
        position: usize,
        /// Image or video.
        modality: Modality,
        /// Length of the run.
        found: usize,
        /// The next grid and its tokens.
        expected: Option<([i64; 3], usize)>,
    },
    /// Grids that no placeholder uses.
    #[error("{left} {modality} grids of the batch have no placeholders in the text")]
    Unused {
        /// Image or video.
        modality: Modality,
        /// How many.
        left: usize,
    },
}
