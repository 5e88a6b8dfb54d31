//! Checkpoints, providers and layouts.

use std::ffi::c_char;

use super::errors::{
    CError, c_string, call, given, hand_out, hand_out_text, output, path, take_back, text,
};
use super::plan::CPlan;
use super::structs::{
    CLayoutInfo, COpenOptions, CParallelLayout, CRankCoord, check_size, optional, rank, spec,
};
use crate::checkpoint::{Checkpoint, OpenOptions};
use crate::error::FfiError;
use crate::provider::Provider;

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_checkpoint_open(
    dir: *const c_char,
    options: *const COpenOptions,
    checkpoint: *mut *mut Checkpoint,
    error: *mut *mut CError,
) -> i32 {
    // SAFETY: the header's rules.
    unsafe {
        call(error, || {
            let dir = path(dir, "path")?;
            let checkpoint = output(checkpoint, "checkpoint")?;
            let options = match optional(options)? {
                None => OpenOptions::default(),
                Some(options) => OpenOptions {
                    reference: match options.reference.is_null() {
                        true => None,
                        false => Some(path(options.reference, "reference")?.to_owned()),
                    },
                    not_strict: options.not_strict != 0,
                },
            };
            hand_out(checkpoint, Checkpoint::open(dir, &options)?);
            Ok(())
        })
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_checkpoint_free(checkpoint: *mut Checkpoint) {
    // SAFETY: the header's rules.
    unsafe { take_back(checkpoint) };
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_checkpoint_provider_json(
    checkpoint: *const Checkpoint,
    json: *mut *mut c_char,
    error: *mut *mut CError,
) -> i32 {
    // SAFETY: the header's rules.
    unsafe {
        call(error, || {
            let checkpoint = given(checkpoint, "checkpoint")?;
            let json = output(json, "json")?;
            hand_out_text(json, &checkpoint.provider().json());
            Ok(())
        })
    }
}

/// Reads one field.
///
/// # Safety
/// The header's rules.
unsafe fn field<T>(
    checkpoint: *const Checkpoint,
    name: *const c_char,
    value: *mut T,
    error: *mut *mut CError,
    read: impl FnOnce(&Provider, &str) -> Result<T, FfiError>,
) -> i32 {
    // SAFETY: passed on.
    unsafe {
        call(error, || {
            let checkpoint = given(checkpoint, "checkpoint")?;
            let name = text(name, "field")?;
            let value = output(value, "value")?;
            value.write(read(&checkpoint.provider(), name)?);
            Ok(())
        })
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_checkpoint_provider_integer(
    checkpoint: *const Checkpoint,
    name: *const c_char,
    value: *mut i64,
    error: *mut *mut CError,
) -> i32 {
    // SAFETY: the header's rules.
    unsafe { field(checkpoint, name, value, error, Provider::integer) }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_checkpoint_provider_number(
    checkpoint: *const Checkpoint,
    name: *const c_char,
    value: *mut f64,
    error: *mut *mut CError,
) -> i32 {
    // SAFETY: the header's rules.
    unsafe { field(checkpoint, name, value, error, Provider::number) }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_checkpoint_provider_boolean(
    checkpoint: *const Checkpoint,
    name: *const c_char,
    value: *mut i32,
    error: *mut *mut CError,
) -> i32 {
    let read = |provider: &Provider, name: &str| provider.boolean(name).map(i32::from);
    // SAFETY: the header's rules.
    unsafe { field(checkpoint, name, value, error, read) }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_checkpoint_provider_text(
    checkpoint: *const Checkpoint,
    name: *const c_char,
    value: *mut *mut c_char,
    error: *mut *mut CError,
) -> i32 {
    let read = |provider: &Provider, name: &str| {
        provider.text(name).map(|text| c_string(&text).into_raw())
    };
    // SAFETY: the header's rules.
    unsafe { field(checkpoint, name, value, error, read) }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_checkpoint_layout(
    checkpoint: *const Checkpoint,
    layout: *const CParallelLayout,
    info: *mut CLayoutInfo,
    error: *mut *mut CError,
) -> i32 {
    // SAFETY: the header's rules.
    unsafe {
        call(error, || {
            let checkpoint = given(checkpoint, "checkpoint")?;
            let info = output(info, "info")?;
            check_size::<CLayoutInfo>((*info).struct_size)?;
            let layout = checkpoint.layout(&spec(layout)?)?;
            info.write(CLayoutInfo {
                struct_size: size_of::<CLayoutInfo>(),
                world_size: layout.world_size(),
                data_parallel_size: layout.dp_size(),
                expert_data_parallel_size: layout.edp_size(),
                virtual_pipeline_model_parallel_size: layout.vp_size(),
                padded_vocab_size: layout.padded_vocab_size(),
            });
            Ok(())
        })
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_checkpoint_plan(
    checkpoint: *const Checkpoint,
    layout: *const CParallelLayout,
    at: *const CRankCoord,
    plan: *mut *mut CPlan,
    error: *mut *mut CError,
) -> i32 {
    // SAFETY: the header's rules.
    unsafe {
        call(error, || {
            let checkpoint = given(checkpoint, "checkpoint")?;
            let plan = output(plan, "plan")?;
            let made = checkpoint.plan(&spec(layout)?, &rank(at)?)?;
            hand_out(plan, CPlan::new(made));
            Ok(())
        })
    }
}
