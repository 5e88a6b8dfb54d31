//! The C++ shim: the only place of this crate that crosses into C++ and uses `unsafe`.

mod ffi;
