//! The optimizer on kernels, held to libtorch's.

use std::collections::HashMap;
use std::path::Path;
use std::process::ExitCode;

use bridge_torch::optim::{AdamW, AdamWOptions, OptimizedParam};
use safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};
use tests::{golden, seeded};

use super::{distance, kernels};

/// Less than a block of 256, as much, more, and more than a chunk of 65,536.
const SIZES: [i64; 5] = [1, 255, 256, 257, 65_536 + 7];

const KERNELS: AdamWOptions = AdamWOptions {
    betas: (0.9, 0.95),
    eps: 1e-8,
    masters: true,
    kernels: true,
    eight_bit: false,
    stochastic_rounding: false,
    seed: 7,
};

fn normals(scale: f64) -> Vec<Tensor> {
    let normal = |&n| Tensor::randn([n], (Kind::Float, Device::Cpu)) * scale;
    SIZES.iter().map(normal).collect()
}

/// Parameters with an optimizer of their own.
struct Training {
    params: Vec<OptimizedParam>,
    optimizer: AdamW,
}

impl Training {
    fn new(start: &[Tensor], kind: Kind, options: &AdamWOptions) -> Self {
        let params: Vec<_> = (0..)
            .zip(start)
            .map(|(number, x)| OptimizedParam {
                name: format!("p{number}"),
                tensor: x.to_kind(kind).copy().set_requires_grad(true),
                weight_decay: if number % 2 == 0 { 0.1 } else { 0.0 },
            })
            .collect();
        let optimizer = AdamW::new(&params, options).unwrap();
        Self { params, optimizer }
    }

    /// Steps on `gradients`, but for the parameter `without` one; gives the norm.
    fn step(&mut self, gradients: &[Tensor], without: Option<usize>) -> f64 {
        self.optimizer.zero_grad();
        for (index, (param, gradient)) in self.params.iter().zip(gradients).enumerate() {
            if without != Some(index) {
                let kind = param.tensor.kind();
                (&param.tensor * gradient.to_kind(kind))
                    .sum(kind)
                    .backward();
            }
        }
        self.optimizer.step(1e-2, Some(1.0)).unwrap()
    }

    /// What a saved run holds: copies of the parameters and of the optimizer's state.
    fn saved(&self) -> HashMap<String, Tensor> {
        let params = self.params.iter();
        let params = params.map(|param| (param.name.clone(), param.tensor.detach().copy()));
        let state = self.optimizer.state().unwrap().into_iter();
        params
            .chain(state.map(|(name, x)| (name, x.copy())))
            .collect()
    }

    /// Goes on from what [`Training::saved`] gave.
    fn resumed(saved: &HashMap<String, Tensor>, kind: Kind, options: &AdamWOptions) -> Self {
        let names = (0..SIZES.len()).map(|number| &saved[&format!("p{number}")]);
        let start: Vec<Tensor> = names.map(Tensor::shallow_clone).collect();
        let mut training = Self::new(&start, kind, options);
        let find = |name: &str| saved.get(name).map(Tensor::shallow_clone);
        training.optimizer.load_state(find).unwrap();
        training
    }
}

fn assert_near(ours: &Training, other: &Training, bound: f64) {
    let (ours, other) = (ours.saved(), other.saved());
    assert_eq!(ours.len(), other.len());
    for (name, x) in &ours {
        let far = distance(x, &other[name]);
        assert!(far <= bound, "{name} is {far} off");
    }
}

fn assert_same_bits(ours: &HashMap<String, Tensor>, other: &HashMap<String, Tensor>) {
    assert_eq!(ours.len(), other.len());
    for (name, x) in ours {
        assert_eq!(x.kind(), other[name].kind(), "{name}");
        assert!(x.equal(&other[name]), "{name} differs");
    }
}

#[test]
fn kernels_step_as_libtorch_does_with_and_without_masters() {
    let _generator = seeded(51);
    kernels();
    for kind in [Kind::BFloat16, Kind::Float] {
        let start = normals(1.0);
        let mut ours = Training::new(&start, kind, &KERNELS);
        let libtorch = AdamWOptions {
            kernels: false,
            ..KERNELS
        };
        let mut other = Training::new(&start, kind, &libtorch);
        for step in 0..6 {
            // Short gradients are not clipped, long ones are; a parameter may have none.
            let gradients = normals(if step == 2 { 1e-4 } else { 0.3 });
            let without = (step == 3).then_some(1);
            let (found, expected) = (
                ours.step(&gradients, without),
                other.step(&gradients, without),
            );
            // libtorch adds the squares of float32 gradients in float32.
            assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
        }
        // Masters may round to either side of a bfloat16 tie.
        let bound = if kind == Kind::BFloat16 { 1e-4 } else { 2e-6 };
        assert_near(&ours, &other, bound);
        for (name, count) in [("step.p0", 6.0), ("step.p1", 5.0)] {
            assert_eq!(ours.saved()[name].double_value(&[]), count, "{name}");
        }
    }
}

