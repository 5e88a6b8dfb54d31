//! Golden tests: gradients in float64 against central differences along random directions.

use bridge_torch::ops::conv1d::causal_conv1d_silu;
use bridge_torch::ops::delta_rule::gated_delta_rule;
use bridge_torch::ops::gdn::{GdnContext, GdnDims, GdnState, GdnWeights, gdn_core, gdn_gates};
use bridge_torch::ops::moe::{load_balancing_loss, route};
use bridge_torch::ops::norm::{rms_norm, rms_norm_gated};
use bridge_torch::ops::policy::Kernels;
use bridge_torch::ops::rotary::{apply_rotary, mrope_cos_sin};
use bridge_torch::ops::sequences::Sequences;
use bridge_torch::ops::swiglu::swiglu;
use tch::{Device, Kind, Tensor};
use tests::seeded;

const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);
const STEP: f64 = 1e-5;
const DIRECTIONS: usize = 4;

fn normal(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, DOUBLE)
}

fn value(x: &Tensor) -> f64 {
    x.double_value(&[])
}

/// Sends random upstream gradients into all outputs of `op` and compares each input's gradient to the slope of the
/// outputs along random directions.
fn check(what: &str, inputs: &[(&str, &Tensor)], op: impl Fn(&[Tensor]) -> Vec<Tensor>) {
    let point: Vec<Tensor> = inputs.iter().map(|(_, x)| x.detach().copy()).collect();
    let upstream: Vec<Tensor> = tch::no_grad(|| op(&point))
        .iter()
        .map(Tensor::randn_like)
        .collect();
    let scalar = |at: &[Tensor]| -> Tensor {
        let outputs = op(at);
        assert_eq!(outputs.len(), upstream.len());
        let terms = outputs.iter().zip(&upstream);
        terms
            .map(|(output, up)| (output * up).sum(Kind::Double))
            .sum()
    };
    let leaves: Vec<Tensor> = point
        .iter()
        .map(|x| x.copy().set_requires_grad(true))
        .collect();
    let grads = Tensor::run_backward(&[scalar(&leaves)], &leaves, false, false);
    for (index, (name, x)) in inputs.iter().enumerate() {
        assert_eq!(grads[index].size(), x.size(), "{what}: gradient of {name}");
        for _ in 0..DIRECTIONS {
            let direction = x.randn_like();
            let moved = |by: f64| {
                let mut at: Vec<Tensor> = point.iter().map(Tensor::shallow_clone).collect();
                at[index] = &point[index] + &direction * by;
                tch::no_grad(|| value(&scalar(&at)))
            };
            let central = |step: f64| (moved(step) - moved(-step)) / (2.0 * step);
            // Two steps cancel the error of third order, which the gated norm of small outputs makes large.
            let slope = (4.0 * central(STEP / 2.0) - central(STEP)) / 3.0;
            let found = value(&(&grads[index] * &direction).sum(Kind::Double));
            assert!(
                (slope - found).abs() <= 1e-6 * slope.abs().max(1.0),
                "{what}: along a direction of {name} the gradient gives {found}, differences give {slope}"
            );
        }
    }
}

fn padded(batch: i64, seq: i64, mask: Option<Tensor>) -> Sequences {
    Sequences::Padded { batch, seq, mask }
}

fn packed(cu_seqlens: &[i64]) -> Sequences {
    Sequences::Packed {
        cu_seqlens: cu_seqlens.to_vec(),
        total: *cu_seqlens.last().unwrap(),
    }
}

/// `[2, 11]`: padding on the left of one row and on the right of the other.
fn holes() -> Tensor {
    let column = Tensor::arange(11, (Kind::Int64, Device::Cpu));
    Tensor::stack(&[column.ge(3), column.lt(7)], 0)
}

/// Batch, length and samples that ops over positions must treat apart: whole chunks, a padded batch, packed samples (one
/// empty, one longer than a chunk).
fn batches() -> Vec<(&'static str, i64, i64, Sequences)> {
    vec![
        ("one chunk", 2, 8, padded(2, 8, None)),
        ("two chunks of 64", 1, 128, padded(1, 128, None)),
        ("a broken chunk", 2, 13, padded(2, 13, None)),
        ("padded", 2, 11, padded(2, 11, Some(holes()))),
        ("packed", 1, 86, packed(&[0, 5, 5, 15, 16, 86])),
    ]
}

/// Outputs at padding mean nothing, so no gradient comes from there.
fn real(out: Tensor, sequences: &Sequences) -> Tensor {
    match sequences {
        Sequences::Padded {
            mask: Some(mask), ..
        } => {
            let mut shape = mask.size();
            shape.resize(out.dim(), 1);
            out * mask.view(shape.as_slice()).to_kind(Kind::Double)
        }
        _ => out,
    }
}

#[test]
fn delta_rule_has_the_slopes_of_its_outputs_and_states() {
    let _generator = seeded(11);
    let (key_heads, value_heads, key_dim, value_dim) = (2, 4, 3, 5);
    for (what, batch, seq, sequences) in batches() {
        let n = sequences.count();
        let qk = [batch, seq, key_heads, key_dim];
        let (q, k) = (normal(&qk), normal(&qk));
        let v = normal(&[batch, seq, value_heads, value_dim]);
        let g = -normal(&[batch, seq, value_heads]).abs();
        let beta = normal(&[batch, seq, value_heads]).sigmoid();
        let state = normal(&[n, value_heads, key_dim, value_dim]);
        let inputs = [
            ("q", &q),
            ("k", &k),
            ("v", &v),
            ("g", &g),
            ("beta", &beta),
            ("state", &state),
        ];
        check(what, &inputs, |x| {
            let [q, k, v, g, beta, state] = x else {
                unreachable!()
            };
            let (out, after) = gated_delta_rule(q, k, v, g, beta, Some(state), &sequences);
            vec![real(out, &sequences), after]
        });
    }
}

