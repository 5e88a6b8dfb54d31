//! Plans.

use std::ffi::{CString, c_char};

use super::errors::{CError, c_string, call, given, output, take_back, text};
use super::structs::{CRankPlace, CTensor, check_size};
use crate::dtype::number_of;
use crate::error::FfiError;
use crate::plan::Plan;

/// `bridge_plan`: a plan, and its names as C reads them.
#[derive(Debug)]
pub struct CPlan {
    pub(super) plan: Plan,
    names: Vec<CString>,
}

impl CPlan {
    pub(super) fn new(plan: Plan) -> Self {
        let names = plan.tensors().iter().map(|tensor| c_string(&tensor.name));
        Self {
            names: names.collect(),
            plan,
        }
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_plan_free(plan: *mut CPlan) {
    // SAFETY: the header's rules.
    unsafe { take_back(plan) };
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_plan_place(
    plan: *const CPlan,
    place: *mut CRankPlace,
    error: *mut *mut CError,
) -> i32 {
    // SAFETY: the header's rules.
    unsafe {
        call(error, || {
            let plan = &given(plan, "plan")?.plan;
            let place = output(place, "place")?;
            check_size::<CRankPlace>((*place).struct_size)?;
            place.write(CRankPlace {
                struct_size: size_of::<CRankPlace>(),
                global_rank: plan.rank.global_rank,
                tp_rank: plan.rank.tp_rank,
                cp_rank: plan.rank.cp_rank,
                dp_rank: plan.rank.dp_rank,
                pp_rank: plan.rank.pp_rank,
                etp_rank: plan.rank.etp_rank,
                ep_rank: plan.rank.ep_rank,
                edp_rank: plan.rank.edp_rank,
                vp_stage: plan.vp_stage,
            });
            Ok(())
        })
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_plan_size(plan: *const CPlan) -> usize {
    // SAFETY: the header's rules.
    match unsafe { given(plan, "plan") } {
        Ok(plan) => plan.names.len(),
        Err(_) => 0,
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_plan_tensor(
    plan: *const CPlan,
    index: usize,
    tensor: *mut CTensor,
    error: *mut *mut CError,
) -> i32 {
    // SAFETY: the header's rules.
    unsafe {
        call(error, || {
            let plan = given(plan, "plan")?;
            let output = output(tensor, "tensor")?;
            let tensors = plan.plan.tensors();
            let size = tensors.len();
            let found = tensors.get(index).ok_or(FfiError::Index { index, size })?;
            output.write(CTensor {
                name: plan.names[index].as_ptr(),
                dtype: number_of(found.dtype),
                num_dims: found.shape.len(),
                shape: found.shape.as_ptr(),
                bytes: found.numel() * found.dtype.size_bytes(),
            });
            Ok(())
        })
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_plan_find(
    plan: *const CPlan,
    name: *const c_char,
    index: *mut usize,
    error: *mut *mut CError,
) -> i32 {
    // SAFETY: the header's rules.
    unsafe {
        call(error, || {
            let plan = given(plan, "plan")?;
            let name = text(name, "name")?;
            output(index, "index")?.write(plan.plan.find(name)?);
            Ok(())
        })
    }
}
