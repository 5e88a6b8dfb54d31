//! The bridge for C++ and C: a running Megatron-Core job has its tensors filled, and hands them back.
//!
//! One core over `bridge-core` ([`checkpoint`], [`plan`], [`load`], [`exporter`]), and two faces: `cxx_bridge` behind the
//! C++ classes of `include/megatron_bridge/megatron_bridge.hpp`, and [`c_api`], the functions of `megatron_bridge.h`. The
//! faces only translate. This crate knows no libtorch.
//!
//! Invariants: whatever comes from a caller is checked in [`checks`] before the first byte moves; memory of callers is
//! touched in [`memory`] alone; a panic ends at the edge ([`error::guard`]); there is no global state, so every call has
//! threads of its own that end with it.

pub mod c_api;
pub mod checkpoint;
pub mod checks;
mod cxx_bridge;
mod dtype;
pub mod error;
pub mod exporter;
pub mod load;
pub mod memory;
pub mod plan;
pub mod provider;
mod stored;
pub mod watch;
