//! A plan carried out file by file.

use std::collections::HashMap;
use std::time::Instant;

use rayon::prelude::*;

use super::execute::{carry_out, in_pool};
use super::{ConvertError, ExecuteOptions, Report, Rounded, copy_tensors};
use crate::checkpoint::{FileSink, TensorSource};
use crate::plan::{ModelPlan, TensorPlan};

/// What fills the files of a sink.
#[derive(Clone, Copy)]
pub struct Contents<'a> {
    /// How tensors are made.
    pub plan: &'a ModelPlan,
    /// What the plan reads.
    pub source: &'a dyn TensorSource,
    /// Where tensors of the sink that are not in the plan are copied from, under their own names.
    pub carried: Option<&'a dyn TensorSource>,
}

/// Writes every file of `sink` and finishes each by itself; files that an earlier run finished are left as they are.
///
/// Each tensor is written as by [`super::execute`]. The report counts what this run wrote.
///
/// # Errors
/// [`ConvertError`]; files that were finished by then stay finished.
pub fn write_files(
    contents: &Contents<'_>,
    sink: &dyn FileSink,
    options: &ExecuteOptions,
) -> Result<Report, ConvertError> {
    let started = Instant::now();
    contents.plan.validate()?;
    let plans: HashMap<&str, (usize, &TensorPlan)> = contents
        .plan
        .tensors
        .iter()
        .enumerate()
        .map(|(place, tensor)| (tensor.name.as_str(), (place, tensor)))
        .collect();
    let run = || {
        (0..sink.num_files())
            .into_par_iter()
            .map(|file| write_file(contents, &plans, sink, file, options))
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
    contents: &Contents<'_>,
    plans: &HashMap<&str, (usize, &TensorPlan)>,
    sink: &dyn FileSink,
    file: usize,
    options: &ExecuteOptions,
) -> Result<(usize, u64, Vec<Rounded>), ConvertError> {
    let names = sink.unwritten(file);
    if names.is_empty() {
        return Ok((0, 0, Vec::new()));
    }
    let planned: Vec<&TensorPlan> = names
        .iter()
        .filter_map(|name| plans.get(name).map(|(_, tensor)| *tensor))
        .collect();
    let rounded = carry_out(&planned, contents.source, sink, options)?;
    if let Some(carried) = contents.carried {
        let others: Vec<&str> = names
            .iter()
            .copied()
            .filter(|name| !plans.contains_key(name))
            .collect();
        copy_tensors(&others, carried, sink, options)?;
    }
    sink.finish_file(file).map_err(ConvertError::Finish)?;
    Ok((names.len(), sink.file_bytes(file), rounded))
}
