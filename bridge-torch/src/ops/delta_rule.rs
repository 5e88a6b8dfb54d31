//! The gated delta rule, in chunks, with a gradient written by hand (`shim/cpp/delta_rule.cpp`).

use tch::Tensor;

use super::sequences::Sequences;
use crate::shim::{absent, at, bridge, pair};

/// Applies the gated delta rule to each sample and returns the output and the final states.
///
/// Per step and value head: `S = exp(g) S`; `S = S + k (beta (v - S^T k))^T`; `o = S^T q / sqrt(d_k)`, with `q` and `k` made
/// unit length here. Value head `h` uses key head `h / (value_heads / key_heads)`.
///
/// - `q`, `k`: `[batch, seq, key_heads, d_k]`; `v`: `[batch, seq, value_heads, d_v]`
/// - `g` (log decay, at most 0), `beta` (0..1): `[batch, seq, value_heads]`
/// - `initial_state`: `[n, value_heads, d_k, d_v]`, zeros if absent; `n` is the number of samples
/// - returns `[batch, seq, value_heads, d_v]` in `v`'s kind, and the states in float32 (float64 for float64 inputs)
///
/// A state never crosses a border of `sequences`, and padding leaves it as it is. Defined by: transformers,
/// `torch_chunk_gated_delta_rule` (qwen3_5).
pub fn gated_delta_rule(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    g: &Tensor,
    beta: &Tensor,
    initial_state: Option<&Tensor>,
    sequences: &Sequences,
) -> (Tensor, Tensor) {
    let state = initial_state.map_or_else(absent, Tensor::shallow_clone);
    let mask = sequences.current_mask().unwrap_or_else(absent);
    let borders = sequences.borders();
    pair(bridge::gated_delta_rule(
        at(q),
        at(k),
        at(v),
        at(g),
        at(beta),
        at(&state),
        at(&mask),
        borders,
    ))
}
