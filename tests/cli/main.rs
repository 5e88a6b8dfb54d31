//! Tests of the cli room.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod data;
mod finetune;
mod forward;
mod generate;
mod init;
mod inspect;
