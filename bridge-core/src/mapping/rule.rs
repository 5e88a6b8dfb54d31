//! How one parameter is laid out: which rows of which sources make it up, and where tensor parallelism cuts it.

/// The dimension that tensor parallelism cuts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Split {
    /// The same bytes on every rank.
    Replicated,
    /// Rows are cut, each section of the tensor by itself.
    Column,
    /// Columns are cut; one-dimensional tensors (biases) are replicated.
    Row,
}

impl Split {
    /// Megatron's word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Replicated => "replicated",
            Self::Column => "column",
            Self::Row => "row",
        }
    }
}

/// The ranks over which a parameter is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Group {
    /// Tensor-parallel ranks.
    Tensor,
    /// Expert-tensor-parallel ranks.
    ExpertTensor,
}

/// A run of whole rows that moves from a source to the full Megatron tensor.
///
/// Every tensor is seen as a matrix of `shape[0]` rows; a packed expert tensor `[E, r, c]` as `E * r` rows of `c`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// Which of the row's sources.
    pub source: usize,
    /// First row in the source.
    pub source_row: usize,
    /// First row in the Megatron tensor.
    pub target_row: usize,
    /// How many rows.
    pub rows: usize,
}

/// The layout of one parameter. Formulas: Megatron Bridge's parameter mappings, restated as row blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rule {
    /// One source, as it is, on every rank.
    Replicated,
    /// One source, rows cut.
    Column,
    /// One source, columns cut.
    Row,
    /// The vocabulary: as [`Rule::Column`], and the place where rows are padded.
    Vocabulary,
    /// `q_proj` (per head: query rows, then gate rows), `k_proj`, `v_proj`. Megatron, for each group: queries of its
    /// heads, gates of its heads, key, value.
    Qkv {
        /// Key-value heads.
        num_query_groups: usize,
        /// Query heads of one group.
        queries_per_group: usize,
        /// Rows of one head.
        head_dim: usize,
    },
    /// `[Q; K; V]` in one source; Megatron interleaves them head by head.
    VisionQkv {
        /// Heads.
        num_heads: usize,
        /// Rows of one head.
        head_dim: usize,
    },
    /// `[gate; up]` from two sources of equal size; each half is cut by itself.
    Gated,
    /// One expert of a packed tensor `[E, 2I, h]`, halves as in [`Rule::Gated`].
    PackedGated,
    /// One expert of a packed tensor `[E, h, I]`, columns cut.
    PackedRow,
    /// `in_proj_{qkv, z, b, a}` one below the other; sections q, k, v, z, beta, alpha are cut one by one.
    GdnInProj {
        /// Rows of q, and of k.
        key_rows: usize,
        /// Rows of v, and of z.
        value_rows: usize,
        /// Rows of beta, and of alpha.
        heads: usize,
    },
    /// Channels q, k, v; the sections are cut one by one.
    GdnConv {
        /// Channels of q, and of k.
        key_rows: usize,
        /// Channels of v.
        value_rows: usize,
    },
}

