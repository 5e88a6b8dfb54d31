//! Criterion suite: delta_rule.

fn main() {}
