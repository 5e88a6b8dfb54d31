//! `vision_config`: the vision tower and its merger.

use serde_json::{Map, Value};

use super::ConfigProblem;
use super::reader::Reader;

/// The vision tower. Field names are those of `config.json`; absent keys have transformers' defaults.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "fields carry the names of config.json")]
pub struct VisionConfig {
    pub depth: usize,
    pub hidden_size: usize,
    pub num_heads: usize,
    pub intermediate_size: usize,
    /// Width of a merged visual token: the language model's hidden size.
    pub out_hidden_size: usize,
    pub hidden_act: String,
    pub in_channels: usize,
    pub patch_size: usize,
    pub temporal_patch_size: usize,
    pub spatial_merge_size: usize,
    /// Rows of the learned position table; a square grid.
    pub num_position_embeddings: usize,
    pub initializer_range: f64,
    /// Layers with a deepstack merger; empty in every published Qwen3.5 and 3.6.
    pub deepstack_visual_indexes: Vec<usize>,
    /// Base of the tower's axial rotary frequencies.
    pub rope_theta: f64,
}

impl VisionConfig {
    /// Values of one patch: channels x time x height x width.
    #[must_use]
    pub fn patch_elements(&self) -> usize {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }

    /// Width of the rows that the merger joins: hidden size x merge size squared.
    #[must_use]
    pub fn merged_size(&self) -> usize {
        self.hidden_size * self.spatial_merge_size * self.spatial_merge_size
    }

    pub(super) fn read(map: &Map<String, Value>, text_hidden: usize) -> (Self, Vec<ConfigProblem>) {
        let mut r = Reader::new("vision_config", map);
        r.only("hidden_act", "\"gelu_pytorch_tanh\"");
        r.also_known(&["model_type", "dtype", "torch_dtype"]);
        let rope_theta = match r.object("rope_parameters") {
            Some(map) => {
                let mut inner = Reader::new("vision_config.rope_parameters", map);
                inner.also_known(&["rope_type"]);
                let theta = inner.float("rope_theta", 10_000.0);
                r.problems.extend(inner.finish());
                theta
            }
            None => 10_000.0,
        };
        let vision = Self {
            depth: r.size_at_most("depth", 27, 100_000),
            hidden_size: r.size("hidden_size", 1152),
            num_heads: r.size("num_heads", 16),
            intermediate_size: r.size("intermediate_size", 4304),
            out_hidden_size: r.size("out_hidden_size", 3584),
            hidden_act: "gelu_pytorch_tanh".to_owned(),
            in_channels: r.size_at_most("in_channels", 3, 1024),
            patch_size: r.size_at_most("patch_size", 16, 1024),
            temporal_patch_size: r.size_at_most("temporal_patch_size", 2, 1024),
            spatial_merge_size: r.size_at_most("spatial_merge_size", 2, 1024),
            num_position_embeddings: r.size("num_position_embeddings", 2304),
            initializer_range: r.float("initializer_range", 0.02),
            deepstack_visual_indexes: r.sizes("deepstack_visual_indexes").unwrap_or_default(),
            rope_theta,
        };
        if !vision.hidden_size.is_multiple_of(vision.num_heads) {
            let reason = format!("it must be a multiple of num_heads ({})", vision.num_heads);
            r.inconsistent("hidden_size", vision.hidden_size, reason);
        }
        if vision.out_hidden_size != text_hidden {
            let reason = format!(
                "visual tokens take the place of text embeddings, text_config.hidden_size is {text_hidden}"
            );
            r.inconsistent("out_hidden_size", vision.out_hidden_size, reason);
        }
        let depth = vision.depth;
        if let Some(index) = vision
            .deepstack_visual_indexes
            .iter()
            .find(|index| **index >= depth)
        {
            let reason = format!("depth is {depth}, so the last layer is {}", depth - 1);
            r.inconsistent("deepstack_visual_indexes", index, reason);
        }
        (vision, r.finish())
    }
}
