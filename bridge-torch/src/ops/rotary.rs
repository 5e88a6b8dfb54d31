//! Rotary embedding with interleaved temporal, height and width positions.

use tch::{Kind, Tensor};

use super::compute_kind;
use super::policy::{Kernels, Op};
use crate::shim::{at, bridge, pair};

/// Cosine and sine of the rotation, `[batch, seq, dims]` each, in `kind`; for kernels `[batch, seq, dims / 2]`, because both
/// halves of a head turn alike.
///
/// `position_ids`: `[3, batch, seq]` (temporal, height, width); `dims`: how many dimensions of a head rotate. Frequency `j`
/// turns with the height if `j % 3 == 1` and `j < 3 * section[1]`, with the width if `j % 3 == 2` and
/// `j < 3 * section[2]`, else with the temporal position. Angles are float32 (float64 when `kind` is).
/// Defined by: transformers, `Qwen3_5TextRotaryEmbedding`.
pub fn mrope_cos_sin(
    kernels: Kernels,
    position_ids: &Tensor,
    dims: i64,
    theta: f64,
    section: [i64; 3],
    kind: Kind,
) -> (Tensor, Tensor) {
    let wide = compute_kind(kind);
    let device = position_ids.device();
    let count = dims / 2;
    let exponents = Tensor::arange_start_step(0, dims, 2, (wide, device)) / dims;
    let frequencies = (exponents * -theta.ln()).exp();
    if kernels.run(Op::Rotary) {
        let like = Tensor::empty([0], (kind, device));
        let table =
            bridge::kernel_mrope_table(at(position_ids), at(&frequencies), &section, at(&like));
        return pair(table);
    }
    let rows: Vec<i64> = (0..count)
        .map(|j| {
            let axis = j % 3;
            let limit = match axis {
                1 => 3 * section[1],
                2 => 3 * section[2],
                _ => 0,
            };
            if j < limit { axis } else { 0 }
        })
        .collect();
    let rows = Tensor::from_slice(&rows).to_device(device);
    let positions = position_ids.index_select(0, &rows).permute([1, 2, 0]); // [b, s, count]
    let angles = positions.to_kind(wide) * frequencies;
    let angles = Tensor::cat(&[&angles, &angles], -1);
    (angles.cos().to_kind(kind), angles.sin().to_kind(kind))
}

/// Rotates the first `cos.size(-1)` dimensions of each head of `q` and `k`; the rest passes.
///
/// `q`, `k`: `[.., seq, heads, d]`; `cos`, `sin`: `[.., seq, r]` of [`mrope_cos_sin`]. The arithmetic is in `q`'s kind; kernels
/// turn `q` and `k` where they lie, in float32 with one rounding.
pub fn apply_rotary(
    kernels: Kernels,
    q: &Tensor,
    k: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
) -> (Tensor, Tensor) {
    if kernels.run(Op::Rotary) {
        let turned = bridge::kernel_mrope(at(q), at(k), at(cos), at(sin));
        return pair(turned);
    }
    let (cos, sin) = (cos.unsqueeze(-2), sin.unsqueeze(-2));
    (rotate(q, &cos, &sin), rotate(k, &cos, &sin))
}

fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let d = x.size().last().copied().unwrap_or_default();
    let r = cos.size().last().copied().unwrap_or_default();
    let front = x.narrow(-1, 0, r);
    let (first, second) = (front.narrow(-1, 0, r / 2), front.narrow(-1, r / 2, r / 2));
    let turned = &front * cos + Tensor::cat(&[-second, first], -1) * sin;
    if r == d {
        return turned;
    }
    Tensor::cat(&[turned, x.narrow(-1, r, d - r)], -1)
}
