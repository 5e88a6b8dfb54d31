//! The process's terminal: stdout, stderr, colour, verbosity and the tracing subscriber.

use std::io::{self, IsTerminal, Write};
use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

use indicatif::MultiProgress;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Between plain lines of progress, where there is no terminal for a bar.
pub(super) const PLAIN_INTERVAL: Duration = Duration::from_secs(30);

/// How much goes to stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verbosity {
    /// Warnings and errors only, no progress.
    Quiet,
    /// Progress, and what a user would miss.
    Normal,
    /// Decisions too: which kernel, which row.
    Debug,
    /// One line a tensor.
    Trace,
}

/// When to colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum ColorChoice {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

// The process has one terminal, so its state is global; `init` sets it once, before a command runs.
static VERBOSITY: OnceLock<Verbosity> = OnceLock::new();
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Sets colour, verbosity and the log subscriber (stderr). Called once, before a command runs.
pub(crate) fn init(verbosity: Verbosity, color: ColorChoice) {
    match color {
        ColorChoice::Auto => anstream::ColorChoice::Auto,
        ColorChoice::Always => anstream::ColorChoice::Always,
        ColorChoice::Never => anstream::ColorChoice::Never,
    }
    .write_global();
    let _ = VERBOSITY.set(verbosity);
    let level = match verbosity {
        Verbosity::Quiet => LevelFilter::WARN,
        Verbosity::Normal => LevelFilter::INFO,
        Verbosity::Debug => LevelFilter::DEBUG,
        Verbosity::Trace => LevelFilter::TRACE,
    };
    let colored = match color {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => anstream::stderr().current_choice() != anstream::ColorChoice::Never,
    };
    // A second call (tests run commands in one process) keeps the first subscriber.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(LogWriter)
        .with_ansi(colored && io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .try_init();
}

/// What `init` was told; `Normal` before that.
pub(crate) fn verbosity() -> Verbosity {
    VERBOSITY.get().copied().unwrap_or(Verbosity::Normal)
}

/// The results of a command. Colour codes are stripped where nobody can see them.
pub(crate) fn out() -> impl Write {
    anstream::stdout()
}

/// Everything that is not a result.
pub(crate) fn err() -> impl Write {
    anstream::stderr()
}

/// The progress bars of the process; lines are written through [`note`] so that they do not tear them.
pub(crate) fn bars() -> &'static MultiProgress {
    &BARS
}

/// One line on stderr, unless `--quiet`.
pub(crate) fn note(line: impl std::fmt::Display) {
    if verbosity() > Verbosity::Quiet {
        BARS.suspend(|| {
            let _ = writeln!(err(), "{line}");
        });
    }
}

/// One JSON value on one line of stdout.
pub(crate) fn json_line(value: &serde_json::Value) -> io::Result<()> {
    let mut out = out();
    writeln!(out, "{value}")?;
    out.flush()
}

/// Prints `error: ...` and its causes on stderr, or `{"error": ...}` on stdout when JSON was asked for.
pub(crate) fn print_error(error: &anyhow::Error, json: bool) {
    if json {
        let _ = json_line(&serde_json::json!({ "error": format!("{error:#}") }));
        return;
    }
    BARS.suspend(|| {
        let mut stderr = err();
        let _ = writeln!(stderr, "error: {error}");
        for cause in error.chain().skip(1) {
            let _ = writeln!(stderr, "caused by: {cause}");
        }
    });
}

struct LogWriter;

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = LogLine;
    fn make_writer(&'a self) -> LogLine {
        LogLine
    }
}

/// Writes between progress bars, never through them.
struct LogLine;

impl Write for LogLine {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        BARS.suspend(|| anstream::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        anstream::stderr().flush()
    }
}
