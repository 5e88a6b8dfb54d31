//! `trainer forward`: the tool with which anyone compares this model with transformers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use bridge_core::AutoBridge;
use bridge_torch::batch::Batch;
use bridge_torch::model::{ForwardOptions, ModelOptions, ModelOutput, Qwen3VlModel};
use bridge_torch::ops::policy::Op;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

use super::compute_args::ComputeArgs;
use crate::device;
use crate::hub::{self, Lookup, Wanted};
use crate::report;

/// Run the model on a batch and write every output to a safetensors file.
///
/// The inputs file holds input_ids [batch, seq] and, where the batch has them, attention_mask, mm_token_type_ids, labels
/// [batch, seq], pixel_values and pixel_values_videos [patches, elements], image_grid_thw and video_grid_thw [n, 3].
/// Outputs: position_ids, visual, visual_videos, hidden.I (input of layer I; the last one is the last layer's output),
/// hidden.norm, logits, loss, aux_loss, router.L.experts, mtp_logits, mtp_loss, total_loss, and with --grads
/// grad.NAME, the gradient of `loss` by Hugging Face names.
///
/// Example: trainer forward --model Qwen3.5-0.8B --inputs batch.safetensors --output out.safetensors --dtype float64
#[derive(Debug, clap::Args)]
pub(crate) struct ForwardArgs {
    /// Hugging Face model directory, or a Hub id.
    #[arg(long, value_name = "MODEL")]
    model: PathBuf,
    /// The batch, a safetensors file.
    #[arg(long, value_name = "FILE")]
    inputs: PathBuf,
    /// Where the outputs go, a safetensors file.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// What the model computes in, and the outputs' dtype.
    #[arg(long, value_enum, default_value_t)]
    dtype: RunDtype,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Also write the gradient of `loss` (without the prediction head's) for every parameter that it reaches.
    #[arg(long)]
    grads: bool,
}

/// Dtypes that the model runs in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum RunDtype {
    /// Single precision.
    #[default]
    Float32,
    /// Double precision, everywhere.
    Float64,
    /// bfloat16 with float32 where the model demands it.
    Bfloat16,
}

impl RunDtype {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::Float32 => Kind::Float,
            Self::Float64 => Kind::Double,
            Self::Bfloat16 => Kind::BFloat16,
        }
    }
}

pub(crate) fn run(args: &ForwardArgs) -> anyhow::Result<ExitCode> {
    let batch = read_batch(&args.inputs)
        .with_context(|| format!("read the batch {}", args.inputs.display()))?;
    let dir = hub::local(&args.model, Wanted::Model, &Lookup::default())?;
    let bridge = AutoBridge::from_hf_pretrained(&dir)
        .with_context(|| format!("open the model {}", args.model.display()))?;
    let model = load(&bridge, &args.compute.options(args.dtype.kind())?)?;
    let options = ForwardOptions::default();
    let forward = || {
        model
            .forward(&batch, &options)
            .with_context(|| format!("run the model on {}", args.inputs.display()))
    };
    let (output, grads) = if args.grads {
        let output = forward()?;
        let Some(loss) = &output.loss else {
            bail!(
                "--grads needs a loss, but no token of {} has a target; give `labels` that are not all -100",
                args.inputs.display()
            );
        };
        loss.f_backward().context("compute the gradients")?;
        let grads = model.hf_gradients(&bridge).context("name the gradients")?;
        (output, grads)
    } else {
        (tch::no_grad(forward)?, Vec::new())
    };
    let mut tensors = named(&output);
    tensors.extend(
        grads
            .into_iter()
            .map(|(name, grad)| (format!("grad.{name}"), grad)),
    );
    write(&tensors, args.dtype.kind(), &args.output)
        .with_context(|| format!("write {}", args.output.display()))?;
    report::note(format_args!(
        "wrote {} tensors to {}",
        tensors.len(),
        args.output.display()
    ));
    Ok(ExitCode::SUCCESS)
}

/// Builds a model and says on stderr what it runs on.
pub(crate) fn load(bridge: &AutoBridge, options: &ModelOptions) -> anyhow::Result<Qwen3VlModel> {
    let (_, implementations) = options.resolve_kernels(Some(&bridge.config().text))?;
    let ops: Vec<String> = implementations
        .iter()
        .filter(|one| one.op != Op::AdamW.name()) // nothing is trained here
        .map(|one| format!("{}: {}", one.op, one.by))
        .collect();
    report::note(format_args!(
        "device {}, {:?}; kernels ({}): {}",
        device::name(options.device),
        options.dtype,
        options.kernels,
        ops.join("; ")
    ));
    Qwen3VlModel::load(bridge, options).context("load the model")
}

/// The input keys, in the order in which help names them.
const KEYS: [&str; 8] = [
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "labels",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
];

