//! Criterion suite: moe.

fn main() {}
