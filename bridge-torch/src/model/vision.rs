//! The vision tower: patches in, merged visual tokens in the language model's width out.
//!
//! Shapes: n patches, x tower width, h heads, d = x / h, m = merge.

use bridge_core::config::VisionConfig;
use tch::{Kind, Tensor};

use super::ModelError;
use super::linear::Linear;
use super::vision_tables::VisionTables;
use crate::ops::attention::attention;
use crate::ops::compute_kind;
use crate::ops::norm::layer_norm;
use crate::ops::policy::Kernels;
use crate::ops::rotary::apply_rotary;
use crate::ops::sequences::Sequences;
use crate::params::ParamStore;

const EPS: f64 = 1e-6;

/// The tower and its merger.
#[derive(Debug)]
pub(super) struct VisionTower {
    /// `[x, channels, time, rows, columns]`: a convolution that never overlaps is a product.
    patch_weight: Tensor,
    patch_bias: Tensor,
    pos_embed: Tensor,
    blocks: Vec<Block>,
    merger: Merger,
    side: i64,
    merge: i64,
    head_dim: i64,
    rope_theta: f64,
}

impl VisionTower {
    pub(super) fn new(config: &VisionConfig, params: &ParamStore) -> Result<Self, ModelError> {
        if !config.deepstack_visual_indexes.is_empty() {
            return Err(ModelError::Unsupported {
                what: "deepstack in the vision tower (no published Qwen3.5 or 3.6 has it)",
                found: format!(
                    "deepstack_visual_indexes {:?}",
                    config.deepstack_visual_indexes
                ),
            });
        }
        let size = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
        let width = size(config.hidden_size);
        let heads = size(config.num_heads);
        let head_dim = width / heads;
        let blocks = (0..config.depth)
            .map(|layer| {
                Block::new(
                    params,
                    &format!("vision_model.decoder.layers.{layer}"),
                    heads,
                )
            })
            .collect::<Result<_, _>>()?;
        let merge = size(config.spatial_merge_size);
        Ok(Self {
            patch_weight: params.get("vision_model.patch_embed.proj.weight")?,
            patch_bias: params.get("vision_model.patch_embed.proj.bias")?,
            pos_embed: params.get("vision_model.pos_embed.weight")?,
            blocks,
            merger: Merger::new(params, merge * merge * width)?,
            side: size(config.num_position_embeddings.isqrt()),
            merge,
            head_dim,
            rope_theta: config.rope_theta,
        })
    }

    /// `pixels`: `[n, patch elements]` of all `grids`; returns `[n / m^2, language width]`.
    pub(super) fn forward(&self, pixels: &Tensor, grids: &[[i64; 3]]) -> Tensor {
        let tables = VisionTables::new(grids, self.side, self.merge);
        let kind = self.pos_embed.kind();
        let device = self.pos_embed.device();
        let weight = self.patch_weight.flatten(1, -1);
        let x = pixels.to_kind(kind).linear(&weight, Some(&self.patch_bias)); // [n, x]
        let wide = compute_kind(kind);
        let taps = Tensor::from_slice(&tables.taps).to_device(device);
        let weights = Tensor::from_slice(&tables.weights)
            .to_kind(wide)
            .to_device(device);
        let positions = (self
            .pos_embed
            .index_select(0, &taps)
            .view([-1, 4, x.size()[1]])
            * weights.view([-1, 4, 1]))
        .sum_dim_intlist([1i64].as_slice(), false, wide);
        let mut x = x + positions.to_kind(kind);
        let (cos, sin) = self.rotary(&tables, wide);
        let rotary = Rotary {
            cos: cos.to_device(device),
            sin: sin.to_device(device),
        };
        for block in &self.blocks {
            x = block.forward(&x, &rotary, &tables.frames);
        }
        self.merger.forward(&x)
    }

    /// Angles of row and column, `[1, n, d]`.
    fn rotary(&self, tables: &VisionTables, kind: Kind) -> (Tensor, Tensor) {
        let positions = Tensor::from_slice(&tables.positions)
            .view([-1, 2, 1])
            .to_kind(Kind::Double);
        vision_rotary(&positions, self.head_dim, self.rope_theta, kind)
    }
}

/// cos and sin `[1, n, d]` of axial positions `[n, 2, 1]` (row, column).
fn vision_rotary(positions: &Tensor, head_dim: i64, theta: f64, kind: Kind) -> (Tensor, Tensor) {
    let exponents = Tensor::arange(head_dim / 4, (Kind::Double, positions.device())) * 4.0;
    let frequencies = (exponents * (-theta.ln() / positions_scale(head_dim))).exp(); // [d/4]
    let angles = (positions * frequencies).view([1, -1, head_dim / 2]);
    let angles = Tensor::cat(&[&angles, &angles], -1);
    (angles.cos().to_kind(kind), angles.sin().to_kind(kind))
}