#[test]
fn a_state_of_kernels_goes_on_in_libtorch_and_the_reverse() {
    let _generator = seeded(52);
    kernels();
    let libtorch = AdamWOptions {
        kernels: false,
        ..KERNELS
    };
    for (before, after) in [(KERNELS, libtorch), (libtorch, KERNELS)] {
        let mut whole = Training::new(&normals(1.0), Kind::BFloat16, &before);
        for _ in 0..3 {
            whole.step(&normals(0.1), None);
        }
        let mut other = Training::resumed(&whole.saved(), Kind::BFloat16, &after);
        for _ in 0..3 {
            let gradients = normals(0.1);
            whole.step(&gradients, None);
            other.step(&gradients, None);
        }
        assert_near(&other, &whole, 1e-4);
    }
}

#[test]
fn a_norm_that_is_not_finite_changes_nothing() {
    let _generator = seeded(53);
    kernels();
    for options in [
        KERNELS,
        AdamWOptions {
            eight_bit: true,
            ..KERNELS
        },
    ] {
        let mut training = Training::new(&normals(1.0), Kind::Float, &options);
        training.step(&normals(0.1), None);
        let before = training.saved();
        for poison in [f64::INFINITY, f64::NAN] {
            let gradients = normals(0.1);
            let _ = gradients[4].narrow(0, 65_540, 1).fill_(poison);
            assert!(!training.step(&gradients, None).is_finite());
            assert_same_bits(&training.saved(), &before);
        }
    }
}

#[test]
fn eight_bit_moments_follow_those_of_32() {
    let _generator = seeded(54);
    kernels();
    let start = normals(1.0);
    let eight = AdamWOptions {
        eight_bit: true,
        ..KERNELS
    };
    let mut ours = Training::new(&start, Kind::Float, &eight);
    let mut exact = Training::new(&start, Kind::Float, &KERNELS);
    let drift = normals(0.02);
    for _ in 0..12 {
        let gradients: Vec<Tensor> = normals(0.02)
            .iter()
            .zip(&drift)
            .map(|(x, y)| x + y)
            .collect();
        ours.step(&gradients, None);
        exact.step(&gradients, None);
    }
    let saved = ours.saved();
    for (name, size) in [("exp_avg.p4", 65_543), ("exp_avg_sq_scale.p4", 257)] {
        assert_eq!(saved[name].size(), [size]);
    }
    assert_eq!(saved["exp_avg_sq.p4"].kind(), Kind::Uint8);
    for index in [2, 4] {
        let moved = |training: &Training| training.params[index].tensor.detach() - &start[index];
        let far = distance(&moved(&ours), &moved(&exact));
        assert!(far <= 6e-2, "parameter {index} moved {far} elsewhere");
    }
}

#[test]
fn a_resumed_run_has_the_same_random_roundings() {
    let _generator = seeded(55);
    kernels();
    let options = AdamWOptions {
        masters: false,
        eight_bit: true,
        stochastic_rounding: true,
        ..KERNELS
    };
    let mut whole = Training::new(&normals(1.0), Kind::BFloat16, &options);
    whole.step(&normals(0.1), None);
    let saved = whole.saved();
    let gradients = normals(0.1);
    whole.step(&gradients, None);
    let next = |options: &AdamWOptions| {
        let mut training = Training::resumed(&saved, Kind::BFloat16, options);
        training.step(&gradients, None);
        training.saved()
    };
    assert_same_bits(&next(&options), &whole.saved());
    let seed = next(&AdamWOptions { seed: 8, ..options });
    assert!(!seed["p4"].equal(&whole.saved()["p4"]));

    // What random rounding is for: steps far below half a unit in the last place move the mean all the same.
    let ones = [Tensor::ones([40_000], (Kind::Float, Device::Cpu))];
    let mean_after = |stochastic_rounding| {
        let options = AdamWOptions {
            stochastic_rounding,
            ..options
        };
        let mut training = Training::new(&ones, Kind::BFloat16, &options);
        training.optimizer.zero_grad();
        let param = &training.params[0].tensor;
        param.sum(Kind::BFloat16).backward();
        training.optimizer.step(2e-4, None).unwrap();
        training.params[0]
            .tensor
            .mean(Kind::Double)
            .double_value(&[])
    };
    assert_eq!(mean_after(false), 1.0);
    let moved = 1.0 - mean_after(true);
    // Of the step and the decay, lr (1 + 0.1); the mean of so many roundings by 1/256 is good to 5 %.
    assert!((moved / 2.2e-4 - 1.0).abs() < 0.2, "{moved}");
}

