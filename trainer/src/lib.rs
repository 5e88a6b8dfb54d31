//! The command line over the bridge: fine-tune, generate, inspect, convert.

mod commands;
pub mod data;
#[cfg(feature = "torch")]
mod device;
mod hub;
mod report;
#[cfg(feature = "torch")]
pub mod train;

pub use commands::run;
