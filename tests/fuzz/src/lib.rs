//! The parsers of untrusted files, one function each, as fuzzers and tests run them.
//!
//! A target gives its input to a parser through the door that users have: the file is written into a directory and the
//! directory is opened. It must not panic, and what it holds in memory at any moment is counted: see
//! [`Target::memory_factor`].

mod room;
pub mod targets;

pub use room::Room;

/// A parser, under the name of its fuzz target and of its folder in the corpus.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// The name.
    pub name: &'static str,
    /// Reads the input and gives the most bytes that it held at once.
    pub peak_of: fn(&[u8]) -> usize,
    /// It never holds more than this many times the input, and the floor.
    pub memory_factor: usize,
    /// Bytes that it may hold for an input of any size.
    pub memory_floor: usize,
}

/// Runs the target of this name.
///
/// # Panics
/// When there is none, or the parser held more than the input explains: libFuzzer and tests take it as a crash.
pub fn check(name: &str, input: &[u8]) {
    let target = targets::ALL.iter().find(|target| target.name == name);
    let target = target.expect("targets are called by the names of the table");
    let peak = (target.peak_of)(input);
    let limit = target.memory_factor * input.len() + target.memory_floor;
    assert!(
        peak <= limit,
        "{name}: an input of {} bytes made its parser hold {peak} bytes, the limit is {limit}",
        input.len()
    );
}
