//! The files of a reference, with other dtypes, another form of experts, or less in them.

use std::collections::{HashMap, HashSet};

use indexmap::IndexMap;

use crate::checkpoint::TensorInfo;
use crate::checkpoint::hf::{HfCheckpoint, HfLayout, LayoutFile};
use crate::mapping::Registry;
use crate::plan::ModelPlan;

/// Each tensor of `plan` stands where `reference` has it, or where it has what it is made of.
///
/// `full` is the table of the reference, `chosen` that of the plan.
pub(super) fn like(
    reference: &HfCheckpoint,
    full: &Registry,
    chosen: &Registry,
    plan: &ModelPlan,
) -> HfLayout {
    let mut wanted: IndexMap<String, TensorInfo> = plan.targets().into_iter().collect();
    let others = successors(full, chosen);
    let own = HfLayout::like(reference);
    let mut layout = HfLayout {
        files: Vec::with_capacity(own.files.len()),
        index_metadata: own.index_metadata.clone(),
    };
    for file in &own.files {
        let mut tensors = Vec::with_capacity(file.tensors.len());
        for (name, _) in &file.tensors {
            let here = others.get(name.as_str()).into_iter().flatten().copied();
            for name in std::iter::once(name.as_str()).chain(here) {
                if let Some((name, info)) = wanted.swap_remove_entry(name) {
                    tensors.push((name, info));
                }
            }
        }
        // A file of nothing but what is left out is left out too.
        if !tensors.is_empty() {
            layout.files.push(LayoutFile {
                tensors,
                ..file.clone()
            });
        }
    }
    if layout.files != own.files {
        count(&mut layout);
    }
    layout
}

/// For each tensor of the reference, the tensors of the other form that are made of the same parameters.
fn successors<'a>(full: &'a Registry, chosen: &'a Registry) -> HashMap<&'a str, Vec<&'a str>> {
    let mut others: HashMap<&str, Vec<&str>> = HashMap::new();
    let mut seen: HashSet<(&str, &str)> = HashSet::new();
    for theirs in full.parameters() {
        let Some(ours) = chosen.parameter(&theirs.megatron_name) else {
            continue;
        };
        if ours.sources == theirs.sources {
            continue;
        }
        for (old, _) in &theirs.sources {
            for (new, _) in &ours.sources {
                if seen.insert((old, new)) {
                    others.entry(old).or_default().push(new);
                }
            }
        }
    }
    others
}

/// Sums that an index states.
fn count(layout: &mut HfLayout) {
    let bytes = layout.num_bytes();
    let elements: usize = layout.tensors().map(|(_, info)| info.numel()).sum();
    let metadata = layout.index_metadata.iter_mut();
    for (key, value) in metadata.flat_map(|metadata| metadata.iter_mut()) {
        match key.as_str() {
            "total_size" => *value = bytes.into(),
            "total_parameters" => *value = elements.into(),
            _ => {}
        }
    }
}
