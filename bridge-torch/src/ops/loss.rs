//! The cross entropy of the output layer.

use tch::{Kind, Reduction, Tensor};

use super::compute_kind;

/// Targets with this value count for nothing.
const IGNORED: i64 = -100;
/// Rows whose float32 logits exist at one time.
const ROWS: i64 = 256;

/// `sum over targets of -log softmax(hidden weight^T)[target] / normalizer`, a scalar in float32 (float64 for float64).
///
/// `hidden`: `[n, h]`; `weight`: `[V, h]`; `targets`: `[n]` int64, -100 is ignored. The logits of all rows never exist in
/// float32.
pub fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    normalizer: f64,
) -> Tensor {
    let n = hidden.size()[0];
    let wide = compute_kind(hidden.kind());
    let mut sum = Tensor::zeros([] as [i64; 0], (wide, hidden.device()));
    let mut start = 0;
    while start < n {
        let rows = ROWS.min(n - start);
        let logits = hidden
            .narrow(0, start, rows)
            .matmul(&weight.tr())
            .to_kind(wide);
        let piece = targets.narrow(0, start, rows);
        sum = sum + logits.cross_entropy_loss::<Tensor>(&piece, None, Reduction::Sum, IGNORED, 0.0);
        start += rows;
    }
    sum / normalizer
}
