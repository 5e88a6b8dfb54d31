//! How often and after which pauses a request is repeated.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

use super::error::DownloadError;

/// The longest pause that a server may ask for; behind a longer one the user should know.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);

/// What is left of the patience with one request.
pub(super) struct Patience(ExponentialBackoff);

impl Patience {
    /// Four more tries after pauses of about 0.5, 1, 2 and 4 seconds.
    pub(super) fn new() -> Self {
        let pauses = ExponentialBuilder::new()
            .with_min_delay(Duration::from_millis(500))
            .with_max_times(4)
            .with_jitter();
        Self(pauses.build())
    }

    /// Waits before the next try, or gives the error back when there is to be none.
    pub(super) fn wait(&mut self, error: DownloadError) -> Result<(), DownloadError> {
        if !error.is_transient() {
            return Err(error);
        }
        let Some(pause) = self.0.next() else {
            return Err(error);
        };
        let pause = error.retry_after().unwrap_or(pause);
        if pause > LONGEST_PAUSE {
            return Err(error);
        }
        tracing::warn!("{}; trying again", in_full(&error));
        std::thread::sleep(pause);
        Ok(())
    }
}

fn in_full(error: &DownloadError) -> String {
    let cause = std::error::Error::source(error);
    cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}
