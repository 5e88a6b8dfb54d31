//! The ops of the model on our kernels: the operator library is compiled with the emulation in CUDA's place, so that its
//! operators serve the CPU, and every op, with its gradient, is held to the libtorch reference in float64.
//!
//! A program of its own: with the library loaded, `auto` takes kernels on the CPU.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod adamw;
mod model;
mod ops;

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use bridge_torch::ops::policy::{KernelFacts, KernelPolicy, Kernels};
use tch::{Device, Kind, Tensor};

/// Builds and loads the library once, and gives the kernels of every op that has some.
fn kernels() -> Kernels {
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let room = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bridge-torch/kernels");
        let out = Command::new(room.join("operators"))
            .env("EMULATION", "1")
            .arg(folder.path())
            .arg(Path::new(env!("LIBTORCH_LIB")).parent().unwrap())
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        let library = folder.path().join("libmegatron_bridge_kernels.so");
        // Once loaded, it needs its file no more.
        bridge_torch::shim::load_operators(&library).unwrap();
    });
    let facts = KernelFacts {
        config: None,
        dtype: Kind::BFloat16,
        device: Device::Cpu,
    };
    let policy: KernelPolicy = "cuda".parse().unwrap();
    policy.resolve(&facts).unwrap().0
}

/// `|x - truth| / |truth|` over all elements.
fn distance(x: &Tensor, truth: &Tensor) -> f64 {
    assert_eq!(x.size(), truth.size());
    let (x, truth) = (x.to_kind(Kind::Double), truth.to_kind(Kind::Double));
    let norm = |x: &Tensor| x.square().sum(Kind::Double).sqrt().double_value(&[]);
    norm(&(x - &truth)) / norm(&truth).max(1e-30)
}

/// Values and gradients of one run of an op.
struct Run {
    outputs: Vec<Tensor>,
    gradients: Vec<Tensor>,
}

/// Runs `op` on leaves with the values of `inputs` in `kind` (those named in `wide` in float32 or float64), and sends
/// `upstream` into its outputs.
fn run(
    inputs: &[(&str, Tensor)],
    upstream: &[Tensor],
    kind: impl Fn(&str) -> Kind,
    op: impl Fn(&[Tensor]) -> Vec<Tensor>,
) -> Run {
    let leaves: Vec<Tensor> = inputs
        .iter()
        .map(|(name, x)| x.to_kind(kind(name)).copy().set_requires_grad(true))
        .collect();
    let outputs = op(&leaves);
    assert_eq!(outputs.len(), upstream.len());
    let sum: Tensor = outputs
        .iter()
        .zip(upstream)
        .map(|(output, up)| (output.to_kind(Kind::Double) * up).sum(Kind::Double))
        .sum();
    Run {
        gradients: Tensor::run_backward(&[sum], &leaves, false, false),
        outputs,
    }
}

/// Holds `op` on kernels, in bfloat16 (parameters named in `wide` in float32), to `op` on libtorch in float64 at the same
/// rounded numbers: `bound` for each output, then for each input's gradient. Two runs give the same bits.
fn check(
    what: &str,
    inputs: &[(&str, Tensor)],
    wide: &[&str],
    bounds: (f64, f64),
    op: impl Fn(Kernels, &[Tensor]) -> Vec<Tensor>,
) {
    let kind = |name: &str| match wide.contains(&name) {
        true => Kind::Float,
        false => Kind::BFloat16,
    };
    let rounded: Vec<(&str, Tensor)> = inputs
        .iter()
        .map(|(name, x)| (*name, x.to_kind(kind(name)).to_kind(Kind::Double)))
        .collect();
    let values: Vec<Tensor> = rounded.iter().map(|(_, x)| x.copy()).collect();
    let upstream: Vec<Tensor> = tch::no_grad(|| op(Kernels::REFERENCE, &values))
        .iter()
        .map(|out| {
            out.randn_like()
                .to_kind(Kind::BFloat16)
                .to_kind(Kind::Double)
        })
        .collect();
    let truth = run(
        &rounded,
        &upstream,
        |_| Kind::Double,
        |x| op(Kernels::REFERENCE, x),
    );
    let ours = run(&rounded, &upstream, kind, |x| op(kernels(), x));
    let again = run(&rounded, &upstream, kind, |x| op(kernels(), x));
    for (index, (out, truth)) in ours.outputs.iter().zip(&truth.outputs).enumerate() {
        let far = distance(out, truth);
        assert!(far <= bounds.0, "{what}: output {index} is {far} off");
    }
    for (((name, _), grad), truth) in inputs.iter().zip(&ours.gradients).zip(&truth.gradients) {
        let far = distance(grad, truth);
        assert!(
            far <= bounds.1,
            "{what}: the gradient of {name} is {far} off"
        );
    }
    let pairs = ours.outputs.iter().zip(&again.outputs);
    for (one, two) in pairs.chain(ours.gradients.iter().zip(&again.gradients)) {
        assert!(one.equal(two), "{what}: two runs differ");
    }
}
