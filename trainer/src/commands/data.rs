//! `trainer data`: Show each row of a data set as the model will see it.

use std::fmt::Write as _;
use std::io::{self, Read, Seek, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use owo_colors::OwoColorize;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::data::{DataError, Dataset, EncodeOptions, Processor, Sample, TooLong};
use crate::hub::{self, Lookup, Wanted};
use crate::report;

/// Show each row of a data set as the model will see it.
///
/// The supervised part of a text stands between {+ and +}, and in green where colours are shown.
///
/// Example: trainer data --model Qwen3.5-0.8B --data train.jsonl --limit 3
#[derive(Debug, clap::Args)]
pub(crate) struct DataArgs {
    /// Directory or Hub id of a model: tokenizer, chat template, image and video settings; no weights are downloaded.
    #[arg(long, value_name = "MODEL")]
    model: PathBuf,
    /// Rows: JSON lines or a JSON array, with `messages` or `conversations`.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Show the first N rows only.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// One JSON object a row on stdout, and nothing else.
    #[arg(long)]
    json: bool,
    /// Write the pixel values of the rows shown, as `row.N.pixel_values` and `row.N.pixel_values_videos`.
    #[arg(long, value_name = "FILE")]
    tensors: Option<PathBuf>,
    /// Replace the file of `--tensors` if there is one.
    #[arg(long, requires = "tensors")]
    overwrite: bool,
    /// Tokens that a row may have.
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Cut rows that are too long, never through an image, instead of refusing them.
    #[arg(long, requires = "max_length")]
    truncate: bool,
}

/// Rows prepared at a time, in parallel; bounds how many pictures are in memory.
const ROWS_AT_ONCE: usize = 32;

pub(crate) fn run(args: &DataArgs) -> anyhow::Result<ExitCode> {
    let model = hub::local(&args.model, Wanted::Processor, &Lookup::default())?;
    let processor = Processor::from_dir(&model)
        .with_context(|| format!("read the processor of {}", args.model.display()))?;
    let dataset = Dataset::open(&args.data).context("open the data set")?;
    let mut tensors = match &args.tensors {
        Some(path) => {
            anyhow::ensure!(
                args.overwrite || !path.exists(),
                "{} exists; give another path, or --overwrite",
                path.display()
            );
            Some(TensorFile::create(path)?)
        }
        None => None,
    };
    let options = EncodeOptions {
        max_length: args.max_length,
        too_long: if args.truncate {
            TooLong::Truncate
        } else {
            TooLong::Refuse
        },
        ..EncodeOptions::default()
    };
    let base_dir = dataset.base_dir();
    let rows = args
        .limit
        .map_or(dataset.len(), |limit| limit.min(dataset.len()));
    let mut summary = Summary::default();
    for start in (0..rows).step_by(ROWS_AT_ONCE) {
        let end = rows.min(start + ROWS_AT_ONCE);
        let samples: Vec<Result<Sample, DataError>> = (start..end)
            .into_par_iter()
            .map(|index| processor.encode(&dataset.row(index)?, &base_dir, &options))
            .collect();
        for (row, sample) in (start..end).zip(samples) {
            summary.add(&sample);
            if let (Some(tensors), Ok(sample)) = (&mut tensors, &sample) {
                tensors.add(sample).context("write the pixel values")?;
            }
            if args.json {
                report::json_line(&row_object(row, &sample))?;
            } else {
                report::out().write_all(row_text(row, &sample).as_bytes())?;
            }
        }
    }
    if let (Some(tensors), Some(path)) = (tensors, &args.tensors) {
        tensors
            .finish(path)
            .with_context(|| format!("write {}", path.display()))?;
    }
    if !args.json {
        writeln!(report::out(), "{summary}")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row_object(row: usize, sample: &Result<Sample, DataError>) -> Value {
    match sample {
        Ok(sample) => json!({
            "row": row,
            "text": sample.text,
            "input_ids": sample.input_ids,
            "labels": sample.labels,
            "mm_token_type_ids": sample.mm_token_type_ids,
            "image_grid_thw": sample.image_grid_thw,
            "video_grid_thw": sample.video_grid_thw,
        }),
        Err(error) => json!({"row": row, "error": error_text(error)}),
    }
}

fn error_text(error: &DataError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let _ = write!(text, ": {inner}");
        cause = inner.source();
    }
    text
}

fn row_text(row: usize, sample: &Result<Sample, DataError>) -> String {
    let mut out = String::new();
    let title = format!("row {row}");
    let sample = match sample {
        Ok(sample) => sample,
        Err(error) => {
            let _ = writeln!(
                out,
                "{}  {} {}\n",
                title.bold(),
                "error:".red().bold(),
                error_text(error)
            );
            return out;
        }
    };
    let _ = writeln!(
        out,
        "{}  {} tokens, {} supervised",
        title.bold(),
        sample.input_ids.len(),
        sample.supervised_tokens()
    );
    let _ = writeln!(out, "{}", marked_text(&sample.text, &sample.supervised));
    let _ = writeln!(
        out,
        "{} {}",
        "input_ids".dimmed(),
        ids_text(&sample.input_ids, &sample.labels)
    );
    let _ = writeln!(out, "{} {}", "labels".dimmed(), runs(&sample.labels));
    let _ = writeln!(
        out,
        "{} {}",
        "mm_token_type_ids".dimmed(),
        runs(&sample.mm_token_type_ids)
    );
    for (name, grids) in [
        ("image_grid_thw", &sample.image_grid_thw),
        ("video_grid_thw", &sample.video_grid_thw),
    ] {
        if !grids.is_empty() {
            let grids: Vec<String> = grids
                .iter()
                .map(|[t, h, w]| format!("{t}x{h}x{w}"))
                .collect();
            let _ = writeln!(out, "{} {}", name.dimmed(), grids.join(" "));
        }
    }
    out.push('\n');
    out
}

/// The text with each supervised range between `{+` and `+}`, green; control characters are shown, not sent.
fn marked_text(text: &str, supervised: &[Range<usize>]) -> String {
    let mut out = String::new();
    let mut from = 0;
    for range in supervised {
        out.push_str(&visible(&text[from..range.start]));
        // Line by line, since a colour that spans lines bleeds in pagers.
        let inner = visible(&text[range.clone()]);
        let lines: Vec<String> = format!("{{+{inner}+}}")
            .split('\n')
            .map(|line| line.green().to_string())
            .collect();
        out.push_str(&lines.join("\n"));
        from = range.end;
    }
    out.push_str(&visible(&text[from..]));
    out
}

/// A data set may hold terminal commands; none of them reaches the terminal.
fn visible(text: &str) -> String {
    text.chars()
        .fold(String::with_capacity(text.len()), |mut out, c| {
            if c.is_control() && c != '\n' && c != '\t' {
                out.extend(c.escape_default());
            } else {
                out.push(c);
            }
            out
        })
}

/// Ids with runs shortened (`972 x16`), the supervised ones between `{+` and `+}`, green.
fn ids_text(ids: &[i64], labels: &[i64]) -> String {
    let is_target = |index: usize| labels[index] >= 0;
    let mut parts = Vec::new();
    let mut start = 0;
    while start < ids.len() {
        let target = is_target(start);
        let end = (start..ids.len())
            .find(|&index| is_target(index) != target)
            .unwrap_or(ids.len());
        let text = runs(&ids[start..end]);
        parts.push(if target {
            format!("{{+{text}+}}").green().to_string()
        } else {
            text
        });
        start = end;
    }
    parts.join(" ")
}

fn runs(values: &[i64]) -> String {
    values
        .chunk_by(|a, b| a == b)
        .flat_map(|run| {
            let short = run.len() > 3;
            let one = if short {
                format!("{} x{}", run[0], run.len())
            } else {
                run[0].to_string()
            };
            std::iter::repeat_n(one, if short { 1 } else { run.len() })
        })
        .collect::<Vec<_>>()
        .join(" ")
}

/// What the rows come to.
#[derive(Debug, Default)]
struct Summary {
    rows: usize,
    errors: usize,
    tokens: usize,
    longest: usize,
    supervised: usize,
    images: usize,
    videos: usize,
}

impl Summary {
    fn add(&mut self, sample: &Result<Sample, DataError>) {
        self.rows += 1;
        let Ok(sample) = sample else {
            self.errors += 1;
            return;
        };
        self.tokens += sample.input_ids.len();
        self.longest = self.longest.max(sample.input_ids.len());
        self.supervised += sample.supervised_tokens();
        self.images += sample.image_grid_thw.len();
        self.videos += sample.video_grid_thw.len();
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} rows, {} with errors; {} tokens (longest row {}), {} supervised; {} images, {} videos",
            self.rows,
            self.errors,
            self.tokens,
            self.longest,
            self.supervised,
            self.images,
            self.videos
        )
    }
}

