//! Defaults, file and command line, merged key by key, with each value's origin.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{RunConfig, check};

/// Words that people bring from elsewhere, and ours for them.
const OTHER_NAMES: [(&str, &str); 24] = [
    ("lr", "learning_rate"),
    ("batch_size", "per_device_train_batch_size"),
    ("micro_batch_size", "per_device_train_batch_size"),
    ("train_batch_size", "per_device_train_batch_size"),
    ("eval_batch_size", "per_device_eval_batch_size"),
    ("accumulate_grad_batches", "gradient_accumulation_steps"),
    ("grad_accum", "gradient_accumulation_steps"),
    ("bf16", "dtype"),
    ("fp16", "dtype"),
    ("torch_dtype", "dtype"),
    ("params_dtype", "dtype"),
    ("clip_grad", "max_grad_norm"),
    ("gradient_clipping", "max_grad_norm"),
    ("cutoff_len", "max_length"),
    ("max_seq_length", "max_length"),
    ("seq_length", "max_length"),
    ("model_name_or_path", "model"),
    ("output_dir", "output"),
    ("dataset", "data"),
    ("train_file", "data"),
    ("min_lr", "min_lr_ratio"),
    ("moe_aux_loss_coeff", "router_aux_loss_coef"),
    ("train_iters", "max_steps"),
    ("freeze_vit", "freeze"),
];

/// Second names of keys.
const ALIASES: [(&str, &str); 1] = [("epochs", "num_train_epochs")];

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// The configuration file.
    File(PathBuf),
    /// `key=value` or a flag, as typed.
    CommandLine(String),
    /// The checkpoint that the run resumes from.
    Checkpoint(PathBuf),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::CommandLine(typed) => write!(f, "command line, {typed}"),
            Self::Checkpoint(path) => write!(f, "{}", path.display()),
        }
    }
}

/// One setting of the command line.
#[derive(Debug, Clone)]
pub struct Override {
    /// Dotted key.
    pub key: String,
    /// Its value.
    pub value: Value,
    /// What the user typed.
    pub typed: String,
}

impl Override {
    /// Reads `key=value`. The value is TOML if it parses as such (`1e-4`, `true`, `["a", "b"]`), `null` for no value, else a
    /// string.
    ///
    /// # Errors
    /// [`ConfigError::NoEquals`] when there is no `=`.
    pub fn parse(typed: &str) -> Result<Self, ConfigError> {
        let Some((key, text)) = typed.split_once('=') else {
            return Err(ConfigError::NoEquals {
                typed: typed.to_owned(),
            });
        };
        let value = match text {
            "null" | "none" => Value::Null,
            _ => toml::from_str::<Map<String, Value>>(&format!("x = {text}"))
                .ok()
                .filter(|table| table.len() == 1)
                .and_then(|mut table| table.remove("x"))
                .unwrap_or_else(|| Value::String(text.to_owned())),
        };
        Ok(Self {
            key: key.trim().to_owned(),
            value,
            typed: typed.to_owned(),
        })
    }

    /// A flag such as `--max-steps 10`.
    #[must_use]
    pub fn flag(key: &str, value: Value, typed: String) -> Self {
        Self {
            key: key.to_owned(),
            value,
            typed,
        }
    }
}

/// A valid configuration and the origin of each of its keys.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The values.
    pub config: RunConfig,
    /// Dotted key to origin; every key is here.
    pub origins: BTreeMap<String, Origin>,
}

/// One thing that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// A key that does not exist.
    #[error("`{key}` is no key of a run ({origin}){}", did_you_mean(nearest))]
    UnknownKey {
        /// As given.
        key: String,
        /// File or command line.
        origin: String,
        /// The nearest right one.
        nearest: Option<String>,
    },
    /// A value that does not fit its key.
    #[error("`{key}` ({origin}): {message}")]
    Value {
        /// The key.
        key: String,
        /// File, command line or default.
        origin: String,
        /// What is wrong, and what would fit.
        message: String,
    },
    /// A required key without a value.
    #[error("`{key}` is not set; give `--{key}` or put it into the configuration file")]
    Missing {
        /// The key.
        key: String,
    },
}

