//! Golden tests: generation.
