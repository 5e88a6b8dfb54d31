//! Golden tests: gradcheck.
