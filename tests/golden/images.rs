//! Golden tests: images.
