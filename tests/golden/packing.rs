//! Golden tests: packing.
