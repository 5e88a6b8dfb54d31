//! Compiles the C++ shim against libtorch, and refuses a libtorch of another version.

use std::path::{Path, PathBuf};

/// The libtorch that `tch` 0.24 was generated for.
const LIBTORCH_VERSION: &str = "2.11.0";

fn main() {
    let lib = PathBuf::from(
        std::env::var("DEP_TCH_LIBTORCH_LIB")
            .expect("torch-sys tells its dependents where libtorch is"),
    );
    let torch = lib.parent().expect("libtorch's lib folder has a parent");
    check_version(torch);

    let include = torch.join("include");
    let api = include.join("torch/csrc/api/include");
    let sources: Vec<PathBuf> = std::fs::read_dir("src/shim/cpp")
        .expect("src/shim/cpp is part of the crate")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "cpp"))
        .collect();
    cxx_build::bridge("src/shim/ffi.rs")
        .files(&sources)
        .std("c++17")
        .include("src/shim/cpp")
        .flag("-isystem")
        .flag(&include)
        .flag("-isystem")
        .flag(&api)
        .define("AT_PER_OPERATOR_HEADERS", None)
        // As libtorch itself was compiled: its headers lay out classes otherwise in a debug build.
        .define("NDEBUG", None)
        .flag_if_supported("-fopenmp")
        .opt_level(2)
        .flag("-g0")
        .flag("-Wall")
        .flag("-Wextra")
        .compile("bridge_shim");
    println!("cargo::rerun-if-changed=src/shim/cpp");
    println!("cargo::rerun-if-changed=src/shim/ffi.rs");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib.display());
}

/// torch-sys skips its own check when libtorch comes from a wheel, so it is made here.
fn check_version(torch: &Path) {
    let file = torch.join("version.py");
    println!("cargo::rerun-if-changed={}", file.display());
    let Ok(text) = std::fs::read_to_string(&file) else {
        return; // A plain libtorch archive: torch-sys has compared its `build-version`.
    };
    let found = text
        .lines()
        .find_map(|line| line.strip_prefix("__version__ = "))
        .unwrap_or_default()
        .trim_matches('\'');
    assert!(
        found.split('+').next() == Some(LIBTORCH_VERSION),
        "libtorch in {} is version {found}, but this project is built for {LIBTORCH_VERSION}: \
         run `make setup`, or point LIBTORCH at libtorch {LIBTORCH_VERSION}",
        torch.display()
    );
}
