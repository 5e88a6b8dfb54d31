//! `trainer generate`: answer a prompt.

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use bridge_core::{AutoBridge, Dtype};
use bridge_torch::batch::Batch;
use bridge_torch::generate::{GenerateOptions, generate};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::compute_args::ComputeArgs;
use super::forward::{RunDtype, load};
use crate::data::{Processor, Sample};
use crate::hub::{self, Lookup, Wanted};
use crate::report;

/// Answer a prompt, with images if there are any.
///
/// The prompt goes through the checkpoint's chat template; --prompt-ids takes token ids as they are and needs no
/// tokenizer files. The answer is streamed as it comes; --json prints {"text", "output_ids"} at the end, new tokens only
/// (`text` is null without a tokenizer).
///
/// Example: trainer generate --model Qwen3.5-0.8B --image cat.jpg --prompt "What is this?" --max-new-tokens 64
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("input").required(true).args(["prompt", "prompt_ids"]))]
pub(crate) struct GenerateArgs {
    /// Hugging Face model directory, or a Hub id.
    #[arg(long, value_name = "MODEL")]
    model: PathBuf,
    /// What the user says.
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Token ids, separated by commas.
    #[arg(long, value_name = "IDS", value_delimiter = ',', num_args = 1)]
    prompt_ids: Option<Vec<i64>>,
    /// An image before the text; may be repeated.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt_ids")]
    image: Vec<PathBuf>,
    /// What the system says.
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_ids")]
    system: Option<String>,
    /// Ask for an answer without a thinking part.
    #[arg(long, conflicts_with = "prompt_ids")]
    no_thinking: bool,
    /// At most so many new tokens.
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    /// 0 takes the most probable token (greedy).
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Draw from the fewest tokens whose probabilities reach this sum.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Draw from so many of the most probable tokens; 0: all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Seed of the draws.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Go on behind stop tokens.
    #[arg(long)]
    ignore_eos: bool,
    /// What the model computes in; default: the checkpoint's own dtype.
    #[arg(long, value_enum)]
    dtype: Option<RunDtype>,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print one JSON object instead of streaming.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &GenerateArgs) -> anyhow::Result<ExitCode> {
    let dir = &*hub::local(&args.model, Wanted::Model, &Lookup::default())?;
    let bridge = AutoBridge::from_hf_pretrained(dir)
        .with_context(|| format!("open the model {}", args.model.display()))?;
    let processor = processor(args, dir)?;
    let batch = match (&args.prompt_ids, &args.prompt) {
        (Some(ids), _) => Batch::new(Tensor::from_slice(ids).view([1, -1])),
        (None, Some(prompt)) => {
            let processor = processor
                .as_ref()
                .context("--prompt needs the checkpoint's tokenizer files")?;
            let sample = prompt_sample(args, processor, prompt)?;
            batch_of(&sample)?
        }
        (None, None) => bail!("give --prompt or --prompt-ids"),
    };
    let dtype = args
        .dtype
        .map_or_else(|| own_dtype(&bridge), RunDtype::kind);
    let model = load(&bridge, &args.compute.options(dtype)?)?;
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        seed: args.seed,
        eos: if args.ignore_eos {
            Vec::new()
        } else {
            stop_tokens(dir, &bridge)?
        },
        use_cache: true,
    };
    let mut stream = Stream::new(processor.as_ref(), !args.json);
    let mut failed = None;
    let ids = generate(&model, &batch, &options, &mut |step| {
        let written = step
            .tokens
            .iter()
            .flatten()
            .try_for_each(|&token| stream.push(token));
        match written {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        }
    })
    .context("generate")?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    let ids = &ids[0];
    if args.json {
        let text = processor
            .as_ref()
            .map(|processor| processor.decode(ids, true));
        report::json_line(&json!({"text": text, "output_ids": ids}))?;
    } else {
        stream.finish()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The tokenizer and its companions; `None` for raw ids in a directory without them.
fn processor(args: &GenerateArgs, dir: &Path) -> anyhow::Result<Option<Processor>> {
    if args.prompt_ids.is_some() && !dir.join("tokenizer.json").exists() {
        return Ok(None);
    }
    Processor::from_dir(dir)
        .with_context(|| format!("open the tokenizer of {}", args.model.display()))
        .map(Some)
}

fn prompt_sample(
    args: &GenerateArgs,
    processor: &Processor,
    prompt: &str,
) -> anyhow::Result<Sample> {
    let mut content: Vec<Value> = args
        .image
        .iter()
        .map(|image| json!({"type": "image", "image": image}))
        .collect();
    content.push(json!({"type": "text", "text": prompt}));
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(json!({"role": "system", "content": system}));
    }
    messages.push(json!({"role": "user", "content": content}));
    let thinking = args.no_thinking.then_some(false);
    processor
        .prompt(&Value::Array(messages), Path::new(""), thinking)
        .context("make the prompt")
}

