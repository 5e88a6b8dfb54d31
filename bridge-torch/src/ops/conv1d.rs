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
    let (_, taps) = weight.size2().expect("a convolution weight is [c, K]");
    let before = inputs_before(x, taps, state, sequences); // [n, K-1, c]
    let y = match sequences {
        Sequences::Padded { seq, .. } => convolve(&Tensor::cat(&[&before, x], 1), weight, *seq),
        Sequences::Packed { cu_seqlens, .. } => {
            let outputs: Vec<Tensor> = (0i64..)
                .zip(Sequences::spans(cu_seqlens))
                .map(|(sample, (start, length))| {
                    let pieces = [before.narrow(0, sample, 1), x.narrow(1, start, length)];
                    convolve(&Tensor::cat(&pieces, 1), weight, length)
                })
                .collect();
            Tensor::cat(&outputs, 1)
        }
    };
    (y, last_inputs(x, taps, state, sequences))
}

/// The `taps - 1` last inputs of each sample, `[n, c, taps - 1]`: the state for the tokens that follow.
pub(crate) fn last_inputs(
    x: &Tensor,
    taps: i64,
    state: Option<&Tensor>,
    sequences: &Sequences,
) -> Tensor {
    let kept = taps - 1;
    let before = inputs_before(x, taps, state, sequences);
    let (n, c) = (before.size()[0], before.size()[2]);
    let last = match sequences {
        Sequences::Padded { seq, .. } => match sequences.current_mask() {
            None => {
                let near = kept.min(*seq);
                Tensor::cat(&[before, x.narrow(1, seq - near, near)], 1).narrow(1, near, kept)
            }
            Some(mask) => {
                // The state ends with the last real token: behind it there is only padding.
                let steps = Tensor::arange_start(1, seq + 1, (Kind::Int64, x.device()));
                let ends = (mask.to_kind(Kind::Int64) * steps).amax([1i64].as_slice(), true);
                let rows = ends + Tensor::arange(kept, (Kind::Int64, x.device()));
                let rows = rows.unsqueeze(-1).expand([n, kept, c], false);
                Tensor::cat(&[&before, x], 1).gather(1, &rows, false)
            }
        },
        Sequences::Packed { cu_seqlens, .. } => {
            let states: Vec<Tensor> = (0i64..)
                .zip(Sequences::spans(cu_seqlens))
                .map(|(sample, (start, length))| {
                    let near = kept.min(length);
                    let inputs = x.narrow(1, start + length - near, near);
                    Tensor::cat(&[before.narrow(0, sample, 1), inputs], 1).narrow(1, near, kept)
                })
                .collect();
            Tensor::cat(&states, 0)
        }
    };
    last.transpose(1, 2).contiguous()
}

/// `[n, taps - 1, c]`.
fn inputs_before(x: &Tensor, taps: i64, state: Option<&Tensor>, sequences: &Sequences) -> Tensor {
    match state {
        Some(state) => state.transpose(1, 2).to_kind(x.kind()),
        None => Tensor::zeros(
            [sequences.count(), taps - 1, x.size()[2]],
            (x.kind(), x.device()),
        ),
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
