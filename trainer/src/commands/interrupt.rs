//! Ctrl-C while files are written: what is half-made goes and the process leaves with code 130; a second one leaves at once.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bridge_core::checkpoint::{CheckpointError, TensorSink};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// The user, or a scheduler, asked the process to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted; nothing was written")]
pub(crate) struct Interrupted;

/// Listens for SIGINT and SIGTERM.
#[derive(Debug)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    pub(crate) fn listen() -> io::Result<Self> {
        let asked: Arc<AtomicBool> = Arc::default();
        for signal in [SIGINT, SIGTERM] {
            // The order matters: the first signal finds the flag unset here and sets it below; the second one ends the process.
            flag::register_conditional_shutdown(signal, 130, Arc::clone(&asked))?;
            flag::register(signal, Arc::clone(&asked))?;
        }
        Ok(Self(asked))
    }

    /// `sink`, until a signal comes: then every write fails with [`Interrupted`], and the writer that stands behind it
    /// takes away what it made.
    pub(crate) fn sink<'a>(&'a self, sink: &'a dyn TensorSink) -> impl TensorSink + 'a {
        Interruptible {
            asked: &self.0,
            sink,
        }
    }
}

struct Interruptible<'a> {
    asked: &'a AtomicBool,
    sink: &'a dyn TensorSink,
}

impl TensorSink for Interruptible<'_> {
    fn write(&self, name: &str, offset_bytes: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        if self.asked.load(Ordering::Relaxed) {
            return Err(CheckpointError::Foreign {
                name: name.to_owned(),
                action: "written",
                source: Box::new(Interrupted),
            });
        }
        self.sink.write(name, offset_bytes, bytes)
    }
}
