//! Golden tests: gradients of ops with a backward pass of their own, against finite differences and libtorch's autograd.

use bridge_torch::ops::attention::attention;
use bridge_torch::ops::loss::linear_cross_entropy;
use bridge_torch::ops::moe::{Routing, experts};
use bridge_torch::ops::policy::Kernels;
use bridge_torch::ops::sequences::Sequences;
use tch::{Device, Kind, Tensor};
use tests::seeded;

const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

fn normal(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, DOUBLE).set_requires_grad(true)
}

fn value(x: &Tensor) -> f64 {
    x.double_value(&[])
}

/// Every element of every input: central differences against the gradient.
fn gradcheck(what: &str, inputs: &[&Tensor], op: impl Fn() -> Tensor) {
    const STEP: f64 = 1e-6;
    let weights = tch::no_grad(&op).randn_like();
    let scalar = || (op() * &weights).sum(Kind::Double);
    let grads = Tensor::run_backward(&[scalar()], inputs, false, false);
    for (index, (input, grad)) in inputs.iter().zip(&grads).enumerate() {
        let flat = input.detach().view([-1]);
        for (place, found) in (0..).zip(Vec::<f64>::try_from(&grad.reshape([-1])).unwrap()) {
            let mut element = flat.get(place);
            let moved = |element: &mut Tensor, by: f64| {
                let _ = tch::no_grad(|| element.g_add_scalar_(by));
                tch::no_grad(|| value(&scalar()))
            };
            let up = moved(&mut element, STEP);
            let down = moved(&mut element, -2.0 * STEP);
            moved(&mut element, STEP);
            let expected = (up - down) / (2.0 * STEP);
            assert!(
                (expected - found).abs() <= 1e-6 * expected.abs().max(1.0),
                "{what}: element {place} of input {index} has gradient {found}, differences give {expected}"
            );
        }
    }
}

/// Values and gradients of two forms of one op.
fn same(what: &str, inputs: &[&Tensor], ours: &Tensor, theirs: &Tensor) {
    let near = |a: &Tensor, b: &Tensor| {
        let distance = value(&(a - b).abs().max()) / value(&b.abs().max()).max(1e-30);
        assert!(distance < 1e-12, "{what}: {distance}");
    };
    near(ours, theirs);
    let upstream = ours.randn_like();
    let grads = |out: &Tensor| {
        let sum = (out * &upstream).sum(Kind::Double);
        Tensor::run_backward(&[sum], inputs, false, false)
    };
    for (a, b) in grads(ours).iter().zip(&grads(theirs)) {
        near(a, b);
    }
}

#[test]
fn cross_entropy_has_the_gradients_of_finite_differences_with_ignored_targets() {
    let _generator = seeded(1);
    let (hidden, weight) = (normal(&[7, 5]), normal(&[11, 5]));
    for targets in [
        [0, 10, 3, 3, 7, 1, 9],
        [-100, 10, -100, 3, 7, 1, -100],
        [-100; 7],
    ] {
        let targets = Tensor::from_slice(&targets);
        gradcheck("cross entropy", &[&hidden, &weight], || {
            linear_cross_entropy(Kernels::REFERENCE, &hidden, &weight, &targets, 4.0)
        });
    }
}

#[test]
fn cross_entropy_of_many_rows_and_far_logits_equals_libtorch() {
    let _generator = seeded(2);
    let (hidden, weight) = (normal(&[2100, 8]), normal(&[37, 8]));
    let targets = Tensor::randint(37, [2100], (Kind::Int64, Device::Cpu));
    for scale in [1.0, 100.0] {
        let x = &hidden * scale;
        let logits = x.matmul(&weight.tr());
        let plain =
            logits.cross_entropy_loss::<Tensor>(&targets, None, tch::Reduction::Sum, -100, 0.0);
        let ours = linear_cross_entropy(Kernels::REFERENCE, &x, &weight, &targets, 10.0);
        same("cross entropy", &[&hidden, &weight], &ours, &(plain / 10.0));
    }
}

