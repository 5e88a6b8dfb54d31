//! The structs of the header, field by field, and what they stand for.
#![expect(missing_docs, reason = "the header says what they mean")]

use std::ffi::{c_char, c_void};

use bridge_core::layout::{LayoutSpec, ParallelSizes, PipelineOptions, World};

use super::errors::{given, text};
use crate::checkpoint::Rank;
use crate::dtype::dtype_of;
use crate::error::FfiError;
use crate::load::Report;

/// `bridge_open_options`.
#[derive(Debug)]
#[repr(C)]
pub struct COpenOptions {
    pub struct_size: usize,
    pub reference: *const c_char,
    pub not_strict: i32,
}

/// `bridge_parallel_layout`.
#[derive(Debug)]
#[repr(C)]
pub struct CParallelLayout {
    pub struct_size: usize,
    pub tensor_model_parallel_size: usize,
    pub pipeline_model_parallel_size: usize,
    pub virtual_pipeline_model_parallel_size: usize,
    pub context_parallel_size: usize,
    pub expert_model_parallel_size: usize,
    pub expert_tensor_parallel_size: usize,
    pub data_parallel_size: usize,
    pub world_size: usize,
    pub pipeline_model_parallel_layout: *const c_char,
    pub num_layers_in_first_pipeline_stage: usize,
    pub num_layers_in_last_pipeline_stage: usize,
    pub account_for_embedding_in_pipeline_split: i32,
    pub account_for_loss_in_pipeline_split: i32,
    pub make_vocab_size_divisible_by: usize,
    pub sequential_experts: i32,
    pub without_mtp: i32,
    pub params_dtype: i32,
}

/// `bridge_rank_coord`.
#[derive(Debug)]
#[repr(C)]
pub struct CRankCoord {
    pub struct_size: usize,
    pub global_rank: usize,
    pub tp_rank: usize,
    pub pp_rank: usize,
    pub ep_rank: usize,
    pub etp_rank: usize,
    pub vp_stage: usize,
}

/// `bridge_layout_info`.
#[derive(Debug)]
#[repr(C)]
pub struct CLayoutInfo {
    pub struct_size: usize,
    pub world_size: usize,
    pub data_parallel_size: usize,
    pub expert_data_parallel_size: usize,
    pub virtual_pipeline_model_parallel_size: usize,
    pub padded_vocab_size: usize,
}

/// `bridge_rank_place`.
#[derive(Debug)]
#[repr(C)]
pub struct CRankPlace {
    pub struct_size: usize,
    pub global_rank: usize,
    pub tp_rank: usize,
    pub cp_rank: usize,
    pub dp_rank: usize,
    pub pp_rank: usize,
    pub etp_rank: usize,
    pub ep_rank: usize,
    pub edp_rank: usize,
    pub vp_stage: usize,
}

/// `bridge_tensor`.
#[derive(Debug)]
#[repr(C)]
pub struct CTensor {
    pub name: *const c_char,
    pub dtype: i32,
    pub num_dims: usize,
    pub shape: *const usize,
    pub bytes: usize,
}

/// `bridge_progress`; null is none.
pub type ProgressFunction = Option<unsafe extern "C" fn(*mut c_void, u64, u64) -> i32>;

/// `bridge_load_options`.
#[derive(Debug)]
#[repr(C)]
pub struct CLoadOptions {
    pub struct_size: usize,
    pub threads: usize,
    pub progress: ProgressFunction,
    pub progress_user: *mut c_void,
    pub cancellation: *const crate::watch::Cancellation,
    pub allow_non_finite: i32,
    pub partial: i32,
}

/// `bridge_destination`.
#[derive(Debug)]
#[repr(C)]
pub struct CDestination {
    pub name: *const c_char,
    pub data: *mut c_void,
    pub bytes: usize,
    pub dtype: i32,
    pub row_stride_bytes: usize,
    pub first_row: usize,
    pub num_rows: usize,
}

/// `bridge_source`.
#[derive(Debug)]
#[repr(C)]
pub struct CSource {
    pub name: *const c_char,
    pub data: *const c_void,
    pub bytes: usize,
    pub dtype: i32,
    pub row_stride_bytes: usize,
}

/// `bridge_load_report`.
#[derive(Debug)]
#[repr(C)]
pub struct CLoadReport {
    pub tensors: usize,
    pub bytes: u64,
    pub rounded: usize,
    pub seconds: f64,
}

/// `bridge_export_options`.
#[derive(Debug)]
#[repr(C)]
pub struct CExportOptions {
    pub struct_size: usize,
    pub export_id: *const c_char,
    pub overwrite: i32,
    pub missing: i32,
}

/// `bridge_export_state`.
#[derive(Debug)]
#[repr(C)]
pub struct CExportState {
    pub complete: i32,
    pub finished: usize,
    pub needed: usize,
}

/// A struct that begins with its size.
pub(super) trait Versioned: Sized {
    /// Its name in the header, and how it is begun there.
    const NAMES: (&'static str, &'static str);
}

