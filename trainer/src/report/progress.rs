//! What a person sees while a run goes: a bar on a terminal, plain lines elsewhere, nothing with `--quiet`.

use std::io::IsTerminal;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::terminal::{PLAIN_INTERVAL, Verbosity, bars, note, verbosity};

/// The progress of a training run.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    total: u64,
    started: Instant,
    first_step: u64,
    /// The first and the last step always have a line.
    last_line: Option<Instant>,
}

/// What a step's line shows.
#[derive(Debug, Clone)]
pub(crate) struct StepLine<'a> {
    /// Steps done, this one included.
    pub(crate) step: u64,
    /// Language-model loss, then the others.
    pub(crate) losses: &'a [(&'a str, f64)],
    /// Rate of this step.
    pub(crate) learning_rate: f64,
    /// Real tokens a second, over the last steps.
    pub(crate) tokens_per_second: f64,
}

impl Progress {
    /// A run that has done `step` of `total` steps.
    pub(crate) fn start(step: u64, total: u64) -> Self {
        let on_terminal = std::io::stderr().is_terminal() && verbosity() > Verbosity::Quiet;
        let bar = on_terminal.then(|| {
            let bar = bars().add(ProgressBar::with_draw_target(
                Some(total),
                ProgressDrawTarget::stderr_with_hz(8),
            ));
            let template = "{bar:24} {pos}/{len} {msg} {elapsed} < {eta}";
            let style = ProgressStyle::with_template(template).expect("a fixed template");
            bar.set_style(style);
            bar.set_position(step);
            bar.reset_eta();
            bar
        });
        Self {
            bar,
            total,
            started: Instant::now(),
            first_step: step,
            last_line: None,
        }
    }

    /// Shows a step.
    pub(crate) fn step(&mut self, line: &StepLine<'_>) {
        let text = text(line);
        if let Some(bar) = &self.bar {
            bar.set_position(line.step);
            bar.set_message(text);
            return;
        }
        let due = self
            .last_line
            .is_none_or(|last| last.elapsed() >= PLAIN_INTERVAL);
        if due || line.step == self.total {
            self.last_line = Some(Instant::now());
            note(format_args!(
                "step {}/{} {text} {}",
                line.step,
                self.total,
                self.left(line.step)
            ));
        }
    }

    /// Takes the bar away; the last line stays readable.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }

    fn left(&self, step: u64) -> String {
        let done = step.saturating_sub(self.first_step).max(1);
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let seconds = self.started.elapsed().as_secs_f64() / done as f64
            * self.total.saturating_sub(step) as f64;
        format!("left {}", clock(seconds))
    }
}

fn text(line: &StepLine<'_>) -> String {
    let losses: Vec<String> = line
        .losses
        .iter()
        .map(|(name, loss)| format!("{name} {loss:.4}"))
        .collect();
    format!(
        "{} lr {:.2e} {:.0} tok/s",
        losses.join(" "),
        line.learning_rate,
        line.tokens_per_second
    )
}

/// `h:mm:ss`.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "whole seconds, not negative"
)]
pub(crate) fn clock(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    format!(
        "{}:{:02}:{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_shows_the_language_loss_first_then_the_others() {
        let losses = [("loss", 1.25), ("mtp_loss", 2.5)];
        let line = StepLine {
            step: 3,
            losses: &losses,
            learning_rate: 1e-4,
            tokens_per_second: 1234.4,
        };
        assert_eq!(
            text(&line),
            "loss 1.2500 mtp_loss 2.5000 lr 1.00e-4 1234 tok/s"
        );
        assert_eq!(clock(3725.4), "1:02:05");
    }
}
