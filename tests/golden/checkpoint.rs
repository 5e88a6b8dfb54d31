//! Golden tests: checkpoint.
