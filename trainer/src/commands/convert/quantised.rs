//! What is said about checkpoints in FP8: they can be read, and not be written again.

use bridge_core::Dtype;
use bridge_core::checkpoint::hf::{HfCheckpoint, UNQUANTISED};
use bridge_core::plan::ModelPlan;

/// Says which matrices of a plan cannot come back as they were.
pub(super) fn report_import(source: &HfCheckpoint, plan: &ModelPlan) {
    let mut names: Vec<&str> = plan
        .tensors
        .iter()
        .flat_map(|tensor| &tensor.sources)
        .map(|source| source.name.as_str())
        .filter(|name| source.is_quantised(name))
        .collect();
    names.sort_unstable();
    names.dedup();
    if let Some(first) = names.first() {
        tracing::warn!(
            "{} matrices were in FP8, first `{first}`: they are multiplied by their scales and rounded once, and cannot be written in FP8 again",
            names.len()
        );
    }
}

/// Says in which form matrices are written that the reference has in FP8: `dtype`, where one was asked for.
pub(super) fn report_export(reference: &HfCheckpoint, dtype: Option<Dtype>) {
    let count = reference.quantised().count();
    if let Some(first) = reference.quantised().next() {
        tracing::warn!(
            "{count} matrices of {} are in FP8, first `{first}`: they are written in {}, without scales, and config.json without quantization_config",
            reference.dir().display(),
            dtype.unwrap_or(UNQUANTISED).torch_word()
        );
    }
}
