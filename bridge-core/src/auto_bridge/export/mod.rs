//! A `torch_dist` directory to Hugging Face.

mod error;
mod layout;
pub(super) mod stored_keys;

pub use error::{ExportError, KeyProblem};

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::Path;

use stored_keys::StoredKeys;

use super::job::Job;
use super::{AutoBridge, BridgeError};
use crate::Dtype;
use crate::checkpoint::hf::{CONFIG, HfCheckpoint, HfLayout, HfWriter};
use crate::checkpoint::torch_dist::TorchDistCheckpoint;
use crate::checkpoint::{CheckpointError, FileSink, Reader, Staging, TensorInfo, TensorSource};
use crate::convert::{ExecuteOptions, Report, write_files};
use crate::mapping::{Part, Registry};
use crate::models::{self, ExpertLayout, Facts};
use crate::plan::{ModelPlan, PlanOptions, TensorPlan};
use crate::provider::run_config::RunConfig;

/// What happens to tensors of the reference that the Megatron side lacks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Missing {
    /// They are an error.
    #[default]
    Refuse,
    /// They are taken from the reference.
    Copy,
    /// They are left out; where that is a whole multi-token-prediction head, the config says so.
    Skip,
}

/// What a Hugging Face directory should hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExportOptions {
    /// The dtype of every tensor; `None`: the reference's.
    pub dtype: Option<Dtype>,
    /// How experts are stored, those of the head too; `None`: as the reference stores them.
    pub expert_layout: Option<ExpertLayout>,
    /// Leaves the multi-token-prediction head out.
    pub without_mtp: bool,
    /// Tensors of the reference that the Megatron side lacks.
    pub missing: Missing,
    /// Leaves out tensors that the reference does not know, and takes a run_config.yaml that contradicts it.
    pub not_strict: bool,
}

/// Files of a new checkpoint grow to this where there is no reference to say more.
const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Stands before the names of tensors that are read from the reference.
const REFERENCE: &str = "reference: ";

/// An export that is planned and checked; nothing is written yet.
#[derive(Debug)]
pub struct Export<'a> {
    bridge: &'a AutoBridge,
    source: &'a TorchDistCheckpoint,
    plan: ModelPlan,
    layout: HfLayout,
    config: Option<String>,
    copied: Vec<String>,
    unknown: Vec<String>,
    is_whole: bool,
    job: Job,
}

