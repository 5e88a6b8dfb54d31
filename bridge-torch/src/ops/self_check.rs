//! Kernels held to libtorch on their own device before a model trusts them: a driver, a card or a compiler that nobody tried
//! shows itself here and not in a loss.

use tch::{Device, Kind, Tensor};

use super::gdn::{GdnContext, GdnDims, GdnWeights, gdn_core};
use super::loss::linear_cross_entropy;
use super::moe::{Routing, SharedExpert, experts};
use super::norm::rms_norm;
use super::policy::{Kernels, Op, PolicyError};
use super::rotary::{apply_rotary, mrope_cos_sin};
use super::sequences::Sequences;
use super::swiglu::swiglu;
use crate::optim::{AdamW, AdamWOptions, OptimizedParam};

/// Allowed `|x - reference| / |reference|` of outputs and gradients: some roundings of bfloat16. Sums that nearly cancel, as the
/// gradients of the decay, are kept out of the cases.
const BOUND: f64 = 2e-2;

/// An op on small inputs; what it gives is one tensor.
struct Case {
    op: Op,
    inputs: Vec<Tensor>,
    run: fn(Kernels, &[Tensor]) -> Tensor,
}

/// Runs every op of `kernels` and its gradient once, small, in `dtype` on `device`, and compares with libtorch in float32.
///
/// Draws no random number. Takes some milliseconds on a GPU.
///
/// # Errors
/// [`PolicyError::Differs`] for the first op that is off.
pub fn self_check(kernels: Kernels, dtype: Kind, device: Device) -> Result<(), PolicyError> {
    for case in cases(device) {
        if !kernels.run(case.op) {
            continue;
        }
        let rounded: Vec<Tensor> = case.inputs.iter().map(|x| x.to_kind(dtype)).collect();
        let ours = run(&case, kernels, dtype, &rounded);
        let reference = run(&case, Kernels::REFERENCE, Kind::Float, &rounded);
        compare(case.op, &ours, &reference, device)?;
    }
    if kernels.run(Op::AdamW) {
        let [ours, reference] = [true, false].map(|kernels| [moved(kernels, dtype, device)]);
        compare(Op::AdamW, &ours, &reference, device)?;
    }
    Ok(())
}

fn compare(
    op: Op,
    ours: &[Tensor],
    reference: &[Tensor],
    device: Device,
) -> Result<(), PolicyError> {
    for (index, (x, wanted)) in ours.iter().zip(reference).enumerate() {
        let distance = distance(x, wanted);
        // Not `distance > BOUND`: NaN is off, too.
        if !matches!(distance.partial_cmp(&BOUND), Some(std::cmp::Ordering::Less)) {
            return Err(PolicyError::Differs {
                op: op.name(),
                what: match index {
                    0 => "output".to_owned(),
                    _ => format!("gradient {index}"),
                },
                device: format!("{device:?}"),
                distance,
            });
        }
    }
    Ok(())
}

/// How far two clipped steps of the optimizer move parameters.
fn moved(kernels: bool, dtype: Kind, device: Device) -> Tensor {
    let start = wave(&[2111], 1.1, device).to_kind(dtype);
    let param = OptimizedParam {
        name: String::new(),
        tensor: start.copy().set_requires_grad(true),
        weight_decay: 0.1,
    };
    let options = AdamWOptions {
        kernels,
        ..AdamWOptions::default()
    };
    let mut optimizer = AdamW::new(std::slice::from_ref(&param), &options)
        .expect("libtorch makes two small moments");
    for step in [1.3, 1.7] {
        let upstream = wave(&[2111], step, device).to_kind(dtype);
        optimizer.zero_grad();
        (&param.tensor * upstream).sum(dtype).backward();
        optimizer
            .step(0.1, Some(1.0))
            .unwrap_or_else(|error| panic!("{error}"));
    }
    param.tensor.detach().to_kind(Kind::Float) - start.to_kind(Kind::Float)
}

/// The output, then the gradient of each input.
fn run(case: &Case, kernels: Kernels, kind: Kind, inputs: &[Tensor]) -> Vec<Tensor> {
    let leaves: Vec<Tensor> = inputs
        .iter()
        .map(|x| x.to_kind(kind).copy().set_requires_grad(true))
        .collect();
    let out = (case.run)(kernels, &leaves).to_kind(Kind::Float);
    let upstream = wave(&out.size(), 0.7, out.device());
    let sum = (&out * upstream).sum(Kind::Float);
    let mut all = Tensor::run_backward(&[sum], &leaves, false, false);
    all.insert(0, out.detach());
    all
}