fn did_you_mean(nearest: &Option<String>) -> String {
    nearest
        .as_ref()
        .map(|name| format!("; did you mean `{name}`?"))
        .unwrap_or_default()
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The file is neither TOML nor YAML, by its name.
    #[error("{} is neither .toml nor .yaml; rename it", file.display())]
    Kind {
        /// The file.
        file: PathBuf,
    },
    /// The file does not parse.
    #[error("{} does not parse: {message}", file.display())]
    Parse {
        /// The file.
        file: PathBuf,
        /// The parser's text, with line and column.
        message: String,
    },
    /// An argument that is no setting.
    #[error("`{typed}` is no setting; write key=value, for instance learning_rate=1e-4")]
    NoEquals {
        /// As typed.
        typed: String,
    },
    /// Keys or values are wrong; all of them are listed.
    #[error("{} {} wrong in the run's configuration:{}", problems.len(), if problems.len() == 1 { "setting is" } else { "settings are" }, lines(problems))]
    Problems {
        /// Each of them.
        problems: Vec<Problem>,
    },
}

fn lines(problems: &[Problem]) -> String {
    problems
        .iter()
        .map(|problem| format!("\n  {problem}"))
        .collect()
}

/// Merges `base` (defaults, or a resumed run's configuration with its origin), the file and the overrides; later ones win.
///
/// # Errors
/// All unknown keys, misfit values and contradictions together, or why the file cannot be read.
pub fn resolve(
    base: Option<(&RunConfig, Origin)>,
    file: Option<&Path>,
    overrides: &[Override],
) -> Result<Resolved, ConfigError> {
    let (start, start_origin) = match base {
        Some((config, origin)) => (config.clone(), origin),
        None => (RunConfig::default(), Origin::Default),
    };
    let mut values = flatten(&to_map(&start));
    let mut origins: BTreeMap<String, Origin> = values
        .keys()
        .map(|key| (key.clone(), start_origin.clone()))
        .collect();
    let mut problems = Vec::new();
    let mut settings: Vec<(String, Value, Origin)> = Vec::new();
    if let Some(path) = file {
        for (key, value) in flatten(&read(path)?) {
            settings.push((key, value, Origin::File(path.to_path_buf())));
        }
    }
    for Override { key, value, typed } in overrides {
        settings.push((
            key.clone(),
            value.clone(),
            Origin::CommandLine(typed.clone()),
        ));
    }
    for (given, value, origin) in settings {
        let key = ALIASES
            .iter()
            .find(|(alias, _)| *alias == given)
            .map_or(given.as_str(), |a| a.1);
        match values.get_mut(key) {
            Some(slot) => {
                *slot = value;
                origins.insert(key.to_owned(), origin);
            }
            None => problems.push(Problem::UnknownKey {
                nearest: nearest(key, values.keys().map(String::as_str)),
                key: given,
                origin: origin.to_string(),
            }),
        }
    }
    let config = parse(&values, &origins, &mut problems);
    if let Some(config) = &config {
        check::check(config, &origins, &mut problems);
    }
    match config {
        Some(config) if problems.is_empty() => Ok(Resolved { config, origins }),
        _ => Err(ConfigError::Problems { problems }),
    }
}

/// What the file and the overrides say of one key, before everything else is resolved.
///
/// # Errors
/// Why the file cannot be read.
pub fn setting(
    key: &str,
    file: Option<&Path>,
    overrides: &[Override],
) -> Result<Option<Value>, ConfigError> {
    if let Some(given) = overrides.iter().rev().find(|given| given.key == key) {
        return Ok(Some(given.value.clone()));
    }
    match file {
        Some(path) => Ok(flatten(&read(path)?).remove(key)),
        None => Ok(None),
    }
}

