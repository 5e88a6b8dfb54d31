//! Criterion suite: mapping.

fn main() {}
