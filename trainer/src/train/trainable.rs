//! Which parameters train, and which of them decay.

use bridge_torch::params::{ParamStore, Part};
use tch::Tensor;

use super::config::RunConfig;

/// Parameters of one part of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PartCount {
    /// As `freeze` names it.
    pub part: &'static str,
    /// All of them.
    pub parameters: usize,
    /// Those that train.
    pub trainable: usize,
}

/// Parameters that share a weight decay.
#[derive(Debug)]
pub(crate) struct Group {
    /// Megatron names and tensors.
    pub params: Vec<(String, Tensor)>,
    /// Their decay.
    pub weight_decay: f64,
}

/// The name that `freeze` uses.
#[must_use]
pub(crate) fn part_name(part: Part) -> &'static str {
    match part {
        Part::Vision => "vision",
        Part::Projector => "projector",
        Part::Language => "language",
        Part::Mtp => "mtp",
    }
}

/// Whether the parameter trains under this configuration.
#[must_use]
pub(crate) fn trains(config: &RunConfig, megatron_name: &str) -> bool {
    let part = part_name(Part::of(megatron_name));
    !config.freeze.iter().any(|frozen| frozen == part)
}

/// Marks what trains and returns the groups of the optimizer, decaying parameters first.
#[must_use]
pub(crate) fn groups(config: &RunConfig, params: &ParamStore) -> Vec<Group> {
    params.set_trainable(|name| trains(config, name));
    let training = params.iter().filter(|(name, _)| trains(config, name));
    let (kept, decayed): (Vec<_>, Vec<_>) = training
        .map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()))
        .partition(|(name, _)| config.no_decay.iter().any(|pattern| matches(pattern, name)));
    let groups = [(decayed, config.weight_decay), (kept, 0.0)];
    groups
        .into_iter()
        .filter(|(params, _)| !params.is_empty())
        .map(|(params, weight_decay)| Group {
            params,
            weight_decay,
        })
        .collect()
}

/// Counts by part, in the order of `freeze`'s names.
#[must_use]
pub(crate) fn counts(config: &RunConfig, params: &ParamStore) -> Vec<PartCount> {
    let parts = [Part::Vision, Part::Projector, Part::Language, Part::Mtp];
    parts
        .into_iter()
        .map(|part| {
            let of_part = || params.iter().filter(|(name, _)| Part::of(name) == part);
            PartCount {
                part: part_name(part),
                parameters: of_part().map(|(_, tensor)| tensor.numel()).sum(),
                trainable: of_part()
                    .filter(|(name, _)| trains(config, name))
                    .map(|(_, tensor)| tensor.numel())
                    .sum(),
            }
        })
        .filter(|count| count.parameters > 0)
        .collect()
}

/// Whether `name` fits `pattern`, where `*` stands for any text, also none.
fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else {
        return false;
    };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else {
        return rest.is_empty();
    };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_like_a_shell_does() {
        for (pattern, name, expected) in [
            ("*.bias", "vision_model.merger.linear_fc1.bias", true),
            ("*.bias", "a.bias.weight", false),
            (
                "*norm*.weight",
                "decoder.layers.0.input_layernorm.weight",
                true,
            ),
            (
                "*norm*.weight",
                "decoder.layers.0.mlp.linear_fc1.weight",
                false,
            ),
            ("decoder.*.weight", "decoder.layers.3.weight", true),
            ("decoder.*.weight", "mtp.layers.3.weight", false),
            ("exact", "exact", true),
            ("exact", "exactly", false),
            ("*", "anything", true),
            ("*a*a", "a", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn norms_biases_and_decay_terms_are_exempt_by_default() {
        let config = RunConfig::default();
        let exempt = |name: &str| config.no_decay.iter().any(|pattern| matches(pattern, name));
        for name in [
            "language_model.decoder.final_layernorm.weight",
            "language_model.decoder.layers.0.self_attention.out_norm.weight",
            "language_model.decoder.layers.0.self_attention.in_proj.layer_norm_weight",
            "language_model.decoder.layers.3.self_attention.q_layernorm.weight",
            "language_model.decoder.layers.0.self_attention.A_log",
            "language_model.decoder.layers.0.self_attention.dt_bias",
            "vision_model.decoder.layers.0.mlp.linear_fc1.layer_norm_bias",
            "language_model.mtp.layers.0.enorm.weight",
        ] {
            assert!(exempt(name), "{name}");
        }
        for name in [
            "language_model.embedding.word_embeddings.weight",
            "language_model.decoder.layers.0.self_attention.conv1d.weight",
            "language_model.decoder.layers.0.mlp.experts.linear_fc1.weight",
            "language_model.decoder.layers.0.mlp.router.weight",
        ] {
            assert!(!exempt(name), "{name}");
        }
    }
}
