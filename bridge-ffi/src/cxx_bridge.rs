//! What the C++ classes call. Thin: texts and numbers are translated, and panics end here.
#![expect(
    unsafe_code,
    reason = "the bridge is generated, and memory of C++ is passed through it"
)]
#![expect(
    clippy::too_many_arguments,
    unreachable_pub,
    reason = "the shapes of the generated code"
)]

use std::ffi::OsStr;
use std::fmt;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bridge_core::Dtype;
use bridge_core::layout::{LayoutSpec, ParallelSizes, PipelineOptions, World};
use bridge_core::shards::RankExportOptions;
use cxx::CxxString;

use crate::checkpoint::{Checkpoint, OpenOptions, Rank};
use crate::dtype::{dtype_of, number_of};
use crate::error::{FfiError, guard};
use crate::exporter::{Exporter, Source, copies};
use crate::load::{Destination, Report};
use crate::plan::Plan;
use crate::provider::Provider;
use crate::watch::{Cancellation, Options};

/// Stands for a number that is not given.
const NONE: usize = usize::MAX;

#[cxx::bridge(namespace = "megatron_bridge::core")]
mod ffi {
    /// ParallelLayout without its text. Numbers that are not given are the largest there is.
    struct LayoutNumbers {
        tensor_model_parallel_size: usize,
        pipeline_model_parallel_size: usize,
        virtual_pipeline_model_parallel_size: usize,
        context_parallel_size: usize,
        expert_model_parallel_size: usize,
        expert_tensor_parallel_size: usize,
        data_parallel_size: usize,
        world_size: usize,
        num_layers_in_first_pipeline_stage: usize,
        num_layers_in_last_pipeline_stage: usize,
        make_vocab_size_divisible_by: usize,
        account_for_embedding_in_pipeline_split: bool,
        account_for_loss_in_pipeline_split: bool,
        sequential_experts: bool,
        without_mtp: bool,
        /// 0: not given.
        params_dtype: i32,
    }

    /// RankCoord; a global rank that is not given is the largest number.
    struct RankNumbers {
        global_rank: usize,
        tp_rank: usize,
        pp_rank: usize,
        ep_rank: usize,
        etp_rank: usize,
        vp_stage: usize,
    }

    struct LayoutResult {
        world_size: usize,
        data_parallel_size: usize,
        expert_data_parallel_size: usize,
        virtual_pipeline_model_parallel_size: usize,
        padded_vocab_size: usize,
        pipeline_model_parallel_layout: String,
    }

    struct Place {
        global_rank: usize,
        tp_rank: usize,
        cp_rank: usize,
        dp_rank: usize,
        pp_rank: usize,
        etp_rank: usize,
        ep_rank: usize,
        edp_rank: usize,
        vp_stage: usize,
    }

    struct Tensor {
        name: String,
        dtype: i32,
        shape: Vec<usize>,
        bytes: usize,
    }

    /// Destination or Source of the header, its name as bytes.
    struct MemoryArgs {
        name: *const u8,
        name_len: usize,
        data: *mut u8,
        bytes: usize,
        dtype: i32,
        row_stride_bytes: usize,
        first_row: usize,
        /// The largest number: all.
        num_rows: usize,
    }

    struct LoadArgs {
        threads: usize,
        allow_non_finite: bool,
        partial: bool,
    }

    struct LoadResult {
        tensors: usize,
        bytes: u64,
        rounded: usize,
        seconds: f64,
    }

    struct State {
        complete: bool,
        finished: usize,
        needed: usize,
    }

    unsafe extern "C++" {
        include!("watch.hpp");

        /// Holds the progress callback, and what it threw.
        type Watch;
        fn is_wanted(self: &Watch) -> bool;
        /// `false` when the callback threw.
        fn report(self: &Watch, done: u64, total: u64) -> bool;
    }