#[test]
fn experts_have_the_gradients_of_finite_differences_also_without_tokens() {
    let _generator = seeded(3);
    let x = normal(&[6, 4]);
    let (fc1, fc2) = (normal(&[5, 6, 4]), normal(&[5, 4, 3]));
    let weights = Tensor::rand([6, 2], DOUBLE).set_requires_grad(true);
    // Expert 2 gets nothing.
    let choices = Tensor::from_slice(&[4i64, 0, 1, 3, 3, 4, 0, 1, 4, 3, 1, 0]).view([6, 2]);
    let routing = Routing {
        weights: weights.shallow_clone(),
        experts: choices,
    };
    let run = || experts(Kernels::REFERENCE, &x, &routing, (&fc1, &fc2), None);
    gradcheck("experts", &[&x, &weights, &fc1, &fc2], run);
    let grads = Tensor::run_backward(&[run().sum(Kind::Double)], &[&fc1, &fc2], false, false);
    for grad in grads {
        assert_eq!(value(&grad.get(2).abs().max()), 0.0);
    }
}

#[test]
fn attention_has_the_gradients_of_finite_differences() {
    let _generator = seeded(4);
    let (q, k, v) = (
        normal(&[2, 5, 4, 3]),
        normal(&[2, 5, 2, 3]),
        normal(&[2, 5, 2, 3]),
    );
    let mask = Tensor::from_slice(&[0, 0, 1, 1, 1, 1, 1, 1, 0, 0])
        .view([2, 5])
        .to_kind(Kind::Bool);
    for mask in [None, Some(mask)] {
        let sequences = Sequences::Padded {
            batch: 2,
            seq: 5,
            mask,
        };
        for seen in [None, Some(0)] {
            gradcheck("attention", &[&q, &k, &v], || {
                attention(&q, &k, &v, &sequences, seen)
            });
        }
    }
}

#[test]
fn attention_in_blocks_equals_libtorch_with_cache_and_across_packed_borders() {
    let _generator = seeded(5);
    let heads_first = |x: &Tensor| x.transpose(1, 2);
    let plain = |q: &Tensor, k: &Tensor, v: &Tensor, seen: i64| {
        let (queries, keys) = (q.size()[1], k.size()[1]);
        let visible = Tensor::ones([queries, keys], (Kind::Bool, Device::Cpu)).tril(seen);
        let (q, k, v) = (heads_first(q), heads_first(k), heads_first(v));
        let out = Tensor::scaled_dot_product_attention(
            &q,
            &k,
            &v,
            Some(&visible),
            0.0,
            false,
            None,
            true,
        );
        heads_first(&out)
    };
    let whole = |seq| Sequences::Padded {
        batch: 1,
        seq,
        mask: None,
    };
    for seen in [0, 70] {
        let (q, k) = (normal(&[1, 300, 4, 8]), normal(&[1, 300 + seen, 2, 8]));
        let v = normal(&[1, 300 + seen, 2, 8]);
        let ours = attention(&q, &k, &v, &whole(300), Some(seen));
        same("attention", &[&q, &k, &v], &ours, &plain(&q, &k, &v, seen));
    }
    let (q, k, v) = (
        normal(&[1, 300, 4, 8]),
        normal(&[1, 300, 2, 8]),
        normal(&[1, 300, 2, 8]),
    );
    let packed = Sequences::Packed {
        cu_seqlens: vec![0, 7, 7, 200, 300],
        total: 300,
    };
    let ours = attention(&q, &k, &v, &packed, Some(0));
    let parts: Vec<Tensor> = [(0, 7), (7, 193), (200, 100)]
        .iter()
        .map(|&(start, length)| {
            let cut = |x: &Tensor| x.narrow(1, start, length);
            plain(&cut(&q), &cut(&k), &cut(&v), 0)
        })
        .collect();
    same(
        "packed attention",
        &[&q, &k, &v],
        &ours,
        &Tensor::cat(&parts, 1),
    );
}
