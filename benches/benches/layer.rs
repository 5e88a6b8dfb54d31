//! Criterion suite: layer.

fn main() {}
