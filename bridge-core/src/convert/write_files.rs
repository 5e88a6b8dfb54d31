//! A plan carried out file by file.

use std::collections::HashMap;
use std::time::Instant;

use rayon::prelude::*;

use super::execute::{carry_out, in_pool};
use super::{ConvertError, ExecuteOptions, Report, Rounded};
use crate::checkpoint::{FileSink, TensorSource};
use crate::plan::{ModelPlan, TensorPlan};

/// Writes every file of `sink` and finishes each by itself; files that an earlier run finished are left as they are.
///
/// Each tensor is written as by [`super::execute`]. The report counts what this run wrote.
///
/// # Errors
/// [`ConvertError`]; files that were finished by then stay finished.
pub fn write_files(
    plan: &ModelPlan,
    source: &dyn TensorSource,
    sink: &dyn FileSink,
    options: &ExecuteOptions,
) -> Result<Report, ConvertError> {
    let started = Instant::now();
    plan.validate()?;
    let plans: HashMap<&str, (usize, &TensorPlan)> = plan
        .tensors
        .iter()
        .enumerate()
        .map(|(place, tensor)| (tensor.name.as_str(), (place, tensor)))
        .collect();
    let run = || {
        (0..sink.num_files())
            .into_par_iter()
            .map(|file| write_file(&plans, source, sink, file, options))
            .collect::<Result<Vec<_>, _>>()
    };
    let files = in_pool(options.threads, run)?;
    let tensors = files.iter().map(|(tensors, _, _)| tensors).sum();
    let bytes = files.iter().map(|(_, bytes, _)| bytes).sum();
    let mut rounded: Vec<Rounded> = files
        .into_iter()
        .flat_map(|(_, _, rounded)| rounded)
        .collect();
    rounded.sort_by_key(|tensor| plans[tensor.name.as_str()].0);
    Ok(Report {
        tensors,
        bytes,
        rounded,
        elapsed: started.elapsed(),
    })
}

fn write_file(
    plans: &HashMap<&str, (usize, &TensorPlan)>,
    source: &dyn TensorSource,
    sink: &dyn FileSink,
    file: usize,
    options: &ExecuteOptions,
) -> Result<(usize, u64, Vec<Rounded>), ConvertError> {
    let names = sink.unwritten(file);
    if names.is_empty() {
        return Ok((0, 0, Vec::new()));
    }
    let tensors: Vec<&TensorPlan> = names
        .iter()
        .filter_map(|name| plans.get(name).map(|(_, tensor)| *tensor))
        .collect();
    let rounded = carry_out(&tensors, source, sink, options)?;
    sink.finish_file(file).map_err(ConvertError::Finish)?;
    Ok((names.len(), sink.file_bytes(file), rounded))
}
