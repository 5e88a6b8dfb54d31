//! Names and links by which a checkpoint would lead its reader elsewhere, and files that would block him.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use bridge_core::checkpoint::Overwrite;
use bridge_core::checkpoint::hf::{HfCheckpoint, HfWriter};
use bridge_core::checkpoint::shard::ShardFile;
use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;
use bridge_core::config::HfConfig;
use bridge_core::provider::run_config::RunConfig;
use tests::golden;

use super::{fifo, torch_dist};
use crate::checkpoint::{assert_says, copy_of, text};

const INDEX: &str = "model.safetensors.index.json";

/// What opening a sharded model says whose index has `shard`, spelled as JSON, in the place of a name.
fn with_shard(shard: &[u8]) -> String {
    let dir = copy_of("moe_vl");
    let path = dir.path().join(INDEX);
    let index = fs_err::read(&path).unwrap();
    let known = b"\"model-00002-of-00003.safetensors\"";
    let at = index.windows(known.len()).position(|one| one == known);
    let at = at.unwrap();
    let forged = [&index[..at], shard, &index[at + known.len()..]].concat();
    fs_err::write(&path, forged).unwrap();
    text(&HfCheckpoint::open(dir.path()).unwrap_err())
}

#[test]
fn a_shard_outside_the_directory_is_refused() {
    let plain = "a shard is a plain file name in the same directory";
    let long = format!("\"{}.safetensors\"", "x".repeat(300));
    for (shard, words) in [
        ("\"../model-00002-of-00003.safetensors\"", plain),
        ("\"/etc/x.safetensors\"", plain),
        ("\"a/../../x.safetensors\"", plain),
        ("\"sub/x.safetensors\"", plain),
        ("\"./model-00002-of-00003.safetensors\"", plain),
        ("\"..\\\\x.safetensors\"", plain),
        ("\"x\\u0000.safetensors\"", plain),
        ("\"x\\n.safetensors\"", plain),
        ("\"c:x.safetensors\"", plain),
        ("\"c:\\\\x.safetensors\"", plain),
        (&long, plain),
        ("\"\"", plain),
        ("\".\"", plain),
        ("\"..\"", plain),
        ("\"/etc/passwd\"", plain),
        ("\"config.json\"", plain),
        ("\"~/x.safetensors\"", plain),
        ("7", "invalid type: integer `7`, expected a string"),
        ("\"\\ud800.safetensors\"", "the index is not valid"),
    ] {
        assert_says(&with_shard(shard.as_bytes()), &[INDEX, words]);
    }
    assert_says(
        &with_shard(b"\"\xff\xfe.safetensors\""),
        &[INDEX, "the index is not valid"],
    );
}

#[test]
fn a_data_file_outside_the_directory_is_refused() {
    let plain = "a data file is a plain file name in the same directory";
    let known = b"X\x0c\0\0\0__0_0.distcp";
    let long = "x".repeat(300);
    let mut cases: Vec<(&[u8], &str)> = [
        "../x.distcp",
        "/etc/passwd",
        "a/../../x",
        "a/x.distcp",
        "./__0_0.distcp",
        "..\\x.distcp",
        "a\\x.distcp",
        "C:x.distcp",
        "x\0",
        "x\n",
        "",
        ".",
        "..",
        &long,
    ]
    .map(|name| (name.as_bytes(), plain))
    .to_vec();
    cases.push((b"\xff\xfe.distcp", "a text is not UTF-8"));
    for (name, words) in cases {
        let dir = torch_dist();
        let path = dir.path().join(".metadata");
        let bytes = fs_err::read(&path).unwrap();
        let len = u32::try_from(name.len()).unwrap();
        let forged = [b"X", &len.to_le_bytes()[..], name].concat();
        let mut out = Vec::new();
        let mut rest = &bytes[..];
        while let Some(at) = rest.windows(known.len()).position(|one| one == known) {
            out.extend([&rest[..at], &forged].concat());
            rest = &rest[at + known.len()..];
        }
        out.extend(rest);
        fs_err::write(&path, out).unwrap();
        let message = text(&TorchDistCheckpoint::open(dir.path()).unwrap_err());
        assert_says(&message, &[".metadata", words]);
    }
}