/// Values that do not fit are taken out one by one, so that all of them are reported.
fn parse(
    values: &BTreeMap<String, Value>,
    origins: &BTreeMap<String, Origin>,
    problems: &mut Vec<Problem>,
) -> Option<RunConfig> {
    let mut values = values.clone();
    let mut failed = false;
    loop {
        match serde_path_to_error::deserialize::<_, RunConfig>(Value::Object(unflatten(&values))) {
            Ok(config) => return (!failed).then_some(config),
            Err(error) => {
                let key = error.path().to_string();
                let known = values
                    .keys()
                    .find(|k| **k == key || key.starts_with(&format!("{k}[")));
                let known = known.cloned();
                problems.push(Problem::Value {
                    origin: known
                        .as_ref()
                        .map_or_else(String::new, |k| origins[k].to_string()),
                    message: error.inner().to_string(),
                    key: key.clone(),
                });
                failed = true;
                // Without the value its default is read, which fits.
                known.and_then(|k| values.remove(&k))?;
            }
        }
    }
}

fn read(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let text = fs_err::read_to_string(path).map_err(|source| ConfigError::Read {
        file: path.to_path_buf(),
        source,
    })?;
    let failed = |message: String| ConfigError::Parse {
        file: path.to_path_buf(),
        message,
    };
    match path.extension().and_then(|e| e.to_str()) {
        Some("toml") => toml::from_str(&text).map_err(|error| failed(error.to_string())),
        Some("yaml" | "yml") if text.trim().is_empty() => Ok(Map::new()),
        Some("yaml" | "yml") => {
            serde_saphyr::from_str(&text).map_err(|error| failed(error.to_string()))
        }
        _ => Err(ConfigError::Kind {
            file: path.to_path_buf(),
        }),
    }
}

pub(super) fn to_map(config: &RunConfig) -> Map<String, Value> {
    match serde_json::to_value(config) {
        Ok(Value::Object(map)) => map,
        other => unreachable!("a run's configuration serialises to an object: {other:?}"),
    }
}

/// Nested tables to dotted keys.
pub(super) fn flatten(map: &Map<String, Value>) -> BTreeMap<String, Value> {
    let mut flat = BTreeMap::new();
    for (key, value) in map {
        match value {
            Value::Object(inner) if !inner.is_empty() => {
                for (rest, value) in flatten(inner) {
                    flat.insert(format!("{key}.{rest}"), value);
                }
            }
            _ => {
                flat.insert(key.clone(), value.clone());
            }
        }
    }
    flat
}

fn unflatten(values: &BTreeMap<String, Value>) -> Map<String, Value> {
    let mut map = Map::new();
    for (key, value) in values {
        match key.split_once('.') {
            None => {
                map.insert(key.clone(), value.clone());
            }
            Some((section, rest)) => {
                let inner = map
                    .entry(section.to_owned())
                    .or_insert_with(|| Value::Object(Map::new()));
                if let Value::Object(inner) = inner {
                    inner.insert(rest.to_owned(), value.clone());
                }
            }
        }
    }
    map
}

