//! The way back without files in between: every rank writes its part of a Hugging Face directory itself.
//!
//! The parts of a layout's distinct ranks are disjoint and cover the model (property tests of [`crate::plan`]), so each
//! rank writes the ranges of its primaries, whoever else writes. What it wrote, and the checksum of every parameter that it
//! holds, it records; the last one holds the records against the model and against each other.

use std::collections::HashMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::checkpoint::hf::SharedHfWriter;
use crate::checkpoint::{CheckpointError, Overwrite, Published, is_id};
use crate::convert::{ConvertError, ExecuteOptions, Filled, Given, copy_tensors, scatter};
use crate::first_ten::first_ten;
use crate::layout::{LayoutSpec, ParallelLayout, RankCoord};
use crate::plan::{ModelPlan, Role, Stage, TensorPlan};
use crate::{AutoBridge, BridgeError};

/// The id of an export of one rank.
const ALONE: &str = "alone";

/// Why a rank's part could not be exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RankExportError {
    /// The reference cannot be planned.
    #[error(transparent)]
    Bridge(#[from] BridgeError),
    /// The directory cannot be made.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Values could not be written.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// A text that names no export.
    #[error(
        "the export id `{id}` cannot be used ({needed} stages of ranks take part); give all ranks the same, of letters, digits, `-` and `_`, and each export another one"
    )]
    Id {
        /// As it was given.
        id: String,
        /// How many take part.
        needed: usize,
    },
    /// Tensors of the reference that the layout leaves out.
    #[error("the ranks lack {} tensors of the reference: {}; copy what is missing from it, or export with the multi-token-prediction head", names.len(), first_ten(names))]
    Missing {
        /// Their names.
        names: Vec<String>,
    },
    /// The rank is not done.
    #[error("{} tensors of {place} were not handed in: {}; nothing was made at {}", names.len(), first_ten(names), target.display())]
    NotHandedIn {
        /// Rank and stage.
        place: String,
        /// Their names.
        names: Vec<String>,
        /// The destination.
        target: PathBuf,
    },
    /// A tensor was handed in a second time, or after the rank had finished.
    #[error("`{name}` of {place} was handed in before")]
    Twice {
        /// Its local name.
        name: String,
        /// Rank and stage.
        place: String,
    },
    /// What a rank recorded is not what this version records.
    #[error("the record of {place} in {} cannot be read: {reason}", dir.display())]
    Record {
        /// Rank and stage.
        place: String,
        /// The destination.
        dir: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Two ranks hold different values of one parameter.
    #[error("{replica} differs from {primary}, which it should be a copy of; {} was not made", target.display())]
    Replica {
        /// The replica.
        replica: Box<Held>,
        /// The parameter that is written.
        primary: Box<Held>,
        /// The destination.
        target: PathBuf,
    },
    /// The ranks together did not write a tensor as often as it has bytes.
    #[error("the ranks wrote {written} bytes of `{name}`, it has {num_bytes}; {} was not made", target.display())]
    Covered {
        /// The Hugging Face tensor.
        name: String,
        /// Bytes that were written.
        written: u64,
        /// Bytes that it has.
        num_bytes: u64,
        /// The destination.
        target: PathBuf,
    },
}

/// A parameter of one rank.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` of {place}")]
pub struct Held {
    /// Its local name.
    pub name: String,
    /// Rank and stage.
    pub place: String,
}

/// How ranks make a directory together; the same for all of them.
#[derive(Debug, Clone, Default)]
pub struct RankExportOptions {
    /// Names this export among all to the same destination; may be empty where one stage of one rank is enough.
    pub id: String,
    /// What happens to a destination that is there.
    pub overwrite: Overwrite,
    /// Copies tensors that no rank has from the reference, instead of refusing.
    pub copy_missing: bool,
}

/// What stands of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportState {
    /// Whether the directory stands at its destination.
    pub complete: bool,
    /// Stages of ranks that have finished.
    pub finished: usize,
    /// Stages of ranks that take part.
    pub needed: usize,
}

/// The part of one virtual stage of one rank.
#[derive(Debug)]
pub struct RankExport {
    reference: Arc<AutoBridge>,
    target: PathBuf,
    plan: ModelPlan,
    /// Everyone who takes part, in order.
    parts: Vec<Part>,
    part: Part,
    /// `None` for a rank that only repeats another one.
    writer: Option<SharedHfWriter>,
    handed_in: Mutex<HandedIn>,
}

/// One virtual stage of one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    global_rank: usize,
    vp_stage: usize,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            global_rank,
            vp_stage,
        } = self;
        write!(f, "rank {global_rank}, virtual stage {vp_stage}")
    }
}

