//! The command line: inspect.
