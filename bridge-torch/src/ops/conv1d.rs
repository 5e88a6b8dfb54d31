//! The short causal convolution in front of the delta rule.

use tch::{Kind, Tensor};

use super::sequences::Sequences;

/// Depthwise causal convolution and silu: `y_t = silu(sum_i weight[c, i] x_{t - K + 1 + i})`, and the last inputs.
///
/// - `x`: `[batch, seq, c]`, zeros at padding; `weight`: `[c, K]`
/// - `state`: `[n, c, K - 1]`, the inputs before each of the `n` samples; zeros if absent
/// - returns `[batch, seq, c]` and the `K - 1` last inputs of each sample `[n, c, K - 1]`
///
/// No tap crosses the border of a sample. Padding on the right does not enter the returned state.
pub fn causal_conv1d_silu(
    x: &Tensor,
    weight: &Tensor,
    state: Option<&Tensor>,
    sequences: &Sequences,
) -> (Tensor, Tensor) {
    let (c, taps) = weight.size2().expect("a convolution weight is [c, K]");
    let n = sequences.count();
    let before = match state {
        Some(state) => state.transpose(1, 2).to_kind(x.kind()),
        None => Tensor::zeros([n, taps - 1, c], (x.kind(), x.device())),
    }; // [n, K-1, c]
    match sequences {
        Sequences::Padded { seq, .. } => {
            let longer = Tensor::cat(&[before, x.shallow_clone()], 1); // [b, K-1+s, c]
            let y = convolve(&longer, weight, *seq);
            let last = match sequences.current_mask() {
                None => longer.narrow(1, *seq, taps - 1),
                Some(mask) => {
                    // The state ends with the last real token: behind it there is only padding.
                    let steps = Tensor::arange_start(1, seq + 1, (Kind::Int64, x.device()));
                    let ends = (mask.to_kind(Kind::Int64) * steps).amax([1i64].as_slice(), true);
                    let rows = ends + Tensor::arange(taps - 1, (Kind::Int64, x.device()));
                    longer.gather(
                        1,
                        &rows.unsqueeze(-1).expand([n, taps - 1, c], false),
                        false,
                    )
                }
            };
            (y, last.transpose(1, 2).contiguous())
        }
        Sequences::Packed { cu_seqlens, .. } => {
            let mut outputs = Vec::new();
            let mut states = Vec::new();
            for (sample, (start, length)) in (0i64..).zip(Sequences::spans(cu_seqlens)) {
                let longer = Tensor::cat(
                    &[before.narrow(0, sample, 1), x.narrow(1, start, length)],
                    1,
                );
                outputs.push(convolve(&longer, weight, length));
                states.push(longer.narrow(1, length, taps - 1));
            }
            (
                Tensor::cat(&outputs, 1),
                Tensor::cat(&states, 0).transpose(1, 2).contiguous(),
            )
        }
    }
}

/// `longer`: `[b, K - 1 + s, c]`; returns `[b, s, c]`.
fn convolve(longer: &Tensor, weight: &Tensor, seq: i64) -> Tensor {
    // One rounding at the end, as a convolution does it: four in bfloat16 cost the model a third more error.
    let kind = longer.kind();
    let wide = super::compute_kind(kind);
    let (longer, weight) = (longer.to_kind(wide), weight.to_kind(wide));
    let taps = weight.unbind(1);
    let sum = (0i64..)
        .zip(&taps)
        .map(|(i, tap)| longer.narrow(1, i, seq) * tap)
        .reduce(|sum, term| sum + term)
        .expect("a kernel has at least one tap");
    sum.to_kind(kind).silu()
}
