//! What one rank holds and reads.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;

use bridge_core::layout::{ParallelLayout, RankCoord};
use bridge_core::mapping::Group;
use bridge_core::plan::{Held, Stage};
use bridge_core::{AutoBridge, BridgeError, Dtype, StagePlanner};

/// A rank's numbers, all virtual stages together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Load {
    /// Parameters outside experts.
    pub(super) dense: u64,
    /// Parameters of experts.
    pub(super) experts: u64,
    /// Bytes of all parameters.
    pub(super) bytes: u64,
    /// Weight files that it reads and bytes that it needs of them; `None` for a model without weights.
    pub(super) reads: Option<(usize, u64)>,
}

impl Load {
    pub(super) fn parameters(&self) -> u64 {
        self.dense + self.experts
    }
}

/// Counts ranks of one layout, each kind once.
///
/// Tensor-parallel ranks cut equal parts, so names, dtypes and shapes depend on the pipeline rank and, where experts may
/// be stored in different dtypes, on the expert-parallel rank. What is read depends on every coordinate that cuts.
pub(super) struct Loads<'a> {
    bridge: &'a AutoBridge,
    planner: StagePlanner<'a>,
    layout: &'a ParallelLayout,
    counted: HashMap<[usize; 4], Load>,
    files: BTreeSet<PathBuf>,
}

impl<'a> Loads<'a> {
    pub(super) fn new(
        bridge: &'a AutoBridge,
        planner: StagePlanner<'a>,
        layout: &'a ParallelLayout,
    ) -> Self {
        Self {
            bridge,
            planner,
            layout,
            counted: HashMap::new(),
            files: BTreeSet::new(),
        }
    }

    pub(super) fn vp_size(&self) -> usize {
        self.layout.vp_size()
    }

    /// Weight files that the ranks so far read together.
    pub(super) fn num_files(&self) -> usize {
        self.files.len()
    }

    pub(super) fn of(&mut self, rank: RankCoord) -> Result<Load, BridgeError> {
        let kind = match self.bridge.checkpoint() {
            None => [rank.pp_rank, 0, 0, 0],
            Some(_) => [rank.pp_rank, rank.tp_rank, rank.ep_rank, rank.etp_rank],
        };
        if let Some(load) = self.counted.get(&kind) {
            return Ok(*load);
        }
        let load = self.count(rank)?;
        self.counted.insert(kind, load);
        Ok(load)
    }

    /// The tensors of each virtual stage.
    pub(super) fn tensors(
        &self,
        rank: RankCoord,
    ) -> impl Iterator<Item = Result<(usize, Vec<Held>), BridgeError>> + '_ {
        self.layout.chunks_of(rank.pp_rank).map(move |chunk| {
            let stage = Stage::new(self.layout, rank, chunk);
            Ok((chunk.vp_stage, self.planner.held(&stage)?))
        })
    }

    fn count(&mut self, rank: RankCoord) -> Result<Load, BridgeError> {
        let mut load = Load {
            dense: 0,
            experts: 0,
            bytes: 0,
            reads: self.reads(rank)?,
        };
        for stage in self.tensors(rank) {
            for held in stage?.1 {
                let numel = held.shape.iter().product::<usize>() as u64;
                match held.group {
                    Group::Tensor => load.dense += numel,
                    Group::ExpertTensor => load.experts += numel,
                }
                load.bytes += numel * held.dtype.size_bytes() as u64;
            }
        }
        Ok(load)
    }

    fn reads(&mut self, rank: RankCoord) -> Result<Option<(usize, u64)>, BridgeError> {
        let Some(checkpoint) = self.bridge.checkpoint() else {
            return Ok(None);
        };
        let mut files: BTreeSet<PathBuf> = BTreeSet::new();
        let mut bytes = 0;
        for chunk in self.layout.chunks_of(rank.pp_rank) {
            let plan = self.planner.plan(&Stage::new(self.layout, rank, chunk))?;
            for tensor in &plan.tensors {
                for copy in &tensor.copies {
                    let source = &tensor.sources[copy.source];
                    let elements = copy.rows as u64 * copy.row_elements as u64;
                    let stored = match checkpoint.is_quantised(&source.name) {
                        true => Dtype::F8E4M3,
                        false => source.dtype,
                    };
                    bytes += elements * stored.size_bytes() as u64;
                    files.extend(checkpoint.file_of(&source.name));
                }
            }
        }
        let count = files.len();
        self.files.extend(files);
        Ok(Some((count, bytes)))
    }
}
