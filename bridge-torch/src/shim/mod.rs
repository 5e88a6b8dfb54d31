//! The C++ shim: the only place of this crate that crosses into C++ and uses `unsafe`.

mod cuda;
mod ffi;

pub use cuda::load_cuda;
pub(crate) use ffi::{absent, at, bridge, own, pair};

/// Keeps freed memory in the process, so that large tensors do not cost page faults each time they are made.
///
/// A choice of the whole process: call it before the first tensor exists, and say so to the user.
pub fn keep_freed_memory() {
    bridge::keep_freed_memory();
}
