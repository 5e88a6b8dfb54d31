//! Destinations filled from a checkpoint.

use std::borrow::Cow;
use std::collections::HashSet;
use std::time::Instant;

use bridge_core::convert::{ExecuteOptions, Filled, Target, fill};
use bridge_core::plan::TensorPlan;
use bridge_core::{BridgeError, Dtype};

use crate::checks::{Memory, Rows, check, check_apart};
use crate::error::FfiError;
use crate::memory::pieces_mut;
use crate::plan::Plan;
use crate::watch::Options;

/// Memory that a tensor, or rows of it, are to stand in.
#[derive(Debug, Clone, Copy)]
pub struct Destination<'a> {
    /// The tensor's local name.
    pub name: &'a str,
    /// The first byte.
    pub data: *mut u8,
    /// Bytes from there on.
    pub bytes: usize,
    /// What values are cast to.
    pub dtype: Dtype,
    /// From the beginning of a row to that of the next; 0: they touch.
    pub row_stride_bytes: usize,
    /// The first row.
    pub first_row: usize,
    /// How many; `None`: the rest.
    pub num_rows: Option<usize>,
}

/// What a load did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Report {
    /// Destinations (or sources) in all.
    pub tensors: usize,
    /// Bytes that were moved.
    pub bytes: u64,
    /// Destinations some of whose values were rounded.
    pub rounded: usize,
    /// Time it took.
    pub seconds: f64,
}

/// A destination that was checked.
struct Checked<'a> {
    tensor: Cow<'a, TensorPlan>,
    data: *mut u8,
    rows: Rows,
}

impl Plan {
    /// Fills one destination in the calling thread.
    ///
    /// # Safety
    /// The memory that the destination describes is the caller's alone until this returns.
    ///
    /// # Errors
    /// [`FfiError`]; before the first byte moves for what is wrong with the destination.
    #[expect(unsafe_code, reason = "the memory is the caller's to vouch for")]
    pub unsafe fn load(&self, destination: &Destination<'_>) -> Result<Report, FfiError> {
        let options = Options {
            threads: 1,
            partial: true,
            ..Options::default()
        };
        // SAFETY: passed on.
        unsafe { self.load_all(std::slice::from_ref(destination), options) }
    }

    /// Fills destinations in parallel.
    ///
    /// # Safety
    /// As [`Plan::load`], for each of them.
    ///
    /// # Errors
    /// As [`Plan::load`]; [`FfiError::NoDestination`], [`FfiError::Overlap`], [`FfiError::Cancelled`].
    #[expect(unsafe_code, reason = "the memory is the caller's to vouch for")]
    pub unsafe fn load_all(
        &self,
        destinations: &[Destination<'_>],
        mut options: Options<'_>,
    ) -> Result<Report, FfiError> {
        let started = Instant::now();
        let checked = destinations
            .iter()
            .map(|destination| self.check(destination))
            .collect::<Result<Vec<_>, _>>()?;
        if !options.partial {
            self.check_complete(destinations)?;
        }
        check_apart(
            destinations
                .iter()
                .map(|one| one.name)
                .zip(checked.iter().map(|one| one.rows)),
        )?;
        let total = checked.iter().map(|one| one.rows.num_bytes() as u64).sum();
        let targets = checked
            .iter()
            .map(|one| Target {
                tensor: &one.tensor,
                first: one.rows.first_element,
                // SAFETY: the caller owns the memory, `rows` was checked, and no two destinations share any of it.
                pieces: unsafe { pieces_mut(one.data, &one.rows) },
            })
            .collect();
        let execute = options.execute_options();
        let filled = options.watch(total, |watch| self.fill(targets, &execute, watch))?;
        Ok(Report {
            tensors: destinations.len(),
            bytes: filled.bytes,
            rounded: filled.rounded,
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    fn check<'a>(&'a self, destination: &Destination<'_>) -> Result<Checked<'a>, FfiError> {
        let tensor = &self.tensors()[self.find(destination.name)?];
        let memory = Memory {
            name: destination.name,
            address: destination.data.addr(),
            bytes: destination.bytes,
            dtype: destination.dtype,
            row_stride_bytes: destination.row_stride_bytes,
            first_row: destination.first_row,
            num_rows: destination.num_rows,
        };
        let rows = check(&memory, &tensor.shape)?;
        let mut tensor = Cow::Borrowed(tensor);
        if tensor.dtype != destination.dtype {
            tensor.to_mut().dtype = destination.dtype;
        }
        Ok(Checked {
            tensor,
            data: destination.data,
            rows,
        })
    }

    /// Every tensor has a destination.
    fn check_complete(&self, destinations: &[Destination<'_>]) -> Result<(), FfiError> {
        let named: HashSet<&str> = destinations.iter().map(|one| one.name).collect();
        let names: Vec<String> = self
            .tensors()
            .iter()
            .filter(|tensor| !named.contains(tensor.name.as_str()))
            .map(|tensor| tensor.name.clone())
            .collect();
        match names.is_empty() {
            true => Ok(()),
            false => Err(FfiError::NoDestination { names }),
        }
    }

    fn fill(
        &self,
        targets: Vec<Target<'_>>,
        options: &ExecuteOptions,
        watch: &(dyn Fn(u64) -> std::ops::ControlFlow<()> + Sync),
    ) -> Result<Filled, FfiError> {
        let opened = &self.checkpoint.0;
        if let Some(stored) = &opened.stored {
            let tensors: Vec<&TensorPlan> = targets.iter().map(|target| target.tensor).collect();
            let (source, options) = stored.source(tensors.into_iter(), options)?;
            return Ok(fill(targets, &source, &options, watch)?);
        }
        let files = opened.bridge.checkpoint().ok_or(BridgeError::NoWeights)?;
        Ok(fill(targets, files, options, watch)?)
    }
}