    extern "Rust" {
        type Cancellation;
        type Checkpoint;
        type Exporter;
        type Plan;
        type Provider;

        fn version() -> &'static str;
        fn dtype_size(number: i32) -> usize;
        fn dtype_word(number: i32) -> &'static str;

        fn new_cancellation() -> Box<Cancellation>;
        fn cancel(self: &Cancellation);
        fn is_cancelled(self: &Cancellation) -> bool;

        fn checkpoint_open(
            path: &CxxString,
            reference: &CxxString,
            not_strict: bool,
        ) -> Result<Box<Checkpoint>>;
        fn checkpoint_provider(checkpoint: &Checkpoint) -> Result<Box<Provider>>;
        fn checkpoint_layout(
            checkpoint: &Checkpoint,
            layout: &LayoutNumbers,
            stages: &CxxString,
        ) -> Result<LayoutResult>;
        fn checkpoint_plan(
            checkpoint: &Checkpoint,
            layout: &LayoutNumbers,
            stages: &CxxString,
            rank: &RankNumbers,
        ) -> Result<Box<Plan>>;

        fn provider_class_name(provider: &Provider) -> String;
        fn provider_json(provider: &Provider) -> String;
        fn provider_fields(provider: &Provider) -> Vec<String>;
        fn provider_has(provider: &Provider, field: &CxxString) -> bool;
        fn provider_integer(provider: &Provider, field: &CxxString) -> Result<i64>;
        fn provider_number(provider: &Provider, field: &CxxString) -> Result<f64>;
        fn provider_boolean(provider: &Provider, field: &CxxString) -> Result<bool>;
        fn provider_text(provider: &Provider, field: &CxxString) -> Result<String>;
        fn provider_integers(provider: &Provider, field: &CxxString) -> Result<Vec<i64>>;

        fn plan_tensors(plan: &Plan) -> Vec<Tensor>;
        fn plan_place(plan: &Plan) -> Place;
        fn plan_find(plan: &Plan, name: &CxxString) -> Result<usize>;
        /// The memory of each destination is the caller's alone until this returns.
        unsafe fn plan_load(
            plan: &Plan,
            destinations: &[MemoryArgs],
            options: &LoadArgs,
            watch: &Watch,
            cancellation: &Cancellation,
        ) -> Result<LoadResult>;

        fn exporter_open(
            reference: &Checkpoint,
            layout: &LayoutNumbers,
            stages: &CxxString,
            rank: &RankNumbers,
            target: &CxxString,
            id: &CxxString,
            overwrite: bool,
            missing: i32,
        ) -> Result<Box<Exporter>>;
        fn exporter_discard(target: &CxxString) -> Result<usize>;
        fn exporter_plan(exporter: &Exporter) -> &Plan;
        fn exporter_is_needed(exporter: &Exporter) -> bool;
        /// The memory of each source is not written until this returns.
        unsafe fn exporter_write(
            exporter: &Exporter,
            sources: &[MemoryArgs],
            options: &LoadArgs,
            watch: &Watch,
            cancellation: &Cancellation,
        ) -> Result<LoadResult>;
        fn exporter_finish(exporter: &Exporter) -> Result<State>;
    }
}

/// An error as it crosses: its number, a blank, its text.
struct Crossing(FfiError);

impl fmt::Display for Crossing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0.status() as i32, self.0.text())
    }
}

fn cross<T>(work: impl FnOnce() -> Result<T, FfiError>) -> Result<T, Crossing> {
    guard(work).map_err(Crossing)
}

fn utf8<'a>(what: &'static str, bytes: &'a [u8]) -> Result<&'a str, FfiError> {
    std::str::from_utf8(bytes).map_err(|_| FfiError::Utf8 {
        what,
        text: String::from_utf8_lossy(bytes).into_owned(),
    })
}

fn path(text: &CxxString) -> PathBuf {
    Path::new(OsStr::from_bytes(text.as_bytes())).to_owned()
}

