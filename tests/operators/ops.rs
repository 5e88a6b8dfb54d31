//! Op by op.

use bridge_torch::ops::gdn::{GdnContext, GdnDims, GdnState, GdnWeights, gdn_core};
use bridge_torch::ops::loss::linear_cross_entropy;
use bridge_torch::ops::moe::{Routing, SharedExpert, experts, route};
use bridge_torch::ops::norm::{add_rms_norm, rms_norm};
use bridge_torch::ops::policy::{KernelFacts, KernelPolicy, Kernels, Op};
use bridge_torch::ops::rotary::{apply_rotary, mrope_cos_sin};
use bridge_torch::ops::self_check::self_check;
use bridge_torch::ops::sequences::Sequences;
use bridge_torch::ops::swiglu::swiglu;
use tch::{Device, Kind, Tensor};
use tests::seeded;

use super::{check, distance, kernels};

const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

fn normal(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, DOUBLE)
}

#[test]
fn every_op_but_attention_runs_on_kernels_once_the_library_is_there() {
    let kernels = kernels();
    for op in [
        Op::Gdn,
        Op::LinearCrossEntropy,
        Op::Moe,
        Op::Norm,
        Op::Rotary,
        Op::Swiglu,
    ] {
        assert!(kernels.run(op), "{op:?}");
    }
    assert!(!kernels.run(Op::Attention));
}

#[test]
fn kernels_pass_their_own_check_and_libtorch_is_not_checked() {
    for kind in [Kind::BFloat16, Kind::Float] {
        let facts = KernelFacts {
            config: None,
            dtype: kind,
            device: Device::Cpu,
        };
        kernels();
        let (kernels, _) = KernelPolicy::default().resolve(&facts).unwrap();
        self_check(kernels, kind, Device::Cpu).unwrap();
    }
    self_check(Kernels::REFERENCE, Kind::Float, Device::Cpu).unwrap();
}

#[test]
fn norms_equal_the_reference() {
    let _generator = seeded(31);
    let (x, residual) = (normal(&[2, 7, 256]), normal(&[2, 7, 256]));
    for wide in [&["weight"][..], &[]] {
        let weight = normal(&[256]) * 0.3;
        let inputs = [("x", x.copy()), ("weight", weight.copy())];
        check("rms_norm", &inputs, wide, (3e-3, 4e-3), |kernels, x| {
            vec![rms_norm(kernels, &x[0], &x[1], 1e-6)]
        });
        let inputs = [
            ("x", x.copy()),
            ("residual", residual.copy()),
            ("weight", weight),
        ];
        check("add_rms_norm", &inputs, wide, (5e-3, 6e-3), |kernels, x| {
            let (out, sum) = add_rms_norm(kernels, &x[0], &x[1], &x[2], 1e-6);
            vec![out, sum]
        });
    }
    // Heads of a wider row: a view, not a copy.
    let wide = normal(&[3, 5, 4 * 64 + 16]);
    let inputs = [("x", wide), ("weight", normal(&[64]))];
    check("a slice", &inputs, &[], (3e-3, 4e-3), |kernels, x| {
        let heads = x[0].narrow(2, 8, 256).view([3, 5, 4, 64]);
        vec![rms_norm(kernels, &heads, &x[1], 1e-6)]
    });
}

#[test]
fn swiglu_equals_the_reference() {
    let _generator = seeded(32);
    let inputs = [("x", normal(&[3, 9, 80]) * 2.0)];
    check("swiglu", &inputs, &[], (3e-3, 4e-3), |kernels, x| {
        vec![swiglu(kernels, &x[0])]
    });
}

#[test]
fn rotary_equals_the_reference_and_leaves_other_dimensions_alone() {
    let _generator = seeded(33);
    let ids = Tensor::randint(5000, [3, 2, 11], (Kind::Int64, Device::Cpu));
    let inputs = [
        ("q", normal(&[2, 11, 4, 128])),
        ("k", normal(&[2, 11, 2, 128])),
    ];
    check("rotary", &inputs, &[], (4e-3, 4e-3), |kernels, x| {
        let (cos, sin) = mrope_cos_sin(kernels, &ids, 64, 1e7, [11, 11, 10], x[0].kind());
        // Fresh tensors, as the norms before it give: kernels turn them where they lie.
        let (q, k) = apply_rotary(kernels, &(&x[0] * 1.0), &(&x[1] * 1.0), &cos, &sin);
        vec![q, k]
    });
}

