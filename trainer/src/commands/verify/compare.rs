//! Which tensors of two checkpoints belong together.

use std::collections::HashSet;
use std::path::Path;

use anyhow::Context;
use bridge_core::checkpoint::hf::HfCheckpoint;
use bridge_core::checkpoint::shard::ShardFile;
use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;
use bridge_core::checkpoint::{CheckpointError, TensorSource};
use bridge_core::convert::{
    Comparison, Padding, Planned, Side, Transforms, VerifyOptions, verify, verify_names,
};
use bridge_core::plan::{ModelPlan, PlanOptions, Stage};
use bridge_core::{AutoBridge, Dtype};

use super::VerifyArgs;
use crate::commands::checkpoint::Checkpoint;
use crate::commands::model::{self, Weights};
use crate::hub::Lookup;

/// What a comparison found.
pub(super) struct Outcome {
    pub(super) comparison: Comparison,
    /// Which side of the comparison A was.
    pub(super) a: Side,
    pub(super) tolerated: Tolerated,
    /// What the checksums inside of torch_dist directories say, a line each.
    pub(super) damaged: Vec<String>,
}

/// What was not compared, and is no difference.
#[derive(Debug, Default)]
pub(super) struct Tolerated {
    /// States of an optimizer that one side has.
    pub(super) optimizer_states: usize,
    /// Objects that say "no extra state".
    pub(super) extra_states: usize,
    /// Tensors of a head that was left out on purpose.
    pub(super) left_out: usize,
}

impl Outcome {
    fn new(comparison: Comparison, tolerated: Tolerated) -> Self {
        Self {
            comparison,
            a: Side::Source,
            tolerated,
            damaged: Vec::new(),
        }
    }

    /// The same with A and B exchanged.
    fn swapped(mut self) -> Self {
        self.a = match self.a {
            Side::Source => Side::Other,
            Side::Other => Side::Source,
        };
        self
    }

    pub(super) fn is_equal(&self) -> bool {
        self.comparison.is_equal() && self.damaged.is_empty()
    }
}

/// Compares every tensor.
pub(super) fn compare(
    a: &Checkpoint,
    b: &Checkpoint,
    args: &VerifyArgs,
) -> anyhow::Result<Outcome> {
    let mut outcome = pair(a, b, args)?;
    for side in [a, b] {
        if let Checkpoint::TorchDist(directory) = side {
            outcome.damaged.extend(damage(directory)?);
        }
    }
    Ok(outcome)
}

fn pair(a: &Checkpoint, b: &Checkpoint, args: &VerifyArgs) -> anyhow::Result<Outcome> {
    use Checkpoint::{Hf, Shard, TorchDist};
    match (a, b) {
        (Hf(one), Hf(other)) => hf_directories(one, other, args),
        (Hf(hf), TorchDist(directory)) => hf_and_torch_dist(hf, directory, args),
        (TorchDist(directory), Hf(hf)) => Ok(hf_and_torch_dist(hf, directory, args)?.swapped()),
        (Hf(hf), Shard(file)) => hf_and_shard(hf, file, args),
        (Shard(file), Hf(hf)) => Ok(hf_and_shard(hf, file, args)?.swapped()),
        (TorchDist(directory), Shard(file)) => torch_dist_and_shard(directory, file, args),
        (Shard(file), TorchDist(directory)) => {
            Ok(torch_dist_and_shard(directory, file, args)?.swapped())
        }
        (TorchDist(one), TorchDist(other)) if args.hf_model.is_some() => {
            torch_dist_directories(one, other, args)
        }
        (TorchDist(_), TorchDist(_)) | (Shard(_), Shard(_)) => by_name(a, b, args),
    }
}

fn options(args: &VerifyArgs, transforms: Transforms) -> VerifyOptions {
    let mut options = VerifyOptions {
        dtype: args.torch_dtype,
        padding: Padding::Ignore,
        ..VerifyOptions::default()
    };
    options.execute.transforms = transforms;
    options
}

/// Tensors of the same names. An optimizer's states are compared where both sides have them.
fn by_name(a: &Checkpoint, b: &Checkpoint, args: &VerifyArgs) -> anyhow::Result<Outcome> {
    let mut tolerated = Tolerated::default();
    let mut of_one = |one: &Checkpoint, other: &Checkpoint, only: bool| -> Vec<String> {
        let model: Option<HashSet<&str>> = match one {
            Checkpoint::TorchDist(directory) => {
                Some(directory.model_tensors().map(|(name, _)| name).collect())
            }
            _ => None,
        };
        let mut names = Vec::new();
        for (name, _) in one.tensors() {
            let alone = other.source().info(name).is_none();
            let counts = model.as_ref().is_none_or(|model| model.contains(name));
            if alone && !counts {
                tolerated.optimizer_states += 1;
            } else if alone || !only {
                names.push(name.to_owned());
            }
        }
        names
    };
    let names = of_one(a, b, false);
    let lacking = of_one(b, a, true);
    let comparison = verify_names(
        &names,
        a.source(),
        b.source(),
        &options(args, Transforms::Apply),
    )?;
    Ok(Outcome::new(
        comparison.lacking(&lacking, Side::Source),
        tolerated,
    ))
}