fn given(number: usize) -> Option<usize> {
    (number != NONE).then_some(number)
}

fn spec(numbers: &ffi::LayoutNumbers, stages: &CxxString) -> Result<LayoutSpec, FfiError> {
    let world = match (given(numbers.data_parallel_size), given(numbers.world_size)) {
        (None, None) => World::Smallest,
        (Some(size), None) => World::DataParallel(size),
        (None, Some(size)) => World::Size(size),
        (Some(data_parallel_size), Some(world_size)) => {
            return Err(FfiError::TwoWorlds {
                data_parallel_size,
                world_size,
            });
        }
    };
    let stages = utf8("pipeline_model_parallel_layout", stages.as_bytes())?;
    Ok(LayoutSpec {
        sizes: ParallelSizes {
            tp_size: numbers.tensor_model_parallel_size,
            cp_size: numbers.context_parallel_size,
            pp_size: numbers.pipeline_model_parallel_size,
            vpp_size: given(numbers.virtual_pipeline_model_parallel_size),
            ep_size: numbers.expert_model_parallel_size,
            etp_size: numbers.expert_tensor_parallel_size,
            world,
        },
        pipeline: PipelineOptions {
            pipeline_model_parallel_layout: match stages {
                "" => None,
                stages => Some(stages.parse()?),
            },
            num_layers_in_first_pipeline_stage: given(numbers.num_layers_in_first_pipeline_stage),
            num_layers_in_last_pipeline_stage: given(numbers.num_layers_in_last_pipeline_stage),
            account_for_embedding_in_pipeline_split: numbers
                .account_for_embedding_in_pipeline_split,
            account_for_loss_in_pipeline_split: numbers.account_for_loss_in_pipeline_split,
        },
        make_vocab_size_divisible_by: given(numbers.make_vocab_size_divisible_by),
        sequential_experts: numbers.sequential_experts,
        without_mtp: numbers.without_mtp,
        dtype: match numbers.params_dtype {
            0 => None,
            number => Some(dtype_of(number)?),
        },
    })
}

fn rank(numbers: &ffi::RankNumbers) -> Rank {
    Rank {
        global_rank: given(numbers.global_rank),
        tp_rank: numbers.tp_rank,
        pp_rank: numbers.pp_rank,
        ep_rank: numbers.ep_rank,
        etp_rank: numbers.etp_rank,
        vp_stage: numbers.vp_stage,
    }
}

fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

fn dtype_size(number: i32) -> usize {
    dtype_of(number).map_or(0, Dtype::size_bytes)
}

fn dtype_word(number: i32) -> &'static str {
    dtype_of(number).map_or("", Dtype::torch_word)
}

fn new_cancellation() -> Box<Cancellation> {
    Box::default()
}

fn checkpoint_open(
    dir: &CxxString,
    reference: &CxxString,
    not_strict: bool,
) -> Result<Box<Checkpoint>, Crossing> {
    cross(|| {
        let options = OpenOptions {
            reference: (!reference.is_empty()).then(|| path(reference)),
            not_strict,
        };
        Ok(Box::new(Checkpoint::open(&path(dir), &options)?))
    })
}

fn checkpoint_provider(checkpoint: &Checkpoint) -> Result<Box<Provider>, Crossing> {
    cross(|| Ok(Box::new(checkpoint.provider())))
}

fn checkpoint_layout(
    checkpoint: &Checkpoint,
    numbers: &ffi::LayoutNumbers,
    stages: &CxxString,
) -> Result<ffi::LayoutResult, Crossing> {
    cross(|| {
        let layout = checkpoint.layout(&spec(numbers, stages)?)?;
        Ok(ffi::LayoutResult {
            world_size: layout.world_size(),
            data_parallel_size: layout.dp_size(),
            expert_data_parallel_size: layout.edp_size(),
            virtual_pipeline_model_parallel_size: layout.vp_size(),
            padded_vocab_size: layout.padded_vocab_size(),
            pipeline_model_parallel_layout: layout.pipeline_layout().to_string(),
        })
    })
}

