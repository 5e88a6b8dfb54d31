//! Criterion suite: training_step.

fn main() {}
