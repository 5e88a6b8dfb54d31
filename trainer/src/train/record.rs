//! One line a step, to every place that records a run.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Map, Value, json};

use super::evaluate::Evaluation;
use super::step::StepLosses;
use crate::report::{EventFile, MetricsFile, Progress, StepLine, loss_plot, note, series};

/// How many of the last steps the final loss is the mean of.
const FINAL_STEPS: usize = 8;

/// The open records of a run.
pub(crate) struct Record {
    metrics: PathBuf,
    file: MetricsFile,
    events: Option<EventFile>,
    progress: Progress,
    started: Instant,
    last_time: Instant,
    last_tokens: u64,
}

/// A step as it is recorded.
#[derive(Debug, Clone)]
pub(crate) struct StepRecord {
    /// Steps done, this one included.
    pub(crate) step: u64,
    /// Epochs done, with the fraction of the current one.
    pub(crate) epoch: f64,
    pub(crate) losses: StepLosses,
    pub(crate) grad_norm: f64,
    pub(crate) learning_rate: f64,
    /// Real tokens since the run's start.
    pub(crate) tokens: u64,
    pub(crate) supervised_tokens: u64,
}

impl Record {
    /// Opens the records of a run that has done `step` of `total` steps and seen `tokens`.
    pub(crate) fn open(
        run_dir: &Path,
        report_to: &[String],
        step: u64,
        total: u64,
        tokens: u64,
    ) -> std::io::Result<Self> {
        let metrics = run_dir.join("metrics.jsonl");
        let events = report_to
            .iter()
            .any(|name| name == "tensorboard")
            .then(|| EventFile::create(&run_dir.join("tensorboard"), step))
            .transpose()?;
        let now = Instant::now();
        Ok(Self {
            file: MetricsFile::open(&metrics, step)?,
            metrics,
            events,
            progress: Progress::start(step, total),
            started: now,
            last_time: now,
            last_tokens: tokens,
        })
    }

    /// Records a step; what is shown is also in the file.
    pub(crate) fn step(&mut self, record: &StepRecord) -> std::io::Result<()> {
        let now = Instant::now();
        let seconds = (now - self.last_time).as_secs_f64().max(1e-9);
        #[expect(
            clippy::cast_precision_loss,
            reason = "token counts are far below 2^52"
        )]
        let tokens_per_second = (record.tokens - self.last_tokens) as f64 / seconds;
        (self.last_time, self.last_tokens) = (now, record.tokens);

        let losses = &record.losses;
        let mut shown = vec![("loss", losses.lm)];
        shown.extend(losses.mtp.map(|loss| ("mtp_loss", loss)));
        shown.extend(losses.aux.map(|loss| ("aux_loss", loss)));
        let mut line = Map::new();
        line.insert("step".to_owned(), json!(record.step));
        line.insert("epoch".to_owned(), json!(record.epoch));
        for (name, value) in &shown {
            line.insert((*name).to_owned(), json!(value));
        }
        line.insert("grad_norm".to_owned(), json!(record.grad_norm));
        line.insert("learning_rate".to_owned(), json!(record.learning_rate));
        line.insert("tokens".to_owned(), json!(record.tokens));
        line.insert(
            "supervised_tokens".to_owned(),
            json!(record.supervised_tokens),
        );
        line.insert("tokens_per_second".to_owned(), json!(tokens_per_second));
        line.insert(
            "seconds".to_owned(),
            json!(self.started.elapsed().as_secs_f64()),
        );
        self.file.append(&line)?;

        let mut scalars = shown.clone();
        scalars.push(("grad_norm", record.grad_norm));
        scalars.push(("learning_rate", record.learning_rate));
        scalars.push(("tokens_per_second", tokens_per_second));
        self.scalars("train", record.step, &scalars)?;
        self.progress.step(&StepLine {
            step: record.step,
            losses: &shown,
            learning_rate: record.learning_rate,
            tokens_per_second,
        });
        Ok(())
    }

    /// Records an evaluation.
    pub(crate) fn evaluation(&mut self, step: u64, result: &Evaluation) -> std::io::Result<()> {
        let mut line = Map::new();
        line.insert("step".to_owned(), json!(step));
        line.insert("eval_loss".to_owned(), json!(result.loss));
        let mut scalars = vec![("loss", result.loss)];
        if let Some(mtp) = result.mtp_loss {
            line.insert("eval_mtp_loss".to_owned(), json!(mtp));
            scalars.push(("mtp_loss", mtp));
        }
        line.insert("eval_samples".to_owned(), json!(result.counts.samples));
        line.insert(
            "eval_supervised_tokens".to_owned(),
            json!(result.counts.targets),
        );
        self.file.append(&line)?;
        self.scalars("eval", step, &scalars)?;
        let (samples, tokens) = (result.counts.samples, result.counts.targets);
        note(format_args!(
            "step {step}: eval_loss {:.4} ({samples} samples, {tokens} supervised tokens)",
            result.loss
        ));
        // The evaluation's time is not the next step's.
        self.last_time = Instant::now();
        Ok(())
    }

    /// Records a step that was left out, with the reason.
    pub(crate) fn left_out(&mut self, step: u64, reason: &str) -> std::io::Result<()> {
        let mut line = Map::new();
        line.insert("step".to_owned(), json!(step));
        line.insert("left_out".to_owned(), Value::from(reason));
        self.file.append(&line)?;
        note(format_args!("warning: step {step} left out: {reason}"));
        Ok(())
    }

    fn scalars(&mut self, kind: &str, step: u64, values: &[(&str, f64)]) -> std::io::Result<()> {
        let Some(events) = &mut self.events else {
            return Ok(());
        };
        let tags: Vec<(String, f64)> = values
            .iter()
            .map(|(name, value)| (format!("{kind}/{name}"), *value))
            .collect();
        let scalars: Vec<(&str, f64)> = tags.iter().map(|(tag, v)| (tag.as_str(), *v)).collect();
        events.scalars(step, &scalars)
    }

    /// The mean of the last recorded losses, of earlier parts of the run too.
    pub(crate) fn final_loss(&self) -> std::io::Result<Option<f64>> {
        let losses = series(&self.metrics, "loss")?;
        let last: Vec<f64> = losses
            .iter()
            .rev()
            .take(FINAL_STEPS)
            .map(|(_, loss)| *loss)
            .collect();
        #[expect(clippy::cast_precision_loss, reason = "at most eight")]
        Ok((!last.is_empty()).then(|| last.iter().sum::<f64>() / last.len() as f64))
    }

    /// Draws the losses of the whole run to `path`.
    pub(crate) fn plot(&self, path: &Path, title: &str) -> anyhow::Result<()> {
        let lines = ["loss", "eval_loss", "mtp_loss"]
            .into_iter()
            .map(|key| Ok((key, series(&self.metrics, key)?)))
            .filter(|line: &std::io::Result<_>| {
                line.as_ref().map_or(true, |line| !line.1.is_empty())
            })
            .collect::<std::io::Result<Vec<_>>>()?;
        loss_plot(path, title, &lines)
    }

    /// Ends the progress bar.
    pub(crate) fn finish(&self) {
        self.progress.finish();
    }
}
