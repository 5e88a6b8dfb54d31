//! Single operations against float64 values of transformers' own code: outputs and gradients.

use std::collections::HashMap;

use bridge_torch::ops::conv1d::causal_conv1d_silu;
use bridge_torch::ops::gdn::gdn_gates;
use bridge_torch::ops::moe::{load_balancing_loss, route};
use bridge_torch::ops::norm::{rms_norm, rms_norm_gated};
use bridge_torch::ops::policy::Kernels;
use bridge_torch::ops::rotary::{apply_rotary, mrope_cos_sin};
use bridge_torch::ops::sequences::Sequences;
use bridge_torch::ops::swiglu::swiglu;
use tch::{Kind, Tensor};

/// One case of a golden file, its inputs in the kind under test.
pub(crate) struct Case {
    tensors: HashMap<String, Tensor>,
    name: String,
    kind: Kind,
}

impl Case {
    pub(crate) fn all(file: &str, kind: Kind) -> Vec<Self> {
        let mut cases: Vec<Self> = Vec::new();
        for (key, tensor) in Tensor::read_safetensors(tests::golden(file)).unwrap() {
            let (name, rest) = key.split_once('.').unwrap();
            let at = cases
                .iter()
                .position(|case| case.name == name)
                .unwrap_or_else(|| {
                    cases.push(Self {
                        tensors: HashMap::new(),
                        name: name.to_owned(),
                        kind,
                    });
                    cases.len() - 1
                });
            cases[at].tensors.insert(rest.to_owned(), tensor);
        }
        cases
    }

