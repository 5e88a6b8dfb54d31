//! The command line: data.
