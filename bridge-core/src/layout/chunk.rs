//! What one virtual stage of one pipeline rank holds.

use std::ops::Range;

use super::pipeline_layout::LayerWord;

/// One model chunk: virtual stage `vp_stage` of pipeline rank `pp_rank`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// The pipeline rank.
    pub pp_rank: usize,
    /// The virtual stage; 0 without virtual stages.
    pub vp_stage: usize,
    /// Global decoder layers; names inside the chunk count them from 0.
    pub layers: Range<usize>,
    /// Whether it is the first chunk of the model.
    pub pre_process: bool,
    /// Whether it is the last chunk of the model.
    pub post_process: bool,
    /// Whether it holds the vision tower.
    pub vision: bool,
    /// Whether it holds an embedding: the first chunk, and a copy beside the multi-token-prediction head.
    pub embedding: bool,
    /// Whether it holds the norm behind the last decoder layer.
    pub final_layernorm: bool,
    /// Whether it holds an output layer of its own; a tied one exists only where the embedding is on another chunk.
    pub output_layer: bool,
    /// Layers of the multi-token-prediction head that it holds.
    pub mtp_num_layers: usize,
}

impl Chunk {
    /// What stands in this stage of a pipeline layout.
    #[must_use]
    pub fn words(&self) -> Vec<LayerWord> {
        let mut words = Vec::new();
        let mut add = |word, times| words.extend(std::iter::repeat_n(word, times));
        add(LayerWord::Embedding, usize::from(self.pre_process));
        add(LayerWord::Decoder, self.layers.len());
        add(LayerWord::Mtp, self.mtp_num_layers);
        add(LayerWord::Loss, usize::from(self.post_process));
        words
    }
}
