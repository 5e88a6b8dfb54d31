//! `trainer info`: Show devices and kernels.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use bridge_torch::ops::policy::{Implementation, Kernel, kernels_built};
use bridge_torch::ops::self_check::self_check;
use bytesize::ByteSize;
use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;
use serde_json::json;
use tch::Cuda;

use super::compute_args::ComputeArgs;
use super::forward::RunDtype;
use super::model::{self, Weights};
use crate::device;
use crate::hub::Lookup;
use crate::report::{self, table};

/// Show devices, the CUDA kernels of this build, and what computes each op.
///
/// With a model, what its sizes and dtype let run: kernels take some shapes only. Those that run are held to libtorch once, as
/// each run does when it builds its model. --json prints a list of {op, kernel,
/// architectures, by}, one for each kernel; an op without kernels has `kernel` null.
///
/// Example: trainer info Qwen3.5-4B --kernels auto,moe=reference
#[derive(Debug, clap::Args)]
pub(crate) struct InfoArgs {
    /// A model directory, a config file of any name, or a Hub id.
    model: Option<PathBuf>,
    /// What the model would compute in.
    #[arg(long, value_enum, default_value = "bfloat16")]
    dtype: RunDtype,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print one JSON list.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &InfoArgs) -> anyhow::Result<ExitCode> {
    let bridge = args
        .model
        .as_deref()
        .map(|model| model::open(model, Weights::IfPresent, &Lookup::default()))
        .transpose()?;
    let options = args.compute.options(args.dtype.kind())?;
    let (kernels, implementations) =
        options.resolve_kernels(bridge.as_ref().map(|bridge| &bridge.config().text))?;
    self_check(kernels, options.dtype, options.device)?;
    let built = kernels_built();
    if args.json {
        let by = |op: &str| implementations.iter().find(|one| one.op == op);
        let rows: Vec<_> = built
            .iter()
            .map(|row| {
                json!({
                    "op": row.op,
                    "kernel": row.kernel,
                    "architectures": row.architectures,
                    "by": by(row.op).map(|one| &one.by),
                })
            })
            .collect();
        report::json_line(&rows.into())?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut out = report::out();
    writeln!(out, "{}", devices())?;
    writeln!(out, "{}", architectures(&built))?;
    writeln!(
        out,
        "\nops on {} in {}, kernels {}:\n{}",
        device::name(options.device),
        format!("{:?}", args.dtype).to_lowercase(),
        options.kernels,
        ops(&built, &implementations)
    )?;
    Ok(ExitCode::SUCCESS)
}

/// The processor, and what the driver says of GPUs.
fn devices() -> String {
    let threads = tch::get_num_threads();
    let gpus = match gpus() {
        Ok(gpus) if gpus.is_empty() => "GPUs: none".to_owned(),
        Ok(gpus) => format!(
            "GPUs (libtorch sees {}):\n{}",
            Cuda::device_count(),
            gpus.join("\n")
        ),
        Err(NvmlError::LibloadingError(_)) => "GPUs: none (no NVIDIA driver)".to_owned(),
        Err(error) => format!("GPUs: unknown (the NVIDIA driver says: {error})"),
    };
    format!("CPU: {threads} threads of libtorch\n{gpus}")
}

fn gpus() -> Result<Vec<String>, NvmlError> {
    let nvml = Nvml::init()?;
    let driver = nvml.sys_driver_version()?;
    (0..nvml.device_count()?)
        .map(|index| {
            let gpu = nvml.device_by_index(index)?;
            let capability = gpu.cuda_compute_capability()?;
            Ok(format!(
                "  cuda:{index} {}, {}, compute capability {}.{}, driver {driver}",
                gpu.name()?,
                ByteSize(gpu.memory_info()?.total),
                capability.major,
                capability.minor
            ))
        })
        .collect()
}

fn architectures(built: &[Kernel]) -> String {
    let kernels = built.iter().find(|row| row.kernel.is_some());
    match kernels {
        Some(row) => format!("CUDA kernels: built for {}", row.architectures.join(", ")),
        None => "CUDA kernels: none in this build (no nvcc was found; `make kernels` brings one)"
            .to_owned(),
    }
}

fn ops(built: &[Kernel], implementations: &[Implementation]) -> String {
    let mut table = table(&["op", "computed by", "kernels built"], &[]);
    for one in implementations {
        let kernels: Vec<&str> = built
            .iter()
            .filter(|row| row.op == one.op)
            .filter_map(|row| row.kernel)
            .collect();
        table.add_row([one.op, &one.by, &kernels.join(", ")]);
    }
    table.to_string()
}