    fn read(name: &str, kind: Kind) -> Self {
        let cases = Self::all("ops.safetensors", kind);
        cases.into_iter().find(|case| case.name == name).unwrap()
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// `in.NAME`, a leaf that requires a gradient when it is a float.
    pub(crate) fn input(&self, name: &str) -> Tensor {
        let tensor = &self.tensors[&format!("in.{name}")];
        if tensor.kind() == Kind::Float {
            tensor
                .to_kind(self.kind)
                .detach()
                .copy()
                .set_requires_grad(true)
        } else {
            tensor.shallow_clone()
        }
    }

    pub(crate) fn maybe(&self, name: &str) -> Option<Tensor> {
        self.tensors
            .contains_key(&format!("in.{name}"))
            .then(|| self.input(name))
    }

    fn expected(&self, name: &str) -> &Tensor {
        &self.tensors[name]
    }

    /// Compares outputs, sends the upstream gradients back and compares the inputs' gradients.
    pub(crate) fn check(
        &self,
        outputs: &[(&str, &Tensor)],
        inputs: &[(&str, &Tensor)],
        tolerances: (f64, f64),
    ) {
        let mut sum = Tensor::zeros([] as [i64; 0], (self.kind, tch::Device::Cpu));
        for (name, value) in outputs {
            self.close(&format!("out.{name}"), value, tolerances.0);
            if let Some(up) = self.tensors.get(&format!("up.{name}")) {
                sum = (*value * up.to_kind(self.kind)).sum(self.kind) + sum;
            }
        }
        sum.backward();
        for (name, input) in inputs {
            self.close(&format!("grad.{name}"), &input.grad(), tolerances.1);
        }
    }

    fn close(&self, key: &str, value: &Tensor, tolerance: f64) {
        let expected = self.expected(key);
        assert_eq!(value.size(), expected.size(), "{}.{key}", self.name);
        let distance = distance(value, expected);
        assert!(
            distance <= tolerance,
            "{}.{key} is {distance:.2e} off in {:?}, allowed {tolerance:.2e}",
            self.name,
            self.kind
        );
    }
}

/// `max |a - b| / max |b|`.
pub(crate) fn distance(value: &Tensor, expected: &Tensor) -> f64 {
    if expected.numel() == 0 {
        return 0.0;
    }
    let expected = expected.to_kind(Kind::Double);
    let off = (value.to_kind(Kind::Double) - &expected)
        .abs()
        .max()
        .double_value(&[]);
    let scale = expected.abs().max().double_value(&[]);
    if off == 0.0 { 0.0 } else { off / scale }
}

/// float64 and float32 with the tolerance for outputs and gradients.
const KINDS: [(Kind, (f64, f64)); 2] = [(Kind::Double, (1e-6, 1e-6)), (Kind::Float, (1e-6, 2e-6))];

fn whole(batch: i64, seq: i64) -> Sequences {
    Sequences::Padded {
        batch,
        seq,
        mask: None,
    }
}

#[test]
fn conv1d_equals_transformers_also_when_short_continued_and_packed() {
    for (kind, tolerances) in KINDS {
        for name in [
            "conv1d_silu",
            "conv1d_silu_short",
            "conv1d_silu_state",
            "conv1d_silu_packed",
        ] {
            let case = Case::read(name, kind);
            let (x, weight, state) = (case.input("x"), case.input("weight"), case.maybe("state"));
            let (batch, _, seq) = x.size3().unwrap();
            let sequences = match case.maybe("cu_seqlens") {
                Some(borders) => Sequences::Packed {
                    cu_seqlens: Vec::<i64>::try_from(&borders.to_kind(Kind::Int64)).unwrap(),
                    total: seq,
                },
                None => whole(batch, seq),
            };
            let (out, after) =
                causal_conv1d_silu(&x.transpose(1, 2), &weight, state.as_ref(), &sequences);
            assert_eq!(
                after.size(),
                [sequences.count(), x.size()[1], weight.size()[1] - 1]
            );
            let mut inputs = vec![("x", &x), ("weight", &weight)];
            inputs.extend(state.as_ref().map(|state| ("state", state)));
            case.check(&[("out", &out.transpose(1, 2))], &inputs, tolerances);
        }
    }
}

#[test]
fn norms_equal_transformers() {
    for (kind, tolerances) in KINDS {
        let case = Case::read("rms_norm_zero_centred", kind);
        let (x, weight) = (case.input("x"), case.input("weight"));
        let out = rms_norm(Kernels::REFERENCE, &x, &weight, 1e-6);
        case.check(
            &[("out", &out)],
            &[("x", &x), ("weight", &weight)],
            tolerances,
        );

        let case = Case::read("rms_norm_gated", kind);
        let (x, gate, weight) = (case.input("x"), case.input("gate"), case.input("weight"));
        let out = rms_norm_gated(&x, &gate, &(&weight - 1.0), 1e-6);
        let inputs = [("x", &x), ("gate", &gate), ("weight", &weight)];
        case.check(&[("out", &out)], &inputs, tolerances);
    }
}

#[test]
fn gates_equal_transformers() {
    for (kind, tolerances) in KINDS {
        let case = Case::read("gdn_gates", kind);
        let (a, b) = (case.input("a"), case.input("b"));
        let (a_log, dt_bias) = (case.input("A_log"), case.input("dt_bias"));
        let (beta, g) = gdn_gates(&a, &b, &a_log, &dt_bias);
        let inputs = [
            ("a", &a),
            ("b", &b),
            ("A_log", &a_log),
            ("dt_bias", &dt_bias),
        ];
        case.check(&[("beta", &beta), ("g", &g)], &inputs, tolerances);
    }
}

#[test]
fn swiglu_equals_transformers() {
    for (kind, tolerances) in KINDS {
        let case = Case::read("swiglu", kind);
        let (gate, up) = (case.input("gate"), case.input("up"));
        let out = swiglu(Kernels::REFERENCE, &Tensor::cat(&[&gate, &up], -1));
        case.check(
            &[("out", &out)],
            &[("gate", &gate), ("up", &up)],
            tolerances,
        );
    }
}

#[test]
fn mrope_equals_transformers_and_stays_near_at_position_200000() {
    for (kind, tolerance) in [(Kind::Double, 1e-6), (Kind::Float, 1e-2)] {
        for (name, dims, section) in [
            ("mrope_d32", 8, [2, 1, 1]),
            ("mrope_d256", 64, [11, 11, 10]),
        ] {
            let case = Case::read(name, kind);
            let (q, k, ids) = (case.input("q"), case.input("k"), case.input("position_ids"));
            let (cos, sin) = mrope_cos_sin(Kernels::REFERENCE, &ids, dims, 1e7, section, kind);
            let (q_out, k_out) = apply_rotary(
                Kernels::REFERENCE,
                &q.transpose(1, 2),
                &k.transpose(1, 2),
                &cos,
                &sin,
            );
            let (q_out, k_out) = (q_out.transpose(1, 2), k_out.transpose(1, 2));
            let outputs = [("cos", &cos), ("sin", &sin), ("q", &q_out), ("k", &k_out)];
            case.check(&outputs, &[("q", &q), ("k", &k)], (tolerance, tolerance));
        }
    }
}

#[test]
fn router_chooses_and_balances_like_transformers() {
    for (kind, tolerances) in KINDS {
        for (name, top_k) in [("router", 2), ("router_ten_of_512", 10)] {
            let case = Case::read(name, kind);
            let (x, weight) = (case.input("x"), case.input("weight"));
            let logits = x.matmul(&weight.tr());
            let routing = route(Kernels::REFERENCE, &logits, top_k);
            let aux = load_balancing_loss(&[&logits], top_k, None);
            assert_eq!(routing.experts, *case.expected("out.experts"), "{name}");
            let outputs = [
                ("logits", &logits),
                ("weights", &routing.weights),
                ("aux_loss", &aux),
            ];
            case.check(&outputs, &[("x", &x), ("weight", &weight)], tolerances);
        }
    }
}
