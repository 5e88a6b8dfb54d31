//! Golden tests: model.
