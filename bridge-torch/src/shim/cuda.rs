//! The CUDA half of libtorch, loaded when a run asks for it.
#![expect(unsafe_code, reason = "loading a library runs its initialisers")]

use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// Loads `libtorch_cuda.so`, so that one binary serves machines with and without a GPU. Later calls give the same answer.
///
/// Call it before the first tensor exists: libtorch looks for its back ends then.
///
/// # Errors
/// The loader's text, for instance when only the CPU half is installed.
pub fn load_cuda() -> Result<(), String> {
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    LOADED
        .get_or_init(|| {
            // SAFETY: the library is the other half of the libtorch that this binary is linked with; its initialisers only
            // register operators and devices, and it is never unloaded.
            let library =
                unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) };
            library
                .map(std::mem::forget)
                .map_err(|error| error.to_string())
        })
        .clone()
}
