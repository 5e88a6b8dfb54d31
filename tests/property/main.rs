//! Tests of the property room.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod layout;
mod pickle;
mod plans;
mod ranks;
mod shards;