fn checkpoint_plan(
    checkpoint: &Checkpoint,
    numbers: &ffi::LayoutNumbers,
    stages: &CxxString,
    place: &ffi::RankNumbers,
) -> Result<Box<Plan>, Crossing> {
    cross(|| {
        let plan = checkpoint.plan(&spec(numbers, stages)?, &rank(place))?;
        Ok(Box::new(plan))
    })
}

fn provider_class_name(provider: &Provider) -> String {
    provider.class_name().to_owned()
}

fn provider_json(provider: &Provider) -> String {
    provider.json()
}

fn provider_fields(provider: &Provider) -> Vec<String> {
    provider.names().map(str::to_owned).collect()
}

fn provider_has(provider: &Provider, field: &CxxString) -> bool {
    field.to_str().is_ok_and(|field| provider.has(field))
}

fn provider_integer(provider: &Provider, field: &CxxString) -> Result<i64, Crossing> {
    cross(|| provider.integer(utf8("field", field.as_bytes())?))
}

fn provider_number(provider: &Provider, field: &CxxString) -> Result<f64, Crossing> {
    cross(|| provider.number(utf8("field", field.as_bytes())?))
}

fn provider_boolean(provider: &Provider, field: &CxxString) -> Result<bool, Crossing> {
    cross(|| provider.boolean(utf8("field", field.as_bytes())?))
}

fn provider_text(provider: &Provider, field: &CxxString) -> Result<String, Crossing> {
    cross(|| provider.text(utf8("field", field.as_bytes())?))
}

fn provider_integers(provider: &Provider, field: &CxxString) -> Result<Vec<i64>, Crossing> {
    cross(|| provider.integers(utf8("field", field.as_bytes())?))
}

fn plan_tensors(plan: &Plan) -> Vec<ffi::Tensor> {
    let tensors = plan.tensors().iter();
    tensors
        .map(|tensor| ffi::Tensor {
            name: tensor.name.clone(),
            dtype: number_of(tensor.dtype),
            shape: tensor.shape.clone(),
            bytes: tensor.numel() * tensor.dtype.size_bytes(),
        })
        .collect()
}

fn plan_place(plan: &Plan) -> ffi::Place {
    let at = plan.rank;
    ffi::Place {
        global_rank: at.global_rank,
        tp_rank: at.tp_rank,
        cp_rank: at.cp_rank,
        dp_rank: at.dp_rank,
        pp_rank: at.pp_rank,
        etp_rank: at.etp_rank,
        ep_rank: at.ep_rank,
        edp_rank: at.edp_rank,
        vp_stage: plan.vp_stage,
    }
}

fn plan_find(plan: &Plan, name: &CxxString) -> Result<usize, Crossing> {
    cross(|| plan.find(utf8("the name", name.as_bytes())?))
}

/// The name of a destination or source.
///
/// # Safety
/// It points to `name_len` bytes that live as long as `memory`.
unsafe fn name_of(memory: &ffi::MemoryArgs) -> Result<&str, FfiError> {
    // SAFETY: the C++ class passes `data()` and `size()` of a std::string that outlives the call.
    let bytes = unsafe { std::slice::from_raw_parts(memory.name, memory.name_len) };
    utf8("the name of a tensor", bytes)
}

