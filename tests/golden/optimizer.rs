//! Golden tests: AdamW against its closed form, clipping, masters and saved states.

use std::collections::HashMap;

use bridge_torch::optim::{AdamW, AdamWError, AdamWOptions, OptimizedParam};
use tch::{Device, Kind, Tensor};

const OPTIONS: AdamWOptions = AdamWOptions {
    betas: (0.9, 0.95),
    eps: 1e-8,
    masters: true,
    kernels: false,
    eight_bit: false,
    stochastic_rounding: false,
    seed: 0,
};

fn leaf(values: &[f64], kind: Kind) -> Tensor {
    Tensor::from_slice(values)
        .to_kind(kind)
        .set_requires_grad(true)
}

fn param(name: &str, tensor: &Tensor, weight_decay: f64) -> OptimizedParam {
    OptimizedParam {
        name: name.to_owned(),
        tensor: tensor.shallow_clone(),
        weight_decay,
    }
}

/// Adds `grad` to the gradient of `tensor`.
fn backward(tensor: &Tensor, grad: &[f64]) {
    let grad = Tensor::from_slice(grad).to_kind(tensor.kind());
    (tensor * grad).sum(tensor.kind()).backward();
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(&tensor.detach().to_kind(Kind::Double)).unwrap()
}

fn assert_near(found: &Tensor, expected: &[f64], tolerance: f64) {
    for (found, expected) in values(found).iter().zip(expected) {
        assert!(
            (found - expected).abs() <= tolerance * expected.abs().max(1e-3),
            "{found} is not {expected}"
        );
    }
}

/// One number under AdamW (Loshchilov and Hutter 2019, algorithm 2, with the decay scaled by the learning rate).
struct Scalar {
    x: f64,
    m: f64,
    v: f64,
    t: i32,
}

impl Scalar {
    fn all(values: &[f64]) -> Vec<Self> {
        let start = |&x| Self {
            x,
            m: 0.0,
            v: 0.0,
            t: 0,
        };
        values.iter().map(start).collect()
    }

    fn step(&mut self, grad: f64, lr: f64, weight_decay: f64) {
        let (beta1, beta2) = OPTIONS.betas;
        self.t += 1;
        self.m = beta1 * self.m + (1.0 - beta1) * grad;
        self.v = beta2 * self.v + (1.0 - beta2) * grad * grad;
        let m = self.m / (1.0 - beta1.powi(self.t));
        let v = self.v / (1.0 - beta2.powi(self.t));
        self.x -= lr * weight_decay * self.x + lr * m / (v.sqrt() + OPTIONS.eps);
    }
}

fn xs(scalars: &[Scalar]) -> Vec<f64> {
    scalars.iter().map(|scalar| scalar.x).collect()
}

const START: [f64; 3] = [1.0, -2.0, 0.25];
const GRADS: [[f64; 3]; 4] = [
    [0.5, -1.0, 0.0],
    [-0.25, 3.0, 1e-3],
    [0.125, 0.0, -2.0],
    [4.0, -0.5, 0.75],
];
const RATES: [f64; 4] = [1e-3, 2e-2, 5e-3, 1e-2];

#[test]
fn four_steps_equal_the_closed_form_with_and_without_decay() {
    for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-6)] {
        let (decayed, free) = (leaf(&START, kind), leaf(&START, kind));
        let frozen = leaf(&START, kind);
        let params = [
            param("decayed", &decayed, 0.1),
            param("free", &free, 0.0),
            param("without gradient", &frozen, 0.1),
        ];
        let mut optimizer = AdamW::new(&params, &OPTIONS).unwrap();
        let (mut with, mut without) = (Scalar::all(&START), Scalar::all(&START));
        for (grad, lr) in GRADS.iter().zip(RATES) {
            backward(&decayed, grad);
            backward(&free, grad);
            let norm = optimizer.step(lr, None).unwrap();
            let expected = (2.0 * grad.iter().map(|g| g * g).sum::<f64>()).sqrt();
            assert!((norm - expected).abs() <= 1e-6 * expected);
            optimizer.zero_grad();
            assert!(!decayed.grad().defined());
            for i in 0..3 {
                with[i].step(grad[i], lr, 0.1);
                without[i].step(grad[i], lr, 0.0);
            }
            assert_near(&decayed, &xs(&with), tolerance);
            assert_near(&free, &xs(&without), tolerance);
            assert_eq!(values(&frozen), START);
        }
    }
}

