//! The fine-tuning run: configuration, loop, checkpoints.
