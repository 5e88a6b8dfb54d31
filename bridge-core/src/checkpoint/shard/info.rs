//! What a shard says about itself.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::layout::{LayoutSpec, ParallelSizes, PipelineLayout, PipelineOptions, RankCoord, World};
use crate::{Dtype, json};

/// The key of the header's `__metadata__`.
const KEY: &str = "megatron_shard";
/// Changes when a field changes its meaning.
const SCHEMA_VERSION: u32 = 1;

/// Whose part of which model a file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardInfo {
    /// `architectures[0]` of the model's config.
    pub architecture: String,
    /// What all ranks have in common.
    pub spec: LayoutSpec,
    /// Rows of the vocabulary, padding included, over all tensor-parallel ranks.
    pub padded_vocab_size: usize,
    /// The rank.
    pub rank: RankCoord,
    /// Its virtual pipeline stage; 0 without virtual stages.
    pub vp_stage: usize,
}

/// The same, flat, in Megatron's words: the JSON text in the header.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    schema_version: u32,
    architecture: String,
    tensor_model_parallel_size: usize,
    context_parallel_size: usize,
    pipeline_model_parallel_size: usize,
    virtual_pipeline_model_parallel_size: Option<usize>,
    expert_model_parallel_size: usize,
    expert_tensor_parallel_size: usize,
    data_parallel_size: Option<usize>,
    world_size: Option<usize>,
    pipeline_model_parallel_layout: Option<String>,
    num_layers_in_first_pipeline_stage: Option<usize>,
    num_layers_in_last_pipeline_stage: Option<usize>,
    account_for_embedding_in_pipeline_split: bool,
    account_for_loss_in_pipeline_split: bool,
    make_vocab_size_divisible_by: Option<usize>,
    padded_vocab_size: usize,
    sequential_experts: bool,
    without_mtp: bool,
    torch_dtype: Option<String>,
    rank: usize,
    tp_rank: usize,
    cp_rank: usize,
    dp_rank: usize,
    pp_rank: usize,
    etp_rank: usize,
    ep_rank: usize,
    edp_rank: usize,
    vp_stage: usize,
}

impl ShardInfo {
    /// All of it, flat, in Megatron's words.
    #[must_use]
    pub fn to_json(&self) -> Value {
        serde_json::to_value(self.text()).expect("numbers and texts are always JSON")
    }

    /// The header's `__metadata__`.
    pub(super) fn metadata(&self) -> Map<String, Value> {
        let text = serde_json::to_string(&self.text()).expect("numbers and texts are always JSON");
        let entries = [("format", "pt".to_owned()), (KEY, text)];
        entries
            .map(|(key, text)| (key.to_owned(), text.into()))
            .into_iter()
            .collect()
    }

    /// Reads `__metadata__`; `None` without a description, the reason where it is not one.
    pub(super) fn from_metadata(metadata: &Map<String, Value>) -> Option<Result<Self, String>> {
        let text = metadata.get(KEY)?.as_str()?;
        let read = || {
            // Strict about keys that stand twice, which serde alone is for structs and not for what it passes over.
            let value = json::parse(text.as_bytes()).map_err(|error| error.to_string())?;
            let text = Text::deserialize(value).map_err(|error| error.to_string())?;
            Self::from_text(text)
        };
        Some(read())
    }

    fn text(&self) -> Text {
        let LayoutSpec {
            sizes, pipeline, ..
        } = &self.spec;
        let layout = pipeline.pipeline_model_parallel_layout.as_ref();
        let (data_parallel_size, world_size) = match sizes.world {
            World::Smallest => (None, None),
            World::DataParallel(size) => (Some(size), None),
            World::Size(size) => (None, Some(size)),
        };
        Text {
            schema_version: SCHEMA_VERSION,
            architecture: self.architecture.clone(),
            tensor_model_parallel_size: sizes.tp_size,
            context_parallel_size: sizes.cp_size,
            pipeline_model_parallel_size: sizes.pp_size,
            virtual_pipeline_model_parallel_size: sizes.vpp_size,
            expert_model_parallel_size: sizes.ep_size,
            expert_tensor_parallel_size: sizes.etp_size,
            data_parallel_size,
            world_size,
            pipeline_model_parallel_layout: layout.map(ToString::to_string),
            num_layers_in_first_pipeline_stage: pipeline.num_layers_in_first_pipeline_stage,
            num_layers_in_last_pipeline_stage: pipeline.num_layers_in_last_pipeline_stage,
            account_for_embedding_in_pipeline_split: pipeline
                .account_for_embedding_in_pipeline_split,
            account_for_loss_in_pipeline_split: pipeline.account_for_loss_in_pipeline_split,
            make_vocab_size_divisible_by: self.spec.make_vocab_size_divisible_by,
            padded_vocab_size: self.padded_vocab_size,
            sequential_experts: self.spec.sequential_experts,
            without_mtp: self.spec.without_mtp,
            torch_dtype: self.spec.dtype.map(|dtype| dtype.torch_word().to_owned()),
            rank: self.rank.global_rank,
            tp_rank: self.rank.tp_rank,
            cp_rank: self.rank.cp_rank,
            dp_rank: self.rank.dp_rank,
            pp_rank: self.rank.pp_rank,
            etp_rank: self.rank.etp_rank,
            ep_rank: self.rank.ep_rank,
            edp_rank: self.rank.edp_rank,
            vp_stage: self.vp_stage,
        }
    }