macro_rules! versioned {
    ($($name:ident: $what:literal, $init:literal;)*) => {
        $(impl Versioned for $name {
            const NAMES: (&'static str, &'static str) = ($what, $init);
        })*
    };
}

versioned! {
    COpenOptions: "bridge_open_options", "BRIDGE_OPEN_OPTIONS_INIT";
    CParallelLayout: "bridge_parallel_layout", "BRIDGE_PARALLEL_LAYOUT_INIT";
    CRankCoord: "bridge_rank_coord", "BRIDGE_RANK_COORD_INIT";
    CLoadOptions: "bridge_load_options", "BRIDGE_LOAD_OPTIONS_INIT";
    CExportOptions: "bridge_export_options", "BRIDGE_EXPORT_OPTIONS_INIT";
    CLayoutInfo: "bridge_layout_info", "its struct_size";
    CRankPlace: "bridge_rank_place", "its struct_size";
}

/// A struct that the caller may leave out.
///
/// # Safety
/// `pointer` is null or points to as many bytes as it begins with, which live for `'a`.
pub(super) unsafe fn optional<'a, T: Versioned>(
    pointer: *const T,
) -> Result<Option<&'a T>, FfiError> {
    if pointer.is_null() {
        return Ok(None);
    }
    let (what, _) = T::NAMES;
    // SAFETY: every such struct begins with its size.
    let found = *unsafe { given(pointer.cast::<usize>(), what) }?;
    check_size::<T>(found)?;
    // SAFETY: it has the size of a `T`.
    Ok(Some(unsafe { given(pointer, what) }?))
}

/// Refuses a struct of another size.
pub(super) fn check_size<T: Versioned>(found: usize) -> Result<(), FfiError> {
    let (what, init) = T::NAMES;
    let expected = size_of::<T>();
    match found == expected {
        true => Ok(()),
        false => Err(FfiError::StructSize {
            what,
            found,
            expected,
            init,
        }),
    }
}

/// What the caller asks for; null: one rank.
///
/// # Safety
/// As [`optional`].
pub(super) unsafe fn spec(layout: *const CParallelLayout) -> Result<LayoutSpec, FfiError> {
    // SAFETY: passed on.
    let Some(layout) = (unsafe { optional(layout) })? else {
        return Ok(LayoutSpec::default());
    };
    let some = |number: usize| (number != 0).then_some(number);
    let world = match (some(layout.data_parallel_size), some(layout.world_size)) {
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
    let stages = layout.pipeline_model_parallel_layout;
    let stages = match stages.is_null() {
        true => "",
        // SAFETY: a text of the caller.
        false => unsafe { text(stages, "pipeline_model_parallel_layout") }?,
    };
    Ok(LayoutSpec {
        sizes: ParallelSizes {
            tp_size: layout.tensor_model_parallel_size,
            cp_size: layout.context_parallel_size,
            pp_size: layout.pipeline_model_parallel_size,
            vpp_size: some(layout.virtual_pipeline_model_parallel_size),
            ep_size: layout.expert_model_parallel_size,
            etp_size: layout.expert_tensor_parallel_size,
            world,
        },
        pipeline: PipelineOptions {
            pipeline_model_parallel_layout: match stages {
                "" => None,
                stages => Some(stages.parse()?),
            },
            num_layers_in_first_pipeline_stage: some(layout.num_layers_in_first_pipeline_stage),
            num_layers_in_last_pipeline_stage: some(layout.num_layers_in_last_pipeline_stage),
            account_for_embedding_in_pipeline_split: layout.account_for_embedding_in_pipeline_split
                != 0,
            account_for_loss_in_pipeline_split: layout.account_for_loss_in_pipeline_split != 0,
        },
        make_vocab_size_divisible_by: some(layout.make_vocab_size_divisible_by),
        sequential_experts: layout.sequential_experts != 0,
        without_mtp: layout.without_mtp != 0,
        dtype: match layout.params_dtype {
            0 => None,
            number => Some(dtype_of(number)?),
        },
    })
}

/// Which rank; null: rank 0.
///
/// # Safety
/// As [`optional`].
pub(super) unsafe fn rank(rank: *const CRankCoord) -> Result<Rank, FfiError> {
    // SAFETY: passed on.
    let Some(rank) = (unsafe { optional(rank) })? else {
        return Ok(Rank::default());
    };
    Ok(Rank {
        global_rank: (rank.global_rank != usize::MAX).then_some(rank.global_rank),
        tp_rank: rank.tp_rank,
        pp_rank: rank.pp_rank,
        ep_rank: rank.ep_rank,
        etp_rank: rank.etp_rank,
        vp_stage: rank.vp_stage,
    })
}

impl From<Report> for CLoadReport {
    fn from(report: Report) -> Self {
        Self {
            tensors: report.tensors,
            bytes: report.bytes,
            rounded: report.rounded,
            seconds: report.seconds,
        }
    }
}
