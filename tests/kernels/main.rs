//! The CUDA kernels without a GPU: each family's test program is compiled by the C++ compiler, with `bridge-torch/kernels/emulation`
//! in CUDA's place, and run. The programs hold the cases and the float64 references; they need no libtorch and no nvcc.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A compiled test program; the folder lives as long as it.
struct Program {
    folder: tempfile::TempDir,
}

impl Program {
    fn compile(family: &str) -> Self {
        let room = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bridge-torch/kernels");
        let folder = tempfile::tempdir().unwrap();
        let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());
        let out = Command::new(&compiler)
            .args(["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"])
            .args(["-DBRIDGE_EMULATION", "-ffp-contract=off"])
            .arg(room.join("tests").join(family).with_extension("cpp"))
            .arg("-o")
            .arg(folder.path().join("program"))
            .output()
            .unwrap_or_else(|error| panic!("{} does not run: {error}", compiler.display()));
        assert!(out.status.success(), "{}", text(&out));
        Self { folder }
    }

    fn run(&self, case: Option<&str>) -> Output {
        let goldens: PathBuf = tests::golden("");
        Command::new(self.folder.path().join("program"))
            .arg(goldens)
            .args(case)
            .output()
            .unwrap()
    }
}

fn text(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
}

/// Everything that `family`'s program claims holds.
fn holds(family: &str) {
    let out = Program::compile(family).run(None);
    assert!(out.status.success(), "{}", text(&out));
    assert!(text(&out).contains("all checks hold"), "{}", text(&out));
}

#[test]
fn emulated_matrix_instructions_equal_plain_products() {
    holds("emulation");
}

#[test]
fn the_emulation_refuses_wrong_kernels_by_name() {
    let program = Program::compile("emulation");
    for (wrong, complaint) in [
        (
            "left_early",
            "1 of 64 threads have left, the others wait for ever",
        ),
        ("two_places", "threads 0 and 32 wait at different places"),
        (
            "half_a_warp",
            "32 of 64 threads have left, the others wait for ever",
        ),
        (
            "shared_overrun",
            "shared memory was written 0 bytes behind its end",
        ),
        ("unaligned", "a 16-byte access at"),
        ("never_waited", "cp.async copies that it never waited for"),
        (
            "no_barrier",
            "out depends on the order of the threads (descending)",
        ),
        (
            "outside",
            "wrote 1 bytes outside of a buffer of 64 elements",
        ),
    ] {
        let out = program.run(Some(wrong));
        assert_eq!(out.status.code(), Some(1), "{wrong}: {}", text(&out));
        assert!(text(&out).contains(complaint), "{wrong}: {}", text(&out));
    }
}

#[test]
fn rms_norm_kernels_equal_float64() {
    holds("rms_norm");
}

#[test]
fn gated_rms_norm_kernels_equal_float64() {
    holds("gated_rms_norm");
}

#[test]
fn swiglu_kernels_equal_float64() {
    holds("swiglu");
}

#[test]
fn mrope_kernels_equal_float64() {
    holds("mrope");
}

#[test]
fn conv1d_silu_kernels_equal_float64() {
    holds("conv1d_silu");
}

#[test]
fn router_kernels_equal_float64() {
    holds("router");
}

#[test]
fn dispatch_kernels_sort_stably_and_copy_exactly() {
    holds("dispatch");
}

#[test]
fn expert_activation_kernels_equal_float64() {
    holds("expert_activation");
}

#[test]
fn cross_entropy_kernels_equal_float64() {
    holds("cross_entropy");
}

#[test]
fn adamw_kernels_equal_float64_and_round_without_bias() {
    holds("adamw");
}

#[test]
fn gdn_forward_kernels_equal_the_float64_recurrence() {
    holds("gdn_forward");
}

#[test]
fn gdn_backward_kernels_equal_the_float64_gradients() {
    holds("gdn_backward");
}

/// What `make gpu-check` carries to a GPU machine.
fn gpu() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/gpu")
}

fn finishes(command: &mut Command) -> String {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", text(&out));
    text(&out)
}

#[test]
fn the_tables_of_the_gpu_check_agree() {
    let listed = finishes(Command::new(gpu().join("run")).arg("--list"));
    assert!(!listed.contains("WRONG"), "{listed}");
    for operator in ["gated_delta_rule", "routed_experts", "linear_cross_entropy"] {
        assert!(listed.contains(operator), "{listed}");
    }
}

#[test]
fn the_gpu_check_packs_what_runs_where_it_is_unpacked_and_is_refused_when_it_is_too_large() {
    let program = Program::compile("emulation");
    let binary = program.folder.path().join("program");
    let folder = tempfile::tempdir().unwrap();
    let pack = |limit: &str| {
        let mut command = Command::new(gpu().join("pack"));
        command.arg(folder.path()).args([&binary, &binary]);
        command.env("LIMIT_MIB", limit);
        command
    };
    let archive = folder.path().join("gpu-check.tar.xz");
    finishes(&mut pack("64"));
    let there = tempfile::tempdir().unwrap();
    finishes(
        Command::new("python3")
            .args(["-m", "tarfile", "-e"])
            .args([archive.as_path(), there.path()]),
    );
    let unpacked = there.path().join("gpu-check");
    for file in [
        "bin/trainer",
        "lib/libmegatron_bridge_kernels.so",
        "goldens/checkpoints/moe_vl/config.json",
        "packed.json",
    ] {
        assert!(unpacked.join(file).is_file(), "{file}");
    }
    finishes(Command::new(unpacked.join("bin/trainer")).arg(tests::golden("")));
    finishes(Command::new(unpacked.join("run")).arg("--list"));

    let out = pack("0").output().unwrap();
    assert_eq!(out.status.code(), Some(1), "{}", text(&out));
    assert!(
        text(&out).contains("but may have fewer than 0"),
        "{}",
        text(&out)
    );
    assert!(!archive.exists());
}
