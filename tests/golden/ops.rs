//! Golden tests: ops.
