//! Global ranks and their coordinates.

use super::error::{LayoutError, LayoutProblem};
use super::model_facts::indivisible;
use super::sizes::{ParallelSizes, World};

/// The place of a rank in Megatron's order `tp-cp-ep-dp-pp`, the first the fastest.
///
/// Ranks form two grids over the same numbers: dense parameters follow `tp, cp, dp, pp`, experts `etp, ep, edp, pp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RankCoord {
    /// The global rank.
    pub global_rank: usize,
    /// Tensor-parallel rank.
    pub tp_rank: usize,
    /// Context-parallel rank.
    pub cp_rank: usize,
    /// Data-parallel rank.
    pub dp_rank: usize,
    /// Pipeline rank.
    pub pp_rank: usize,
    /// Expert-tensor-parallel rank.
    pub etp_rank: usize,
    /// Expert-parallel rank.
    pub ep_rank: usize,
    /// Data-parallel rank of the experts.
    pub edp_rank: usize,
}

/// The two grids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Grid {
    pub(super) tp_size: usize,
    pub(super) cp_size: usize,
    pub(super) dp_size: usize,
    pub(super) pp_size: usize,
    pub(super) etp_size: usize,
    pub(super) ep_size: usize,
    pub(super) edp_size: usize,
}

/// The most ranks that are counted.
const MAX_WORLD: usize = 1 << 32;

impl Grid {
    /// Sizes are not zero.
    pub(super) fn new(sizes: &ParallelSizes) -> Result<Self, LayoutProblem> {
        let ParallelSizes {
            tp_size,
            cp_size,
            pp_size,
            ep_size,
            etp_size,
            ..
        } = *sizes;
        let dense = product([tp_size, cp_size, pp_size])?;
        let expert = product([etp_size, ep_size, pp_size])?;
        let world = match sizes.world {
            World::Smallest => product([dense / gcd(dense, expert), expert, 1])?,
            World::DataParallel(dp_size) => product([dense, dp_size, 1])?,
            World::Size(world) => product([world, 1, 1])?,
        };
        let parts = vec![tp_size, cp_size, pp_size];
        let words =
            "tensor_model_parallel_size * context_parallel_size * pipeline_model_parallel_size";
        if let Some(problem) = indivisible("world_size", world, "TP x CP x PP", parts, words) {
            return Err(problem);
        }
        let parts = vec![etp_size, ep_size, pp_size];
        let words = "expert_tensor_parallel_size * expert_model_parallel_size * pipeline_model_parallel_size";
        if let Some(problem) = indivisible("world_size", world, "ETP x EP x PP", parts, words) {
            return Err(problem);
        }
        Ok(Self {
            tp_size,
            cp_size,
            dp_size: world / dense,
            pp_size,
            etp_size,
            ep_size,
            edp_size: world / expert,
        })
    }

    pub(super) fn world_size(&self) -> usize {
        self.tp_size * self.cp_size * self.dp_size * self.pp_size
    }

    /// The ranks of a pipeline stage after which coordinates that cut parameters repeat: both grids' patterns at once.
    pub(super) fn distinct(&self) -> usize {
        let experts = self.etp_size * self.ep_size;
        self.tp_size / gcd(self.tp_size, experts) * experts
    }

    /// `global_rank` is below the world size.
    pub(super) fn coord(&self, global_rank: usize) -> RankCoord {
        let stage = self.world_size() / self.pp_size;
        let within = global_rank % stage;
        RankCoord {
            global_rank,
            tp_rank: within % self.tp_size,
            cp_rank: within / self.tp_size % self.cp_size,
            dp_rank: within / self.tp_size / self.cp_size,
            pp_rank: global_rank / stage,
            etp_rank: within % self.etp_size,
            ep_rank: within / self.etp_size % self.ep_size,
            edp_rank: within / self.etp_size / self.ep_size,
        }
    }

