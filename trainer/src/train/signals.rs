//! Ctrl-C and the signals of schedulers: finish the step, save, leave; a second one leaves at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;

/// What the signals so far asked for.
#[derive(Debug, Clone)]
pub(crate) struct Signals {
    stop: Arc<AtomicBool>,
    save: Arc<AtomicBool>,
}

impl Signals {
    /// Listens for SIGINT and SIGTERM (save and stop) and SIGUSR1 (save and go on).
    ///
    /// # Errors
    /// When the system refuses a handler.
    pub(crate) fn listen() -> std::io::Result<Self> {
        let signals = Self {
            stop: Arc::default(),
            save: Arc::default(),
        };
        for signal in [SIGINT, SIGTERM] {
            // The order matters: the first signal finds the flag unset here and sets it below; the second one ends the process.
            flag::register_conditional_shutdown(signal, 130, Arc::clone(&signals.stop))?;
            flag::register(signal, Arc::clone(&signals.stop))?;
        }
        flag::register(SIGUSR1, Arc::clone(&signals.save))?;
        Ok(signals)
    }

    /// Whether the run is to save and stop.
    #[must_use]
    pub(crate) fn stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Whether a checkpoint was asked for since the last call.
    #[must_use]
    pub(crate) fn take_save(&self) -> bool {
        self.save.swap(false, Ordering::Relaxed)
    }
}
