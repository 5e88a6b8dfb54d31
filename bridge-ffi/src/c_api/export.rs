//! Exporting.

use std::ffi::c_char;

use bridge_core::checkpoint::discard_exports;
use bridge_core::shards::RankExportOptions;

use super::errors::{CError, call, given, hand_out, output, path, take_back, text, wanted_output};
use super::load::{array, with_options};
use super::plan::CPlan;
use super::structs::{
    CExportOptions, CExportState, CLoadOptions, CLoadReport, CParallelLayout, CRankCoord, CSource,
    optional, rank, spec,
};
use crate::checkpoint::Checkpoint;
use crate::dtype::dtype_of;
use crate::error::FfiError;
use crate::exporter::{Exporter, Source, copies};

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_exporter_open(
    reference: *const Checkpoint,
    layout: *const CParallelLayout,
    at: *const CRankCoord,
    target: *const c_char,
    options: *const CExportOptions,
    exporter: *mut *mut Exporter,
    error: *mut *mut CError,
) -> i32 {
    // SAFETY: the header's rules.
    unsafe {
        call(error, || {
            let reference = given(reference, "reference")?;
            let target = path(target, "target")?;
            let exporter = output(exporter, "exporter")?;
            let options = match optional(options)? {
                None => RankExportOptions::default(),
                Some(options) => RankExportOptions {
                    id: match options.export_id.is_null() {
                        true => String::new(),
                        false => text(options.export_id, "export_id")?.to_owned(),
                    },
                    overwrite: (options.overwrite != 0).into(),
                    copy_missing: copies(options.missing)?,
                },
            };
            let (spec, at) = (spec(layout)?, rank(at)?);
            hand_out(
                exporter,
                Exporter::open(reference, &spec, &at, target, &options)?,
            );
            Ok(())
        })
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_exporter_free(exporter: *mut Exporter) {
    // SAFETY: the header's rules.
    unsafe { take_back(exporter) };
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_exporter_plan(
    exporter: *const Exporter,
    plan: *mut *mut CPlan,
    error: *mut *mut CError,
) -> i32 {
    // SAFETY: the header's rules.
    unsafe {
        call(error, || {
            let exporter = given(exporter, "exporter")?;
            let plan = output(plan, "plan")?;
            hand_out(plan, CPlan::new(exporter.plan().clone()));
            Ok(())
        })
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_exporter_is_needed(exporter: *const Exporter) -> i32 {
    // SAFETY: the header's rules.
    unsafe { given(exporter, "exporter") }.map_or(0, |exporter| i32::from(exporter.is_needed()))
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_exporter_write(
    exporter: *const Exporter,
    sources: *const CSource,
    count: usize,
    options: *const CLoadOptions,
    report: *mut CLoadReport,
    error: *mut *mut CError,
) -> i32 {
    // SAFETY: the header's rules.
    unsafe {
        call(error, || {
            let exporter = given(exporter, "exporter")?;
            let report = wanted_output(report, "report")?;
            let sources = array(sources, count, "sources")?
                .iter()
                .map(|one| {
                    Ok(Source {
                        name: text(one.name, "the name of a source")?,
                        data: one.data.cast(),
                        bytes: one.bytes,
                        dtype: dtype_of(one.dtype)?,
                        row_stride_bytes: one.row_stride_bytes,
                    })
                })
                .collect::<Result<Vec<_>, FfiError>>()?;
            let done = with_options(options, |options| exporter.write(&sources, options))?;
            if let Some(report) = report {
                report.write(done.into());
            }
            Ok(())
        })
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_exporter_finish(
    exporter: *const Exporter,
    state: *mut CExportState,
    error: *mut *mut CError,
) -> i32 {
    // SAFETY: the header's rules.
    unsafe {
        call(error, || {
            let exporter = given(exporter, "exporter")?;
            let state = wanted_output(state, "state")?;
            let found = exporter.finish()?;
            if let Some(state) = state {
                state.write(CExportState {
                    complete: i32::from(found.complete),
                    finished: found.finished,
                    needed: found.needed,
                });
            }
            Ok(())
        })
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_export_discard(
    target: *const c_char,
    removed: *mut usize,
    error: *mut *mut CError,
) -> i32 {
    // SAFETY: the header's rules.
    unsafe {
        call(error, || {
            let target = path(target, "target")?;
            let removed = wanted_output(removed, "removed")?;
            let found = discard_exports(target)?;
            if let Some(removed) = removed {
                removed.write(found);
            }
            Ok(())
        })
    }
}