#[test]
fn long_gradients_are_scaled_to_the_allowed_norm_and_short_ones_are_not() {
    for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-6)] {
        let (a, b) = (leaf(&START, kind), leaf(&START[..1], kind));
        let params = [param("a", &a, 0.1), param("b", &b, 0.0)];
        let mut optimizer = AdamW::new(&params, &OPTIONS).unwrap();
        let (mut a_form, mut b_form) = (Scalar::all(&START), Scalar::all(&START[..1]));
        // 13 and 1 are the norms; the first is scaled to 2.
        for (a_grad, b_grad) in [([3.0, 0.0, -4.0], 12.0), ([0.6, 0.0, 0.0], 0.8)] {
            backward(&a, &a_grad);
            backward(&b, &[b_grad]);
            let norm = optimizer.step(1e-2, Some(2.0)).unwrap();
            let expected = (a_grad.iter().map(|g| g * g).sum::<f64>() + b_grad * b_grad).sqrt();
            assert!((norm - expected).abs() <= 1e-6 * expected, "{norm}");
            optimizer.zero_grad();
            let scale = (2.0 / (expected + 1e-6)).min(1.0);
            for (form, grad) in a_form.iter_mut().zip(a_grad) {
                form.step(grad * scale, 1e-2, 0.1);
            }
            b_form[0].step(b_grad * scale, 1e-2, 0.0);
            assert_near(&a, &xs(&a_form), tolerance);
            assert_near(&b, &xs(&b_form), tolerance);
        }
    }
}

#[test]
fn a_norm_that_is_not_finite_changes_nothing() {
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
        let x = leaf(&START, kind);
        let mut optimizer = AdamW::new(&[param("x", &x, 0.1)], &OPTIONS).unwrap();
        for bad in [f64::NAN, f64::INFINITY] {
            backward(&x, &[1.0, bad, 1.0]);
            assert!(!optimizer.step(1e-2, Some(1.0)).unwrap().is_finite());
            optimizer.zero_grad();
        }
        assert_eq!(values(&x), START);
        for (name, tensor) in optimizer.state().unwrap() {
            if !name.starts_with("master.") {
                assert_eq!(tensor.abs().max().double_value(&[]), 0.0, "{name}");
            }
        }
    }
}

#[test]
fn masters_keep_steps_that_bfloat16_loses() {
    let lr = 1e-3; // bfloat16 has steps of 0.0078 above 1
    for masters in [true, false] {
        let x = leaf(&START, Kind::BFloat16);
        let options = AdamWOptions { masters, ..OPTIONS };
        let mut optimizer = AdamW::new(&[param("x", &x, 0.0)], &options).unwrap();
        let mut form = Scalar::all(&START);
        for _ in 0..40 {
            backward(&x, &[1.0, -1.0, 0.5]);
            optimizer.step(lr, Some(1.0)).unwrap();
            optimizer.zero_grad();
            let scale = 1.0 / (1.5 + 1e-6);
            for (form, grad) in form.iter_mut().zip([1.0, -1.0, 0.5]) {
                form.step(grad * scale, lr, 0.0);
            }
        }
        assert_eq!(x.kind(), Kind::BFloat16);
        let state: HashMap<String, Tensor> = optimizer.state().unwrap().into_iter().collect();
        if masters {
            let master = &state["master.x"];
            assert_eq!(master.kind(), Kind::Float);
            assert_near(master, &xs(&form), 1e-5);
            assert_eq!(values(&x), values(&master.to_kind(Kind::BFloat16)));
        } else {
            assert!(!state.contains_key("master.x"));
            assert_eq!(values(&x)[..2], START[..2], "each step is rounded away");
        }
    }
}

