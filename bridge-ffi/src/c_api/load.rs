//! Loading and cancellation.

use std::ffi::{c_char, c_void};
use std::ops::ControlFlow;

use super::errors::{CError, call, given, output, take_back, text, wanted_output};
use super::plan::CPlan;
use super::structs::{CDestination, CLoadOptions, CLoadReport, optional};
use crate::dtype::dtype_of;
use crate::error::FfiError;
use crate::load::{Destination, Report};
use crate::watch::{Cancellation, Options};

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn bridge_cancellation_new() -> *mut Cancellation {
    Box::into_raw(Box::default())
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_cancellation_cancel(cancellation: *const Cancellation) {
    // SAFETY: the header's rules.
    if let Ok(cancellation) = unsafe { given(cancellation, "cancellation") } {
        cancellation.cancel();
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_cancellation_free(cancellation: *mut Cancellation) {
    // SAFETY: the header's rules.
    unsafe { take_back(cancellation) };
}

/// The objects of an array.
///
/// # Safety
/// `pointer` points to `count` of them, or is null when there are none.
pub(super) unsafe fn array<'a, T>(
    pointer: *const T,
    count: usize,
    what: &'static str,
) -> Result<&'a [T], FfiError> {
    if count == 0 {
        return Ok(&[]);
    }
    // SAFETY: passed on.
    unsafe { given(pointer, what) }?;
    // SAFETY: not null, aligned, and `count` long by the rules of the header.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// Calls `work` with the caller's options.
///
/// # Safety
/// The header's rules for `options`.
pub(super) unsafe fn with_options(
    options: *const CLoadOptions,
    work: impl FnOnce(Options<'_>) -> Result<Report, FfiError>,
) -> Result<Report, FfiError> {
    // SAFETY: passed on.
    let Some(options) = (unsafe { optional(options) })? else {
        return work(Options::default());
    };
    let user = options.progress_user;
    let mut progress = |done, total| {
        let Some(function) = options.progress else {
            return ControlFlow::Continue(());
        };
        // SAFETY: the caller's function, called in the caller's thread with the caller's pointer.
        match unsafe { function(user, done, total) } {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    };
    let cancellation = match options.cancellation.is_null() {
        true => None,
        // SAFETY: alive by the rules of the header.
        false => Some(unsafe { given(options.cancellation, "cancellation") }?.clone()),
    };
    work(Options {
        threads: options.threads,
        progress: match options.progress {
            Some(_) => Some(&mut progress),
            None => None,
        },
        cancellation,
        allow_non_finite: options.allow_non_finite != 0,
        partial: options.partial != 0,
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_plan_load(
    plan: *const CPlan,
    name: *const c_char,
    data: *mut c_void,
    bytes: usize,
    dtype: i32,
    error: *mut *mut CError,
) -> i32 {
    // SAFETY: the header's rules.
    unsafe {
        call(error, || {
            let plan = &given(plan, "plan")?.plan;
            let destination = Destination {
                name: text(name, "name")?,
                data: output(data.cast::<u8>(), "data")?,
                bytes,
                dtype: dtype_of(dtype)?,
                row_stride_bytes: 0,
                first_row: 0,
                num_rows: None,
            };
            plan.load(&destination)?;
            Ok(())
        })
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_plan_load_all(
    plan: *const CPlan,
    destinations: *const CDestination,
    count: usize,
    options: *const CLoadOptions,
    report: *mut CLoadReport,
    error: *mut *mut CError,
) -> i32 {
    // SAFETY: the header's rules.
    unsafe {
        call(error, || {
            let plan = &given(plan, "plan")?.plan;
            let report = wanted_output(report, "report")?;
            let destinations = array(destinations, count, "destinations")?
                .iter()
                .map(|one| {
                    Ok(Destination {
                        name: text(one.name, "the name of a destination")?,
                        data: one.data.cast(),
                        bytes: one.bytes,
                        dtype: dtype_of(one.dtype)?,
                        row_stride_bytes: one.row_stride_bytes,
                        first_row: one.first_row,
                        num_rows: (one.num_rows != 0).then_some(one.num_rows),
                    })
                })
                .collect::<Result<Vec<_>, FfiError>>()?;
            let done = with_options(options, |options| plan.load_all(&destinations, options))?;
            if let Some(report) = report {
                report.write(done.into());
            }
            Ok(())
        })
    }
}
