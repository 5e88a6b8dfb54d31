//! Opening, planning and loading from C++ and C, and every way in which they fail.

use std::path::Path;

use bridge_core::checkpoint::Staging;
use bridge_core::checkpoint::hf::HfCheckpoint;
use bridge_core::{AutoBridge, ImportOptions};
use serde_json::Value;
use tempfile::TempDir;
use tests::fp8::write;
use tests::tensors::read_all;

use crate::cases::{model, run, run_c};

fn scratch() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn copy(from: &Path, to: &Path) {
    fs_err::create_dir(to).unwrap();
    for entry in fs_err::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs_err::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Runs a case of C++ on the mixture of experts.
fn on_moe(case: &str) {
    run(case, &model("moe_vl"), scratch().path(), "");
}

#[test]
fn missing_files_are_named_with_the_systems_word() {
    let scratch = scratch();
    let dir = |name: &str| scratch.path().join(name);
    fs_err::create_dir(dir("config_only")).unwrap();
    let config = model("moe_vl").join("config.json");
    fs_err::copy(&config, dir("config_only").join("config.json")).unwrap();
    copy(&model("moe_vl"), &dir("missing_shard"));
    fs_err::remove_file(dir("missing_shard").join("model-00002-of-00003.safetensors")).unwrap();
    copy(&dir("config_only"), &dir("bad_config"));
    fs_err::write(dir("bad_config").join("config.json"), "{").unwrap();
    run(
        "a_directory_that_is_not_there",
        &model("moe_vl"),
        scratch.path(),
        "",
    );
}

#[test]
fn a_torch_dist_directory_needs_a_reference_of_the_same_model() {
    let scratch = scratch();
    let bridge = AutoBridge::from_hf_pretrained(&model("moe_vl")).unwrap();
    let target = scratch.path().join("megatron");
    bridge
        .import_ckpt(&target, &ImportOptions::default(), &Staging::default())
        .unwrap();
    let other = model("dense_vl").display().to_string();
    run(
        "a_reference_too_many_or_missing",
        &model("moe_vl"),
        scratch.path(),
        &other,
    );
}

#[test]
fn files_that_are_cut_short_are_damage_and_not_a_refusal() {
    let scratch = scratch();
    copy(&model("dense_vl"), &scratch.path().join("cut"));
    let file = scratch.path().join("cut/model.safetensors");
    let len = fs_err::metadata(&file).unwrap().len();
    let file = fs_err::OpenOptions::new().write(true).open(file).unwrap();
    file.set_len(len - 1).unwrap();
    copy(&model("dense_vl"), &scratch.path().join("cut_later"));
    run(
        "a_file_that_is_cut_short",
        &model("dense_vl"),
        scratch.path(),
        "",
    );
}

#[test]
fn values_that_are_no_numbers_are_refused_unless_they_are_allowed() {
    let scratch = scratch();
    let source = HfCheckpoint::open(&model("moe_vl")).unwrap();
    let mut tensors = read_all(&source);
    let norm = "model.language_model.norm.weight";
    let (_, _, bytes) = tensors.iter_mut().find(|(name, ..)| name == norm).unwrap();
    bytes[12..16].copy_from_slice(&f32::NAN.to_le_bytes());
    let config = fs_err::read(model("moe_vl").join("config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    write(
        &tensors,
        &config,
        &scratch.path().join("not_finite"),
        1 << 30,
    );
    run(
        "values_that_are_no_numbers",
        &model("moe_vl"),
        scratch.path(),
        "",
    );
}

#[test]
fn a_layout_that_does_not_fit_is_refused_with_its_numbers() {
    on_moe("a_layout_that_does_not_fit");
}

#[test]
fn names_that_there_are_not_are_refused_with_the_nearest() {
    on_moe("a_tensor_that_there_is_not");
    on_moe("fields_that_a_provider_lacks");
}

#[test]
fn memory_that_does_not_fit_is_refused_untouched() {
    on_moe("memory_that_does_not_fit");
    on_moe("memory_that_is_given_twice");
}

#[test]
fn a_load_stops_when_it_is_told_to() {
    on_moe("work_that_is_cancelled");
    on_moe("a_callback_that_throws");
}

#[test]
fn a_panic_is_an_error_and_does_not_cross() {
    on_moe("a_panic_does_not_cross");
}

#[test]
fn a_provider_and_a_layout_are_explained() {
    on_moe("a_provider_says_all_of_it");
    on_moe("a_layout_is_explained");
}

#[test]
fn rows_and_ranges_and_casts_go_where_they_are_wanted() {
    on_moe("one_by_one_is_all_at_once");
    on_moe("rows_go_where_they_are_wanted");
    on_moe("values_are_cast_on_the_way");
}

#[test]
fn handles_are_shared_by_threads_and_outlive_each_other() {
    on_moe("threads_share_a_plan");
    on_moe("handles_are_values");
    on_moe("progress_ends_with_everything");
}

#[test]
fn c_does_the_same_and_fails_with_status_and_text() {
    for case in ["opening", "planning", "loading"] {
        run_c(case, &model("moe_vl"), scratch().path());
    }
}
