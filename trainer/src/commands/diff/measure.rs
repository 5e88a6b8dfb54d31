//! Tensors of two checkpoints side by side.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;
use bridge_core::checkpoint::{TensorInfo, TensorSource};
use bridge_core::convert::{Distance, ExecuteOptions, NonFinite, Planned, distances};
use bridge_core::mapping::{Part, Registry};
use bridge_core::{AutoBridge, Dtype};

use crate::commands::checkpoint::Checkpoint;
use crate::commands::model::{self, Weights};
use crate::hub::Lookup;

/// One tensor of both sides.
pub(super) struct Row {
    pub(super) name: String,
    pub(super) place: Place,
    pub(super) shape: Vec<usize>,
    pub(super) dtypes: (Dtype, Dtype),
    pub(super) distance: Distance,
}

/// Where a tensor belongs; unknown without the model's config.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) part: Option<Part>,
    pub(super) layer: Option<usize>,
}

/// Tensors together.
#[derive(Default)]
pub(super) struct Group {
    pub(super) tensors: usize,
    pub(super) distance: Distance,
}

/// What two checkpoints have in common, and what not.
#[derive(Default)]
pub(super) struct Measured {
    /// The furthest apart first.
    pub(super) rows: Vec<Row>,
    /// Tensors of one side, with the letter of the side that lacks them.
    pub(super) missing: Vec<(String, &'static str)>,
    /// Tensors whose shapes differ.
    pub(super) misshapen: Vec<(String, Vec<usize>, Vec<usize>)>,
}

/// Names and infos of a side.
type Tensors = Vec<(String, TensorInfo)>;

/// Measures every tensor.
pub(super) fn measure(
    a: &Checkpoint,
    b: &Checkpoint,
    hf_model: Option<&Path>,
) -> anyhow::Result<Measured> {
    use Checkpoint::{Hf, Shard, TorchDist};
    match (a, b) {
        (Hf(one), Hf(_)) => {
            // What is no model that the mapping knows is measured all the same.
            let bridge = AutoBridge::from_hf_pretrained(one.dir()).ok();
            let registry = bridge.as_ref().map(AutoBridge::registry).transpose()?;
            side_by_side(
                (a.source(), &tensors(a)),
                (b.source(), &tensors(b)),
                registry.as_ref(),
            )
        }
        (Shard(_), Shard(_)) => {
            side_by_side((a.source(), &tensors(a)), (b.source(), &tensors(b)), None)
        }
        (TorchDist(one), TorchDist(other)) => {
            let Some(path) = hf_model else {
                return side_by_side((a.source(), &tensors(a)), (b.source(), &tensors(b)), None);
            };
            let bridge = model::open(path, Weights::IfPresent, &Lookup::default())?;
            let registry = bridge.registry()?;
            as_hf(&bridge, one, |in_a| {
                as_hf(&bridge, other, |in_b| {
                    side_by_side(in_a, in_b, Some(&registry))
                })
            })
        }
        (Hf(hf), TorchDist(directory)) => {
            let bridge = model::open(
                hf.dir(),
                Weights::NeededFor("a comparison"),
                &Lookup::default(),
            )?;
            let registry = bridge.registry()?;
            as_hf(&bridge, directory, |in_b| {
                side_by_side((a.source(), &tensors(a)), in_b, Some(&registry))
            })
        }
        (TorchDist(directory), Hf(hf)) => {
            let bridge = model::open(
                hf.dir(),
                Weights::NeededFor("a comparison"),
                &Lookup::default(),
            )?;
            let registry = bridge.registry()?;
            as_hf(&bridge, directory, |in_a| {
                side_by_side(in_a, (b.source(), &tensors(b)), Some(&registry))
            })
        }
        (Shard(_), _) | (_, Shard(_)) => anyhow::bail!(
            "a {} and a {} have no tensors in common; `trainer verify` compares them through the mapping",
            a.kind(),
            b.kind()
        ),
    }
}

/// The weights of a checkpoint.
fn tensors(side: &Checkpoint) -> Tensors {
    let owned = |(name, info): (&str, &TensorInfo)| (name.to_owned(), info.clone());
    match side {
        Checkpoint::TorchDist(directory) => directory.model_tensors().map(owned).collect(),
        _ => side.tensors().into_iter().map(owned).collect(),
    }
}

/// Shows a directory of Megatron-Core as Hugging Face tensors.
fn as_hf(
    bridge: &AutoBridge,
    directory: &TorchDistCheckpoint,
    then: impl FnOnce((&dyn TensorSource, &Tensors)) -> anyhow::Result<Measured>,
) -> anyhow::Result<Measured> {
    let plan = bridge.plan_found(directory, false)?.as_hf(directory);
    let options = ExecuteOptions {
        non_finite: NonFinite::Allow,
        ..ExecuteOptions::default()
    };
    let source = Planned::new(&plan, directory, &options)?;
    then((&source, &plan.targets()))
}

fn side_by_side(
    a: (&dyn TensorSource, &Tensors),
    b: (&dyn TensorSource, &Tensors),
    registry: Option<&Registry>,
) -> anyhow::Result<Measured> {
    let mut measured = Measured::default();
    let mut both: Vec<&(String, TensorInfo)> = Vec::new();
    for tensor in a.1 {
        let (name, info) = tensor;
        match b.0.info(name) {
            None => measured.missing.push((name.clone(), "B")),
            Some(other) if other.shape != info.shape => {
                let shapes = (info.shape.clone(), other.shape);
                measured.misshapen.push((name.clone(), shapes.0, shapes.1));
            }
            Some(_) => both.push(tensor),
        }
    }
    let in_a: HashSet<&str> = a.1.iter().map(|(name, _)| name.as_str()).collect();
    let only_b = b.1.iter().filter(|(name, _)| !in_a.contains(name.as_str()));
    measured
        .missing
        .extend(only_b.map(|(name, _)| (name.clone(), "A")));
    measured.missing.sort();
    let names: Vec<&str> = both.iter().map(|(name, _)| name.as_str()).collect();
    let found = distances(&names, a.0, b.0, 0)?;
    for ((name, info), distance) in both.into_iter().zip(found) {
        let other = b.0.info(name).map_or(info.dtype, |other| other.dtype);
        measured.rows.push(Row {
            name: name.clone(),
            place: registry
                .map(|registry| place(registry, name))
                .unwrap_or_default(),
            shape: info.shape.clone(),
            dtypes: (info.dtype, other),
            distance,
        });
    }
    measured.rows.sort_by(|one, other| {
        let key = |row: &Row| row.distance.relative();
        key(other)
            .total_cmp(&key(one))
            .then_with(|| one.name.cmp(&other.name))
    });
    Ok(measured)
}

fn place(registry: &Registry, hf_name: &str) -> Place {
    let Some(tensor) = registry.hf_parameter(hf_name) else {
        return Place::default();
    };
    let parameter = registry.parameter(&tensor.megatron_name);
    Place {
        part: Some(tensor.part),
        layer: parameter.and_then(|parameter| parameter.layer),
    }
}

impl Measured {
    pub(super) fn is_equal(&self) -> bool {
        self.missing.is_empty()
            && self.misshapen.is_empty()
            && self.rows.iter().all(|row| row.distance.changed == 0)
    }

    /// All tensors together.
    pub(super) fn total(&self) -> Distance {
        let distances = self.rows.iter().map(|row| row.distance);
        distances.fold(Distance::default(), Distance::with)
    }

    /// By part and layer; empty where those are unknown.
    pub(super) fn groups(&self) -> BTreeMap<Place, Group> {
        let mut groups: BTreeMap<Place, Group> = BTreeMap::new();
        for row in self.rows.iter().filter(|row| row.place.part.is_some()) {
            let group = groups.entry(row.place).or_default();
            group.tensors += 1;
            group.distance = group.distance.with(row.distance);
        }
        groups
    }

    /// The relative norm of each layer, a line a part.
    pub(super) fn series(&self) -> Vec<(&'static str, Vec<(u64, f64)>)> {
        let mut lines: BTreeMap<Part, Vec<(u64, f64)>> = BTreeMap::new();
        for (place, group) in self.groups() {
            if let (Some(part), Some(layer)) = (place.part, place.layer) {
                let point = (layer as u64, group.distance.relative());
                lines.entry(part).or_default().push(point);
            }
        }
        lines
            .into_iter()
            .map(|(part, points)| (part.word(), points))
            .collect()
    }
}
