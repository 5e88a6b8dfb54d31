//! The command line: init.