fn batch_of(sample: &Sample) -> anyhow::Result<Batch> {
    let row = |ids: &[i64]| Tensor::from_slice(ids).view([1, -1]);
    let pixels = |values: &[f32], grids: &[[i64; 3]]| -> anyhow::Result<Option<Tensor>> {
        let patches: i64 = grids.iter().map(|grid| grid.iter().product::<i64>()).sum();
        let pixels = (patches > 0).then(|| Tensor::from_slice(values).f_view([patches, -1]));
        Ok(pixels.transpose()?)
    };
    Ok(Batch {
        mm_token_type_ids: Some(row(&sample.mm_token_type_ids)),
        pixel_values: pixels(&sample.pixel_values, &sample.image_grid_thw)?,
        image_grid_thw: sample.image_grid_thw.clone(),
        pixel_values_videos: pixels(&sample.pixel_values_videos, &sample.video_grid_thw)?,
        video_grid_thw: sample.video_grid_thw.clone(),
        ..Batch::new(row(&sample.input_ids))
    })
}

/// bfloat16 checkpoints run in bfloat16, all others in float32.
fn own_dtype(bridge: &AutoBridge) -> Kind {
    match bridge.config().text.dtype {
        Some(Dtype::Bf16) => Kind::BFloat16,
        _ => Kind::Float,
    }
}

/// `eos_token_id` of generation_config.json, else of the config.
fn stop_tokens(dir: &Path, bridge: &AutoBridge) -> anyhow::Result<Vec<i64>> {
    let file = dir.join("generation_config.json");
    let fallback = || bridge.config().text.eos_token_id.into_iter().collect();
    if !file.exists() {
        return Ok(fallback());
    }
    let config: Value = serde_json::from_str(&fs_err::read_to_string(&file)?)
        .with_context(|| format!("read {}", file.display()))?;
    let ids = match config.get("eos_token_id") {
        None | Some(Value::Null) => return Ok(fallback()),
        Some(Value::Array(list)) => list.iter().map(Value::as_i64).collect(),
        Some(one) => one.as_i64().map(|id| vec![id]),
    };
    ids.with_context(|| {
        format!(
            "`eos_token_id` in {} is neither a token id nor a list of them",
            file.display()
        )
    })
}

/// Writes the answer as it grows.
struct Stream<'a> {
    processor: Option<&'a Processor>,
    visible: bool,
    ids: Vec<i64>,
    /// Bytes of the decoded text that are on screen.
    shown: usize,
}

impl<'a> Stream<'a> {
    fn new(processor: Option<&'a Processor>, visible: bool) -> Self {
        Self {
            processor,
            visible,
            ids: Vec::new(),
            shown: 0,
        }
    }

    fn push(&mut self, token: i64) -> std::io::Result<()> {
        if !self.visible {
            return Ok(());
        }
        self.ids.push(token);
        let mut out = report::out();
        match self.processor {
            Some(processor) => {
                let text = processor.decode(&self.ids, true);
                // A character of several tokens ends in a replacement character until its last one has come.
                let ready = text.trim_end_matches('\u{fffd}').len();
                if ready > self.shown && text.is_char_boundary(self.shown) {
                    write!(out, "{}", &text[self.shown..ready])?;
                    self.shown = ready;
                }
            }
            None => write!(out, "{}{token}", if self.ids.len() > 1 { " " } else { "" })?,
        }
        out.flush()
    }

    fn finish(&self) -> std::io::Result<()> {
        let mut out = report::out();
        if let Some(processor) = self.processor {
            let text = processor.decode(&self.ids, true);
            if let Some(rest) = text.get(self.shown..) {
                write!(out, "{rest}")?;
            }
        }
        writeln!(out)?;
        if std::io::stdout().is_terminal() {
            report::note(format_args!("{} tokens", self.ids.len()));
        }
        Ok(())
    }
}