impl AutoBridge {
    /// Plans a Hugging Face directory like this one out of `source`, whatever layout, key style and dtypes that has.
    ///
    /// Files, dtypes, expert layout and configs are this checkpoint's; a bridge made from a config alone gives new files
    /// in the config's dtype.
    ///
    /// # Errors
    /// [`BridgeError::Export`] with every tensor that is missing, unknown or misshapen, or where the directory describes
    /// another model; otherwise as [`AutoBridge::plan`].
    pub fn export<'a>(
        &'a self,
        source: &'a TorchDistCheckpoint,
        options: &ExportOptions,
    ) -> Result<Export<'a>, BridgeError> {
        let (full, _) = self.tables(&PlanOptions::default())?;
        let dir = source.dir();
        let refuse = |error: ExportError| Err(BridgeError::Export(error));
        if !options.not_strict
            && let Some(file) = source.run_config()
        {
            let differences = RunConfig::read(&file)?.differences(&self.to_megatron_provider());
            if !differences.is_empty() {
                return refuse(ExportError::OtherModel { file, differences });
            }
        }
        let chosen = models::registry_for(&self.config, &self.chosen_facts(options))?;
        let stored = StoredKeys::new(self, source, &full)?;
        let plan = stored.plan(&chosen, &|name| self.exported_dtype(&full, &chosen, name))?;
        let plan = match options.dtype {
            Some(dtype) => plan.inverted().with_dtype(dtype),
            None => plan.inverted(),
        };
        let problems = stored.misshapen(&plan);
        if !problems.is_empty() {
            let dir = dir.to_owned();
            return refuse(ExportError::Keys { dir, problems });
        }
        let unknown = stored.unknown();
        if !options.not_strict && !unknown.is_empty() {
            let dir = dir.to_owned();
            return refuse(ExportError::Unknown { dir, keys: unknown });
        }
        let missing = stored.missing(&plan);
        if options.missing == Missing::Refuse && !missing.is_empty() {
            let dir = dir.to_owned();
            let tensors = missing;
            return refuse(ExportError::Missing { dir, tensors });
        }
        self.settle(source, options, (&full, &chosen), plan, &missing, unknown)
    }

    /// Decides about missing tensors, and lays out the files.
    fn settle<'a>(
        &'a self,
        source: &'a TorchDistCheckpoint,
        options: &ExportOptions,
        (full, chosen): (&Registry, &Registry),
        mut plan: ModelPlan,
        missing: &[(String, String)],
        unknown: Vec<String>,
    ) -> Result<Export<'a>, BridgeError> {
        let missing: HashSet<&str> = missing.iter().map(|(name, _)| name.as_str()).collect();
        let is_missing = |tensor: &TensorPlan| missing.contains(tensor.name.as_str());
        let mut copied = Vec::new();
        match options.missing {
            Missing::Refuse => {}
            Missing::Skip => plan = plan.only(|tensor| !is_missing(tensor)),
            Missing::Copy => {
                for tensor in plan.tensors.iter_mut().filter(|tensor| is_missing(tensor)) {
                    let name = tensor.name.clone();
                    let reference = self.checkpoint.as_ref();
                    let Some(info) = reference.and_then(|files| files.info(&name)) else {
                        return Err(BridgeError::Export(ExportError::NothingToCopy { name }));
                    };
                    let read = format!("{REFERENCE}{name}");
                    *tensor = TensorPlan::whole(name.clone(), tensor.dtype, read, info);
                    copied.push(name);
                }
            }
        }
        let layout = match &self.checkpoint {
            Some(reference) => layout::like(reference, full, chosen, &plan),
            None => HfLayout::sharded(plan.targets(), MAX_SHARD_BYTES),
        };
        let written: HashSet<&str> = plan.tensors.iter().map(|one| one.name.as_str()).collect();
        let skipped: Vec<&str> = chosen
            .hf_parameters()
            .map(|(name, _)| name)
            .filter(|name| !written.contains(name))
            .collect();
        let is_of_head = |name: &str| {
            let row = chosen.hf_parameter(name);
            row.is_some_and(|row| row.part == Part::Mtp)
        };
        let has_mtp = written.iter().any(|name| is_of_head(name));
        let config = self.exported_config(options, has_mtp);
        let is_whole = skipped.iter().all(|name| !has_mtp && is_of_head(name));
        let dropped = full
            .hf_parameters()
            .filter(|(_, row)| chosen.parameter(&row.megatron_name).is_none())
            .map(|(name, _)| name);
        plan.left_out = skipped
            .into_iter()
            .chain(dropped)
            .map(str::to_owned)
            .collect();
        let config_file = &self.config.file;
        let reference = self.checkpoint.as_ref();
        let files = source.paths().chain([config_file.clone()]);
        let job = Job::new(
            &format!("export {options:?}"),
            files.chain(reference.iter().flat_map(|files| files.paths())),
            [
                reference.map_or(config_file.as_path(), HfCheckpoint::dir),
                source.dir(),
            ],
        );
        Ok(Export {
            bridge: self,
            source,
            plan,
            layout,
            config,
            copied,
            unknown,
            is_whole,
            job,
        })
    }

    /// Writes a Hugging Face directory of the `torch_dist` directory `megatron_path` to `hf_path`; see
    /// [`AutoBridge::export`].
    ///
    /// # Errors
    /// [`BridgeError`]; nothing that looks complete stands at `hf_path` then.
    pub fn export_ckpt(
        &self,
        megatron_path: &Path,
        hf_path: &Path,
        options: &ExportOptions,
        staging: &Staging,
    ) -> Result<Report, BridgeError> {
        let source = TorchDistCheckpoint::open(megatron_path)?;
        let export = self.export(&source, options)?;
        let writer = export.create(hf_path, staging)?;
        let report = export.write(&writer, &ExecuteOptions::default())?;
        writer.finish()?;
        Ok(report)
    }

    fn chosen_facts(&self, options: &ExportOptions) -> Facts {
        Facts {
            experts: options.expert_layout.unwrap_or(self.facts.experts),
            mtp_experts: options.expert_layout.unwrap_or(self.facts.mtp_experts),
            mtp: self.facts.mtp && !options.without_mtp,
            ..self.facts
        }
    }

    /// The reference's dtype; of a tensor that the reference stores in another form, that of this form's tensors.
    fn exported_dtype(&self, full: &Registry, chosen: &Registry, name: &str) -> Dtype {
        if full.hf_parameter(name).is_some() {
            return self.hf_info(full, name).dtype;
        }
        let theirs = chosen
            .hf_parameter(name)
            .and_then(|row| full.parameter(&row.megatron_name));
        let dtypes = theirs
            .iter()
            .flat_map(|parameter| &parameter.sources)
            .map(|(name, _)| self.hf_info(full, name).dtype);
        dtypes
            .reduce(Dtype::widest)
            .expect("both forms have the same Megatron parameters")
    }

    /// config.json, where it is not the reference's any more.
    fn exported_config(&self, options: &ExportOptions, has_mtp: bool) -> Option<String> {
        let mut config = self.config.clone();
        if let Some(dtype) = options.dtype {
            config.set_dtype(dtype);
        }
        if self.quantised().next().is_some() {
            config.drop_quantization();
        }
        if self.facts.mtp && !has_mtp {
            config.drop_mtp();
        }
        (config.raw != self.config.raw).then(|| config.to_json())
    }
}

