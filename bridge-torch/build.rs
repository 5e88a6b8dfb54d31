//! Compiles the C++ shim against libtorch, refuses a libtorch of another version, and compiles the CUDA kernels where there
//! is an nvcc.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The libtorch that `tch` 0.24 was generated for.
const LIBTORCH_VERSION: &str = "2.11.0";

/// What kernels are compiled for, where nvcc knows it: a line each.
const ARCHITECTURES: &str = include_str!("kernels/architectures");

fn main() {
    let lib = PathBuf::from(
        std::env::var("DEP_TCH_LIBTORCH_LIB")
            .expect("torch-sys tells its dependents where libtorch is"),
    );
    let torch = lib.parent().expect("libtorch's lib folder has a parent");
    check_version(torch);

    let mut shim = cxx_build::bridge("src/shim/ffi.rs");
    against_libtorch(&mut shim, torch)
        .files(sources("src/shim/cpp", "cpp"))
        .include("src/shim/cpp")
        .flag_if_supported("-fopenmp")
        .compile("bridge_shim");
    println!("cargo::rerun-if-changed=src/shim/cpp");
    println!("cargo::rerun-if-changed=src/shim/ffi.rs");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib.display());

    // Not the folder: its tests and the emulation are no part of this.
    println!("cargo::rerun-if-changed=kernels/torch");
    for extension in ["cu", "cuh", "hpp"] {
        for file in sources("kernels", extension) {
            println!("cargo::rerun-if-changed={}", file.display());
        }
    }
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    let architectures = match nvcc() {
        Some(nvcc) => kernels(&nvcc, torch),
        None => {
            println!(
                "cargo::warning=no nvcc in CUDA_HOME, PATH or .venv: built without CUDA kernels, ops run on libtorch (`make kernels` brings an nvcc)"
            );
            String::new()
        }
    };
    println!("cargo::rustc-env=BRIDGE_KERNEL_ARCHITECTURES={architectures}");
}

/// Flags of every C++ source that includes libtorch's headers.
fn against_libtorch<'a>(build: &'a mut cc::Build, torch: &Path) -> &'a mut cc::Build {
    let include = torch.join("include");
    build
        .cpp(true)
        .std("c++17")
        .flag("-isystem")
        .flag(&include)
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include"))
        .define("AT_PER_OPERATOR_HEADERS", None)
        // As libtorch itself was compiled: its headers lay out classes otherwise in a debug build.
        .define("NDEBUG", None)
        .opt_level(2)
        .flag("-g0")
        .flag("-Wall")
        .flag("-Wextra")
}

fn sources(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("{folder} is part of the crate: {error}"))
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    files.sort();
    files
}

/// The compiler of `CUDA_HOME`, of `PATH`, or of `make setup`; an empty `CUDA_HOME` asks for none.
fn nvcc() -> Option<PathBuf> {
    let home = std::env::var_os("CUDA_HOME");
    if home.as_ref().is_some_and(|home| home.is_empty()) {
        return None;
    }
    let home = home.map(|home| PathBuf::from(home).join("bin/nvcc"));
    if let Some(nvcc) = &home {
        assert!(
            nvcc.is_file(),
            "there is no {}: unset CUDA_HOME, or point it at a CUDA toolkit",
            nvcc.display()
        );
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|folder| folder.join("nvcc"));
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/nvcc/bin/nvcc");
    home.into_iter()
        .chain(on_path)
        .chain([venv])
        .find(|nvcc| nvcc.is_file())
}

/// Compiles kernels and operators and links them whole: operators register themselves when the program starts. Returns the
/// architectures' names between blanks.
fn kernels(nvcc: &Path, torch: &Path) -> String {
    let nvcc = nvcc.canonicalize().expect("nvcc is there");
    let toolkit = nvcc.ancestors().nth(2).expect("nvcc lies in bin");
    let known = output(Command::new(&nvcc).arg("--list-gpu-arch"));
    let architectures: Vec<&str> = ARCHITECTURES
        .lines()
        .filter(|arch| {
            let plain = format!("compute_{}", arch.trim_end_matches('a'));
            known.split_whitespace().any(|line| line == plain)
        })
        .collect();

    let out = PathBuf::from(std::env::var("OUT_DIR").expect("cargo says where outputs go"));
    let files = sources("kernels", "cu");
    let object = |source: &Path| {
        let name = source.file_stem().expect("a source has a name");
        out.join(name).with_extension("cu.o")
    };
    let jobs = std::env::var("NUM_JOBS").map_or(1, |jobs| jobs.parse().unwrap_or(1));
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(source) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut command = Command::new(&nvcc);
                    command
                        .args([
                            "-c",
                            "-O3",
                            "-std=c++17",
                            "-lineinfo",
                            "-Xcompiler",
                            "-fPIC",
                        ])
                        .args(
                            architectures
                                .iter()
                                .map(|arch| format!("-gencode=arch=compute_{arch},code=sm_{arch}")),
                        )
                        .arg("-o")
                        .arg(object(source))
                        .arg(source);
                    output(&mut command);
                }
            });
        }
    });

    let mut operators = cc::Build::new();
    against_libtorch(&mut operators, torch)
        .files(sources("kernels/torch", "cpp"))
        .objects(files.iter().map(|source| object(source)))
        .flag("-isystem")
        .flag(toolkit.join("include"))
        .cargo_metadata(false)
        .compile("bridge_kernels");
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static:+whole-archive=bridge_kernels");
    let runtime = ["lib64", "lib", "targets/x86_64-linux/lib"]
        .map(|folder| toolkit.join(folder))
        .into_iter()
        .find(|folder| folder.join("libcudart_static.a").is_file())
        .unwrap_or_else(|| panic!("{} has no libcudart_static.a", toolkit.display()));
    println!("cargo::rustc-link-search=native={}", runtime.display());
    // The static one, so that the program starts where no CUDA is installed.
    println!("cargo::rustc-link-lib=static=cudart_static");
    for library in ["dl", "rt", "pthread"] {
        println!("cargo::rustc-link-lib={library}");
    }
    let names: Vec<String> = architectures
        .iter()
        .map(|arch| format!("sm_{arch}"))
        .collect();
    names.join(" ")
}

fn output(command: &mut Command) -> String {
    let out = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?} does not run: {error}"));
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        out.status.success(),
        "{command:?} failed; CUDA_HOME=DIR takes the toolkit in DIR (13.0 was tried), CUDA_HOME= builds without kernels:\n{text}{}",
        String::from_utf8_lossy(&out.stderr)
    );
    text
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
