//! Files put in order.

use std::collections::HashMap;
use std::path::PathBuf;

use indexmap::IndexMap;

use super::{Coordinates, ShardSetError};
use crate::checkpoint::shard::{ShardFile, ShardInfo};
use crate::checkpoint::{CheckpointError, Reader, TensorInfo, TensorSource};
use crate::layout::{Chunk, LayoutSpec, ParallelLayout, RankCoord};
use crate::plan::{ModelPlan, Stage, gather};
use crate::{AutoBridge, StagePlanner};

/// What tells the parts of a model apart: pipeline rank, virtual stage, tensor, expert and expert-tensor rank.
type Key = [usize; 5];

/// One part of the model: the file that is read, and the files of ranks that hold the same.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) file: ShardFile,
    pub(super) replicas: Vec<ShardFile>,
    pub(super) plan: ModelPlan,
}

/// A full set of rank files.
///
/// As a source of tensors, a tensor has the name that [`ShardSet::plan`] gives it.
#[derive(Debug)]
pub struct ShardSet {
    layout: ParallelLayout,
    pub(super) parts: Vec<Part>,
    names: HashMap<String, (usize, String)>,
}

impl ShardSet {
    /// Opens files in any order. `reference` is the model that they were made from, or one of the same config.
    ///
    /// # Errors
    /// [`ShardSetError`]: a file that cannot be read or belongs to another set, a rank that is missing or stands twice,
    /// tensors that are not those of the rank.
    pub fn open(files: &[PathBuf], reference: &AutoBridge) -> Result<Self, ShardSetError> {
        let files = files
            .iter()
            .map(|file| ShardFile::open(file))
            .collect::<Result<Vec<_>, _>>()?;
        let first = files.first().ok_or(ShardSetError::Empty)?;
        let config = reference.config();
        let expected = config.architecture.hf_name();
        if first.shard().architecture != expected {
            return Err(ShardSetError::Foreign {
                file: first.path().to_owned(),
                other: PathBuf::from("the reference"),
                what: "architecture",
                found: first.shard().architecture.clone(),
                expected: expected.to_owned(),
            });
        }
        for file in &files[1..] {
            same_set(file, first)?;
        }
        let fits = |source| ShardSetError::Layout {
            file: first.path().to_owned(),
            source,
        };
        let (options, layout) = reference.lay_out(&first.shard().spec).map_err(fits)?;
        if first.shard().padded_vocab_size != layout.padded_vocab_size() {
            return Err(ShardSetError::Foreign {
                file: first.path().to_owned(),
                other: PathBuf::from("the reference"),
                what: "padded_vocab_size",
                found: first.shard().padded_vocab_size.to_string(),
                expected: layout.padded_vocab_size().to_string(),
            });
        }
        let by_part = by_part(files, &layout)?;
        let planner = reference.planner(&options)?;
        let parts = in_order(by_part, &layout, &planner)?;
        let names = parts.iter().enumerate().flat_map(|(number, part)| {
            let names = part.file.tensors();
            names
                .map(move |(name, _)| (format!("{}{name}", label(part)), (number, name.to_owned())))
        });
        Ok(Self {
            names: names.collect(),
            layout,
            parts,
        })
    }

    /// The layout that the files were written for.
    #[must_use]
    pub fn layout(&self) -> &ParallelLayout {
        &self.layout
    }

    /// Plans Hugging Face tensors out of this set, with the dtypes of the reference.
    ///
    /// [`ModelPlan::left_out`] are the reference's tensors that the set lacks on purpose (an MTP head that was left out).
    ///
    /// # Errors
    /// [`ShardSetError::Plan`] when the parts do not cover the model.
    pub fn plan(&self) -> Result<ModelPlan, ShardSetError> {
        let labelled = self.parts.iter();
        let mut plan = gather(labelled.map(|part| (label(part), part.plan.clone())))?;
        if let Some(first) = self.parts.first() {
            plan.left_out = first.plan.left_out.clone();
        }
        Ok(plan)
    }
}

/// What stands before the local names of a part.
fn label(part: &Part) -> String {
    let shard = part.file.shard();
    format!("rank {} stage {}: ", shard.rank.global_rank, shard.vp_stage)
}

pub(super) fn coordinates(shard: &ShardInfo) -> Coordinates {
    Coordinates {
        rank: shard.rank,
        vp_stage: shard.vp_stage,
    }
}

fn key(at: &Coordinates) -> Key {
    let rank = &at.rank;
    [
        rank.pp_rank,
        at.vp_stage,
        rank.tp_rank,
        rank.ep_rank,
        rank.etp_rank,
    ]
}

