//! Tests of the ffi room: the library as C++ and C see it.
#![expect(clippy::unwrap_used, reason = "a test may panic")]
#![expect(unsafe_code, reason = "the cases are C++ and C")]

mod cases;
mod exporting;
mod goldens;
mod headers;
mod loading;