/// The tensors by number.
#[derive(Debug, Default)]
struct HandedIn {
    tensors: Vec<State>,
    /// The record is written.
    finished: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    NotYet,
    /// A call is about it.
    Now,
    /// With the CRC-32 of its bytes.
    Done(u32),
}

/// What a part says when it is finished.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Bytes of each Hugging Face tensor that it wrote.
    written: Vec<(String, u64)>,
    contents: Vec<Content>,
}

/// A parameter: tensors with the same key should have the same bytes.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    key: u64,
    primary: bool,
    name: String,
    dtype: String,
    crc32: u32,
}

impl RankExport {
    /// Joins an export as virtual stage `vp_stage` of a rank; `rank_of` finds it in the layout.
    ///
    /// # Errors
    /// [`RankExportError`].
    pub fn open(
        reference: Arc<AutoBridge>,
        spec: &LayoutSpec,
        rank: RankCoord,
        vp_stage: usize,
        target: &Path,
        options: &RankExportOptions,
    ) -> Result<Self, RankExportError> {
        let checkpoint = reference.checkpoint().ok_or(BridgeError::NoWeights)?;
        let (planned, layout) = reference.lay_out(spec).map_err(BridgeError::from)?;
        let chunk = layout
            .chunk(rank.pp_rank, vp_stage)
            .map_err(BridgeError::from)?;
        let planner = reference.planner(&planned)?;
        let plan = planner.plan(&Stage::new(&layout, rank, chunk))?;
        let names = &plan.left_out;
        if !names.is_empty() && !options.copy_missing {
            let names = names.clone();
            return Err(RankExportError::Missing { names });
        }
        let parts = parts(&layout);
        let id = match (options.id.as_str(), parts.len()) {
            ("", 1) => ALONE,
            (id, _) if is_id(id) => id,
            (id, needed) => {
                return Err(RankExportError::Id {
                    id: id.to_owned(),
                    needed,
                });
            }
        };
        let part = Part {
            global_rank: rank.global_rank,
            vp_stage,
        };
        let writer = match parts.contains(&part) {
            false => None,
            true => {
                let description = describe(&reference, spec, options);
                Some(SharedHfWriter::like(
                    checkpoint,
                    target,
                    id,
                    options.overwrite,
                    &description,
                )?)
            }
        };
        let finished = match &writer {
            Some(writer) => writer.recorded(&record_name(part))?.is_some(),
            None => false,
        };
        Ok(Self {
            handed_in: Mutex::new(HandedIn {
                tensors: vec![State::NotYet; plan.tensors.len()],
                finished,
            }),
            target: target.to_owned(),
            reference,
            plan,
            parts,
            part,
            writer,
        })
    }

    /// What the rank holds, under its local names.
    #[must_use]
    pub fn plan(&self) -> &ModelPlan {
        &self.plan
    }

    /// Whether the rank takes part: a lower one may have the same parameters.
    #[must_use]
    pub fn is_needed(&self) -> bool {
        self.writer.is_some()
    }

