//! The gated delta rule against its recurrence, token by token in float64.

use bridge_torch::ops::delta_rule::gated_delta_rule;
use bridge_torch::ops::sequences::Sequences;
use tch::Kind;

use crate::ops::Case;

fn check_all(kind: Kind, tolerances: impl Fn(&str) -> (f64, f64)) {
    let cases = Case::all("delta_rule.safetensors", kind);
    assert!(cases.iter().any(|case| case.name().starts_with("packed")));
    for case in cases {
        let [q, k, v, g, beta, state] =
            ["q", "k", "v", "g", "beta", "state"].map(|name| case.input(name));
        let (batch, seq) = (q.size()[0], q.size()[1]);
        let sequences = match case.maybe("cu_seqlens") {
            Some(borders) => Sequences::Packed {
                cu_seqlens: Vec::<i64>::try_from(&borders.to_kind(Kind::Int64)).unwrap(),
                total: seq,
            },
            None => Sequences::Padded {
                batch,
                seq,
                mask: None,
            },
        };
        let (out, after) = gated_delta_rule(&q, &k, &v, &g, &beta, Some(&state), &sequences);
        case.check(
            &[("out", &out), ("state", &after)],
            &[
                ("q", &q),
                ("k", &k),
                ("v", &v),
                ("g", &g),
                ("beta", &beta),
                ("state", &state),
            ],
            tolerances(case.name()),
        );
    }
}

#[test]
fn float64_equals_the_recurrence_for_every_length_packed_and_extreme() {
    check_all(Kind::Double, |_| (1e-6, 1e-6));
}

#[test]
fn float32_stays_within_ten_times_the_distance_of_transformers() {
    check_all(Kind::Float, |name| {
        let stated = match name {
            name if name.starts_with("extreme") => 1.4e-5,
            name if name.starts_with("steady") => 7.7e-7,
            name if name.starts_with("batch2") => 6.8e-7,
            _ => 1.2e-6,
        };
        (10.0 * stated, 1e-4)
    });
}
