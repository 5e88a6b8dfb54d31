//! A rank's part of a directory that all ranks make together.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use bridge_core::convert::{ExecuteOptions, Given};
use bridge_core::layout::{LayoutSpec, RankCoord};
use bridge_core::plan::TensorPlan;
use bridge_core::shards::{ExportState, RankExport, RankExportOptions};
use bridge_core::{BridgeError, Dtype};

use crate::checkpoint::{Checkpoint, Opened, Rank};
use crate::checks::{Memory, Rows, check};
use crate::error::FfiError;
use crate::load::Report;
use crate::memory::pieces;
use crate::plan::Plan;
use crate::watch::Options;

/// Memory that holds a whole tensor.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// The tensor's local name.
    pub name: &'a str,
    /// The first byte.
    pub data: *const u8,
    /// Bytes from there on.
    pub bytes: usize,
    /// What the values are.
    pub dtype: Dtype,
    /// From the beginning of a row to that of the next; 0: they touch.
    pub row_stride_bytes: usize,
}

/// One virtual stage of one rank in an export; clones share it.
#[derive(Debug, Clone)]
pub struct Exporter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    export: RankExport,
    plan: Plan,
}

impl Exporter {
    /// Joins an export.
    ///
    /// # Errors
    /// [`FfiError::Export`], [`FfiError::Layout`].
    pub fn open(
        reference: &Checkpoint,
        spec: &LayoutSpec,
        rank: &Rank,
        target: &Path,
        options: &RankExportOptions,
    ) -> Result<Self, FfiError> {
        if target.file_name().is_none() {
            return Err(FfiError::Name {
                what: "the target",
                found: target.display().to_string(),
                problem: "names no directory",
            });
        }
        if let Some(dtype) = spec.dtype.filter(|dtype| !dtype.is_float()) {
            return Err(FfiError::ParamsDtype { dtype });
        }
        let bridge = &reference.0.bridge;
        if bridge.checkpoint().is_none() {
            return Err(BridgeError::NoWeights.into());
        }
        let coord = rank.in_layout(&reference.layout(spec)?)?;
        let bridge = Arc::clone(bridge);
        let export = RankExport::open(
            Arc::clone(&bridge),
            spec,
            coord,
            rank.vp_stage,
            target,
            options,
        )?;
        // Whatever format was opened, the reference's files are Hugging Face's.
        let files = Checkpoint(Arc::new(Opened {
            bridge,
            stored: None,
        }));
        Ok(Self(Arc::new(Inner {
            plan: Plan::new(files, export.plan().clone(), coord, rank.vp_stage),
            export,
        })))
    }

    /// What the rank is to hand in.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.0.plan
    }

    /// The rank.
    #[must_use]
    pub fn rank(&self) -> RankCoord {
        self.0.plan.rank
    }

    /// Whether the rank takes part.
    #[must_use]
    pub fn is_needed(&self) -> bool {
        self.0.export.is_needed()
    }

    /// Hands in tensors.
    ///
    /// # Safety
    /// The memory that the sources describe is readable and not written until this returns.
    ///
    /// # Errors
    /// [`FfiError`]; before the first byte moves for what is wrong with the sources.
    #[expect(unsafe_code, reason = "the memory is the caller's to vouch for")]
    pub unsafe fn write(
        &self,
        sources: &[Source<'_>],
        mut options: Options<'_>,
    ) -> Result<Report, FfiError> {
        let started = Instant::now();
        let checked = sources
            .iter()
            .map(|source| self.check(source))
            .collect::<Result<Vec<_>, _>>()?;
        let numbers: Vec<usize> = checked.iter().map(|(number, _)| *number).collect();
        let given: Vec<Given<'_>> = sources
            .iter()
            .zip(&checked)
            .map(|(source, (number, rows))| Given {
                tensor: self.tensor(*number),
                dtype: source.dtype,
                piece_bytes: rows.piece_bytes,
                // SAFETY: the caller lets the memory be read, and `rows` was checked.
                pieces: unsafe { pieces(source.data, rows) },
            })
            .collect();
        let total = checked
            .iter()
            .map(|(_, rows)| rows.num_bytes() as u64)
            .sum();
        let execute = options.execute_options();
        let written = AtomicBool::new(false);
        let result = options.watch(total, |watch| {
            let rounded = self.write_in_sight(&numbers, &given, total, &execute, watch)?;
            written.store(true, Ordering::Relaxed);
            Ok(rounded)
        });
        if result.is_err() && written.into_inner() {
            // A callback that stops at the very end stops the whole call.
            self.0.export.withdraw(&numbers);
        }
        Ok(Report {
            tensors: sources.len(),
            bytes: total,
            rounded: result?,
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// Replicas and padding are not written; they count as done at the end.
    fn write_in_sight(
        &self,
        numbers: &[usize],
        given: &[Given<'_>],
        total: u64,
        options: &ExecuteOptions,
        watch: &(dyn Fn(u64) -> ControlFlow<()> + Sync),
    ) -> Result<usize, FfiError> {
        let told = AtomicU64::new(0);
        let tell = |bytes| {
            told.fetch_add(bytes, Ordering::Relaxed);
            watch(bytes)
        };
        let filled = self.0.export.write(numbers, given, options, &tell)?;
        let rest = total.saturating_sub(told.into_inner());
        // Everything is handed in: it is too late to stop.
        let _ = watch(rest);
        Ok(filled.rounded)
    }

    fn tensor(&self, number: usize) -> &TensorPlan {
        &self.0.export.plan().tensors[number]
    }

    fn check(&self, source: &Source<'_>) -> Result<(usize, Rows), FfiError> {
        let number = self.0.plan.find(source.name)?;
        let memory = Memory {
            name: source.name,
            address: source.data.addr(),
            bytes: source.bytes,
            dtype: source.dtype,
            row_stride_bytes: source.row_stride_bytes,
            first_row: 0,
            num_rows: None,
        };
        Ok((number, check(&memory, &self.tensor(number).shape)?))
    }

    /// Says that the rank is done, and completes the export if it is the last.
    ///
    /// # Errors
    /// [`FfiError::Export`].
    pub fn finish(&self) -> Result<ExportState, FfiError> {
        Ok(self.0.export.finish()?)
    }
}

/// Whether a number of `bridge_missing` stands for copying.
pub(crate) fn copies(missing: i32) -> Result<bool, FfiError> {
    match missing {
        0 => Ok(false),
        1 => Ok(true),
        found => Err(FfiError::Number {
            what: "missing",
            found,
            known: "bridge_missing",
        }),
    }
}