    fn from_text(text: Text) -> Result<Self, String> {
        if text.schema_version != SCHEMA_VERSION {
            return Err(format!(
                "its schema_version is {}, this program reads {SCHEMA_VERSION}",
                text.schema_version
            ));
        }
        let world = match (text.data_parallel_size, text.world_size) {
            (None, None) => World::Smallest,
            (Some(size), None) => World::DataParallel(size),
            (None, Some(size)) => World::Size(size),
            (Some(_), Some(_)) => {
                return Err("it has both data_parallel_size and world_size".to_owned());
            }
        };
        let layout: Option<PipelineLayout> = text
            .pipeline_model_parallel_layout
            .map(|layout| layout.parse())
            .transpose()
            .map_err(|error| format!("{error}"))?;
        let dtype: Option<Dtype> = text
            .torch_dtype
            .map(|word| word.parse())
            .transpose()
            .map_err(|error| format!("{error}"))?;
        Ok(Self {
            architecture: text.architecture,
            spec: LayoutSpec {
                sizes: ParallelSizes {
                    tp_size: text.tensor_model_parallel_size,
                    cp_size: text.context_parallel_size,
                    pp_size: text.pipeline_model_parallel_size,
                    vpp_size: text.virtual_pipeline_model_parallel_size,
                    ep_size: text.expert_model_parallel_size,
                    etp_size: text.expert_tensor_parallel_size,
                    world,
                },
                pipeline: PipelineOptions {
                    pipeline_model_parallel_layout: layout,
                    num_layers_in_first_pipeline_stage: text.num_layers_in_first_pipeline_stage,
                    num_layers_in_last_pipeline_stage: text.num_layers_in_last_pipeline_stage,
                    account_for_embedding_in_pipeline_split: text
                        .account_for_embedding_in_pipeline_split,
                    account_for_loss_in_pipeline_split: text.account_for_loss_in_pipeline_split,
                },
                make_vocab_size_divisible_by: text.make_vocab_size_divisible_by,
                sequential_experts: text.sequential_experts,
                without_mtp: text.without_mtp,
                dtype,
            },
            padded_vocab_size: text.padded_vocab_size,
            rank: RankCoord {
                global_rank: text.rank,
                tp_rank: text.tp_rank,
                cp_rank: text.cp_rank,
                dp_rank: text.dp_rank,
                pp_rank: text.pp_rank,
                etp_rank: text.etp_rank,
                ep_rank: text.ep_rank,
                edp_rank: text.edp_rank,
            },
            vp_stage: text.vp_stage,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> ShardInfo {
        ShardInfo {
            architecture: "Qwen3_5ForConditionalGeneration".to_owned(),
            spec: LayoutSpec {
                sizes: ParallelSizes {
                    tp_size: 2,
                    pp_size: 2,
                    vpp_size: Some(2),
                    world: World::DataParallel(3),
                    ..ParallelSizes::default()
                },
                pipeline: PipelineOptions {
                    pipeline_model_parallel_layout: Some("Et|t|t|tmL".parse().unwrap()),
                    ..PipelineOptions::default()
                },
                make_vocab_size_divisible_by: Some(96),
                sequential_experts: true,
                without_mtp: false,
                dtype: Some(Dtype::Bf16),
            },
            padded_vocab_size: 576,
            rank: RankCoord {
                global_rank: 7,
                tp_rank: 1,
                cp_rank: 0,
                dp_rank: 0,
                pp_rank: 1,
                etp_rank: 0,
                ep_rank: 0,
                edp_rank: 1,
            },
            vp_stage: 1,
        }
    }

    fn with(from: &str, to: &str) -> Map<String, Value> {
        let mut metadata = info().metadata();
        let text = metadata[KEY].as_str().unwrap();
        let changed = text.replacen(from, to, 1);
        assert_ne!(text, changed);
        metadata.insert(KEY.to_owned(), changed.into());
        metadata
    }

    #[test]
    fn a_description_comes_back_as_it_was() {
        let found = ShardInfo::from_metadata(&info().metadata()).unwrap();
        assert_eq!(found.unwrap(), info());
        assert!(ShardInfo::from_metadata(&Map::new()).is_none());
    }

    #[test]
    fn a_description_that_is_not_ours_is_refused_with_the_reason() {
        for (from, to, reason) in [
            (
                "\"schema_version\":1",
                "\"schema_version\":2",
                "schema_version is 2",
            ),
            ("\"rank\":7", "\"rank\":-7", "-7"),
            ("\"rank\":7", "\"rank\":7,\"rank\":8", "stands twice"),
            ("\"rank\":7", "\"rank\":7,\"colour\":1", "colour"),
            ("\"rank\":7,", "", "rank"),
            ("\"Et|", "\"Ex|", "Invalid layer character 'x'"),
            ("bfloat16", "bfloat17", "bfloat17"),
            ("\"world_size\":null", "\"world_size\":4", "both"),
        ] {
            let found = ShardInfo::from_metadata(&with(from, to)).unwrap();
            let error = found.unwrap_err();
            assert!(error.contains(reason), "{from} to {to}: {error}");
        }
    }
}