/// By name, but where experts are packed in one and stored one by one in the other: those through Megatron's parameters.
fn hf_directories(
    one: &HfCheckpoint,
    other: &HfCheckpoint,
    args: &VerifyArgs,
) -> anyhow::Result<Outcome> {
    // Whatever is no model that the mapping knows is still compared, by name.
    let bridges = (
        AutoBridge::from_hf_pretrained(one.dir()),
        AutoBridge::from_hf_pretrained(other.dir()),
    );
    if let (Ok(a), Ok(b)) = &bridges {
        let layout = |bridge: &AutoBridge| (bridge.facts().experts, bridge.facts().mtp_experts);
        if a.config().text.moe.is_some() && layout(a) != layout(b) {
            return through_megatron(a, b, args);
        }
        // Codes against values say nothing: FP8 is held against another form as what is written of it.
        let in_fp8 = |side: &HfCheckpoint| side.quantised().next().is_some();
        let (a, b) = (weights(a)?, weights(b)?);
        if in_fp8(a) != in_fp8(b) {
            return same_names(a, b, (&a.as_written(), &b.as_written()), args);
        }
    }
    same_names(one, other, (one, other), args)
}

/// Tensors of the same names, read from the `sources` that stand for the two directories.
fn same_names(
    one: &HfCheckpoint,
    other: &HfCheckpoint,
    sources: (&dyn TensorSource, &dyn TensorSource),
    args: &VerifyArgs,
) -> anyhow::Result<Outcome> {
    let names: Vec<&str> = one.names().collect();
    let lacking: Vec<&str> = other
        .names()
        .filter(|name| one.info(name).is_none())
        .collect();
    let options = options(args, Transforms::Apply);
    let comparison = verify_names(&names, sources.0, sources.1, &options)?;
    Ok(Outcome::new(
        comparison.lacking(&lacking, Side::Source),
        Tolerated::default(),
    ))
}

/// Both sides as Megatron's parameters, without arithmetic: it is the same on both.
fn through_megatron(a: &AutoBridge, b: &AutoBridge, args: &VerifyArgs) -> anyhow::Result<Outcome> {
    let plan_options = PlanOptions {
        without_mtp: args.no_mtp,
        ..PlanOptions::default()
    };
    let (plan_a, plan_b) = (a.plan(&plan_options)?, b.plan(&plan_options)?);
    let options = options(args, Transforms::LayoutOnly);
    let other = Planned::new(&plan_b, weights(b)?, &options.execute)?;
    let comparison = verify(&plan_a, weights(a)?, &other, &options)?;
    let known: HashSet<&str> = plan_a.tensors.iter().map(|one| one.name.as_str()).collect();
    let lacking: Vec<&str> = plan_b
        .tensors
        .iter()
        .map(|one| one.name.as_str())
        .filter(|name| !known.contains(name))
        .collect();
    let tolerated = Tolerated {
        left_out: plan_a.left_out.len(),
        ..Tolerated::default()
    };
    Ok(Outcome::new(
        comparison.lacking(&lacking, Side::Source),
        tolerated,
    ))
}

fn weights(bridge: &AutoBridge) -> anyhow::Result<&HfCheckpoint> {
    bridge
        .checkpoint()
        .context("a model opened for its weights has none")
}

fn hf_and_torch_dist(
    hf: &HfCheckpoint,
    directory: &TorchDistCheckpoint,
    args: &VerifyArgs,
) -> anyhow::Result<Outcome> {
    let bridge = model::open(
        hf.dir(),
        Weights::NeededFor("a comparison"),
        &Lookup::default(),
    )?;
    let stored = bridge.plan_found(directory, args.no_mtp)?;
    let options = options(args, Transforms::Apply);
    let comparison = verify(&stored.plan, weights(&bridge)?, directory, &options)?;
    let tolerated = tolerated(directory, &stored.plan);
    Ok(Outcome::new(
        comparison.lacking(&stored.unknown, Side::Source),
        tolerated,
    ))
}

fn tolerated(directory: &TorchDistCheckpoint, plan: &ModelPlan) -> Tolerated {
    Tolerated {
        optimizer_states: directory.tensors().len() - directory.model_tensors().count(),
        extra_states: directory
            .objects()
            .filter(|(name, _)| name.contains("_extra_state"))
            .count(),
        left_out: plan.left_out.len(),
    }
}

fn hf_and_shard(hf: &HfCheckpoint, file: &ShardFile, args: &VerifyArgs) -> anyhow::Result<Outcome> {
    let bridge = model::open(
        hf.dir(),
        Weights::NeededFor("a comparison"),
        &Lookup::default(),
    )?;
    let plan = shard_plan(&bridge, file)?;
    let options = options(args, Transforms::Apply);
    let comparison = verify(&plan, weights(&bridge)?, file, &options)?;
    Ok(shard_outcome(comparison, file, &plan))
}

