//! Libraries that come into the process while it runs.
#![expect(unsafe_code, reason = "loading a library runs its initialisers")]

use std::path::Path;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::bridge;

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

/// Loads a library of libtorch operators, as `torch.ops.load_library` does; it stays for the life of the process.
///
/// A model built afterwards finds the operators `megatron_bridge::*` in it.
///
/// # Errors
/// The loader's text, or libtorch's where it refuses an operator.
pub fn load_operators(library: &Path) -> Result<(), String> {
    bridge::load_operators(&library.to_string_lossy()).map_err(|error| error.what().to_owned())
}