#[test]
fn gdn_core_has_the_slopes_of_its_output_with_and_without_a_state() {
    let _generator = seeded(12);
    let dims = GdnDims {
        key_heads: 2,
        value_heads: 4,
        key_dim: 3,
        value_dim: 5,
        kernel: 4,
        eps: 1e-6,
    };
    let (keys, values) = (6, 20);
    let channels = 2 * keys + values;
    for (what, batch, seq, sequences) in batches() {
        let n = sequences.count();
        let x = normal(&[batch, seq, channels + values + 2 * dims.value_heads]);
        let conv = normal(&[channels, dims.kernel]);
        let (a_log, dt_bias) = (normal(&[4]) * 0.5, normal(&[4]));
        let out_norm = normal(&[5]);
        let before = GdnState {
            conv: normal(&[n, channels, dims.kernel - 1]),
            recurrent: normal(&[n, 4, 3, 5]),
        };
        let inputs = [
            ("in_proj_out", &x),
            ("conv1d", &conv),
            ("a_log", &a_log),
            ("dt_bias", &dt_bias),
            ("out_norm", &out_norm),
        ];
        for state in [None, Some(&before)] {
            check(what, &inputs, |inputs| {
                let weights = GdnWeights {
                    conv1d: &inputs[1],
                    a_log: &inputs[2],
                    dt_bias: &inputs[3],
                    out_norm: &inputs[4],
                };
                let context = GdnContext {
                    sequences: &sequences,
                    pack: None,
                    state,
                    state_wanted: false,
                };
                let (out, _) = gdn_core(Kernels::REFERENCE, &inputs[0], &weights, &dims, &context);
                vec![real(out, &sequences)]
            });
        }
    }
}

#[test]
fn conv1d_has_the_slopes_of_its_output_and_state() {
    let _generator = seeded(13);
    for (what, batch, seq, sequences) in batches() {
        let (x, weight) = (normal(&[batch, seq, 6]), normal(&[6, 4]));
        let state = normal(&[sequences.count(), 6, 3]);
        let inputs = [("x", &x), ("weight", &weight), ("state", &state)];
        check(what, &inputs, |x| {
            let (out, after) = causal_conv1d_silu(&x[0], &x[1], Some(&x[2]), &sequences);
            vec![out, after]
        });
    }
}

#[test]
fn norms_and_activations_have_the_slopes_of_their_outputs() {
    let _generator = seeded(14);
    let (x, gate, weight) = (normal(&[3, 4, 8]), normal(&[3, 4, 8]), normal(&[8]));
    let inputs = [("x", &x), ("weight", &weight)];
    check("rms_norm", &inputs, |x| {
        vec![rms_norm(Kernels::REFERENCE, &x[0], &x[1], 1e-6)]
    });
    // A large eps shows in the gradient.
    check("rms_norm, eps 1", &inputs, |x| {
        vec![rms_norm(Kernels::REFERENCE, &x[0], &x[1], 1.0)]
    });
    let inputs = [("x", &x), ("gate", &gate), ("weight", &weight)];
    check("rms_norm_gated", &inputs, |x| {
        vec![rms_norm_gated(&x[0], &x[1], &x[2], 1e-6)]
    });
    check("swiglu", &[("x", &x)], |x| {
        vec![swiglu(Kernels::REFERENCE, &x[0])]
    });
    let (a, b, a_log, dt_bias) = (
        normal(&[2, 5, 3]),
        normal(&[2, 5, 3]),
        normal(&[3]),
        normal(&[3]),
    );
    let inputs = [
        ("a", &a),
        ("b", &b),
        ("a_log", &a_log),
        ("dt_bias", &dt_bias),
    ];
    check("gates", &inputs, |x| {
        let (beta, g) = gdn_gates(&x[0], &x[1], &x[2], &x[3]);
        vec![beta, g]
    });
}

#[test]
fn rotary_has_the_slopes_of_a_partial_rotation() {
    let _generator = seeded(15);
    let ids = Tensor::randint(50, [3, 2, 7], (Kind::Int64, Device::Cpu));
    let (cos, sin) = mrope_cos_sin(Kernels::REFERENCE, &ids, 8, 1e4, [2, 1, 1], Kind::Double);
    let (q, k) = (normal(&[2, 7, 4, 12]), normal(&[2, 7, 2, 12]));
    check("rotary", &[("q", &q), ("k", &k)], |x| {
        let (q, k) = apply_rotary(Kernels::REFERENCE, &x[0], &x[1], &cos, &sin);
        vec![q, k]
    });
}

#[test]
fn router_has_the_slopes_of_its_weights_and_of_the_balancing_loss() {
    let _generator = seeded(16);
    let (first, second) = (normal(&[10, 6]), normal(&[10, 6]));
    check("router weights", &[("logits", &first)], |x| {
        vec![route(Kernels::REFERENCE, &x[0], 3).weights]
    });
    let inputs = [("first", &first), ("second", &second)];
    let mask = Tensor::arange(10, (Kind::Int64, Device::Cpu)).lt(7);
    for mask in [None, Some(&mask)] {
        check("load balancing", &inputs, |x| {
            vec![load_balancing_loss(&[&x[0], &x[1]], 2, mask)]
        });
    }
}
