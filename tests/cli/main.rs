//! Tests of the cli room.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod broken_off;
mod checksums;
mod data;
mod diff;
mod directories;
#[cfg(feature = "torch")]
mod finetune;
#[cfg(feature = "torch")]
mod forward;
#[cfg(feature = "torch")]
mod generate;
mod hub;
#[cfg(feature = "torch")]
mod info;
mod init;
mod inspect;
mod interrupted;
mod permissions;
mod plan;
mod program;
mod shard;
mod unshard;
mod verify;