/// Refuses a file of another model or layout than the first one.
fn same_set(file: &ShardFile, first: &ShardFile) -> Result<(), ShardSetError> {
    /// A field of the description, as text.
    type Field = (&'static str, fn(&ShardInfo) -> String);
    let fields: [Field; 8] = [
        ("architecture", |one| one.architecture.clone()),
        ("parallel sizes", |one| sizes(&one.spec)),
        ("the pipeline options", |one| {
            format!("{:?}", one.spec.pipeline)
        }),
        ("padded_vocab_size", |one| one.padded_vocab_size.to_string()),
        ("make_vocab_size_divisible_by", |one| {
            format!("{:?}", one.spec.make_vocab_size_divisible_by)
        }),
        ("sequential_experts", |one| {
            one.spec.sequential_experts.to_string()
        }),
        ("without_mtp", |one| one.spec.without_mtp.to_string()),
        ("torch_dtype", |one| {
            let word = one.spec.dtype.map(crate::Dtype::torch_word);
            word.unwrap_or("of the source").to_owned()
        }),
    ];
    for (what, field) in fields {
        let (found, expected) = (field(file.shard()), field(first.shard()));
        if found != expected {
            return Err(ShardSetError::Foreign {
                file: file.path().to_owned(),
                other: first.path().to_owned(),
                what,
                found,
                expected,
            });
        }
    }
    Ok(())
}

fn sizes(spec: &LayoutSpec) -> String {
    let sizes = &spec.sizes;
    format!(
        "TP {} CP {} PP {} VPP {} EP {} ETP {} ({:?} world)",
        sizes.tp_size,
        sizes.cp_size,
        sizes.pp_size,
        sizes.vpp_size.unwrap_or(1),
        sizes.ep_size,
        sizes.etp_size,
        sizes.world
    )
}

/// The files of each part, the lowest rank first.
fn by_part(
    mut files: Vec<ShardFile>,
    layout: &ParallelLayout,
) -> Result<HashMap<Key, Vec<ShardFile>>, ShardSetError> {
    files.sort_by_key(|file| file.shard().rank.global_rank);
    let mut parts: HashMap<Key, Vec<ShardFile>> = HashMap::new();
    for file in files {
        let at = coordinates(file.shard());
        let real = layout
            .coord(at.rank.global_rank)
            .is_ok_and(|rank| rank == at.rank);
        if !real || layout.chunk(at.rank.pp_rank, at.vp_stage).is_err() {
            return Err(ShardSetError::NoSuchRank {
                file: file.path().to_owned(),
                found: at,
            });
        }
        let part = parts.entry(key(&at)).or_default();
        let same = |other: &&ShardFile| coordinates(other.shard()) == at;
        if let Some(other) = part.iter().find(same) {
            return Err(ShardSetError::Repeated {
                first: other.path().to_owned(),
                second: file.path().to_owned(),
                coordinates: at,
            });
        }
        part.push(file);
    }
    Ok(parts)
}

/// A part for each that the layout has.
fn in_order(
    mut files: HashMap<Key, Vec<ShardFile>>,
    layout: &ParallelLayout,
    planner: &StagePlanner<'_>,
) -> Result<Vec<Part>, ShardSetError> {
    let needed = || {
        let ranks = layout.distinct_ranks();
        ranks.flat_map(|rank| {
            let chunks = layout.chunks_of(rank.pp_rank);
            chunks.map(move |chunk| (rank, chunk))
        })
    };
    let at = |(rank, chunk): (RankCoord, &Chunk)| Coordinates {
        rank,
        vp_stage: chunk.vp_stage,
    };
    // Each of the files' parts is one of these. A file may claim a layout of any size, so the parts are not listed.
    if let Some(first) = needed().map(at).find(|at| !files.contains_key(&key(at))) {
        let a_stage = layout.distinct_ranks().count() / layout.pp_size();
        let needed = a_stage * layout.chunks().len();
        return Err(ShardSetError::Missing {
            first,
            missing: needed - files.len(),
            needed,
        });
    }
    let mut parts = Vec::with_capacity(files.len());
    for (rank, chunk) in needed() {
        // Whoever wrote the file, it has the part of this rank, whose primaries cover the model.
        let plan = planner.plan(&Stage::new(layout, rank, chunk))?;
        let mut replicas = files
            .remove(&key(&at((rank, chunk))))
            .expect("no part is missing, and none comes twice");
        for file in &replicas {
            check_tensors(file, &plan)?;
        }
        let file = replicas.remove(0);
        parts.push(Part {
            file,
            replicas,
            plan,
        });
    }
    Ok(parts)
}

/// Refuses a file that lacks a tensor, holds one more, or has one of another shape.
fn check_tensors(file: &ShardFile, plan: &ModelPlan) -> Result<(), ShardSetError> {
    let planned: IndexMap<&str, &[usize]> = plan
        .tensors
        .iter()
        .map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice()))
        .collect();
    let mut problems = Vec::new();
    for (name, expected) in &planned {
        match file.info(name) {
            None => problems.push(format!("`{name}` {expected:?} is missing")),
            Some(TensorInfo { shape, .. }) if shape != *expected => problems.push(format!(
                "`{name}` has shape {shape:?}, the layout implies {expected:?}"
            )),
            Some(_) => {}
        }
    }
    let unknown = file
        .tensors()
        .filter(|(name, _)| !planned.contains_key(name));
    problems
        .extend(unknown.map(|(name, _)| format!("`{name}` is not part of it and would be lost")));
    if problems.is_empty() {
        return Ok(());
    }
    Err(ShardSetError::Tensors {
        file: file.path().to_owned(),
        problems,
    })
}

impl TensorSource for ShardSet {
    fn info(&self, name: &str) -> Option<TensorInfo> {
        let (number, local) = self.names.get(name)?;
        self.parts[*number].file.info(local)
    }

    fn read(&self, name: &str, offset_bytes: u64, into: &mut [u8]) -> Result<(), CheckpointError> {
        self.reader(name)?(offset_bytes, into)
    }

    fn reader<'a>(&'a self, name: &'a str) -> Result<Reader<'a>, CheckpointError> {
        let (number, local) = self
            .names
            .get(name)
            .ok_or_else(|| CheckpointError::NoTensor {
                name: name.to_owned(),
            })?;
        self.parts[*number].file.reader(local)
    }
}