#[test]
fn linear_cross_entropy_equals_the_reference_with_ignored_rows() {
    let _generator = seeded(34);
    for vocabulary in [256, 1001] {
        let targets = Tensor::randint(vocabulary, [37], (Kind::Int64, Device::Cpu));
        let _ = targets.narrow(0, 5, 9).fill_(-100);
        let inputs = [
            ("hidden", normal(&[37, 64])),
            ("weight", normal(&[vocabulary, 64]) * 0.2),
        ];
        check("cross entropy", &inputs, &[], (2e-3, 8e-3), |kernels, x| {
            vec![linear_cross_entropy(kernels, &x[0], &x[1], &targets, 28.0)]
        });
    }
}

#[test]
fn routers_and_experts_equal_the_reference() {
    let _generator = seeded(35);
    let (tokens, num_experts, top_k, hidden, inner) = (53, 16, 4, 64, 32);
    let logits = normal(&[tokens, num_experts]).to_kind(Kind::BFloat16);
    let ours = route(kernels(), &logits, top_k);
    let theirs = route(Kernels::REFERENCE, &logits, top_k);
    // bfloat16 logits tie; among equals libtorch takes any, kernels the lower number.
    let chosen = |routing: &Routing| logits.gather(1, &routing.experts, false);
    assert!(chosen(&ours).equal(&chosen(&theirs)));
    assert_eq!(ours.experts.kind(), Kind::Int64);
    assert!(distance(&ours.weights, &theirs.weights) < 4e-3);

    // Expert 3 has no token: its gradients are zeros, not what the memory held.
    let _ = logits.select(1, 3).fill_(-30.0);
    let choice = route(kernels(), &logits, top_k);
    let inputs = [
        ("x", normal(&[tokens, hidden])),
        ("weights", choice.weights.to_kind(Kind::Double)),
        ("fc1", normal(&[num_experts, 2 * inner, hidden]) * 0.2),
        ("fc2", normal(&[num_experts, hidden, inner]) * 0.2),
        ("shared", normal(&[tokens, hidden])),
        ("gate", normal(&[tokens, 1])),
    ];
    check("experts", &inputs, &[], (8e-3, 1e-2), |kernels, x| {
        let routing = Routing {
            weights: x[1].shallow_clone(),
            experts: choice.experts.shallow_clone(),
        };
        let shared = SharedExpert {
            output: x[4].shallow_clone(),
            gate: x[5].shallow_clone(),
        };
        let weights = (&x[2], &x[3]);
        let alone = experts(kernels, &x[0], &routing, weights, None);
        vec![
            experts(kernels, &x[0], &routing, weights, Some(&shared)),
            alone,
        ]
    });
    // No two of a row are equal, so that both choose the same.
    let logits = normal(&[tokens, num_experts])
        .argsort(1, false)
        .to_kind(Kind::Double)
        * 0.25;
    let inputs = [("logits", logits)];
    check("router", &inputs, &[], (4e-3, 8e-3), |kernels, x| {
        vec![route(kernels, &x[0], top_k).weights]
    });
}

fn masked(lengths: &[(i64, i64)], seq: i64) -> Sequences {
    let column = Tensor::arange(seq, (Kind::Int64, Device::Cpu));
    let rows: Vec<Tensor> = lengths
        .iter()
        .map(|&(first, behind)| column.ge(first).logical_and(&column.lt(behind)))
        .collect();
    Sequences::Padded {
        batch: i64::try_from(rows.len()).unwrap(),
        seq,
        mask: Some(Tensor::stack(&rows, 0)),
    }
}

/// Outputs at padding mean nothing, so no gradient comes from there.
fn real(out: Tensor, sequences: &Sequences) -> Tensor {
    match sequences {
        Sequences::Padded {
            mask: Some(mask), ..
        } => &out * mask.unsqueeze(-1).to_kind(out.kind()),
        _ => out,
    }
}