#[test]
fn a_restored_state_continues_bit_by_bit() {
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
        let walk = |optimizer: &mut AdamW, x: &Tensor, from: usize, to: usize| {
            for (grad, lr) in GRADS[from..to].iter().zip(&RATES[from..to]) {
                backward(x, grad);
                optimizer.step(*lr, Some(1.0)).unwrap();
                optimizer.zero_grad();
            }
        };
        let straight = leaf(&START, kind);
        let mut optimizer = AdamW::new(&[param("x", &straight, 0.1)], &OPTIONS).unwrap();
        walk(&mut optimizer, &straight, 0, 2);
        let saved: HashMap<String, Tensor> = optimizer
            .state()
            .unwrap()
            .into_iter()
            .map(|(name, tensor)| (name, tensor.copy()))
            .collect();
        let resumed = straight.detach().copy().set_requires_grad(true);
        walk(&mut optimizer, &straight, 2, 4);

        let mut other = AdamW::new(&[param("x", &resumed, 0.1)], &OPTIONS).unwrap();
        let find = |name: &str| saved.get(name).map(Tensor::shallow_clone);
        other.load_state(find).unwrap();
        walk(&mut other, &resumed, 2, 4);
        assert_eq!(values(&straight), values(&resumed), "{kind:?}");
        for ((name, a), (_, b)) in optimizer
            .state()
            .unwrap()
            .iter()
            .zip(other.state().unwrap())
        {
            assert_eq!(
                values(&a.view([-1])),
                values(&b.view([-1])),
                "{kind:?} {name}"
            );
        }
    }
}

#[test]
fn loading_masters_also_sets_their_parameters() {
    let x = leaf(&START, Kind::BFloat16);
    let mut optimizer = AdamW::new(&[param("x", &x, 0.1)], &OPTIONS).unwrap();
    let other = [4.0, 5.0, 6.0];
    optimizer
        .load_state(|name| {
            Some(match name {
                "step.x" => Tensor::zeros([] as [i64; 0], (Kind::Float, Device::Cpu)),
                "master.x" => leaf(&other, Kind::Float).detach(),
                _ => Tensor::zeros([3], (Kind::Float, Device::Cpu)),
            })
        })
        .unwrap();
    assert_eq!(values(&x), other);
}

#[test]
fn a_state_of_another_model_is_refused_by_name() {
    let x = leaf(&START, Kind::Float);
    let mut optimizer = AdamW::new(&[param("x", &x, 0.1)], &OPTIONS).unwrap();
    let missing = optimizer.load_state(|_| None).unwrap_err();
    assert!(matches!(&missing, AdamWError::Missing { name } if name == "exp_avg.x"));
    let shape = optimizer
        .load_state(|_| Some(Tensor::zeros([4], (Kind::Float, Device::Cpu))))
        .unwrap_err();
    assert!(matches!(
        &shape,
        AdamWError::Shape { name, found, expected }
            if name == "exp_avg.x" && found == &[4] && expected == &[3]
    ));
}

#[test]
fn what_only_kernels_compute_is_refused_without_them() {
    let x = leaf(&[1.0], Kind::Float);
    for (options, what) in [
        (
            AdamWOptions {
                eight_bit: true,
                ..OPTIONS
            },
            "moments of 8 bits",
        ),
        (
            AdamWOptions {
                stochastic_rounding: true,
                ..OPTIONS
            },
            "random roundings",
        ),
    ] {
        let error = AdamW::new(&[param("x", &x, 0.0)], &options).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with(what), "{text}");
        assert!(text.contains("by the kernels of `adamw` only"), "{text}");
    }
}
