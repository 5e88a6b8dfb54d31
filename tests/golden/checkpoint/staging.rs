//! A directory in the making: one writer, finished files, what a stopped run leaves.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bridge_core::Dtype;
use bridge_core::checkpoint::hf::{HfCheckpoint, HfLayout, HfWriter};
use bridge_core::checkpoint::{
    CheckpointError, FileSink, Overwrite, ReadBack, Resume, Staging, TensorInfo, TensorSink,
};

/// Three files of one tensor each.
fn layout() -> HfLayout {
    let info = TensorInfo {
        dtype: Dtype::F32,
        shape: vec![256],
    };
    let tensors = ["a", "b", "c"].map(|name| (name.to_owned(), info.clone()));
    HfLayout::sharded(tensors.to_vec(), 1)
}

fn staging(resume: Resume) -> Staging {
    Staging {
        job: Some("the same job".to_owned()),
        resume,
        ..Staging::default()
    }
}

fn bytes(name: &str) -> Vec<u8> {
    let first = name.as_bytes()[0];
    (0..=255)
        .cycle()
        .take(1024)
        .map(|at: u8| first.wrapping_add(at))
        .collect()
}

fn write(writer: &HfWriter, names: &[&str]) {
    for name in names {
        writer.write(name, 0, &bytes(name)).unwrap();
    }
}

fn partial(target: &Path) -> PathBuf {
    let name = target.file_name().unwrap().to_str().unwrap();
    target.with_file_name(format!(".{name}.partial"))
}

/// A run that wrote a file and a half.
fn stopped(target: &Path) {
    let writer = HfWriter::create(&layout(), target, staging(Resume::No)).unwrap();
    write(&writer, &["a"]);
    writer.finish_file(0).unwrap();
    writer.write("b", 0, &bytes("b")[..100]).unwrap();
    drop(writer);
    assert!(!target.exists());
    assert!(partial(target).is_dir());
}

fn assert_complete(target: &Path) {
    let found = HfCheckpoint::open(target).unwrap();
    for name in ["a", "b", "c"] {
        let mut read = vec![0; 1024];
        bridge_core::checkpoint::TensorSource::read(&found, name, 0, &mut read).unwrap();
        assert!(read == bytes(name), "{name}");
    }
    let parent = target.parent().unwrap();
    assert_eq!(std::fs::read_dir(parent).unwrap().count(), 1);
    let names: Vec<_> = std::fs::read_dir(target)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(names.iter().all(|name| !name.starts_with('.')), "{names:?}");
}

#[test]
fn a_second_writer_of_one_destination_is_refused() {
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("model");
    let first = HfWriter::create(&layout(), &target, Overwrite::No).unwrap();
    let second = HfWriter::create(&layout(), &target, Overwrite::No).unwrap_err();
    assert!(matches!(second, CheckpointError::Busy { .. }), "{second}");
    assert!(second.to_string().contains("another process"), "{second}");
    write(&first, &["a", "b", "c"]);
    first.finish().unwrap();
    assert_complete(&target);
}

#[test]
fn a_resumed_run_keeps_finished_files_and_writes_the_others() {
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("model");
    stopped(&target);
    let writer = HfWriter::create(&layout(), &target, staging(Resume::Yes)).unwrap();
    assert!(writer.unwritten(0).is_empty());
    assert_eq!(writer.unwritten(1), ["b"]);
    write(&writer, &["b", "c"]);
    writer.finish().unwrap();
    assert_complete(&target);
}

#[test]
fn a_finished_file_that_was_changed_since_is_written_anew() {
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("model");
    stopped(&target);
    let file = partial(&target).join("model-00001-of-00003.safetensors");
    let damaged = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    let len = damaged.metadata().unwrap().len();
    damaged.write_all_at(b"!", len - 1).unwrap();
    let writer = HfWriter::create(&layout(), &target, staging(Resume::Yes)).unwrap();
    assert_eq!(writer.unwritten(0), ["a"]);
    write(&writer, &["a", "b", "c"]);
    writer.finish().unwrap();
    assert_complete(&target);
}

#[test]
fn what_another_job_left_is_not_taken_for_ours() {
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("model");
    for (job, resume) in [("another job", Resume::Yes), ("the same job", Resume::No)] {
        stopped(&target);
        let staging = Staging {
            job: Some(job.to_owned()),
            ..staging(resume)
        };
        let writer = HfWriter::create(&layout(), &target, staging).unwrap();
        assert_eq!(writer.unwritten(0), ["a"], "{job}");
        drop(writer);
        assert!(!partial(&target).exists(), "nothing was finished: {job}");
    }
}

#[test]
fn bytes_that_do_not_read_back_as_written_are_found() {
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("model");
    for read_back in [ReadBack::Yes, ReadBack::No] {
        let staging = Staging {
            read_back,
            ..Staging::default()
        };
        let writer = HfWriter::create(&layout(), &target, staging).unwrap();
        write(&writer, &["a", "b", "c"]);
        let file = partial(&target).join("model-00002-of-00003.safetensors");
        let damaged = std::fs::OpenOptions::new().write(true).open(file).unwrap();
        let len = damaged.metadata().unwrap().len();
        damaged.write_all_at(b"!", len - 1).unwrap();
        let finished = writer.finish();
        if read_back == ReadBack::Yes {
            let error = finished.unwrap_err();
            assert!(error.to_string().contains("00002-of-00003"), "{error}");
            assert!(!target.exists());
        } else {
            finished.unwrap();
        }
    }
}

#[test]
fn more_than_the_disk_holds_is_refused_before_anything_is_written() {
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("model");
    let info = TensorInfo {
        dtype: Dtype::F32,
        shape: vec![1 << 40],
    };
    let layout = HfLayout::sharded(vec![("a".to_owned(), info)], 1);
    let error = HfWriter::create(&layout, &target, Overwrite::No).unwrap_err();
    // A file system may refuse the size itself.
    let text = error.to_string();
    assert!(
        text.contains("free") || text.contains("cannot extend"),
        "{text}"
    );
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
}
