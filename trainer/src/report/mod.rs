//! Everything a run shows: results on stdout, the rest on stderr, and the files that record a run.
//!
//! This is the only room of the trainer that touches the terminal. It knows numbers and text, no models and no data sets.
//! Invariants: stdout carries results only; a closed pipe is not an error; colour never carries meaning alone.

mod terminal;

pub(crate) use terminal::{ColorChoice, Verbosity, err, init, json_line, out, print_error};
#[cfg(feature = "torch")]
pub(crate) use terminal::{bars, note, verbosity};
