//! MODEL on the command line: what a user names as a model, opened.

use std::path::Path;

use bridge_core::AutoBridge;
use bridge_core::config::HfConfig;

use crate::hub::{self, Lookup, Wanted};

/// Which revision of a Hub id.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct HubArgs {
    /// Branch, tag or commit of a Hub id; MODEL@REVISION says the same.
    #[arg(long, value_name = "REVISION")]
    hf_revision: Option<String>,
}

impl HubArgs {
    /// How the model is looked up.
    pub(crate) fn lookup(&self, no_progress: bool) -> Lookup<'_> {
        Lookup {
            revision: self.hf_revision.as_deref(),
            no_progress,
        }
    }
}

/// Whether a command reads weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weights {
    /// They are opened where the directory has them; a config alone will do, and of a Hub model nothing else is downloaded.
    IfPresent,
    /// The same, but a Hub model is downloaded as a whole: the output is made after it.
    OfReference,
    /// A model without them is an error; the text says what needs them.
    NeededFor(&'static str),
}

/// Opens MODEL: a model directory, a config file of any name, or a Hub id.
pub(crate) fn open(
    model: &Path,
    weights: Weights,
    lookup: &Lookup<'_>,
) -> anyhow::Result<AutoBridge> {
    let wanted = match weights {
        Weights::IfPresent => Wanted::Config,
        Weights::OfReference | Weights::NeededFor(_) => Wanted::Model,
    };
    let model = &*hub::local(model, wanted, lookup)?;
    let is_file = model.is_file();
    if !is_file && has_weights(model) {
        return Ok(AutoBridge::from_hf_pretrained(model)?);
    }
    if let Weights::NeededFor(what) = weights {
        if is_file {
            anyhow::bail!(
                "{} is a config file; {what} needs a directory with weights",
                model.display()
            );
        }
        anyhow::bail!("{} holds no weights; {what} needs them", model.display());
    }
    let config = if is_file {
        HfConfig::from_file(model)?
    } else {
        HfConfig::from_dir(model)?
    };
    Ok(AutoBridge::from_hf_config(config))
}

fn has_weights(dir: &Path) -> bool {
    // Whatever else is wrong with a directory is for the checks of the bridge to say.
    !dir.join("config.json").is_file()
        || fs_err::read_dir(dir).is_ok_and(|entries| {
            entries.flatten().any(|entry| {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")
            })
        })
}