fn read_batch(path: &Path) -> anyhow::Result<Batch> {
    let bytes = fs_err::read(path)?;
    let file = SafeTensors::deserialize(&bytes).context("it is not a safetensors file")?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        let Some(key) = KEYS.into_iter().find(|&key| key == name) else {
            bail!(
                "unknown input `{name}`{}; known are {}",
                nearest(&name),
                KEYS.join(", ")
            );
        };
        tensors.insert(key, tensor(key, &view)?);
    }
    let mut take = |key: &str| tensors.remove(key);
    let Some(input_ids) = take("input_ids") else {
        bail!("there is no `input_ids`");
    };
    Ok(Batch {
        input_ids,
        attention_mask: take("attention_mask"),
        labels: take("labels"),
        mm_token_type_ids: take("mm_token_type_ids"),
        pixel_values: take("pixel_values"),
        image_grid_thw: grids("image_grid_thw", take("image_grid_thw"))?,
        pixel_values_videos: take("pixel_values_videos"),
        video_grid_thw: grids("video_grid_thw", take("video_grid_thw"))?,
        cu_seqlens: None,
    })
}

/// `; did you mean ...`, when a known key is close.
fn nearest(name: &str) -> String {
    let name = name.strip_prefix("in.").unwrap_or(name);
    let close = KEYS
        .into_iter()
        .map(|key| (strsim::jaro_winkler(key, name), key))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(likeness, _)| *likeness > 0.8);
    close.map_or_else(String::new, |(_, key)| format!(", did you mean `{key}`?"))
}

fn tensor(name: &str, view: &TensorView<'_>) -> anyhow::Result<Tensor> {
    let kind = match view.dtype() {
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        other => bail!(
            "`{name}` has dtype {other:?}, expected integers (I64) for tokens and grids, F32 for pixels"
        ),
    };
    let size = view
        .shape()
        .iter()
        .map(|&length| i64::try_from(length))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Tensor::f_from_data_size(view.data(), &size, kind)?)
}

fn grids(name: &str, tensor: Option<Tensor>) -> anyhow::Result<Vec<[i64; 3]>> {
    let Some(tensor) = tensor else {
        return Ok(Vec::new());
    };
    if !matches!(tensor.size()[..], [_, 3]) {
        bail!("`{name}` has shape {:?}, expected [n, 3]", tensor.size());
    }
    if !matches!(tensor.kind(), Kind::Int64 | Kind::Int) {
        bail!("`{name}` has dtype {:?}, expected I64", tensor.kind());
    }
    let flat: Vec<i64> = Vec::try_from(tensor.to_kind(Kind::Int64).view([-1]))?;
    Ok(flat
        .chunks_exact(3)
        .map(|grid| [grid[0], grid[1], grid[2]])
        .collect())
}

fn named(output: &ModelOutput) -> Vec<(String, Tensor)> {
    let mut all = vec![(
        "position_ids".to_owned(),
        output.position_ids.shallow_clone(),
    )];
    let mut add = |name: &str, tensor: &Tensor| all.push((name.to_owned(), tensor.shallow_clone()));
    for (index, hidden) in output.hidden_states.iter().enumerate() {
        add(&format!("hidden.{index}"), hidden);
    }
    add("hidden.norm", &output.hidden_norm);
    for (layer, router) in output.routers.iter().enumerate() {
        add(&format!("router.{layer}.experts"), &router.experts);
    }
    for (name, tensor) in [
        ("visual", &output.visual),
        ("visual_videos", &output.visual_videos),
        ("logits", &output.logits),
        ("loss", &output.loss),
        ("aux_loss", &output.aux_loss),
        ("mtp_logits", &output.mtp_logits),
        ("mtp_loss", &output.mtp_loss),
        ("total_loss", &output.total_loss),
    ] {
        if let Some(tensor) = tensor {
            add(name, tensor);
        }
    }
    all
}

/// Writes beside the destination and renames.
fn write(tensors: &[(String, Tensor)], kind: Kind, path: &Path) -> anyhow::Result<()> {
    let mut raw: Vec<(&str, Dtype, Vec<usize>, Vec<u8>)> = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let tensor = tensor.detach().f_to_device(Device::Cpu)?;
        let (tensor, dtype) = if tensor.kind() == Kind::Int64 {
            (tensor, Dtype::I64)
        } else {
            let dtype = match kind {
                Kind::Double => Dtype::F64,
                Kind::BFloat16 => Dtype::BF16,
                _ => Dtype::F32,
            };
            (tensor.f_to_kind(kind)?, dtype)
        };
        let tensor = tensor.f_contiguous()?;
        let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        let shape = tensor
            .size()
            .into_iter()
            .map(usize::try_from)
            .collect::<Result<_, _>>()?;
        raw.push((name, dtype, shape, bytes));
    }
    let views = raw
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            Ok((*name, TensorView::new(*dtype, shape.clone(), bytes)?))
        })
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    let bytes = safetensors::serialize(views, None)?;
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let file = tempfile::NamedTempFile::new_in(dir)?;
    fs_err::write(file.path(), bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}