fn distance(x: &Tensor, wanted: &Tensor) -> f64 {
    let norm = |x: &Tensor| x.square().sum(Kind::Double).sqrt().double_value(&[]);
    let (x, wanted) = (x.to_kind(Kind::Double), wanted.to_kind(Kind::Double));
    norm(&(x - &wanted)) / norm(&wanted)
}

/// Numbers of about unit size that repeat nowhere, without the generator that training draws from.
fn wave(shape: &[i64], step: f64, device: Device) -> Tensor {
    let count = shape.iter().product::<i64>();
    let places = Tensor::arange(count, (Kind::Double, device));
    ((&places * step).sin() + (places * (step * 0.618)).cos())
        .to_kind(Kind::Float)
        .view(shape)
}

fn cases(device: Device) -> Vec<Case> {
    let x = |shape: &[i64], step: f64| wave(shape, step, device);
    vec![
        Case {
            op: Op::Norm,
            inputs: vec![x(&[33, 256], 1.1), x(&[256], 0.3) * 0.3],
            run: |kernels, x| rms_norm(kernels, &x[0], &x[1], 1e-6),
        },
        Case {
            op: Op::Swiglu,
            inputs: vec![x(&[33, 2 * 128], 1.3)],
            run: |kernels, x| swiglu(kernels, &x[0]),
        },
        Case {
            op: Op::Rotary,
            inputs: vec![x(&[1, 9, 2, 128], 1.7), x(&[1, 9, 1, 128], 1.9)],
            run: |kernels, x| {
                let ids = Tensor::arange(27, (Kind::Int64, x[0].device())).view([3, 1, 9]);
                let (cos, sin) = mrope_cos_sin(kernels, &ids, 64, 1e7, [11, 11, 10], x[0].kind());
                let (q, k) = apply_rotary(kernels, &(&x[0] * 1.0), &(&x[1] * 1.0), &cos, &sin);
                Tensor::cat(&[q.flatten(0, -1), k.flatten(0, -1)], 0)
            },
        },
        Case {
            op: Op::LinearCrossEntropy,
            inputs: vec![x(&[33, 64], 2.1), x(&[300, 64], 2.3) * 0.3],
            run: |kernels, x| {
                let targets = Tensor::arange(33, (Kind::Int64, x[0].device())) * 9;
                linear_cross_entropy(kernels, &x[0], &x[1], &targets, 33.0)
            },
        },
        Case {
            op: Op::Moe,
            inputs: vec![
                x(&[33, 64], 2.7),
                x(&[33, 2], 2.9).abs() + 0.1,
                x(&[8, 2 * 64, 64], 3.1) * 0.2,
                x(&[8, 64, 64], 3.3) * 0.2,
                x(&[33, 64], 3.7),
                x(&[33, 1], 3.9),
            ],
            run: |kernels, x| {
                let places = Tensor::arange(66, (Kind::Int64, x[0].device())).view([33, 2]);
                let routing = Routing {
                    weights: x[1].shallow_clone(),
                    // Two neighbours of seven, so that one expert has no token.
                    experts: places.remainder(7),
                };
                let shared = SharedExpert {
                    output: x[4].shallow_clone(),
                    gate: x[5].shallow_clone(),
                };
                experts(kernels, &x[0], &routing, (&x[2], &x[3]), Some(&shared))
            },
        },
        Case {
            op: Op::Gdn,
            // Two key heads, four value heads: q, k, v, z, b, a.
            inputs: vec![
                x(&[1, 100, 4 * 128 + 8 * 128 + 8], 4.3),
                x(&[8 * 128, 4], 4.7) * 0.5,
                x(&[128], 5.1) * 0.3,
            ],
            run: gdn,
        },
    ]
}

/// A pack of two samples, one longer than a chunk.
fn gdn(kernels: Kernels, x: &[Tensor]) -> Tensor {
    let device = x[0].device();
    let dims = GdnDims {
        key_heads: 2,
        value_heads: 4,
        key_dim: 128,
        value_dim: 128,
        kernel: 4,
        eps: 1e-6,
    };
    let sequences = Sequences::Packed {
        cu_seqlens: vec![0, 30, 100],
        total: 100,
    };
    let pack = kernels.run(Op::Gdn).then(|| sequences.pack(device));
    let (decay, bias) = (wave(&[4], 5.3, device), wave(&[4], 5.7, device));
    let weights = GdnWeights {
        conv1d: &x[1],
        a_log: &decay,
        dt_bias: &bias,
        out_norm: &x[2],
    };
    let context = GdnContext {
        sequences: &sequences,
        pack: pack.as_ref(),
        state: None,
        state_wanted: false,
    };
    gdn_core(kernels, &x[0], &weights, &dims, &context).0
}
