//! The gated delta rule, in chunks.

use tch::{Kind, Tensor};

use super::compute_kind;
use super::sequences::Sequences;

/// Tokens of a chunk.
const CHUNK: i64 = 64;
/// Keeps the unit length of a zero vector finite, and its gradient.
const L2_EPS: f64 = 1e-6;

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
    let wide = compute_kind(v.kind());
    let heads = v.size()[2];
    let (key_heads, d_k) = (q.size()[2], q.size()[3]);
    let d_v = v.size()[3];
    let unit = |x: &Tensor| {
        let x = x.to_kind(wide);
        let sum = x
            .square()
            .sum_dim_intlist([-1i64].as_slice(), true, None::<Kind>);
        (&x * (sum + L2_EPS).rsqrt()).repeat_interleave_self_int(heads / key_heads, Some(2), None)
    };
    let scale = (d_k as f64).powf(-0.5);
    let inputs = [
        unit(q) * scale,
        unit(k),
        v.to_kind(wide),
        g.to_kind(wide).unsqueeze(-1),
        beta.to_kind(wide).unsqueeze(-1),
    ];
    let state = match initial_state {
        Some(state) => state.to_kind(wide),
        None => Tensor::zeros([sequences.count(), heads, d_k, d_v], (wide, v.device())),
    };
    let (out, state) = match sequences {
        Sequences::Padded { .. } => {
            let inputs = inputs.map(|x| sequences.zero_padding(&x));
            chunked(&inputs, &state)
        }
        Sequences::Packed { cu_seqlens, .. } => {
            let mut outs = Vec::new();
            let mut states = Vec::new();
            for (sample, (start, length)) in (0i64..).zip(Sequences::spans(cu_seqlens)) {
                let state = state.narrow(0, sample, 1);
                if length == 0 {
                    states.push(state);
                    continue;
                }
                let cut = inputs.each_ref().map(|x| x.narrow(1, start, length));
                let (out, state) = chunked(&cut, &state);
                outs.push(out);
                states.push(state);
            }
            (Tensor::cat(&outs, 1), Tensor::cat(&states, 0))
        }
    };
    (out.to_kind(v.kind()), state)
}

/// `q, k [b, s, h, d_k]`, `v [b, s, h, d_v]`, `g, beta [b, s, h, 1]`, state `[b, h, d_k, d_v]`.
fn chunked(inputs: &[Tensor; 5], state: &Tensor) -> (Tensor, Tensor) {
    let (b, s, h) = inputs[0].size3_front();
    let chunks = (s + CHUNK - 1) / CHUNK;
    let padding = chunks * CHUNK - s;
    let split = |x: &Tensor| {
        let d = x.size()[3];
        x.constant_pad_nd([0, 0, 0, 0, 0, padding])
            .view([b, chunks, CHUNK, h, d])
            .permute([0, 3, 1, 2, 4]) // [b, h, chunks, C, d]
    };
    let [q, k, v, g, beta] = inputs.each_ref().map(split);
    let device = q.device();
    let strict = Tensor::ones([CHUNK, CHUNK], (Kind::Bool, device)).tril(-1);
    let lower = Tensor::ones([CHUNK, CHUNK], (Kind::Bool, device)).tril(0);
    let c = g.cumsum(3, None::<Kind>); // [b, h, chunks, C, 1]
    let decay = (&c - c.transpose(-1, -2))
        .masked_fill(&lower.logical_not(), f64::NEG_INFINITY)
        .exp();
    let k_beta = &k * &beta;
    let a = (k_beta.matmul(&k.transpose(-1, -2)) * &decay).masked_fill(&strict.logical_not(), 0.0);
    let unit = Tensor::eye(CHUNK, (a.kind(), device));
    let d_v = v.size()[4];
    let d_k = k.size()[4];
    let rhs = Tensor::cat(&[v * &beta, k_beta * c.exp()], -1);
    let solved = (a + unit).linalg_solve_triangular(&rhs, false, true, true);
    let (u, w) = (solved.narrow(-1, 0, d_v), solved.narrow(-1, d_v, d_k));
    let p = q.matmul(&k.transpose(-1, -2)) * decay;
    let q_decayed = q * c.exp();
    let last = c.narrow(3, CHUNK - 1, 1);
    let k_decayed = k * (&last - &c).exp();
    let last = last.exp();

    let mut state = state.shallow_clone();
    let mut outs = Vec::new();
    for i in 0..chunks {
        let pick = |x: &Tensor| x.select(2, i);
        let v_new = pick(&u) - pick(&w).matmul(&state);
        outs.push(pick(&q_decayed).matmul(&state) + pick(&p).matmul(&v_new));
        state = &state * pick(&last) + pick(&k_decayed).transpose(-1, -2).matmul(&v_new);
    }
    let out = Tensor::cat(&outs, 2).transpose(1, 2).narrow(1, 0, s); // [b, s, h, d_v]
    (out, state)
}

/// The first three sizes of a tensor.
trait FrontSizes {
    fn size3_front(&self) -> (i64, i64, i64);
}

impl FrontSizes for Tensor {
    fn size3_front(&self) -> (i64, i64, i64) {
        let size = self.size();
        (size[0], size[1], size[2])
    }
}