impl Rule {
    /// A short name for tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Replicated => "replicated",
            Self::Column => "column",
            Self::Row => "row",
            Self::Vocabulary => "vocabulary",
            Self::Qkv { .. } => "qkv+gate",
            Self::VisionQkv { .. } => "vision qkv",
            Self::Gated => "gate,up",
            Self::PackedGated => "packed gate,up",
            Self::PackedRow => "packed row",
            Self::GdnInProj { .. } => "gdn in_proj",
            Self::GdnConv { .. } => "gdn conv",
        }
    }

    /// The dimension that tensor parallelism cuts.
    #[must_use]
    pub fn split(self) -> Split {
        match self {
            Self::Replicated => Split::Replicated,
            Self::Row | Self::PackedRow => Split::Row,
            _ => Split::Column,
        }
    }

    /// How many sources a row with this rule has.
    #[must_use]
    pub fn num_sources(self) -> usize {
        match self {
            Self::Qkv { .. } => 3,
            Self::Gated => 2,
            Self::GdnInProj { .. } => 4,
            _ => 1,
        }
    }

    /// Whether a source holds all experts, of which a parameter is one slice.
    #[must_use]
    pub fn is_packed(self) -> bool {
        matches!(self, Self::PackedGated | Self::PackedRow)
    }

    /// Shape of the full Megatron tensor; `sources` are the shapes on the Hugging Face side.
    ///
    /// # Panics
    /// When the number of sources is not [`Rule::num_sources`]; [`crate::mapping::row`] checks it.
    #[must_use]
    pub fn target_shape(self, sources: &[Vec<usize>]) -> Vec<usize> {
        match self {
            _ if self.is_packed() => sources[0][1..].to_vec(),
            _ => {
                let mut shape = sources[0].clone();
                shape[0] = sources.iter().map(|source| source[0]).sum();
                shape
            }
        }
    }

    /// Rows of each section of the full tensor, in order; a column cut takes its part of each.
    #[must_use]
    pub fn sections(self, target_rows: usize) -> Vec<usize> {
        match self {
            Self::Gated | Self::PackedGated => vec![target_rows / 2; 2],
            Self::GdnInProj {
                key_rows,
                value_rows,
                heads,
            } => vec![key_rows, key_rows, value_rows, value_rows, heads, heads],
            Self::GdnConv {
                key_rows,
                value_rows,
            } => vec![key_rows, key_rows, value_rows],
            _ => vec![target_rows],
        }
    }

    /// The words that Megatron-Core appends to the key of a tensor whose sections it stores one by one, in the order of
    /// [`Rule::sections`]; empty where it stores the tensor in one.
    #[must_use]
    pub fn section_words(self) -> &'static [&'static str] {
        match self {
            Self::GdnInProj { .. } => &["query", "key", "value", "z", "beta", "alpha"],
            Self::GdnConv { .. } => &["query", "key", "value"],
            _ => &[],
        }
    }

    /// The blocks of the full Megatron tensor in the order of its rows.
    ///
    /// `source_rows` are the rows of each source (of one expert, for a packed one); `expert` picks the slice of a
    /// packed source.
    #[must_use]
    pub fn blocks(self, source_rows: &[usize], expert: Option<usize>) -> Vec<Block> {
        let mut list = Rows::default();
        match self {
            Self::Qkv {
                num_query_groups,
                queries_per_group,
                head_dim,
            } => {
                for group in 0..num_query_groups {
                    for part in 0..2 {
                        for query in 0..queries_per_group {
                            let head = group * queries_per_group + query;
                            list.push(0, (2 * head + part) * head_dim, head_dim);
                        }
                    }
                    list.push(1, group * head_dim, head_dim);
                    list.push(2, group * head_dim, head_dim);
                }
            }
            Self::VisionQkv {
                num_heads,
                head_dim,
            } => {
                for head in 0..num_heads {
                    for part in 0..3 {
                        list.push(0, (part * num_heads + head) * head_dim, head_dim);
                    }
                }
            }
            Self::PackedGated | Self::PackedRow => {
                let rows = source_rows[0];
                list.push(0, expert.unwrap_or(0) * rows, rows);
            }
            _ => {
                for (source, rows) in source_rows.iter().enumerate() {
                    list.push(source, 0, *rows);
                }
            }
        }
        list.blocks
    }
}

/// Blocks one below the other; neighbours that touch on both sides are joined.
#[derive(Default)]
struct Rows {
    blocks: Vec<Block>,
    next: usize,
}

impl Rows {
    fn push(&mut self, source: usize, source_row: usize, rows: usize) {
        match self.blocks.last_mut() {
            Some(last) if last.source == source && last.source_row + last.rows == source_row => {
                last.rows += rows;
            }
            _ => self.blocks.push(Block {
                source,
                source_row,
                target_row: self.next,
                rows,
            }),
        }
        self.next += rows;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two groups of two heads, head size 1: q_proj rows are q0 g0 q1 g1 q2 g2 q3 g3.
    #[test]
    fn qkv_rows_interleave_by_query_group() {
        let rule = Rule::Qkv {
            num_query_groups: 2,
            queries_per_group: 2,
            head_dim: 1,
        };
        let rows: Vec<(usize, usize)> = rule
            .blocks(&[8, 2, 2], None)
            .iter()
            .flat_map(|block| (0..block.rows).map(|i| (block.source, block.source_row + i)))
            .collect();
        let wanted = [
            (0, 0),
            (0, 2),
            (0, 1),
            (0, 3),
            (1, 0),
            (2, 0),
            (0, 4),
            (0, 6),
            (0, 5),
            (0, 7),
            (1, 1),
            (2, 1),
        ];
        assert_eq!(rows, wanted);
    }

    #[test]
    fn vision_qkv_rows_interleave_by_head() {
        let rule = Rule::VisionQkv {
            num_heads: 2,
            head_dim: 2,
        };
        let starts: Vec<usize> = rule
            .blocks(&[12], None)
            .iter()
            .map(|block| block.source_row)
            .collect();
        assert_eq!(starts, [0, 4, 8, 2, 6, 10]);
    }

    #[test]
    fn a_packed_expert_is_one_slice() {
        let blocks = Rule::PackedGated.blocks(&[6], Some(3));
        assert_eq!(blocks.len(), 1);
        assert_eq!(blocks[0].source_row, 18);
        assert_eq!(Rule::PackedGated.target_shape(&[vec![8, 6, 5]]), vec![6, 5]);
    }
}
