//! The command line: forward.

use std::collections::BTreeMap;
use std::path::Path;

use assert_cmd::Command;
use predicates::prelude::predicate;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;
use tests::golden;

/// A tensor as it stands in a file.
type Raw = (Dtype, Vec<usize>, Vec<u8>);

fn read(path: &Path) -> BTreeMap<String, Raw> {
    let bytes = fs_err::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter();
    tensors
        .map(|(name, view)| {
            (
                name,
                (view.dtype(), view.shape().to_vec(), view.data().to_vec()),
            )
        })
        .collect()
}

fn write(path: &Path, tensors: &BTreeMap<String, Raw>) {
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        (
            name.as_str(),
            TensorView::new(*dtype, shape.clone(), data).unwrap(),
        )
    });
    fs_err::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The inputs of a golden case, without `in.`.
fn inputs(case: &str) -> BTreeMap<String, Raw> {
    read(&golden(&format!("model/{case}.safetensors")))
        .into_iter()
        .filter_map(|(name, raw)| Some((name.strip_prefix("in.")?.to_owned(), raw)))
        .collect()
}

fn floats((dtype, _, data): &Raw) -> Vec<f64> {
    match dtype {
        Dtype::F64 => data
            .chunks(8)
            .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
            .collect(),
        Dtype::F32 => data
            .chunks(4)
            .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
            .collect(),
        other => panic!("{other:?} holds no floats"),
    }
}

fn command(model: &str, dir: &TempDir) -> Command {
    let mut command = Command::cargo_bin("trainer").unwrap();
    command
        .arg("forward")
        .arg("--model")
        .arg(golden("checkpoints").join(model))
        .arg("--inputs")
        .arg(dir.path().join("in.safetensors"))
        .arg("--output")
        .arg(dir.path().join("out.safetensors"));
    command
}

fn assert_near(found: &Raw, expected: &Raw, what: &str) {
    assert_eq!(found.1, expected.1, "{what}: shape");
    let (found, expected) = (floats(found), floats(expected));
    let largest = expected
        .iter()
        .fold(0.0_f64, |largest, x| largest.max(x.abs()));
    for (a, b) in found.iter().zip(&expected) {
        assert!(
            (a - b).abs() <= 1e-6 * largest.max(f64::MIN_POSITIVE),
            "{what}: {a}, {b}"
        );
    }
}

#[test]
fn outputs_have_the_names_and_values_of_transformers() {
    let dir = tempfile::tempdir().unwrap();
    for (model, case) in [("dense_vl", "image"), ("moe_vl", "text")] {
        write(
            &dir.path().join("in.safetensors"),
            &inputs(&format!("{model}_{case}")),
        );
        command(model, &dir)
            .args(["--dtype", "float64"])
            .assert()
            .success()
            .stdout("")
            .stderr(predicate::str::contains("kernels (auto): attention: "));
        let found = read(&dir.path().join("out.safetensors"));
        let expected = read(&golden(&format!("model/{model}_{case}.safetensors")));
        let mut compared = 0;
        for (name, found) in &found {
            let Some(expected) = expected.get(&format!("out.{name}")) else {
                assert!(
                    ["mtp_logits", "mtp_loss", "total_loss"].contains(&name.as_str()),
                    "{name} is in no golden"
                );
                continue;
            };
            compared += 1;
            if found.0 == Dtype::I64 {
                assert_eq!(found, expected, "{name}");
            } else {
                assert_eq!(found.0, Dtype::F64, "{name}");
                assert_near(found, expected, name);
            }
        }
        assert!(found.contains_key("mtp_logits"));
        assert_eq!(found.contains_key("aux_loss"), model == "moe_vl");
        assert!(compared >= 9, "{compared} outputs");
    }
}

#[test]
fn gradients_stand_under_hugging_face_names() {
    let dir = tempfile::tempdir().unwrap();
    write(
        &dir.path().join("in.safetensors"),
        &inputs("dense_vl_image_batch"),
    );
    command("dense_vl", &dir)
        .args(["--dtype", "float64", "--grads"])
        .assert()
        .success();
    let found = read(&dir.path().join("out.safetensors"));
    let expected = read(&golden("model/dense_vl_image_batch_grads.safetensors"));
    for (name, expected) in &expected {
        assert_near(&found[name], expected, name);
    }
    let grads = found
        .keys()
        .filter(|name| name.starts_with("grad."))
        .count();
    assert_eq!(grads, expected.len());
}

#[test]
fn outputs_have_the_dtype_of_the_run_and_losses_need_a_target() {
    let dir = tempfile::tempdir().unwrap();
    let mut batch = inputs("dense_vl_tied_bf16_text");
    batch.remove("labels");
    write(&dir.path().join("in.safetensors"), &batch);
    command("dense_vl_tied_bf16", &dir)
        .args(["--dtype", "bfloat16"])
        .assert()
        .success();
    let found = read(&dir.path().join("out.safetensors"));
    assert_eq!(found["logits"].0, Dtype::BF16);
    assert_eq!(found["position_ids"].0, Dtype::I64);
    for loss in ["loss", "mtp_loss", "total_loss", "aux_loss", "visual"] {
        assert!(!found.contains_key(loss), "{loss}");
    }
    command("dense_vl_tied_bf16", &dir)
        .arg("--grads")
        .assert()
        .code(1)
        .stderr(predicate::str::contains("no token of"));
}

#[test]
fn inputs_that_do_not_fit_are_errors_that_name_them() {
    let dir = tempfile::tempdir().unwrap();
    let batch = inputs("dense_vl_image");
    let refuses = |change: &dyn Fn(&mut BTreeMap<String, Raw>), message: &str| {
        let mut changed = batch.clone();
        change(&mut changed);
        write(&dir.path().join("in.safetensors"), &changed);
        command("dense_vl", &dir)
            .assert()
            .code(1)
            .stdout("")
            .stderr(predicate::str::contains(message));
        assert!(!dir.path().join("out.safetensors").exists());
    };
    refuses(
        &|batch| {
            let ids = batch["input_ids"].clone();
            batch.insert("inputs_ids".to_owned(), ids);
        },
        "unknown input `inputs_ids`, did you mean `input_ids`?",
    );
    refuses(
        &|batch| drop(batch.remove("input_ids")),
        "there is no `input_ids`",
    );
    refuses(
        &|batch| batch.get_mut("labels").unwrap().1 = vec![1, 1, 27],
        "`labels` has shape [1, 1, 27], expected [1, 27] as input_ids",
    );
    refuses(
        &|batch| drop(batch.remove("pixel_values")),
        "image grids are given without pixels",
    );
    refuses(
        &|batch| {
            let ids = batch.get_mut("input_ids").unwrap();
            ids.2[..8].copy_from_slice(&99_999_i64.to_le_bytes());
        },
        "`input_ids` holds 99999 in sample 0 at position 0",
    );
    refuses(
        &|batch| {
            let shape = batch["input_ids"].1.clone();
            let zeros = vec![0; 4 * shape.iter().product::<usize>()];
            batch.insert("input_ids".to_owned(), (Dtype::F32, shape, zeros));
        },
        "`input_ids` has type Float, expected integers",
    );
    fs_err::write(dir.path().join("in.safetensors"), b"no tensors").unwrap();
    command("dense_vl", &dir)
        .assert()
        .code(1)
        .stderr(predicate::str::contains("it is not a safetensors file"));
}
