//! Everything a run shows: results on stdout, the rest on stderr, and the files that record a run.
//!
//! This is the only room of the trainer that touches the terminal. It knows numbers and text, no models and no data sets.
//! Invariants: stdout carries results only; a closed pipe is not an error; colour never carries meaning alone.

#[cfg(feature = "torch")]
mod metrics;
mod plot;
#[cfg(feature = "torch")]
mod progress;
mod table;
#[cfg(feature = "torch")]
mod tensorboard;
mod terminal;
mod transfer;

#[cfg(feature = "torch")]
pub(crate) use metrics::{MetricsFile, series};
#[cfg(feature = "torch")]
pub(crate) use plot::loss_plot;
pub(crate) use plot::{Labels, line_plot};
#[cfg(feature = "torch")]
pub(crate) use progress::{Progress, StepLine, clock};
pub(crate) use table::{grouped, table};
#[cfg(feature = "torch")]
pub(crate) use tensorboard::EventFile;
#[cfg(feature = "torch")]
pub(crate) use terminal::note;
pub(crate) use terminal::{ColorChoice, Verbosity, init, json_line, out, print_error};
pub(crate) use transfer::Transfer;