impl Export<'_> {
    /// How every tensor is made. [`ModelPlan::left_out`] are the reference's tensors that the result lacks.
    #[must_use]
    pub fn plan(&self) -> &ModelPlan {
        &self.plan
    }

    /// Tensors that the Megatron side lacks and that are the reference's.
    #[must_use]
    pub fn copied(&self) -> &[String] {
        &self.copied
    }

    /// Keys of the Megatron side that are left out because the reference does not know them.
    #[must_use]
    pub fn unknown(&self) -> &[String] {
        &self.unknown
    }

    /// Whether the result has every tensor that its config.json describes; [`Missing::Skip`] may leave it without some.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Whether config.json differs from the reference's.
    #[must_use]
    pub fn changes_config(&self) -> bool {
        self.config.is_some()
    }

    /// Starts the directory, with the reference's small files in it. Its data files can be finished one by one:
    /// [`Staging::job`] is set here.
    ///
    /// # Errors
    /// [`BridgeError::Overlap`], [`CheckpointError`].
    pub fn create(&self, target: &Path, staging: &Staging) -> Result<HfWriter, BridgeError> {
        let config = &self.bridge.config.file;
        let staging = self.job.staging(target, staging)?;
        let writer = HfWriter::create(&self.layout, target, staging)?;
        // A config file of another name stands among files of other models.
        if config.file_name() == Some(OsStr::new(CONFIG)) {
            writer.copy_support_files(config.parent().unwrap_or(Path::new(".")))?;
        }
        match &self.config {
            Some(text) => writer.write_file(CONFIG, text.as_bytes())?,
            None if config.is_file() => writer.copy_file_as(config, CONFIG)?,
            // The config was made in memory.
            None => writer.write_file(CONFIG, self.bridge.config.to_json().as_bytes())?,
        }
        Ok(writer)
    }

    /// Fills `sink`, which is the writer or stands before it.
    ///
    /// # Errors
    /// [`BridgeError::Convert`].
    pub fn write(
        &self,
        sink: &dyn FileSink,
        options: &ExecuteOptions,
    ) -> Result<Report, BridgeError> {
        Ok(write_files(&self.plan, self, sink, options)?)
    }
}

/// What the plan reads: stored tensors, and those of the reference under a prefix.
impl TensorSource for Export<'_> {
    fn info(&self, name: &str) -> Option<TensorInfo> {
        match (name.strip_prefix(REFERENCE), &self.bridge.checkpoint) {
            (Some(name), Some(reference)) => reference.info(name),
            _ => self.source.info(name),
        }
    }

    fn read(&self, name: &str, offset_bytes: u64, into: &mut [u8]) -> Result<(), CheckpointError> {
        match (name.strip_prefix(REFERENCE), &self.bridge.checkpoint) {
            (Some(name), Some(reference)) => reference.read(name, offset_bytes, into),
            _ => self.source.read(name, offset_bytes, into),
        }
    }

    fn reader<'a>(&'a self, name: &'a str) -> Result<Reader<'a>, CheckpointError> {
        match (name.strip_prefix(REFERENCE), &self.bridge.checkpoint) {
            (Some(name), Some(reference)) => reference.reader(name),
            _ => self.source.reader(name),
        }
    }
}