#[test]
fn what_kernels_do_not_take_is_refused_in_words() {
    let _generator = seeded(56);
    kernels();
    let start = [Tensor::ones([4, 8], (Kind::Float, Device::Cpu))];
    let refused = |param: Tensor, gradient: &Tensor| {
        let param = OptimizedParam {
            name: "p".to_owned(),
            tensor: param.set_requires_grad(true),
            weight_decay: 0.0,
        };
        let mut optimizer = AdamW::new(std::slice::from_ref(&param), &KERNELS).unwrap();
        (&param.tensor * gradient)
            .sum(param.tensor.kind())
            .backward();
        optimizer.step(1e-2, None).unwrap_err().to_string()
    };
    let gradient = start[0].shallow_clone();
    let error = refused(start[0].to_kind(Kind::Double), &gradient);
    assert!(error.contains("a parameter is Double"), "{error}");
    let error = refused(start[0].transpose(0, 1).detach(), &gradient.transpose(0, 1));
    assert!(error.contains("parameters[0] has gaps"), "{error}");
    let odd = Tensor::ones([33], (Kind::Float, Device::Cpu)).narrow(0, 1, 32);
    let error = refused(
        odd.detach(),
        &Tensor::ones([32], (Kind::Float, Device::Cpu)),
    );
    assert!(
        error.contains("parameters[0] does not begin at a multiple of 16 bytes"),
        "{error}"
    );

    // Moments of other bits than the state's.
    let eight = AdamWOptions {
        eight_bit: true,
        ..KERNELS
    };
    let floats = Training::new(&start, Kind::Float, &KERNELS).saved();
    let find = |name: &str| floats.get(name).map(Tensor::shallow_clone);
    let mut other = Training::new(&start, Kind::Float, &eight);
    let error = other.optimizer.load_state(find).unwrap_err().to_string();
    assert!(
        error.contains("`exp_avg.p0` of the optimizer state is floats, expected codes of 8 bits"),
        "{error}"
    );

    // A graph of before the step must not be walked with the values of after it.
    let mut training = Training::new(&start, Kind::Float, &KERNELS);
    let square = training.params[0].tensor.square().sum(Kind::Float);
    training.step(&start, None);
    let error = square.f_backward().unwrap_err().to_string();
    assert!(
        error.contains("modified by an inplace operation"),
        "{error}"
    );
}

/// Fine-tunes the tiny dense model in this process, on 8-bit moments; further arguments behind.
fn finetune(output: &Path, more: &[&str]) {
    let model = golden("checkpoints/dense_vl");
    let data = golden("data/shapes/train.jsonl");
    let mut args = vec![
        "trainer",
        "-q",
        "finetune",
        "--model",
        model.to_str().unwrap(),
    ];
    args.extend(["--data", data.to_str().unwrap()]);
    args.extend(["--output", output.to_str().unwrap()]);
    args.extend(["optim=adamw_8bit", "kernels.policy=reference,adamw=cuda"]);
    args.extend([
        "device=cpu",
        "lr_scheduler_type=constant",
        "learning_rate=1e-3",
    ]);
    args.extend([
        "keep_freed_memory=false",
        "report_to=",
        "per_device_train_batch_size=2",
    ]);
    args.extend(more);
    let code = trainer::run(args.into_iter().map(Into::into));
    assert_eq!(code, ExitCode::SUCCESS);
}

#[test]
fn finetuning_with_eight_bits_saves_them_and_resumes_bit_for_bit() {
    let _generator = seeded(57);
    kernels();
    let dir = tempfile::tempdir().unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    finetune(&whole, &["max_steps=4", "save_steps=2"]);
    let optimizer = fs_err::read(whole.join("checkpoint-4/optimizer.safetensors")).unwrap();
    let state = SafeTensors::deserialize(&optimizer).unwrap();
    let moments = state
        .tensors()
        .into_iter()
        .filter(|(name, _)| name.starts_with("exp_avg."));
    assert!(moments.clone().count() > 50);
    for (name, moment) in moments {
        assert_eq!(moment.dtype(), Dtype::U8, "{name}");
    }
    let record = fs_err::read_to_string(whole.join("run/run.json")).unwrap();
    assert!(record.contains(r#""adamw": "kernels adamw""#), "{record}");

    finetune(&parts, &["max_steps=2", "save_steps=2"]);
    finetune(&parts, &["max_steps=4", "save_steps=2", "--resume"]);
    for file in ["model.safetensors", "checkpoint-4/optimizer.safetensors"] {
        let [ours, other] = [&whole, &parts].map(|dir| fs_err::read(dir.join(file)).unwrap());
        assert!(ours == other, "{file} differs");
    }
}
