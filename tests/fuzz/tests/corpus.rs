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
