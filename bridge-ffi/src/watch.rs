//! Work in other threads while the calling one looks on: cancellation and progress.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use bridge_core::convert::{ConvertError, ExecuteOptions, NonFinite};

use crate::error::{FfiError, panic_error};

/// How often progress is told.
const TICK: Duration = Duration::from_millis(50);

/// Stops work from elsewhere; clones share one state.
#[derive(Debug, Clone, Default)]
pub struct Cancellation(Arc<AtomicBool>);

impl Cancellation {
    /// Asks work to stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether that was asked for.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What looks on: told of bytes that are done and of all bytes, it says whether to go on.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> ControlFlow<()>;

/// How tensors are loaded or written.
#[derive(Default)]
pub struct Options<'a> {
    /// Threads; 0: one a core.
    pub threads: usize,
    /// Called in the calling thread.
    pub progress: Option<Progress<'a>>,
    /// Stops the work from elsewhere.
    pub cancellation: Option<Cancellation>,
    /// Carries infinities and NaN.
    pub allow_non_finite: bool,
    /// Takes less than the whole plan.
    pub partial: bool,
}

impl Options<'_> {
    /// The executor's options, with a number of threads that is never 0: that would be the threads of the whole process.
    pub(crate) fn execute_options(&self) -> ExecuteOptions {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        ExecuteOptions {
            threads: match self.threads {
                0 => cores(),
                threads => threads,
            },
            non_finite: match self.allow_non_finite {
                true => NonFinite::Allow,
                false => NonFinite::Refuse,
            },
            ..ExecuteOptions::default()
        }
    }

    /// Does `work`, which tells of the bytes that it has moved, of `total` in all.
    ///
    /// # Errors
    /// [`FfiError::Cancelled`] when the work was stopped; else what it gives.
    pub(crate) fn watch<T: Send>(
        &mut self,
        total: u64,
        work: impl FnOnce(&(dyn Fn(u64) -> ControlFlow<()> + Sync)) -> Result<T, FfiError> + Send,
    ) -> Result<T, FfiError> {
        let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let cancellation = self.cancellation.clone();
        let asked = || {
            stop.load(Ordering::Relaxed)
                || cancellation
                    .as_ref()
                    .is_some_and(Cancellation::is_cancelled)
        };
        let moved = |bytes: u64| {
            done.fetch_add(bytes, Ordering::Relaxed);
            match asked() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        let cancelled = || FfiError::Cancelled {
            done: done.load(Ordering::Relaxed),
            total,
        };
        if asked() {
            return Err(cancelled());
        }
        let result = match &mut self.progress {
            None => work(&moved),
            Some(progress) => in_sight(progress, total, &done, &stop, || work(&moved)),
        };
        match result {
            Err(FfiError::Convert(ConvertError::Stopped)) => Err(cancelled()),
            // Whoever asks to stop when the work has just ended is told so too.
            Ok(_) if stop.load(Ordering::Relaxed) => Err(cancelled()),
            other => other,
        }
    }
}

/// Works in a thread of its own while this one tells how far it is.
fn in_sight<T: Send>(
    progress: &mut Progress<'_>,
    total: u64,
    done: &AtomicU64,
    stop: &AtomicBool,
    work: impl FnOnce() -> Result<T, FfiError> + Send,
) -> Result<T, FfiError> {
    std::thread::scope(|scope| {
        let (ended, ends) = channel::<()>();
        let worker = scope.spawn(move || {
            let _ended = ended;
            work()
        });
        while ends.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
            if !stop.load(Ordering::Relaxed)
                && progress(done.load(Ordering::Relaxed), total).is_break()
            {
                stop.store(true, Ordering::Relaxed);
            }
        }
        let result = match worker.join() {
            Ok(result) => result,
            Err(payload) => return Err(panic_error(payload.as_ref())),
        };
        if result.is_ok()
            && !stop.load(Ordering::Relaxed)
            && progress(done.load(Ordering::Relaxed), total).is_break()
        {
            stop.store(true, Ordering::Relaxed);
        }
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    #[test]
    fn progress_is_told_in_the_calling_thread_and_ends_with_everything() {
        let here = std::thread::current().id();
        let mut seen = Vec::new();
        let mut progress = |done, total| {
            assert_eq!(std::thread::current().id(), here);
            seen.push((done, total));
            ControlFlow::Continue(())
        };
        let mut options = Options {
            progress: Some(&mut progress),
            ..Options::default()
        };
        let work = |moved: &(dyn Fn(u64) -> ControlFlow<()> + Sync)| {
            assert_ne!(std::thread::current().id(), here);
            assert!(moved(3).is_continue() && moved(4).is_continue());
            Ok(5)
        };
        assert_eq!(options.watch(7, work).unwrap(), 5);
        assert_eq!(seen.last(), Some(&(7, 7)));
    }

    #[test]
    fn work_that_is_cancelled_before_it_begins_does_not_begin() {
        let cancellation = Cancellation::default();
        cancellation.cancel();
        let mut options = Options {
            cancellation: Some(cancellation),
            ..Options::default()
        };
        let mut begun = false;
        let work = |_: &(dyn Fn(u64) -> ControlFlow<()> + Sync)| {
            begun = true;
            Ok(())
        };
        let error = options.watch(7, work).unwrap_err();
        assert!(!begun);
        assert_eq!(error.status(), Status::Cancelled);
        assert_eq!(error.text(), "cancelled after 0 of 7 bytes");
    }

    #[test]
    fn a_callback_that_breaks_off_stops_the_work() {
        let mut progress = |_, _| ControlFlow::Break(());
        let mut options = Options {
            progress: Some(&mut progress),
            ..Options::default()
        };
        let work = |moved: &(dyn Fn(u64) -> ControlFlow<()> + Sync)| -> Result<(), FfiError> {
            while moved(1).is_continue() {
                std::thread::yield_now();
            }
            Err(ConvertError::Stopped.into())
        };
        let error = options.watch(7, work).unwrap_err();
        assert_eq!(error.status(), Status::Cancelled);
    }

    #[test]
    fn a_panic_of_the_work_is_an_error() {
        let mut progress = |_, _| ControlFlow::Continue(());
        let mut options = Options {
            progress: Some(&mut progress),
            ..Options::default()
        };
        let error = options
            .watch(1, |_| -> Result<(), FfiError> { panic!("oh") })
            .unwrap_err();
        assert_eq!(error.status(), Status::Internal);
    }
}
