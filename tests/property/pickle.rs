//! Directories that nobody wrote: cut, flipped and forged bytes give an error or the old bytes, never a panic.

use std::fs;
use std::path::Path;

use bridge_core::checkpoint::TensorSource;
use bridge_core::checkpoint::torch_dist::TorchDistCheckpoint;
use proptest::prelude::*;
use tests::golden;

const FILES: [&str; 4] = [".metadata", "__0_0.distcp", "common.pt", "metadata.json"];

fn copied() -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for name in FILES {
        let bytes = fs::read(golden("torch_dist/minimal_no_torch").join(name)).unwrap();
        fs::write(copy.path().join(name), bytes).unwrap();
    }
    copy
}

/// Opens a directory and reads all there is; what is refused is refused.
fn read_all(dir: &Path) {
    let Ok(checkpoint) = TorchDistCheckpoint::open(dir) else {
        return;
    };
    let _ = checkpoint.common();
    let _ = checkpoint.verify();
    for (name, info) in checkpoint.tensors() {
        // A forged shape cannot be larger than its chunks, whose archives cannot be larger than the file.
        let stored: u64 = checkpoint.chunks(name).map(|chunk| chunk.num_bytes).sum();
        if info.num_bytes() <= stored {
            let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
            let _ = checkpoint.read(name, 0, &mut bytes);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Bytes of any file may change: opening and reading end, with an error or without.
    #[test]
    fn changed_bytes_never_panic(
        file in 0usize..4,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let copy = copied();
        let path = copy.path().join(FILES[file]);
        let mut bytes = fs::read(&path).unwrap();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        fs::write(&path, bytes).unwrap();
        read_all(copy.path());
    }

    /// Any bytes at all in the place of the table of contents are refused.
    #[test]
    fn random_programs_are_refused(
        program in prop::collection::vec(
            prop::sample::select(b"(.NKMJXC)]}aesutcRbQqrhj\x80\x81\x85\x86\x87\x88\x89\x8a\x8c\x8d\x93\x94\x95\0\x01\x02\n".to_vec()),
            0..200,
        ),
    ) {
        let copy = copied();
        fs::write(copy.path().join(".metadata"), program).unwrap();
        prop_assert!(TorchDistCheckpoint::open(copy.path()).is_err());
    }
}
