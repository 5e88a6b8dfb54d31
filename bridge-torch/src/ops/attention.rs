//! Softmax attention with grouped key/value heads.

use tch::{Device, Tensor};

use super::sequences::{Sequences, additive_mask, causal};
use crate::shim::{at, bridge, own};

/// Below this many keys, probabilities are kept for the backward pass: the CPU's flash kernel is slower there.
const SHORT: i64 = 2048;

/// `softmax(q k^T / sqrt(d)) v` inside each sample.
///
/// - `q`: `[batch, seq, query_heads, d]`; `k`, `v`: `[batch, keys, kv_heads, d]`
/// - `seen`: `None` for attention in both directions; `Some(n)` for causal attention in which query `i` sees keys up to
///   `n + i` (`n` tokens come from a cache, so `keys = n + seq`)
/// - returns `[batch, seq, query_heads, d]`
///
/// Keys at padding are seen by no real token; what a query at padding gives is finite and means nothing.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sequences: &Sequences,
    seen: Option<i64>,
) -> Tensor {
    let heads_first = |x: &Tensor| x.transpose(1, 2);
    let (q, k, v) = (heads_first(q), heads_first(k), heads_first(v));
    let out = match sequences {
        Sequences::Padded { mask, .. } => {
            let (queries, keys) = (q.size()[2], k.size()[2]);
            let offset = seen.unwrap_or(0);
            match (mask, seen) {
                (None, _) => inside(&q, &k, &v, None, seen),
                (Some(mask), _) => {
                    let mask = mask.view([mask.size()[0], 1, 1, keys]);
                    let visible = match seen {
                        Some(_) => {
                            let causal = causal(queries, keys, offset, q.device());
                            // Every query sees itself, so that no row of the softmax is empty.
                            causal
                                .logical_and(&mask)
                                .logical_or(&causal.logical_xor(&causal.tril(offset - 1)))
                        }
                        None => mask,
                    };
                    inside(&q, &k, &v, Some(&visible), seen)
                }
            }
        }
        Sequences::Packed { cu_seqlens, .. } => {
            // One split, because its backward is one concatenation.
            let lengths: Vec<i64> = Sequences::spans(cu_seqlens).map(|span| span.1).collect();
            let split = |x: &Tensor| x.split_with_sizes(&lengths, 2);
            let parts: Vec<Tensor> = split(&q)
                .iter()
                .zip(split(&k))
                .zip(split(&v))
                .filter(|((q, _), _)| q.size()[2] > 0)
                .map(|((q, k), v)| inside(q, &k, &v, None, seen))
                .collect();
            Tensor::cat(&parts, 2)
        }
    };
    out.transpose(1, 2)
}

/// Attention of one sample a row, heads first; `visible` (`[b, 1, s or 1, t]`) contains the causal mask.
fn inside(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    visible: Option<&Tensor>,
    seen: Option<i64>,
) -> Tensor {
    let (queries, keys) = (q.size()[2], k.size()[2]);
    if q.device() == Device::Cpu && keys < SHORT {
        let bias = visible.map_or_else(Tensor::new, |visible| additive_mask(visible, q.kind()));
        let out = bridge::short_attention(
            at(q),
            at(k),
            at(v),
            at(&bias),
            seen.is_some(),
            seen.unwrap_or(0),
        );
        return own(out.expect("q [b, h, s, d] and k, v [b, g, t, d], g dividing h"));
    }
    let causal_mask = match (visible, seen) {
        (None, Some(seen)) if queries > 1 && queries != keys => {
            Some(causal(queries, keys, seen, q.device()))
        }
        _ => None,
    };
    let visible = visible.or(causal_mask.as_ref());
    let is_causal = visible.is_none() && seen.is_some() && queries > 1;
    let grouped = q.size()[1] != k.size()[1];
    Tensor::scaled_dot_product_attention(q, k, v, visible, 0.0, is_causal, None, grouped)
}
