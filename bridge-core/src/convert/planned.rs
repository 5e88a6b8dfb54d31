//! The targets of a plan, made when they are read.

use std::collections::HashMap;

use super::execute::{Buffers, Job};
use super::{ConvertError, ExecuteOptions};
use crate::checkpoint::{CheckpointError, TensorInfo, TensorSource};
use crate::plan::{ModelPlan, TensorPlan};

/// What a plan gives out of a source, as a source itself: two plans can be carried out one behind the other without
/// anything in between being stored.
pub struct Planned<'a> {
    jobs: HashMap<&'a str, Job<'a>>,
    source: &'a dyn TensorSource,
    options: ExecuteOptions,
    pool: Buffers,
}

impl<'a> Planned<'a> {
    /// Checks `plan` against `source`.
    ///
    /// # Errors
    /// [`ConvertError`], as [`super::execute`] before its first byte.
    pub fn new(
        plan: &'a ModelPlan,
        source: &'a dyn TensorSource,
        options: &ExecuteOptions,
    ) -> Result<Self, ConvertError> {
        plan.validate()?;
        Self::some(&plan.tensors, source, options)
    }

    /// The same for some tensors of a plan that was validated.
    ///
    /// # Errors
    /// As [`Planned::new`].
    pub fn some(
        tensors: impl IntoIterator<Item = &'a TensorPlan>,
        source: &'a dyn TensorSource,
        options: &ExecuteOptions,
    ) -> Result<Self, ConvertError> {
        let jobs = tensors.into_iter().map(|tensor| {
            let job = Job::new(tensor, source, options)?;
            Ok((tensor.name.as_str(), job))
        });
        Ok(Self {
            jobs: jobs.collect::<Result<_, ConvertError>>()?,
            source,
            options: options.clone(),
            pool: Buffers::default(),
        })
    }
}

impl TensorSource for Planned<'_> {
    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.jobs.get(name).map(|job| TensorInfo {
            dtype: job.tensor.dtype,
            shape: job.tensor.shape.clone(),
        })
    }

    /// Ranges are of whole elements.
    fn read(&self, name: &str, offset_bytes: u64, into: &mut [u8]) -> Result<(), CheckpointError> {
        let Some(job) = self.jobs.get(name) else {
            return Err(CheckpointError::NoTensor {
                name: name.to_owned(),
            });
        };
        let size = job.tensor.dtype.size_bytes();
        let whole = into.len().is_multiple_of(size) && offset_bytes.is_multiple_of(size as u64);
        let start = usize::try_from(offset_bytes).ok().map(|at| at / size);
        let end = start.and_then(|start| start.checked_add(into.len() / size));
        let (Some(start), Some(end), true) = (start, end, whole) else {
            return Err(range(job, offset_bytes, into));
        };
        if end > job.tensor.numel() {
            return Err(range(job, offset_bytes, into));
        }
        let mut pair = self.pool.take();
        let made = job.make(
            start..end,
            self.source,
            &self.options,
            into,
            &mut pair.scratch,
        );
        self.pool.give(pair);
        match made {
            Ok(_) => Ok(()),
            Err(ConvertError::Checkpoint { source, .. }) => Err(source),
            Err(error) => Err(CheckpointError::Foreign {
                name: name.to_owned(),
                action: "read",
                source: Box::new(error),
            }),
        }
    }
}

fn range(job: &Job<'_>, offset_bytes: u64, into: &[u8]) -> CheckpointError {
    CheckpointError::Range {
        name: job.tensor.name.clone(),
        start: offset_bytes,
        end: offset_bytes.saturating_add(into.len() as u64),
        num_bytes: job.tensor.num_bytes(),
    }
}
