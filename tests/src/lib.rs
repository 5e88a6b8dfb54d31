//! Where the goldens are, and what tests share.

#[expect(clippy::unwrap_used, reason = "a test may panic")]
pub mod fp8;
#[expect(clippy::unwrap_used, reason = "a test may panic")]
pub mod tensors;

use std::path::PathBuf;
#[cfg(feature = "torch")]
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The path of a file or folder under `tests/goldens`.
pub fn golden(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "goldens", name]
        .iter()
        .collect()
}

/// Seeds libtorch's generator and keeps other tests that draw from it waiting while the guard lives: the generator is one
/// for all threads, so without it the drawn numbers would depend on which tests run at the same time.
#[cfg(feature = "torch")]
#[must_use = "the numbers are only repeatable while the guard lives"]
pub fn seeded(seed: i64) -> MutexGuard<'static, ()> {
    static GENERATOR: Mutex<()> = Mutex::new(());
    let guard = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(seed);
    guard
}
