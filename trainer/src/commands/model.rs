//! MODEL on the command line: what a user names as a model, opened.

use std::path::Path;

use bridge_core::AutoBridge;
use bridge_core::config::HfConfig;

use super::hub;

/// Whether a command reads weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weights {
    /// They are opened where the directory has them; a config alone will do.
    IfPresent,
    /// A model without them is an error; the text says what needs them.
    NeededFor(&'static str),
}

/// Opens MODEL: a model directory, a config file of any name, or the Hub id of a model in the cache.
pub(crate) fn open(model: &Path, weights: Weights) -> anyhow::Result<AutoBridge> {
    let model = &*hub::local(model)?;
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
