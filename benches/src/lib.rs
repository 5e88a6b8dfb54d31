//! What the criterion suites share.

mod checkpoint;
#[cfg(feature = "torch")]
mod training;

pub use checkpoint::write_checkpoint;
#[cfg(feature = "torch")]
pub use training::{EIGHT_LAYERS, Training, batch, config, model};
