//! Plans carried out file by file.

use bridge_core::checkpoint::hf::{HfCheckpoint, HfWriter};
use bridge_core::checkpoint::torch_dist::{TorchDistCheckpoint, TorchDistLayout, TorchDistWriter};
use bridge_core::checkpoint::{FileSink, MemoryTensors, Resume, Staging};
use bridge_core::convert::{ExecuteOptions, write_files};
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

#[test]
fn a_run_that_broke_off_goes_on_behind_its_finished_files() {
    let bridge = AutoBridge::from_hf_pretrained(&golden("checkpoints/moe_vl")).unwrap();
    let reference = bridge.checkpoint().unwrap();
    let (plan, memory) = stored(&bridge);
    let back = plan.inverted();
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
    let report = write_files(&back, &memory, &writer, &options).unwrap();
    assert_eq!(report.tensors, back.tensors.len() - part.tensors.len());
    writer.finish().unwrap();
    assert_same_files(&target, reference);
}

#[test]
fn a_torch_dist_directory_written_by_files_holds_the_plan() {
    let bridge = AutoBridge::from_hf_pretrained(&golden("checkpoints/dense_vl")).unwrap();
    let (plan, memory) = stored(&bridge);
    let layout = TorchDistLayout {
        tensors: plan.targets(),
        extra_states: bridge.extra_states(&PlanOptions::default()).unwrap(),
        ..TorchDistLayout::default()
    };
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("run");
    let writer = TorchDistWriter::create(&layout, &target, Overwrite::No).unwrap();
    let source = bridge.checkpoint().unwrap();
    write_files(&plan, source, &writer, &ExecuteOptions::default()).unwrap();
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
