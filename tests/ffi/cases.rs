//! Cases in C++ and C, run by name.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};

use bridge_ffi::c_api::CParallelLayout;
use tests::golden;

type Visit = unsafe extern "C" fn(
    *mut c_void,
    *const c_char,
    i32,
    *const usize,
    usize,
    *const c_void,
    usize,
);

// Cases register themselves, so none is left out for being called by nobody.
#[link(name = "ffi_cases", kind = "static", modifiers = "+whole-archive")]
unsafe extern "C" {
    fn ffi_run(
        name: *const c_char,
        checkpoint: *const c_char,
        scratch: *const c_char,
        more: *const c_char,
        text: *mut c_char,
        capacity: usize,
    ) -> i32;
    fn ffi_load(
        checkpoint: *const c_char,
        reference: *const c_char,
        layout: *const CParallelLayout,
        rank: usize,
        vp_stage: usize,
        visit: Visit,
        user: *mut c_void,
        text: *mut c_char,
        capacity: usize,
    ) -> i32;
}

#[link(name = "ffi_c_cases", kind = "static")]
unsafe extern "C" {
    fn ffi_run_c(
        name: *const c_char,
        checkpoint: *const c_char,
        scratch: *const c_char,
        text: *mut c_char,
        capacity: usize,
    ) -> i32;
}

fn c(text: impl AsRef<[u8]>) -> CString {
    CString::new(text.as_ref()).unwrap()
}

fn path(path: &Path) -> CString {
    c(path.as_os_str().as_encoded_bytes())
}

/// The directory of a golden checkpoint.
pub(crate) fn model(name: &str) -> PathBuf {
    golden(&format!("checkpoints/{name}"))
}

/// Runs a C++ case.
pub(crate) fn run(name: &str, checkpoint: &Path, scratch: &Path, more: &str) {
    let mut text = [0; 4096];
    // SAFETY: texts with an end, and a buffer with its length.
    let failed = unsafe {
        ffi_run(
            c(name).as_ptr(),
            path(checkpoint).as_ptr(),
            path(scratch).as_ptr(),
            c(more).as_ptr(),
            text.as_mut_ptr(),
            text.len(),
        )
    };
    // SAFETY: the case ends its text.
    let text = unsafe { CStr::from_ptr(text.as_ptr()) };
    assert!(failed == 0, "{}", text.to_string_lossy());
}

/// Runs a case in C.
pub(crate) fn run_c(name: &str, checkpoint: &Path, scratch: &Path) {
    let mut text = [0; 4096];
    // SAFETY: as above.
    let failed = unsafe {
        ffi_run_c(
            c(name).as_ptr(),
            path(checkpoint).as_ptr(),
            path(scratch).as_ptr(),
            text.as_mut_ptr(),
            text.len(),
        )
    };
    // SAFETY: as above.
    let text = unsafe { CStr::from_ptr(text.as_ptr()) };
    assert!(failed == 0, "{}", text.to_string_lossy());
}

/// A tensor as C++ loaded it.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) name: String,
    /// The header's number.
    pub(crate) dtype: i32,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// Loads one stage of one rank in C++.
pub(crate) fn load(
    checkpoint: &Path,
    reference: &str,
    layout: &CParallelLayout,
    rank: usize,
    vp_stage: usize,
) -> Vec<Loaded> {
    unsafe extern "C" fn visit(
        user: *mut c_void,
        name: *const c_char,
        dtype: i32,
        shape: *const usize,
        num_dims: usize,
        data: *const c_void,
        bytes: usize,
    ) {
        // SAFETY: `user` is the list below, and the rest lives during the call.
        unsafe {
            let list = &mut *user.cast::<Vec<Loaded>>();
            list.push(Loaded {
                name: CStr::from_ptr(name).to_str().unwrap().to_owned(),
                dtype,
                shape: match num_dims {
                    0 => Vec::new(),
                    _ => std::slice::from_raw_parts(shape, num_dims).to_vec(),
                },
                bytes: match bytes {
                    0 => Vec::new(),
                    _ => std::slice::from_raw_parts(data.cast::<u8>(), bytes).to_vec(),
                },
            });
        }
    }
    let mut list: Vec<Loaded> = Vec::new();
    let mut text = [0; 4096];
    // SAFETY: texts with an end, the header's struct, and a buffer with its length.
    let failed = unsafe {
        ffi_load(
            path(checkpoint).as_ptr(),
            c(reference).as_ptr(),
            layout,
            rank,
            vp_stage,
            visit,
            (&raw mut list).cast(),
            text.as_mut_ptr(),
            text.len(),
        )
    };
    // SAFETY: the function ends its text.
    let text = unsafe { CStr::from_ptr(text.as_ptr()) };
    assert!(failed == 0, "{}", text.to_string_lossy());
    list
}
