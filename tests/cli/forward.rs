//! The command line: forward.