/// The nearest of `known` to `key`, if any is near at all.
pub(super) fn nearest<'a>(key: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let plain = key.replace('-', "_").to_lowercase();
    if let Some((_, ours)) = OTHER_NAMES
        .iter()
        .chain(&ALIASES)
        .find(|(theirs, _)| *theirs == plain)
    {
        return Some((*ours).to_owned());
    }
    known
        .map(|name| {
            let last = name.rsplit('.').next().unwrap_or(name);
            (
                strsim::jaro_winkler(&plain, name).max(strsim::jaro_winkler(&plain, last)),
                name,
            )
        })
        .filter(|(score, _)| *score > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::{OnNonFinite, Optim, SchedulerType};
    use super::*;

    fn set(settings: &[&str]) -> Result<Resolved, ConfigError> {
        let mut all = vec!["model=m", "data=d.jsonl", "output=o"];
        all.extend(settings);
        let overrides: Vec<_> = all.iter().map(|s| Override::parse(s).unwrap()).collect();
        resolve(None, None, &overrides)
    }

    fn file(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs_err::write(&path, text).unwrap();
        (dir, path)
    }

    #[test]
    fn later_layers_win_and_origins_are_kept() {
        let (_dir, path) = file(
            "run.toml",
            "model = 'm'\ndata = 'd'\noutput = 'o'\nlearning_rate = 1e-4\nepochs = 3\n[kernels]\npolicy = 'reference'\n",
        );
        let overrides = [Override::parse("learning_rate=2e-4").unwrap()];
        let resolved = resolve(None, Some(&path), &overrides).unwrap();
        assert_eq!(resolved.config.learning_rate, 2e-4);
        assert_eq!(resolved.config.num_train_epochs, 3.0);
        assert_eq!(resolved.config.kernels.policy, "reference");
        assert_eq!(
            resolved.origins["learning_rate"],
            Origin::CommandLine("learning_rate=2e-4".into())
        );
        assert_eq!(resolved.origins["kernels.policy"], Origin::File(path));
        assert_eq!(resolved.origins["seed"], Origin::Default);
    }

    #[test]
    fn yaml_reads_the_same_keys() {
        let (_dir, path) = file(
            "run.yaml",
            "model: m\ndata: d\noutput: o\nlearning_rate: 1e-4\nfreeze: [vision, projector]\nsave_steps: null\nlr_scheduler_type: linear\n",
        );
        let config = resolve(None, Some(&path), &[]).unwrap().config;
        assert_eq!(config.learning_rate, 1e-4);
        assert_eq!(config.freeze, ["vision", "projector"]);
        assert_eq!(config.save_steps, None);
        assert_eq!(config.lr_scheduler_type, SchedulerType::Linear);
    }

    #[test]
    fn misspelt_keys_are_all_named_with_the_nearest_right_one() {
        let error = set(&[
            "learning_rte=1e-4",
            "batch_size=2",
            "kernel.policy=auto",
            "zzz=1",
        ]);
        let text = error.unwrap_err().to_string();
        assert!(text.contains("4 settings are wrong"), "{text}");
        assert!(text.contains("`learning_rte` is no key of a run (command line, learning_rte=1e-4); did you mean `learning_rate`?"), "{text}");
        assert!(
            text.contains("did you mean `per_device_train_batch_size`?"),
            "{text}"
        );
        assert!(text.contains("did you mean `kernels.policy`?"), "{text}");
        assert!(
            text.contains("`zzz` is no key of a run (command line, zzz=1)"),
            "{text}"
        );
    }

    #[test]
    fn values_that_do_not_fit_are_all_named() {
        let text = set(&[
            "learning_rate=fast",
            "max_steps=-1",
            "lr_scheduler_type=cosin",
        ]);
        let text = text.unwrap_err().to_string();
        assert!(
            text.contains("`learning_rate` (command line, learning_rate=fast)"),
            "{text}"
        );
        assert!(text.contains("`max_steps`"), "{text}");
        assert!(
            text.contains("expected one of `constant`, `linear`, `cosine`"),
            "{text}"
        );
    }

    #[test]
    fn values_are_typed_as_written() {
        let config = set(&[
            "freeze=vision,projector",
            "on_non_finite=skip",
            "save_steps=null",
            "max_steps=7",
            "no_decay=[\"*.bias\"]",
        ]);
        let config = config.unwrap().config;
        assert_eq!(config.freeze, ["vision", "projector"]);
        assert_eq!(config.on_non_finite, OnNonFinite::Skip);
        assert_eq!((config.save_steps, config.max_steps), (None, Some(7)));
        assert_eq!(config.no_decay, ["*.bias"]);
        let hydra = set(&["freeze=[vision, projector]"]).unwrap().config;
        assert_eq!(hydra.freeze, ["vision", "projector"]);
        for (name, optim) in [
            ("adamw_torch_fused", Optim::AdamW),
            ("adamw_8bit", Optim::AdamW8Bit),
            ("adamw_bnb_8bit", Optim::AdamW8Bit),
        ] {
            let config = set(&[&format!("optim={name}")]).unwrap().config;
            assert_eq!(config.optim, optim);
        }
    }

    #[test]
    fn required_keys_are_asked_for() {
        let text = resolve(None, None, &[]).unwrap_err().to_string();
        assert!(text.contains("`model` is not set"), "{text}");
        assert!(text.contains("`data` is not set"), "{text}");
        assert!(text.contains("`output` is not set"), "{text}");
    }
}