/// A safetensors file whose header is known last: values are spooled beside it, then joined and renamed.
struct TensorFile {
    spool: tempfile::NamedTempFile,
    header: Map<String, Value>,
    bytes: u64,
}

impl TensorFile {
    fn create(path: &Path) -> anyhow::Result<Self> {
        let spool = tempfile::NamedTempFile::new_in(folder(path))
            .with_context(|| format!("write beside {}", path.display()))?;
        Ok(Self {
            spool,
            header: Map::new(),
            bytes: 0,
        })
    }

    fn add(&mut self, sample: &Sample) -> io::Result<()> {
        for (name, grids, values) in [
            ("pixel_values", &sample.image_grid_thw, &sample.pixel_values),
            (
                "pixel_values_videos",
                &sample.video_grid_thw,
                &sample.pixel_values_videos,
            ),
        ] {
            let patches: i64 = grids.iter().map(|grid| grid.iter().product::<i64>()).sum();
            let Ok(patches) = usize::try_from(patches) else {
                continue;
            };
            if patches == 0 {
                continue;
            }
            let bytes: &[u8] = bytemuck::cast_slice(values);
            self.spool.write_all(bytes)?;
            let end = self.bytes + bytes.len() as u64;
            self.header.insert(
                format!("row.{}.{name}", sample.row),
                json!({
                    "dtype": "F32",
                    "shape": [patches, values.len() / patches],
                    "data_offsets": [self.bytes, end],
                }),
            );
            self.bytes = end;
        }
        Ok(())
    }

    fn finish(mut self, path: &Path) -> anyhow::Result<()> {
        let mut header = Value::Object(self.header).to_string();
        // The data starts at a multiple of eight.
        while !header.len().is_multiple_of(8) {
            header.push(' ');
        }
        let mut out = tempfile::NamedTempFile::new_in(folder(path))?;
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        self.spool.rewind()?;
        io::copy(
            &mut Read::by_ref(&mut self.spool).take(self.bytes),
            &mut out,
        )?;
        out.as_file().sync_all()?;
        out.persist(path)?;
        Ok(())
    }
}

fn folder(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn supervised_text_is_marked_without_colour_too() {
        let plain = anstream::adapter::strip_str(&marked_text(
            "ab\u{1b}[31mcd\ne",
            std::slice::from_ref(&(1..2)),
        ))
        .to_string();
        assert_eq!(plain, "a{+b+}\\u{1b}[31mcd\ne");
    }

    #[test]
    fn runs_are_shortened() {
        assert_eq!(runs(&[1, 1, 972, 972, 972, 972, 2]), "1 1 972 x4 2");
        assert_eq!(runs(&[]), "");
    }
}
