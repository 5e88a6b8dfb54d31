//! Softmax attention with grouped key/value heads.

use tch::Tensor;

use super::sequences::{Sequences, causal};

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
                (None, None) => plain(&q, &k, &v, None, false),
                (None, Some(_)) if queries == keys || queries == 1 => {
                    plain(&q, &k, &v, None, queries > 1)
                }
                (None, Some(_)) => {
                    let visible = causal(queries, keys, offset, q.device());
                    plain(&q, &k, &v, Some(&visible), false)
                }
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
                    plain(&q, &k, &v, Some(&visible), false)
                }
            }
        }
        Sequences::Packed { cu_seqlens, .. } => {
            let parts: Vec<Tensor> = Sequences::spans(cu_seqlens)
                .filter(|&(_, length)| length > 0)
                .map(|(start, length)| {
                    let cut = |x: &Tensor| x.narrow(2, start, length);
                    plain(&cut(&q), &cut(&k), &cut(&v), None, seen.is_some())
                })
                .collect();
            Tensor::cat(&parts, 2)
        }
    };
    out.transpose(1, 2)
}

fn plain(q: &Tensor, k: &Tensor, v: &Tensor, visible: Option<&Tensor>, is_causal: bool) -> Tensor {
    let grouped = q.size()[1] != k.size()[1];
    Tensor::scaled_dot_product_attention(q, k, v, visible, 0.0, is_causal, None, grouped)
}