/// Head sizes are small, so the conversion is exact.
fn positions_scale(head_dim: i64) -> f64 {
    f64::from(i32::try_from(head_dim).unwrap_or(i32::MAX))
}

struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

#[derive(Debug)]
struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    /// Takes `{prefix}_weight`/`{prefix}.weight` by `joint`, and the bias alike.
    fn new(params: &ParamStore, prefix: &str, joint: char) -> Result<Self, ModelError> {
        Ok(Self {
            weight: params.get(&format!("{prefix}{joint}weight"))?,
            bias: params.get(&format!("{prefix}{joint}bias"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        layer_norm(x, &self.weight, &self.bias, EPS)
    }
}

#[derive(Debug)]
struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: i64,
}

impl Block {
    fn new(params: &ParamStore, name: &str, heads: i64) -> Result<Self, ModelError> {
        let attention = format!("{name}.self_attention");
        let mlp = format!("{name}.mlp");
        Ok(Self {
            norm1: LayerNorm::new(params, &format!("{attention}.linear_qkv.layer_norm"), '_')?,
            qkv: Linear::with_bias(params, &format!("{attention}.linear_qkv"))?,
            proj: Linear::with_bias(params, &format!("{attention}.linear_proj"))?,
            norm2: LayerNorm::new(params, &format!("{mlp}.linear_fc1.layer_norm"), '_')?,
            fc1: Linear::with_bias(params, &format!("{mlp}.linear_fc1"))?,
            fc2: Linear::with_bias(params, &format!("{mlp}.linear_fc2"))?,
            heads,
        })
    }

    fn forward(&self, x: &Tensor, rotary: &Rotary, frames: &[i64]) -> Tensor {
        let x = x + self.attend(&self.norm1.forward(x), rotary, frames);
        let inner = self.fc1.forward(&self.norm2.forward(&x)).gelu("tanh");
        &x + self.fc2.forward(&inner)
    }

    fn attend(&self, x: &Tensor, rotary: &Rotary, frames: &[i64]) -> Tensor {
        let (n, width) = (x.size()[0], x.size()[1]);
        let kind = x.kind();
        // Megatron's rows: q, k and v of each head after each other.
        let mut qkv = self
            .qkv
            .forward(x)
            .view([1, n, self.heads, 3, width / self.heads])
            .unbind(3)
            .into_iter();
        let mut next = || qkv.next().expect("the axis of q, k and v has length 3");
        let (q, k, v) = (next(), next(), next()); // [1, n, h, d]
        let wide = compute_kind(kind);
        let (q, k) = apply_rotary(
            Kernels::REFERENCE,
            &q.to_kind(wide),
            &k.to_kind(wide),
            &rotary.cos,
            &rotary.sin,
        );
        let (q, k) = (q.to_kind(kind), k.to_kind(kind));
        let mut parts = Vec::new();
        let mut start = 0;
        for run in frames.chunk_by(|a, b| a == b) {
            // Frames of one size form a batch; no patch sees another frame.
            let count = i64::try_from(run.len()).unwrap_or(i64::MAX);
            let length = count * run[0];
            let cut = |t: &Tensor| {
                t.narrow(1, start, length)
                    .reshape([count, run[0], self.heads, width / self.heads])
            };
            let sequences = Sequences::Padded {
                batch: count,
                seq: run[0],
                mask: None,
            };
            let out = attention(&cut(&q), &cut(&k), &cut(&v), &sequences, None);
            parts.push(out.reshape([length, width]));
            start += length;
        }
        self.proj.forward(&Tensor::cat(&parts, 0))
    }
}

#[derive(Debug)]
struct Merger {
    norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    merged_width: i64,
}

impl Merger {
    fn new(params: &ParamStore, merged_width: i64) -> Result<Self, ModelError> {
        Ok(Self {
            norm: LayerNorm::new(params, "vision_model.merger.patch_norm", '.')?,
            fc1: Linear::with_bias(params, "vision_model.merger.linear_fc1")?,
            fc2: Linear::with_bias(params, "vision_model.merger.linear_fc2")?,
            merged_width,
        })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let merged = self.norm.forward(x).view([-1, self.merged_width]);
        self.fc2.forward(&self.fc1.forward(&merged).gelu("none"))
    }
}
