//! Compiles the C++ face; its classes stand over the functions of `src/cxx_bridge.rs`.

use std::path::PathBuf;

fn main() {
    let sources: Vec<PathBuf> = std::fs::read_dir("src/cpp")
        .expect("src/cpp is part of the crate")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "cpp"))
        .collect();
    cxx_build::bridge("src/cxx_bridge.rs")
        .files(&sources)
        .std("c++17")
        .include("include")
        .include("src/cpp")
        .opt_level(2)
        .flag("-g0")
        .flag("-fvisibility=hidden")
        // Such symbols stay global whatever the linker is told.
        .flag_if_supported("-fno-gnu-unique")
        .compile("megatron_bridge_cpp");
    println!("cargo::rerun-if-changed=src/cpp");
    println!("cargo::rerun-if-changed=src/cxx_bridge.rs");
    println!("cargo::rerun-if-changed=include");
}
