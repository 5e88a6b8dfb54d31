//! Plans carried out file by file.

use bridge_core::checkpoint::hf::{HfCheckpoint, HfWriter};
use bridge_core::checkpoint::torch_dist::{TorchDistCheckpoint, TorchDistLayout, TorchDistWriter};
use bridge_core::checkpoint::{FileSink, MemoryTensors, Resume, Staging};
use bridge_core::convert::{Contents, ExecuteOptions, write_files};
use bridge_core::plan::{KeyStyle, ModelPlan, PlanOptions};

use super::*;

fn stored(bridge: &AutoBridge) -> (ModelPlan, MemoryTensors) {
    let plan = bridge
        .plan_stored(&PlanOptions::default(), KeyStyle::Written)
        .unwrap();
    let memory = memory_for(&plan);
    let source = bridge.checkpoint().unwrap();
    execute(&plan, source, &memory, &ExecuteOptions::default()).unwrap();
    (plan, memory)
}

fn assert_same_files(found: &Path, wanted: &HfCheckpoint) {
    for name in fs_err::read_dir(wanted.dir()).unwrap() {
        let name = name.unwrap().file_name();
        if name.to_string_lossy().ends_with(".safetensors") {
            let (ours, theirs) = (found.join(&name), wanted.dir().join(&name));
            assert!(fs_err::read(ours).unwrap() == fs_err::read(theirs).unwrap());
        }
    }
}

/// AReaL 1403: a file with a tensor that was not converted lost its neighbours too.
#[test]
fn tensors_that_no_plan_makes_are_carried_over_beside_their_neighbours() {
    let bridge = AutoBridge::from_hf_pretrained(&golden("checkpoints/moe_vl")).unwrap();
    let reference = bridge.checkpoint().unwrap();
    let (plan, memory) = stored(&bridge);
    let back = plan
        .inverted()
        .only(|tensor| !tensor.name.starts_with("mtp."));
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("model");
    let contents = Contents {
        plan: &back,
        source: &memory,
        carried: Some(reference),
    };
    let writer = HfWriter::like(reference, &target, Overwrite::No).unwrap();
    let report = write_files(&contents, &writer, &ExecuteOptions::default()).unwrap();
    assert_eq!(report.tensors, reference.names().len());
    writer.finish().unwrap();
    assert_same_files(&target, reference);

    // Without a place to take them from they are missed by name.
    let target = out.path().join("other");
    let contents = Contents {
        carried: None,
        ..contents
    };
    let writer = HfWriter::like(reference, &target, Overwrite::No).unwrap();
    let error = write_files(&contents, &writer, &ExecuteOptions::default()).unwrap_err();
    assert_says(&text(&error), &["`mtp.", "was not created"]);
    drop(writer);
    assert!(!target.exists());
}

#[test]
fn a_run_that_broke_off_goes_on_behind_its_finished_files() {
    let bridge = AutoBridge::from_hf_pretrained(&golden("checkpoints/moe_vl")).unwrap();
    let reference = bridge.checkpoint().unwrap();
    let (plan, memory) = stored(&bridge);
    let back = plan.inverted();
    let contents = Contents {
        plan: &back,
        source: &memory,
        carried: None,
    };
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("model");
    let staging = |resume| Staging {
        job: Some("job".to_owned()),
        resume,
        ..Staging::default()
    };
    let options = ExecuteOptions::default();
    let writer = HfWriter::like(reference, &target, staging(Resume::No)).unwrap();
    let first = writer.unwritten(0);
    let part = plan
        .inverted()
        .only(|tensor| first.contains(&&*tensor.name));
    execute(&part, &memory, &writer, &options).unwrap();
    writer.finish_file(0).unwrap();
    drop(writer);

    let writer = HfWriter::like(reference, &target, staging(Resume::Yes)).unwrap();
    let report = write_files(&contents, &writer, &options).unwrap();
    assert_eq!(report.tensors, back.tensors.len() - part.tensors.len());
    writer.finish().unwrap();
    assert_same_files(&target, reference);
}

#[test]
fn a_torch_dist_directory_written_by_files_holds_the_plan() {
    let bridge = AutoBridge::from_hf_pretrained(&golden("checkpoints/dense_vl")).unwrap();
    let (plan, memory) = stored(&bridge);
    let infos = plan.tensors.iter().map(|tensor| {
        let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
        (tensor.name.clone(), TensorInfo { dtype, shape })
    });
    let layout = TorchDistLayout {
        tensors: infos.collect(),
        extra_states: bridge.extra_states(&PlanOptions::default()).unwrap(),
        ..TorchDistLayout::default()
    };
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("run");
    let writer = TorchDistWriter::create(&layout, &target, Overwrite::No).unwrap();
    let contents = Contents {
        plan: &plan,
        source: bridge.checkpoint().unwrap(),
        carried: None,
    };
    write_files(&contents, &writer, &ExecuteOptions::default()).unwrap();
    writer.finish().unwrap();
    let found = TorchDistCheckpoint::open(&target).unwrap();
    found.verify().unwrap();
    assert_eq!(found.objects().count(), layout.extra_states.len());
    for (name, info) in found.tensors() {
        let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
        found.read(name, 0, &mut bytes).unwrap();
        assert!(memory.bytes(name).unwrap() == bytes, "{name}");
    }
}