    /// Hands in tensors: `numbers` are their places in the plan. `watch` is told the bytes of what is given.
    ///
    /// # Errors
    /// [`RankExportError::Twice`]; [`RankExportError::Convert`], after which the same tensors may be handed in again.
    pub fn write(
        &self,
        numbers: &[usize],
        given: &[Given<'_>],
        options: &ExecuteOptions,
        watch: &(dyn Fn(u64) -> ControlFlow<()> + Sync),
    ) -> Result<Filled, RankExportError> {
        self.begin(numbers)?;
        let done = self.write_now(given, options, watch);
        let mut handed_in = self.lock();
        for (at, number) in numbers.iter().enumerate() {
            handed_in.tensors[*number] = match &done {
                Ok((_, crcs)) => State::Done(crcs[at]),
                Err(_) => State::NotYet,
            };
        }
        done.map(|(filled, _)| filled)
    }

    /// Forgets that tensors were handed in, so that they can be again. Not once the rank has finished.
    pub fn withdraw(&self, numbers: &[usize]) {
        let mut handed_in = self.lock();
        for number in numbers {
            handed_in.tensors[*number] = State::NotYet;
        }
    }

    fn begin(&self, numbers: &[usize]) -> Result<(), RankExportError> {
        let mut handed_in = self.lock();
        for (at, number) in numbers.iter().enumerate() {
            if handed_in.finished || handed_in.tensors[*number] != State::NotYet {
                for begun in &numbers[..at] {
                    handed_in.tensors[*begun] = State::NotYet;
                }
                return Err(RankExportError::Twice {
                    name: self.plan.tensors[*number].name.clone(),
                    place: self.part.to_string(),
                });
            }
            handed_in.tensors[*number] = State::Now;
        }
        Ok(())
    }

    fn write_now(
        &self,
        given: &[Given<'_>],
        options: &ExecuteOptions,
        watch: &(dyn Fn(u64) -> ControlFlow<()> + Sync),
    ) -> Result<(Filled, Vec<u32>), RankExportError> {
        let Some(writer) = &self.writer else {
            return Ok((Filled::default(), vec![0; given.len()]));
        };
        let primary = |one: &&Given<'_>| one.tensor.role == Role::Primary;
        let primaries: Vec<Given<'_>> = given.iter().filter(primary).cloned().collect();
        let filled = scatter(&primaries, writer, options, watch)?;
        let crc = |one: &Given<'_>| {
            let mut hasher = crc32fast::Hasher::new();
            one.pieces.iter().for_each(|piece| hasher.update(piece));
            hasher.finalize()
        };
        let crcs = match options.threads {
            1 => given.iter().map(crc).collect(),
            threads => rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .map_err(|source| ConvertError::Threads { threads, source })?
                .install(|| given.par_iter().map(crc).collect()),
        };
        Ok((filled, crcs))
    }

    /// Says that the rank has handed in everything, and moves the directory to its destination if it is the last.
    ///
    /// # Errors
    /// [`RankExportError::NotHandedIn`]; and, for the last, [`RankExportError::Replica`], [`RankExportError::Covered`].
    pub fn finish(&self) -> Result<ExportState, RankExportError> {
        let needed = self.parts.len();
        let Some(writer) = &self.writer else {
            return Ok(ExportState {
                complete: false,
                finished: 0,
                needed,
            });
        };
        self.record(writer)?;
        let mut finished = 0;
        let published = writer.publish(|| {
            let records = self.records(writer)?;
            finished = records.len();
            if finished < needed {
                return Ok(false);
            }
            self.check_covered(writer, &records)?;
            self.check_replicas(&records)?;
            Ok::<bool, RankExportError>(true)
        })?;
        let complete = published == Published::Yes;
        Ok(ExportState {
            complete,
            finished: if complete { needed } else { finished },
            needed,
        })
    }

    /// Syncs what was written, and says so to the others.
    fn record(&self, writer: &SharedHfWriter) -> Result<(), RankExportError> {
        let mut handed_in = self.lock();
        if handed_in.finished {
            return Ok(());
        }
        let tensors = || self.plan.tensors.iter().zip(&handed_in.tensors);
        let names: Vec<String> = tensors()
            .filter(|(_, state)| !matches!(state, State::Done(_)))
            .map(|(tensor, _)| tensor.name.clone())
            .collect();
        if !names.is_empty() {
            return Err(RankExportError::NotHandedIn {
                place: self.part.to_string(),
                names,
                target: self.target.clone(),
            });
        }
        let mut record = Record {
            written: written(&self.plan),
            contents: tensors()
                .map(|(tensor, state)| Content {
                    key: content(tensor),
                    primary: tensor.role == Role::Primary,
                    name: tensor.name.clone(),
                    dtype: tensor.dtype.to_string(),
                    crc32: match state {
                        State::Done(crc) => *crc,
                        State::NotYet | State::Now => 0,
                    },
                })
                .collect(),
        };
        if Some(&self.part) == self.parts.first() {
            record.written.extend(self.copy_missing(writer)?);
        }
        writer.sync()?;
        let text = serde_json::to_vec(&record).expect("texts and numbers are always JSON");
        writer.record(&record_name(self.part), &text)?;
        handed_in.finished = true;
        Ok(())
    }

    /// The first part copies what no rank has.
    fn copy_missing(&self, writer: &SharedHfWriter) -> Result<Vec<(String, u64)>, RankExportError> {
        let Some(reference) = self.reference.checkpoint() else {
            return Ok(Vec::new());
        };
        let names = &self.plan.left_out;
        let source = reference.as_written();
        let options = ExecuteOptions::default();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(1)
            .build()
            .map_err(|source| ConvertError::Threads { threads: 1, source })?;
        pool.install(|| copy_tensors(names, &source, writer, &options))?;
        let sizes: HashMap<&str, u64> = writer.tensors().collect();
        let bytes = |name: &String| sizes.get(name.as_str()).copied().unwrap_or_default();
        Ok(names
            .iter()
            .map(|name| (name.clone(), bytes(name)))
            .collect())
    }

    fn records(&self, writer: &SharedHfWriter) -> Result<Vec<(Part, Record)>, RankExportError> {
        let mut records = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let Some(text) = writer.recorded(&record_name(*part))? else {
                continue;
            };
            let record =
                serde_json::from_slice(&text).map_err(|error| RankExportError::Record {
                    place: part.to_string(),
                    dir: self.target.clone(),
                    reason: error.to_string(),
                })?;
            records.push((*part, record));
        }
        Ok(records)
    }