/// Calls `work` with the options of a C++ call.
fn with_options(
    args: &ffi::LoadArgs,
    watch: &ffi::Watch,
    cancellation: &Cancellation,
    work: impl FnOnce(Options<'_>) -> Result<Report, FfiError>,
) -> Result<ffi::LoadResult, FfiError> {
    let mut progress = |done, total| match watch.report(done, total) {
        true => ControlFlow::Continue(()),
        false => ControlFlow::Break(()),
    };
    let report = work(Options {
        threads: args.threads,
        progress: match watch.is_wanted() {
            true => Some(&mut progress),
            false => None,
        },
        cancellation: Some(cancellation.clone()),
        allow_non_finite: args.allow_non_finite,
        partial: args.partial,
    })?;
    Ok(ffi::LoadResult {
        tensors: report.tensors,
        bytes: report.bytes,
        rounded: report.rounded,
        seconds: report.seconds,
    })
}

/// # Safety
/// See the bridge.
unsafe fn plan_load(
    plan: &Plan,
    destinations: &[ffi::MemoryArgs],
    args: &ffi::LoadArgs,
    watch: &ffi::Watch,
    cancellation: &Cancellation,
) -> Result<ffi::LoadResult, Crossing> {
    cross(|| {
        let destinations = destinations
            .iter()
            .map(|one| {
                Ok(Destination {
                    // SAFETY: the C++ class holds the name until this returns.
                    name: unsafe { name_of(one) }?,
                    data: one.data,
                    bytes: one.bytes,
                    dtype: dtype_of(one.dtype)?,
                    row_stride_bytes: one.row_stride_bytes,
                    first_row: one.first_row,
                    num_rows: given(one.num_rows),
                })
            })
            .collect::<Result<Vec<_>, FfiError>>()?;
        with_options(args, watch, cancellation, |options| {
            // SAFETY: the caller of the C++ function owns the memory of the destinations.
            unsafe { plan.load_all(&destinations, options) }
        })
    })
}

fn exporter_open(
    reference: &Checkpoint,
    numbers: &ffi::LayoutNumbers,
    stages: &CxxString,
    place: &ffi::RankNumbers,
    target: &CxxString,
    id: &CxxString,
    overwrite: bool,
    missing: i32,
) -> Result<Box<Exporter>, Crossing> {
    cross(|| {
        let options = RankExportOptions {
            id: utf8("export_id", id.as_bytes())?.to_owned(),
            overwrite: overwrite.into(),
            copy_missing: copies(missing)?,
        };
        let spec = spec(numbers, stages)?;
        let exporter = Exporter::open(reference, &spec, &rank(place), &path(target), &options)?;
        Ok(Box::new(exporter))
    })
}

fn exporter_discard(target: &CxxString) -> Result<usize, Crossing> {
    cross(|| Ok(bridge_core::checkpoint::discard_exports(&path(target))?))
}

fn exporter_plan(exporter: &Exporter) -> &Plan {
    exporter.plan()
}

fn exporter_is_needed(exporter: &Exporter) -> bool {
    exporter.is_needed()
}

/// # Safety
/// See the bridge.
unsafe fn exporter_write(
    exporter: &Exporter,
    sources: &[ffi::MemoryArgs],
    args: &ffi::LoadArgs,
    watch: &ffi::Watch,
    cancellation: &Cancellation,
) -> Result<ffi::LoadResult, Crossing> {
    cross(|| {
        let sources = sources
            .iter()
            .map(|one| {
                Ok(Source {
                    // SAFETY: the C++ class holds the name until this returns.
                    name: unsafe { name_of(one) }?,
                    data: one.data,
                    bytes: one.bytes,
                    dtype: dtype_of(one.dtype)?,
                    row_stride_bytes: one.row_stride_bytes,
                })
            })
            .collect::<Result<Vec<_>, FfiError>>()?;
        with_options(args, watch, cancellation, |options| {
            // SAFETY: the caller of the C++ function leaves the memory of the sources alone.
            unsafe { exporter.write(&sources, options) }
        })
    })
}

fn exporter_finish(exporter: &Exporter) -> Result<ffi::State, Crossing> {
    cross(|| {
        let state = exporter.finish()?;
        Ok(ffi::State {
            complete: state.complete,
            finished: state.finished,
            needed: state.needed,
        })
    })
}
