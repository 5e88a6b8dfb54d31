//! Routing, the routed experts and the auxiliary loss.

use tch::{Kind, Tensor};

use super::compute_kind;
use super::policy::{Kernels, Op};
use crate::shim::{absent, at, bridge, one, pair};

/// Which experts each row goes to.
#[derive(Debug)]
pub struct Routing {
    /// `[n, k]`, in the logits' kind; each row sums to 1.
    pub weights: Tensor,
    /// `[n, k]` int64, by falling probability.
    pub experts: Tensor,
}

/// Chooses the `top_k` experts of each row: softmax in float32 over all, the best, renormalised.
///
/// `logits`: `[n, experts]`.
pub fn route(kernels: Kernels, logits: &Tensor, top_k: i64) -> Routing {
    if kernels.run(Op::Moe) {
        let (weights, experts) = pair(bridge::kernel_route(at(logits), top_k));
        return Routing { weights, experts };
    }
    let probabilities = logits.softmax(-1, compute_kind(logits.kind()));
    let (weights, experts) = probabilities.topk(top_k, -1, true, true);
    let sum = weights.sum_dim_intlist([-1i64].as_slice(), true, None::<Kind>);
    Routing {
        weights: (weights / sum).to_kind(logits.kind()),
        experts,
    }
}

/// What the shared expert of a layer gives, before its gate.
#[derive(Debug)]
pub struct SharedExpert {
    /// `[n, h]`
    pub output: Tensor,
    /// Logits of the gate, `[n, 1]`.
    pub gate: Tensor,
}

/// The weighted sum of each row's experts, `sum_k w_k fc2_e(swiglu(fc1_e(x)))`, and `sigmoid(gate) output` of the shared one.
///
/// `x`: `[n, h]`; `fc1`: `[experts, 2 I, h]`, gate first; `fc2`: `[experts, h, I]`; returns `[n, h]`.
///
/// # Panics
/// When shapes do not fit.
pub fn experts(
    kernels: Kernels,
    x: &Tensor,
    routing: &Routing,
    (fc1, fc2): (&Tensor, &Tensor),
    shared: Option<&SharedExpert>,
) -> Tensor {
    let (x, weights, experts) = (at(x), at(&routing.weights), at(&routing.experts));
    if kernels.run(Op::Moe) {
        let (output, gate) = match shared {
            Some(shared) => (shared.output.shallow_clone(), shared.gate.shallow_clone()),
            None => (absent(), absent()),
        };
        return one(bridge::kernel_routed_experts(
            x,
            weights,
            at(fc1),
            at(fc2),
            experts,
            at(&output),
            at(&gate),
        ));
    }
    let routed = one(bridge::routed_experts(
        x,
        weights,
        at(fc1),
        at(fc2),
        experts,
    ));
    match shared {
        Some(shared) => routed + shared.gate.sigmoid() * &shared.output,
        None => routed,
    }
}

/// The load-balancing loss of all layers together: `E sum_e f_e P_e`, where `f_e` counts choices and `P_e` averages
/// probabilities over the real rows of all layers.
///
/// `logits`: `[n, experts]` a layer; `mask`: `[n]`, true at real tokens. A balanced router gives `top_k`; `f` carries no
/// gradient. Defined by: transformers, `load_balancing_loss_func`.
pub fn load_balancing_loss(logits: &[&Tensor], top_k: i64, mask: Option<&Tensor>) -> Tensor {
    let all = Tensor::cat(logits, 0);
    let experts = all.size()[1];
    let probabilities = all.softmax(-1, all.kind()); // [layers n, E]
    let (_, chosen) = probabilities.topk(top_k, -1, true, true);
    let wide = compute_kind(all.kind());
    let options = (wide, all.device());
    let weights = match mask {
        Some(mask) => mask
            .reshape([-1])
            .to_kind(wide)
            .repeat([i64::try_from(logits.len()).expect("few layers")]),
        None => Tensor::ones([all.size()[0]], options),
    };
    let rows = weights.sum(None::<Kind>);
    let each = weights.unsqueeze(-1);
    let counts = Tensor::zeros([experts], options).scatter_add(
        0,
        &chosen.reshape([-1]),
        &each.expand([-1, top_k], false).reshape([-1]),
    );
    let share = (probabilities.to_kind(wide) * each).sum_dim_intlist(
        [0i64].as_slice(),
        false,
        None::<Kind>,
    );
    let sum = (counts / &rows * (share / rows)).sum(None::<Kind>);
    sum * experts
}