    fn check_covered(
        &self,
        writer: &SharedHfWriter,
        records: &[(Part, Record)],
    ) -> Result<(), RankExportError> {
        let mut sums: HashMap<&str, u64> = HashMap::new();
        for (name, bytes) in records.iter().flat_map(|(_, record)| &record.written) {
            *sums.entry(name).or_default() += bytes;
        }
        for (name, num_bytes) in writer.tensors() {
            let written = sums.get(name).copied().unwrap_or_default();
            if written != num_bytes {
                return Err(RankExportError::Covered {
                    name: name.to_owned(),
                    written,
                    num_bytes,
                    target: self.target.clone(),
                });
            }
        }
        Ok(())
    }

    /// Ranks that hold the same parameter in the same dtype hold the same bytes.
    fn check_replicas(&self, records: &[(Part, Record)]) -> Result<(), RankExportError> {
        let all = || {
            let parts = records.iter();
            parts.flat_map(|(part, record)| record.contents.iter().map(move |one| (*part, one)))
        };
        let primaries: HashMap<u64, (Part, &Content)> = all()
            .filter(|(_, one)| one.primary)
            .map(|(part, one)| (one.key, (part, one)))
            .collect();
        for (part, one) in all().filter(|(_, one)| !one.primary) {
            let Some((primary_part, primary)) = primaries.get(&one.key) else {
                continue;
            };
            if one.dtype == primary.dtype && one.crc32 != primary.crc32 {
                let held = |part: Part, content: &Content| {
                    Box::new(Held {
                        name: content.name.clone(),
                        place: part.to_string(),
                    })
                };
                return Err(RankExportError::Replica {
                    replica: held(part, one),
                    primary: held(*primary_part, primary),
                    target: self.target.clone(),
                });
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HandedIn> {
        self.handed_in
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Every stage of one rank of those that hold the same.
fn parts(layout: &ParallelLayout) -> Vec<Part> {
    layout
        .distinct_ranks()
        .flat_map(|rank| {
            let stages = 0..layout.vp_size();
            stages.map(move |vp_stage| Part {
                global_rank: rank.global_rank,
                vp_stage,
            })
        })
        .collect()
}

fn record_name(part: Part) -> String {
    format!(
        "rank-{:06}-stage-{:03}.json",
        part.global_rank, part.vp_stage
    )
}

/// What all ranks must agree on.
fn describe(
    reference: &AutoBridge,
    spec: &LayoutSpec,
    options: &RankExportOptions,
) -> Map<String, Value> {
    let mut hasher = crc32fast::Hasher::new();
    if let Some(checkpoint) = reference.checkpoint() {
        for (name, info) in checkpoint.tensors() {
            let file = checkpoint.file_of(name);
            let file = file
                .as_deref()
                .and_then(Path::file_name)
                .unwrap_or_default();
            hasher.update(format!("{name} {} {:?} {file:?}\n", info.dtype, info.shape).as_bytes());
        }
    }
    let sizes = &spec.sizes;
    let entries: [(&str, Value); 10] = [
        ("schema_version", 1.into()),
        (
            "architecture",
            reference.config().architecture.hf_name().into(),
        ),
        ("tensors of the reference", hasher.finalize().into()),
        ("parallel sizes", format!("{sizes:?}").into()),
        ("pipeline options", format!("{:?}", spec.pipeline).into()),
        (
            "make_vocab_size_divisible_by",
            spec.make_vocab_size_divisible_by.into(),
        ),
        ("sequential_experts", spec.sequential_experts.into()),
        ("without_mtp", spec.without_mtp.into()),
        ("overwrite", (options.overwrite == Overwrite::Yes).into()),
        ("missing", options.copy_missing.into()),
    ];
    entries
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

/// Bytes of each Hugging Face tensor that the primaries of a plan fill.
fn written(plan: &ModelPlan) -> Vec<(String, u64)> {
    let mut sums: indexmap::IndexMap<&str, u64> = indexmap::IndexMap::new();
    let primaries = plan.tensors.iter().filter(|one| one.role == Role::Primary);
    for tensor in primaries {
        for copy in &tensor.copies {
            let source = &tensor.sources[copy.source];
            let elements = copy.rows as u64 * copy.row_elements as u64;
            *sums.entry(&source.name).or_default() += elements * source.dtype.size_bytes() as u64;
        }
    }
    let sums = sums.into_iter();
    sums.map(|(name, bytes)| (name.to_owned(), bytes)).collect()
}

/// A number for what a tensor is made of, the same in every process.
fn content(tensor: &TensorPlan) -> u64 {
    let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
    for source in &tensor.sources {
        source.name.hash(&mut hasher);
    }
    tensor.copies.hash(&mut hasher);
    hasher.finish()
}

/// FNV-1a of 64 bits; the standard library's hash may change between its versions.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
