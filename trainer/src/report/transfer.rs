//! What a person sees while bytes are moved: a bar on a terminal, a plain line now and then elsewhere.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::terminal::{PLAIN_INTERVAL, Verbosity, bars, note, verbosity};

/// The progress of a conversion or download. Any thread may add to it.
#[derive(Debug)]
pub(crate) struct Transfer {
    shown: bool,
    /// What happens to the bytes.
    done_word: &'static str,
    bar: Option<ProgressBar>,
    total: u64,
    done: AtomicU64,
    last_line: Mutex<Instant>,
}

impl Transfer {
    /// `total` bytes that are to be `done_word`. It is not `shown` where the user does not want to see it.
    pub(crate) fn start(total: u64, shown: bool, done_word: &'static str) -> Self {
        let shown = shown && verbosity() > Verbosity::Quiet;
        let bar = (shown && std::io::stderr().is_terminal()).then(|| {
            let target = ProgressDrawTarget::stderr_with_hz(8);
            let bar = bars().add(ProgressBar::with_draw_target(Some(total), target));
            let template = "{bar:24} {bytes}/{total_bytes} {bytes_per_sec} {elapsed} < {eta}";
            bar.set_style(ProgressStyle::with_template(template).expect("a fixed template"));
            bar
        });
        Self {
            shown,
            done_word,
            bar,
            total,
            done: AtomicU64::new(0),
            last_line: Mutex::new(Instant::now()),
        }
    }

    /// So many bytes more are done.
    pub(crate) fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
            return;
        }
        if !self.shown {
            return;
        }
        let mut last = self
            .last_line
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if last.elapsed() >= PLAIN_INTERVAL {
            *last = Instant::now();
            note(format_args!(
                "{} of {} {}",
                ByteSize(done),
                ByteSize(self.total),
                self.done_word
            ));
        }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
