//! The command line: files and folders that may not be read or written.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tests::golden;

use crate::broken_off::SmallDisk;
use crate::program::done;
use crate::shard::words;
use crate::verify::copied;

/// A folder that anybody may use, with a copy of the program in it.
struct Place {
    scratch: tempfile::TempDir,
    /// Who runs the program: root asks nobody for permission, so somebody else has to.
    user: Option<u32>,
}

fn mode(path: &Path, mode: u32) {
    fs_err::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

impl Place {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        mode(scratch.path(), 0o777);
        let program = scratch.path().join("trainer");
        fs_err::copy(assert_cmd::cargo::cargo_bin("trainer"), &program).unwrap();
        mode(&program, 0o755);
        let is_root = fs_err::metadata(&program).unwrap().uid() == 0;
        let user = is_root.then_some(65_534);
        Self { scratch, user }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Runs the program in the folder: exit code and stderr.
    fn run(&self, args: &str) -> (i32, String) {
        let mut command = Command::new(self.at("trainer"));
        command.current_dir(self.scratch.path()).args(words(args));
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        let (code, _, stderr) = done(&mut command.into());
        (code, stderr)
    }

    /// A golden checkpoint that anybody may read.
    fn model(&self, name: &str, golden_name: &str) {
        copied(&golden(golden_name), &self.at(name));
        mode(&self.at(name), 0o755);
    }
}

/// Names in a folder, hidden ones too.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs_err::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

const IMPORT: &str = "convert import --hf-model model --megatron-path";
const EXPORT: &str = "convert export --hf-model model --megatron-path megatron --hf-path";
const SHARD: &str = "convert shard --hf-model model --output";
const UNSHARD: &str = "convert unshard rank.safetensors --hf-model model --hf-path";

fn place_with_everything() -> Place {
    let place = Place::new();
    place.model("model", "checkpoints/dense_vl");
    for args in [
        format!("{IMPORT} megatron"),
        format!("{SHARD} rank.safetensors"),
    ] {
        let (code, stderr) = place.run(&args);
        assert_eq!(code, 0, "{stderr}");
    }
    place
}

#[test]
fn a_destination_that_may_not_be_written_is_named_and_left_as_it_was() {
    let place = place_with_everything();
    let locked = place.at("locked");
    fs_err::create_dir(&locked).unwrap();
    mode(&locked, 0o555);
    for (args, file) in [
        (format!("{IMPORT} locked/out"), "locked/.out.partial"),
        (format!("{EXPORT} locked/out"), "locked/.out.partial"),
        (format!("{UNSHARD} locked/out"), "locked/.out.partial"),
        (format!("{SHARD} locked/out.safetensors"), "locked"),
        (format!("{IMPORT} locked/below/out"), "locked/below"),
    ] {
        let (code, stderr) = place.run(&args);
        assert_eq!(code, 1, "{args}: {stderr}");
        for words in ["cannot create", file, "Permission denied"] {
            assert!(stderr.contains(words), "no {words}: {args}: {stderr}");
        }
        assert_eq!(names(&locked), Vec::<String>::new(), "{args}");
    }
    // What stands there may be read and not be replaced: its folder belongs to somebody else.
    place.model("locked/old", "checkpoints/dense_vl");
    let before = names(&locked.join("old"));
    let (code, stderr) = place.run(&format!("{EXPORT} locked/old --overwrite"));
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("Permission denied"), "{stderr}");
    assert_eq!(names(&locked), ["old"]);
    assert_eq!(names(&locked.join("old")), before);
}

#[test]
fn a_source_that_may_not_be_read_is_named_and_nothing_is_made() {
    let place = place_with_everything();
    let metadata = "megatron/iter_0000000/.metadata";
    let data = {
        let inside = names(&place.at("megatron/iter_0000000"));
        let file = inside.into_iter().find(|name| name.ends_with(".distcp"));
        format!("megatron/iter_0000000/{}", file.unwrap())
    };
    let run_config = "megatron/iter_0000000/run_config.yaml";
    let cases: [(&str, &str, &str); 10] = [
        ("model/config.json", IMPORT, "out"),
        ("model/model.safetensors", IMPORT, "out"),
        ("model/model.safetensors", SHARD, "out.safetensors"),
        ("model", IMPORT, "out"),
        ("model/tokenizer.json", EXPORT, "out"),
        ("model/config.json", EXPORT, "out"),
        (metadata, EXPORT, "out"),
        (&data, EXPORT, "out"),
        (run_config, EXPORT, "out"),
        ("rank.safetensors", UNSHARD, "out"),
    ];
    let before = names(place.scratch.path());
    for (locked, command, out) in cases {
        let path = place.at(locked);
        let kept = fs_err::metadata(&path).unwrap().permissions().mode();
        mode(&path, 0);
        let owner_of = place
            .user
            .map(|_| std::os::unix::fs::chown(&path, Some(0), Some(0)));
        assert!(owner_of.is_none_or(|changed| changed.is_ok()));
        let (code, stderr) = place.run(&format!("{command} {out}"));
        mode(&path, kept | 0o444);
        assert_eq!(code, 1, "{locked}: {stderr}");
        for words in [locked, "Permission denied"] {
            assert!(stderr.contains(words), "no {words} in {command}: {stderr}");
        }
        assert_eq!(names(place.scratch.path()), before, "{locked}");
    }
}

#[test]
fn a_file_system_that_may_only_be_read_is_named() {
    let place = place_with_everything();
    let disk = place.at("disk");
    let Some(_disk) = SmallDisk::mount(&disk, 64 << 20) else {
        eprintln!("not run: this system mounts no tmpfs for the test");
        return;
    };
    let remounted = Command::new("mount")
        .args(["-o", "remount,ro"])
        .arg(&disk)
        .status();
    if !remounted.is_ok_and(|status| status.success()) {
        eprintln!("not run: this system does not mount a tmpfs to be read only");
        return;
    }
    for command in [IMPORT, EXPORT, UNSHARD, SHARD] {
        let (code, stderr) = place.run(&format!("{command} disk/out"));
        assert_eq!(code, 1, "{stderr}");
        for words in ["error: cannot create ", "disk", "Read-only file system"] {
            assert!(stderr.contains(words), "no {words} in {command}: {stderr}");
        }
        assert_eq!(names(&disk), Vec::<String>::new());
    }
}