    /// The first rank with these coordinates.
    pub(super) fn first_rank(
        &self,
        (tp_rank, pp_rank, ep_rank, etp_rank): (usize, usize, usize, usize),
    ) -> Result<RankCoord, LayoutError> {
        for (what, rank, size) in [
            ("tp_rank", tp_rank, self.tp_size),
            ("pp_rank", pp_rank, self.pp_size),
            ("ep_rank", ep_rank, self.ep_size),
            ("etp_rank", etp_rank, self.etp_size),
        ] {
            if rank >= size {
                return Err(LayoutProblem::Rank { what, rank, size }.into());
            }
        }
        let stage = self.world_size() / self.pp_size;
        (etp_rank + self.etp_size * ep_rank..stage)
            .step_by(self.etp_size * self.ep_size)
            // The pattern repeats after this many steps.
            .take(self.tp_size)
            .find(|within| within % self.tp_size == tp_rank)
            .map(|within| self.coord(pp_rank * stage + within))
            .ok_or_else(|| {
                LayoutProblem::NoSuchRank {
                    tp_rank,
                    ep_rank,
                    etp_rank,
                    tp_size: self.tp_size,
                    ep_size: self.ep_size,
                    etp_size: self.etp_size,
                }
                .into()
            })
    }
}

fn product(sizes: [usize; 3]) -> Result<usize, LayoutProblem> {
    sizes
        .iter()
        .try_fold(1usize, |product, size| product.checked_mul(*size))
        .filter(|product| *product <= MAX_WORLD)
        .ok_or(LayoutProblem::TooLarge {
            what: "the number of ranks",
            limit: MAX_WORLD,
        })
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(tp_size: usize, pp_size: usize, ep_size: usize, etp_size: usize) -> Grid {
        Grid::new(&ParallelSizes {
            tp_size,
            pp_size,
            ep_size,
            etp_size,
            ..ParallelSizes::default()
        })
        .unwrap()
    }

    #[test]
    fn the_smallest_world_is_a_multiple_of_both_grids() {
        assert_eq!(grid(2, 1, 2, 1).world_size(), 2);
        assert_eq!(grid(2, 2, 2, 2).world_size(), 8);
        assert_eq!(grid(2, 1, 3, 1).world_size(), 6);
        assert_eq!(grid(4, 1, 6, 1).world_size(), 12);
    }

    #[test]
    fn distinct_ranks_have_every_pair_of_coordinates_once() {
        for (tp_size, ep_size, etp_size) in [(2, 2, 2), (4, 6, 1), (2, 3, 4), (1, 1, 1), (8, 2, 2)]
        {
            let mut sizes = ParallelSizes {
                tp_size,
                ep_size,
                etp_size,
                cp_size: 3,
                ..ParallelSizes::default()
            };
            let smallest = Grid::new(&sizes).unwrap().dp_size;
            sizes.world = World::DataParallel(smallest * 5);
            let grid = Grid::new(&sizes).unwrap();
            let key = |rank| {
                let at = grid.coord(rank);
                (at.tp_rank, at.ep_rank, at.etp_rank)
            };
            let first: Vec<_> = (0..grid.distinct()).map(key).collect();
            let mut all: Vec<_> = (0..grid.world_size()).map(key).collect();
            all.sort_unstable();
            all.dedup();
            let mut sorted = first.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, all);
        }
    }

    #[test]
    fn coordinates_that_no_rank_has_are_refused() {
        let grid = grid(2, 1, 1, 2);
        assert_eq!(grid.first_rank((1, 0, 0, 1)).unwrap().global_rank, 1);
        let error = grid.first_rank((1, 0, 0, 0)).unwrap_err().to_string();
        assert!(error.contains("no rank has tp_rank 1"), "{error}");
        let error = grid.first_rank((2, 0, 0, 0)).unwrap_err().to_string();
        assert_eq!(
            error,
            "tp_rank 2 does not exist, there are 2, numbered from 0"
        );
    }

    #[test]
    fn a_world_that_a_grid_does_not_divide_is_refused() {
        let mut sizes = ParallelSizes {
            tp_size: 2,
            ..ParallelSizes::default()
        };
        sizes.world = World::Size(3);
        let error = Grid::new(&sizes).unwrap_err().to_string();
        assert!(
            error.starts_with("world_size 3 is not divisible by TP x CP x PP 2 x 1 x 1"),
            "{error}"
        );
        sizes.ep_size = 4;
        sizes.world = World::DataParallel(1);
        let error = Grid::new(&sizes).unwrap_err().to_string();
        assert!(
            error.starts_with("world_size 2 is not divisible by ETP x EP x PP 1 x 4 x 1"),
            "{error}"
        );
    }
}