/// Reads a directory; gives what is said where it is refused.
type Read = fn(&Path) -> Result<(), String>;

/// A file, a directory that has it, and who reads that.
type Reader = (&'static str, fn() -> tempfile::TempDir, Read);

fn open_hf(dir: &Path) -> Result<(), String> {
    HfCheckpoint::open(dir)
        .map(drop)
        .map_err(|error| text(&error))
}

fn open_torch_dist(dir: &Path) -> Result<(), String> {
    let checkpoint = TorchDistCheckpoint::open(dir).map_err(|error| text(&error))?;
    checkpoint.common().map(drop).map_err(|error| text(&error))
}

fn copy_model(dir: &Path) -> Result<(), String> {
    let reference = HfCheckpoint::open(dir).map_err(|error| text(&error))?;
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("out");
    HfWriter::like(&reference, &target, Overwrite::No)
        .map(drop)
        .map_err(|error| {
            assert!(!target.exists());
            text(&error)
        })
}

/// A run: a directory with a tracker and one iteration.
fn run() -> tempfile::TempDir {
    let run = tempfile::tempdir().unwrap();
    let iteration = run.path().join("iter_0000007");
    fs_err::create_dir(&iteration).unwrap();
    for entry in fs_err::read_dir(torch_dist().path()).unwrap() {
        let entry = entry.unwrap();
        fs_err::copy(entry.path(), iteration.join(entry.file_name())).unwrap();
    }
    fs_err::write(run.path().join("latest_checkpointed_iteration.txt"), "7").unwrap();
    run
}

const READERS: [Reader; 12] = [
    ("model.safetensors", || copy_of("dense_vl"), open_hf),
    (
        "model-00002-of-00003.safetensors",
        || copy_of("moe_vl"),
        open_hf,
    ),
    (INDEX, || copy_of("moe_vl"), open_hf),
    ("tokenizer.json", || copy_of("dense_vl"), copy_model),
    ("chat_template.jinja", || copy_of("dense_vl"), copy_model),
    (".metadata", torch_dist, open_torch_dist),
    ("metadata.json", torch_dist, open_torch_dist),
    ("__0_0.distcp", torch_dist, open_torch_dist),
    ("common.pt", torch_dist, open_torch_dist),
    ("latest_checkpointed_iteration.txt", run, open_torch_dist),
    ("latest_train_state.pt", run, open_torch_dist),
    ("iter_0000007/.metadata", run, open_torch_dist),
];

/// What `read` says of a directory; it must say something within minutes, and takes milliseconds.
fn says(read: Read, dir: &Path) -> Result<(), String> {
    let (done, finished) = mpsc::channel();
    let dir = dir.to_owned();
    std::thread::spawn(move || done.send(read(&dir)));
    match finished.recv_timeout(Duration::from_secs(120)) {
        Ok(result) => result,
        Err(_) => panic!("the reader blocks or panics"),
    }
}

/// How a file is replaced, given a path outside; and what its reader must say, one of these.
type Kind = (&'static str, fn(&Path, &Path), &'static [&'static str]);

const KINDS: [Kind; 7] = [
    (
        "link out",
        |file, away| symlink(away, file).unwrap(),
        &["outside the directory"],
    ),
    (
        "relative link out",
        |file, away| {
            let name = away.parent().unwrap().file_name().unwrap();
            let up = Path::new("../..").join(name).join("away");
            let up = if file.parent().unwrap().join(&up).exists() {
                up
            } else {
                Path::new("..").join(name).join("away")
            };
            symlink(up, file).unwrap();
        },
        &["outside the directory"],
    ),
    (
        "loop of links",
        |file, _| symlink(file.file_name().unwrap(), file).unwrap(),
        &["Too many levels of symbolic links"],
    ),
    (
        "link to nothing",
        |file, _| symlink("nothing", file).unwrap(),
        &["No such file or directory"],
    ),
    ("FIFO", |file, _| fifo(file), &["not a regular file"]),
    (
        "device",
        |file, _| symlink("/dev/zero", file).unwrap(),
        &["outside the directory"],
    ),
    (
        "folder",
        |file, _| fs_err::create_dir(file).unwrap(),
        &["not a regular file"],
    ),
];

/// Each file that a checkpoint's readers open, replaced by each thing that is no file of it.
#[test]
fn links_out_loops_pipes_devices_and_folders_are_refused_in_the_place_of_any_file() {
    for (name, make, read) in READERS {
        let whole = make();
        says(read, whole.path()).unwrap();
        for (kind, replace, words) in KINDS {
            let dir = make();
            let outside = tempfile::tempdir().unwrap();
            let away = outside.path().join("away");
            let file = dir.path().join(name);
            if file.exists() {
                // The right bytes, in the wrong place.
                fs_err::copy(&file, &away).unwrap();
                fs_err::remove_file(&file).unwrap();
            } else {
                fs_err::write(&away, "").unwrap();
            }
            replace(&file, &away);
            let message = match says(read, dir.path()) {
                Err(message) => message,
                Ok(()) => panic!("{name} as a {kind} is accepted"),
            };
            let last = Path::new(name).file_name().unwrap().to_str().unwrap();
            assert!(message.contains(last), "{name}, {kind}: {message}");
            let said = words.iter().any(|words| message.contains(words));
            assert!(said, "{name}, {kind}: {message}");
        }
    }
}

/// Files that a user names himself may be links, but they must be files.
#[test]
fn pipes_and_folders_are_refused_in_the_place_of_a_named_file() {
    let readers: [(&str, Read); 4] = [
        ("config.json", |dir| {
            HfConfig::from_dir(dir)
                .map(drop)
                .map_err(|error| text(&error))
        }),
        ("config.json", |dir| {
            let file = dir.join("config.json");
            HfConfig::from_file(&file)
                .map(drop)
                .map_err(|error| text(&error))
        }),
        ("run_config.yaml", |dir| {
            let file = dir.join("run_config.yaml");
            RunConfig::read(&file)
                .map(drop)
                .map_err(|error| text(&error))
        }),
        ("rank.safetensors", |dir| {
            let file = dir.join("rank.safetensors");
            ShardFile::open(&file)
                .map(drop)
                .map_err(|error| text(&error))
        }),
    ];
    for (name, read) in readers {
        for (kind, replace) in [
            ("FIFO", fifo as fn(&Path)),
            ("folder", |file| fs_err::create_dir(file).unwrap()),
            ("device", |file| symlink("/dev/zero", file).unwrap()),
        ] {
            let dir = tempfile::tempdir().unwrap();
            replace(&dir.path().join(name));
            let message = says(read, dir.path()).unwrap_err();
            assert!(
                message.contains(name) && message.contains("not a regular file"),
                "{name}, {kind}: {message}"
            );
        }
    }
}

/// A directory may be called anything that its system allows.
#[test]
fn a_directory_whose_name_is_no_text_is_read_and_written_and_one_that_is_too_long_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let strange = scratch
        .path()
        .join(std::ffi::OsStr::from_bytes(b"model \xff\xfe"));
    fs_err::create_dir(&strange).unwrap();
    for entry in fs_err::read_dir(golden("megatron/checkpoints/dense_vl_kv2")).unwrap() {
        let entry = entry.unwrap();
        fs_err::copy(entry.path(), strange.join(entry.file_name())).unwrap();
    }
    let reference = HfCheckpoint::open(&strange).unwrap();
    let target = scratch
        .path()
        .join(std::ffi::OsStr::from_bytes(b"copy \xff"));
    let writer = HfWriter::like(&reference, &target, Overwrite::No).unwrap();
    let names: Vec<&str> = reference.names().collect();
    let options = bridge_core::convert::ExecuteOptions::default();
    bridge_core::convert::copy_tensors(&names, &reference, &writer, &options).unwrap();
    writer.finish().unwrap();
    assert!(HfCheckpoint::open(&target).is_ok());

    let long = scratch.path().join("x".repeat(300));
    let error = HfWriter::like(&reference, &long, Overwrite::No).unwrap_err();
    assert_says(&text(&error), &["cannot create", "File name too long"]);
    assert_says(&open_hf(&long).unwrap_err(), &["xxx"]);
}
