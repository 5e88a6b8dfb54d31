//! Binaries find libtorch by rpath, so that they run without LD_LIBRARY_PATH; the cases of the ffi room are compiled.

use std::path::PathBuf;

fn main() {
    if let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
        // The operators of the kernels are compiled against it when their tests run.
        println!("cargo::rustc-env=LIBTORCH_LIB={lib}");
    }
    ffi_cases();
}

/// `tests/ffi/main.rs` links them; no other binary has any use for them.
fn ffi_cases() {
    let folder = PathBuf::from("ffi/cpp");
    let with = |extension: &str| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&folder).expect("ffi/cpp is part of the crate");
        entries
            .map(|entry| entry.expect("a readable folder").path())
            .filter(|path| path.extension().is_some_and(|found| found == extension))
            .collect()
    };
    for (name, std, cpp, files) in [
        ("ffi_cases", "c++17", true, with("cpp")),
        ("ffi_c_cases", "c11", false, with("c")),
    ] {
        cc::Build::new()
            .files(files)
            .cpp(cpp)
            .std(std)
            .include("../bridge-ffi/include")
            .opt_level(1)
            .flag("-g0")
            .flag("-Wall")
            .flag("-Wextra")
            .flag("-pedantic")
            .flag("-Werror")
            .cargo_metadata(false)
            .compile(name);
    }
    let out = std::env::var("OUT_DIR").expect("cargo sets it");
    println!("cargo::rustc-link-search=native={out}");
    println!("cargo::rerun-if-changed=ffi/cpp");
    println!("cargo::rerun-if-changed=../bridge-ffi/include");
}
