//! Golden tests: mapping.
