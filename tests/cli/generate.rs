//! The command line: generate.