#[test]
fn gated_delta_nets_equal_the_reference_padded_packed_and_with_states() {
    let _generator = seeded(36);
    let (key_heads, value_heads) = (2, 4);
    let dims = GdnDims {
        key_heads,
        value_heads,
        key_dim: 128,
        value_dim: 128,
        kernel: 4,
        eps: 1e-6,
    };
    let (keys, values) = (key_heads * 128, value_heads * 128);
    let channels = 2 * keys + values;
    let packed = |cu_seqlens: &[i64]| Sequences::Packed {
        cu_seqlens: cu_seqlens.to_vec(),
        total: *cu_seqlens.last().unwrap(),
    };
    let padded = |batch, seq| Sequences::Padded {
        batch,
        seq,
        mask: None,
    };
    for (what, batch, seq, sequences) in [
        ("two whole rows", 2, 70, padded(2, 70)),
        ("one token", 1, 1, padded(1, 1)),
        (
            "padding on both sides",
            3,
            40,
            masked(&[(3, 40), (0, 31), (5, 38)], 40),
        ),
        ("padding behind", 2, 40, masked(&[(0, 40), (0, 31)], 40)),
        ("a pack", 1, 150, packed(&[0, 5, 5, 69, 150])),
    ] {
        let n = sequences.count();
        let before = GdnState {
            conv: normal(&[n, channels, 3]).to_kind(Kind::BFloat16),
            recurrent: normal(&[n, value_heads, 128, 128]).to_kind(Kind::Float) * 0.1,
        };
        let inputs = [
            (
                "x",
                normal(&[batch, seq, channels + values + 2 * value_heads]),
            ),
            ("conv1d", normal(&[channels, 4]) * 0.5),
            ("a_log", normal(&[value_heads]) * 0.5),
            ("dt_bias", normal(&[value_heads])),
            ("out_norm", normal(&[128]) * 0.3),
        ];
        // A sample that goes on has no padding between its state and its tokens.
        let goes_on = what != "padding on both sides";
        for with_state in [false, true].into_iter().filter(|&with| goes_on || !with) {
            let wide: &[&str] = match with_state {
                false => &["a_log", "out_norm"],
                true => &["a_log", "dt_bias", "out_norm"],
            };
            check(what, &inputs, wide, (9e-3, 3e-2), |kernels, x| {
                let double = x[0].kind() == Kind::Double;
                let state = with_state.then(|| GdnState {
                    conv: before.conv.to_kind(x[0].kind()),
                    recurrent: match double {
                        true => before.recurrent.to_kind(Kind::Double),
                        false => before.recurrent.shallow_clone(),
                    },
                });
                let weights = GdnWeights {
                    conv1d: &x[1],
                    a_log: &x[2],
                    dt_bias: &x[3],
                    out_norm: &x[4],
                };
                let pack = kernels.run(Op::Gdn).then(|| sequences.pack(Device::Cpu));
                let context = GdnContext {
                    sequences: &sequences,
                    pack: pack.as_ref(),
                    state: state.as_ref(),
                    state_wanted: false,
                };
                let (out, after) = gdn_core(kernels, &x[0], &weights, &dims, &context);
                assert!(after.is_none());
                vec![real(out, &sequences)]
            });
        }
        // The states that generation goes on from.
        let after = |kernels: Kernels, kind: Kind| {
            tch::no_grad(|| {
                let x: Vec<Tensor> = inputs
                    .iter()
                    .map(|(_, x)| x.to_kind(Kind::BFloat16).to_kind(kind))
                    .collect();
                let weights = GdnWeights {
                    conv1d: &x[1],
                    a_log: &x[2],
                    dt_bias: &x[3],
                    out_norm: &x[4],
                };
                let state = GdnState {
                    conv: before.conv.to_kind(kind),
                    recurrent: match kind {
                        Kind::Double => before.recurrent.to_kind(kind),
                        _ => before.recurrent.shallow_clone(),
                    },
                };
                let pack = kernels.run(Op::Gdn).then(|| sequences.pack(Device::Cpu));
                let context = GdnContext {
                    sequences: &sequences,
                    pack: pack.as_ref(),
                    state: goes_on.then_some(&state),
                    state_wanted: true,
                };
                gdn_core(kernels, &x[0], &weights, &dims, &context)
                    .1
                    .unwrap()
            })
        };
        let (ours, theirs) = (
            after(kernels(), Kind::BFloat16),
            after(Kernels::REFERENCE, Kind::Double),
        );
        let far = distance(&ours.recurrent, &theirs.recurrent);
        assert!(far < 8e-3, "{what}: the state is {far} off");
        assert!(distance(&ours.conv, &theirs.conv) < 1e-12, "{what}");
    }
}
