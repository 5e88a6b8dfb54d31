//! Every file of the corpora through its parser: no panic, no hang, no memory beyond the stated bound.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

/// Far beyond what any file takes: what runs into it hangs.
const HANGS: Duration = Duration::from_secs(300);

fn files(target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

#[test]
fn no_file_of_the_corpora_panics_hangs_or_takes_memory_beyond_the_bound() {
    for target in fuzz::targets::ALL {
        let name = target.name;
        let files = files(name);
        assert!(files.len() >= 5, "{name} has a corpus of {}", files.len());
        for file in files {
            let input = std::fs::read(&file).unwrap();
            let (done, finished) = mpsc::channel();
            let run = std::thread::spawn(move || {
                fuzz::check(name, &input);
                done.send(()).unwrap();
            });
            match finished.recv_timeout(HANGS) {
                Ok(()) => run.join().unwrap(),
                Err(mpsc::RecvTimeoutError::Timeout) => panic!("{} hangs", file.display()),
                Err(mpsc::RecvTimeoutError::Disconnected) => panic!("{} panics", file.display()),
            }
        }
    }
}

/// The inputs that hold the most values a byte, a megabyte each.
#[test]
fn the_densest_inputs_stay_within_the_stated_multiple() {
    let many = 1 << 20;
    let list = |item: &str| format!("{{\"a\":[{}0]}}", item.repeat(many / item.len())).into_bytes();
    let header = |item: &str| {
        let text = list(item);
        [&(text.len() as u64).to_le_bytes()[..], &text].concat()
    };
    let tuples = [b"N".to_vec(), b"\x85".repeat(many), b".".to_vec()].concat();
    for item in ["0,", "[],", "{},"] {
        for name in ["index_json", "config_json"] {
            fuzz::check(name, &list(item));
        }
        fuzz::check("safetensors_header", &header(item));
    }
    for program in [b"N".repeat(many), b"]".repeat(many), tuples] {
        fuzz::check("torch_dist_metadata", &program);
    }
    fuzz::check("pipeline_layout", &b"t*9".repeat(many / 30));
    fuzz::check("pipeline_layout", b"|*262143");
}
