//! `trainer demo`: The whole way once, on a model that is small enough for two minutes.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use bridge_core::AutoBridge;
use bridge_torch::generate::{GenerateOptions, generate};
use bridge_torch::model::{ModelOptions, Qwen3VlModel};
use comfy_table::{ContentArrangement, Table, presets};
use serde_json::{Value, json};

use crate::data::{Dataset, Processor};
use crate::hub::{self, Lookup, Wanted};
use crate::report;
use crate::train::config::{Override, resolve};
use crate::train::{RunOptions, ask_batch};

/// Questions shown side by side; all are asked.
const SHOWN: usize = 12;

/// Questions answered at once.
const BATCH: usize = 16;

/// Tokens an answer may have; the answers are one word.
const ANSWER_TOKENS: usize = 6;

/// Fine-tune a tiny model on pictures and ask it about them, before and after.
///
/// Example: `trainer demo --model tests/goldens/checkpoints/moe_vl --data tests/goldens/data/shapes/train.jsonl --output demo`
///
/// The last line of stdout is one JSON object: final_loss, asked, correct, correct_before, plot, checkpoint.
#[derive(Debug, clap::Args)]
pub(crate) struct DemoArgs {
    /// Hugging Face directory or Hub id to start from.
    #[arg(long, value_name = "MODEL")]
    model: PathBuf,
    /// Questions with pictures and one-word answers, JSONL.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Where the run and the trained checkpoint go.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Optimizer steps.
    #[arg(long, value_name = "N", default_value_t = 300)]
    max_steps: u64,
    /// Replace the run that OUTPUT holds.
    #[arg(long)]
    overwrite: bool,
}

pub(crate) fn run(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let questions = questions(&args.data)?;
    let model = hub::local(&args.model, Wanted::Model, &Lookup::default())?;
    let before = answers(&model, &args.data, &questions)?;

    // Measured: 300 steps at this rate answer all 64 training questions; a loss of 0.25 after 160 steps still answers a third wrong.
    let text = |path: &Path| Value::from(path.to_string_lossy());
    let settings = [
        ("model", text(&model)),
        ("data", text(&args.data)),
        ("output", text(&args.output)),
        ("max_steps", json!(args.max_steps)),
        ("per_device_train_batch_size", json!(8)),
        ("learning_rate", json!(2e-3)),
        ("lr_scheduler_type", json!("cosine")),
        ("warmup_steps", json!(10)),
        ("min_lr_ratio", json!(0.1)),
        ("adam_beta2", json!(0.95)),
        ("weight_decay", json!(0.0)),
        ("router_aux_loss_coef", json!(0.0)),
        ("mtp_loss_scaling_factor", json!(0.0)),
        ("save_steps", Value::Null),
    ];
    let overrides: Vec<Override> = settings
        .into_iter()
        .map(|(key, value)| Override::flag(key, value, "trainer demo".to_owned()))
        .collect();
    let resolved = resolve(None, None, &overrides)?;
    let options = RunOptions {
        resume: None,
        overwrite: args.overwrite,
    };
    let outcome = crate::train::run(&resolved, &options)?;
    if outcome.interrupted {
        return Ok(ExitCode::from(130));
    }

    let after = answers(&args.output, &args.data, &questions)?;
    let right = |answers: &[String]| {
        answers
            .iter()
            .zip(&questions)
            .filter(|(answer, q)| **answer == q.expected)
            .count()
    };
    let (correct_before, correct) = (right(&before), right(&after));
    let mut out = report::out();
    writeln!(out, "{}", table(&questions, &before, &after))?;
    if questions.len() > SHOWN {
        writeln!(out, "... and {} more questions", questions.len() - SHOWN)?;
    }
    writeln!(out, "right before: {correct_before} of {}", questions.len())?;
    writeln!(out, "right after:  {correct} of {}", questions.len())?;
    if let Some(plot) = &outcome.plot {
        writeln!(out, "plot:         {}", plot.display())?;
    }
    writeln!(out, "checkpoint:   {}", outcome.output.display())?;
    out.flush()?;
    report::json_line(&json!({
        "final_loss": outcome.final_loss,
        "asked": questions.len(),
        "correct": correct,
        "correct_before": correct_before,
        "plot": outcome.plot,
        "checkpoint": outcome.output,
    }))?;
    Ok(ExitCode::SUCCESS)
}

/// A question of the data file and its answer.
struct Question {
    /// The messages before the answer.
    messages: Value,
    text: String,
    expected: String,
}

fn questions(data: &Path) -> anyhow::Result<Vec<Question>> {
    let dataset = Dataset::open(data)?;
    let mut questions = Vec::new();
    for index in 0..dataset.len() {
        let row = dataset.row(index)?;
        let Some((answer, messages)) = row.value["messages"]
            .as_array()
            .and_then(|messages| messages.split_last())
        else {
            bail!(
                "{} row {index}: the demo needs `messages` that end in an answer",
                data.display()
            );
        };
        let last = messages
            .last()
            .map_or(&Value::Null, |message| &message["content"]);
        questions.push(Question {
            messages: Value::from(messages.to_vec()),
            text: plain_text(last),
            expected: plain_text(&answer["content"]),
        });
    }
    Ok(questions)
}

/// The text of a message's content.
fn plain_text(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts
            .iter()
            .filter_map(|part| part["text"].as_str())
            .collect(),
        _ => String::new(),
    }
}

/// Greedy answers of the model in `dir` to all questions.
fn answers(dir: &Path, data: &Path, questions: &[Question]) -> anyhow::Result<Vec<String>> {
    let job = || format!("ask {}", dir.display());
    let processor = Processor::from_dir(dir)?;
    let bridge = AutoBridge::from_hf_pretrained(dir).with_context(job)?;
    let options = ModelOptions {
        mtp: false,
        ..ModelOptions::default()
    };
    let model = Qwen3VlModel::load(&bridge, &options).with_context(job)?;
    let end = processor.tokenizer().token_id("<|im_end|>");
    let options = GenerateOptions {
        max_new_tokens: ANSWER_TOKENS,
        eos: end.into_iter().collect(),
        ..GenerateOptions::default()
    };
    let base_dir = data.parent().unwrap_or(Path::new("."));
    let mut answers = Vec::with_capacity(questions.len());
    for chunk in questions.chunks(BATCH) {
        let prompts = chunk
            .iter()
            .map(|question| processor.prompt(&question.messages, base_dir, Some(false)))
            .collect::<Result<Vec<_>, _>>()
            .with_context(job)?;
        let batch = ask_batch(&prompts, processor.tokenizer().pad_token_id())?;
        let new = generate(&model, &batch, &options, &mut |_| ControlFlow::Continue(()))?;
        answers.extend(new.iter().map(|ids| processor.decode(ids, true)));
    }
    Ok(answers)
}

fn table(questions: &[Question], before: &[String], after: &[String]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_HORIZONTAL_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(["question", "answer", "untrained", "trained", ""]);
    for (question, (before, after)) in questions.iter().zip(before.iter().zip(after)).take(SHOWN) {
        let verdict = if *after == question.expected {
            "right"
        } else {
            "wrong"
        };
        let shown = |answer: &String| answer.escape_debug().to_string();
        table.add_row([
            question.text.clone(),
            question.expected.clone(),
            shown(before),
            shown(after),
            verdict.to_owned(),
        ]);
    }
    table
}
