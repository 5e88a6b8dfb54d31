//! Golden tests: training.
