//! Ctrl-C while files are written: what is half-made goes and the process leaves with code 130; a second one leaves at once.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bridge_core::checkpoint::{CheckpointError, FileSink, TensorSink};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::report::Transfer;

/// The user, or a scheduler, asked the process to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted; the output was not made")]
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
    pub(crate) fn sink<'a, S: TensorSink + ?Sized>(&'a self, sink: &'a S) -> Watched<'a, S> {
        Watched {
            asked: &self.0,
            transfer: None,
            sink,
        }
    }
}

/// A sink that stops when it is asked to, and shows what passes through it.
pub(crate) struct Watched<'a, S: ?Sized> {
    asked: &'a AtomicBool,
    transfer: Option<&'a Transfer>,
    sink: &'a S,
}

impl<'a, S: ?Sized> Watched<'a, S> {
    /// Shows the bytes that are written in `transfer`.
    pub(crate) fn showing(self, transfer: &'a Transfer) -> Self {
        Self {
            transfer: Some(transfer),
            ..self
        }
    }
}

impl<S: TensorSink + ?Sized> TensorSink for Watched<'_, S> {
    fn write(&self, name: &str, offset_bytes: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        if self.asked.load(Ordering::Relaxed) {
            return Err(CheckpointError::Foreign {
                name: name.to_owned(),
                action: "written",
                source: Box::new(Interrupted),
            });
        }
        self.sink.write(name, offset_bytes, bytes)?;
        if let Some(transfer) = self.transfer {
            transfer.add(bytes.len() as u64);
        }
        Ok(())
    }
}

impl<S: FileSink + ?Sized> FileSink for Watched<'_, S> {
    fn num_files(&self) -> usize {
        self.sink.num_files()
    }

    fn file_bytes(&self, file: usize) -> u64 {
        self.sink.file_bytes(file)
    }

    fn unwritten(&self, file: usize) -> Vec<&str> {
        self.sink.unwritten(file)
    }

    fn finish_file(&self, file: usize) -> Result<(), CheckpointError> {
        self.sink.finish_file(file)
    }
}