fn shard_outcome(comparison: Comparison, file: &ShardFile, plan: &ModelPlan) -> Outcome {
    let planned: HashSet<&str> = plan.tensors.iter().map(|one| one.name.as_str()).collect();
    let unknown: Vec<&str> = file
        .tensors()
        .map(|(name, _)| name)
        .filter(|name| !planned.contains(name))
        .collect();
    let tolerated = Tolerated {
        left_out: plan.left_out.len(),
        ..Tolerated::default()
    };
    Outcome::new(comparison.lacking(&unknown, Side::Source), tolerated)
}

/// What the file should hold by its own description, in the dtypes of the model.
fn shard_plan(bridge: &AutoBridge, file: &ShardFile) -> anyhow::Result<ModelPlan> {
    let shard = file.shard();
    let expected = bridge.config().architecture.hf_name();
    if shard.architecture != expected {
        anyhow::bail!(
            "{} is of a {}, the model is a {expected}",
            file.path().display(),
            shard.architecture
        );
    }
    let spec = bridge_core::layout::LayoutSpec {
        dtype: None,
        ..shard.spec.clone()
    };
    let (options, layout) = bridge.lay_out(&spec)?;
    let chunk = layout.chunk(shard.rank.pp_rank, shard.vp_stage)?;
    let stage = Stage::new(&layout, shard.rank, chunk);
    Ok(bridge.planner(&options)?.plan(&stage)?)
}

/// The model that `--hf-model` names.
fn reference(args: &VerifyArgs) -> anyhow::Result<AutoBridge> {
    let path: &Path = args.hf_model.as_deref().context(
        "a torch_dist directory and a shard need the model's config to be compared; pass --hf-model",
    )?;
    model::open(path, Weights::IfPresent, &Lookup::default())
}

fn torch_dist_and_shard(
    directory: &TorchDistCheckpoint,
    file: &ShardFile,
    args: &VerifyArgs,
) -> anyhow::Result<Outcome> {
    let bridge = reference(args)?;
    let options = options(args, Transforms::LayoutOnly);
    let stored = bridge.plan_found(directory, file.shard().spec.without_mtp)?;
    let as_hf = stored.as_hf(directory);
    let source = Planned::new(&as_hf, directory, &options.execute)?;
    let mut plan = shard_plan(&bridge, file)?;
    for tensor in &mut plan.tensors {
        let sources = tensor.sources.iter();
        let dtypes = sources.filter_map(|one| Some(source.info(&one.name)?.dtype));
        tensor.dtype = dtypes.reduce(Dtype::widest).unwrap_or(tensor.dtype);
    }
    let comparison = verify(&plan, &source, file, &options)?;
    let mut outcome = shard_outcome(comparison, file, &plan);
    outcome.tolerated.optimizer_states = tolerated(directory, &plan).optimizer_states;
    Ok(outcome)
}

/// Both as Hugging Face tensors, whatever their keys look like.
fn torch_dist_directories(
    one: &TorchDistCheckpoint,
    other: &TorchDistCheckpoint,
    args: &VerifyArgs,
) -> anyhow::Result<Outcome> {
    let bridge = reference(args)?;
    let options = options(args, Transforms::LayoutOnly);
    let one_stored = bridge.plan_found(one, args.no_mtp)?;
    let other_stored = bridge.plan_found(other, args.no_mtp)?;
    let one_hf = one_stored.as_hf(one);
    let other_hf = other_stored.as_hf(other);
    let source = Planned::new(&one_hf, one, &options.execute)?;
    let second = Planned::new(&other_hf, other, &options.execute)?;
    let whole = one_stored.plan.inverted();
    let names: Vec<&str> = whole.tensors.iter().map(|one| one.name.as_str()).collect();
    let comparison = verify_names(&names, &source, &second, &options)?;
    let comparison = comparison
        .lacking(&one_stored.unknown, Side::Other)
        .lacking(&other_stored.unknown, Side::Source);
    let (first, second) = (
        tolerated(one, &one_stored.plan),
        tolerated(other, &other_stored.plan),
    );
    let tolerated = Tolerated {
        optimizer_states: first.optimizer_states + second.optimizer_states,
        extra_states: first.extra_states + second.extra_states,
        left_out: first.left_out,
    };
    Ok(Outcome::new(comparison, tolerated))
}

/// What differs from the checksums that the archives of a directory carry; an error only where it cannot be read.
fn damage(directory: &TorchDistCheckpoint) -> anyhow::Result<Vec<String>> {
    match directory.verify() {
        Ok(()) => Ok(Vec::new()),
        Err(CheckpointError::TorchDist { path, problems }) => Ok(problems
            .iter()
            .map(|problem| format!("{}: {problem}", path.display()))
            .collect()),
        Err(error) => Err(error.into()),
    }
}
