# make setup | demo | test | lint | audit | bench | kernels | ffi | install | test-ffi | kernels-check | gpu-check | test-peers      (see README.md)
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup setup-ffi demo test test-ffi lint audit bench kernels ffi install torch-ops kernels-check gpu-check fuzz test-peers clean-demo

VENV := .venv
PEERS := .venv-peers
TORCH := torch==2.11.0
CUDA_FOR_CPU := nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85
CUDA ?= 0
# nvcc names its parts without versions, so that all are named here; cuobjdump 13.0 is not on PyPI.
NVCC := nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 \
  nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37
CMAKE_WHEEL := cmake==4.4.5
CARGO_DENY := cargo-deny@0.20.2
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
PREFIX ?= /usr/local

# A libtorch of your own: make LIBTORCH=/path/to/libtorch ...
ifdef LIBTORCH
export LIBTORCH
LIBTORCH_READY :=
else
LIBTORCH_READY := .libtorch
endif

# A CUDA toolkit of your own: make CUDA_HOME=/usr/local/cuda ... (the build finds it in CUDA_HOME or PATH, too)
ifdef CUDA_HOME
NVCC_READY :=
else
NVCC_READY := $(VENV)/nvcc
endif

# What a build of the whole workspace wants.
READY = $(LIBTORCH_READY) $(NVCC_READY)

help:
	@echo 'make setup       what a build needs: libtorch and nvcc into .venv (CUDA=1 for a GPU; LIBTORCH=DIR, CUDA_HOME=DIR for your own)'
	@echo 'make demo        fine-tune the tiny MoE model on pictures of shapes and ask it about them'
	@echo 'make test        every test'
	@echo 'make lint        format, clippy and docs, warnings as errors'
	@echo 'make audit       known advisories, licences and sources of the crates that we are built from (wants github.com)'
	@echo 'make bench       the criterion suites'
	@echo 'make kernels     every CUDA kernel: into the release binary, and as target/kernels/libmegatron_bridge_kernels.so for Python'
	@echo 'make ffi         libmegatron_bridge, shared and static, into target/ffi, for C++ and C'
	@echo 'make install     it with its headers, CMake package and pkg-config file: make install PREFIX=/opt/megatron-bridge'
	@echo 'make torch-ops   the operator library for jobs in Python: make torch-ops PYTHON=python3 (one that has torch)'
	@echo 'make setup-ffi   what make test-ffi needs: cmake into .venv; says whether clang++ and valgrind are missing'
	@echo 'make test-ffi    the C and C++ library against an installed tree: compilers, sanitizers, valgrind, examples'
	@echo 'make kernels-check  every CUDA kernel compiled for every architecture, spills and machine code checked (no GPU needed)'
	@echo 'make gpu-check   one archive for a machine with a GPU and torch: checks and times every kernel there (docs/kernels.md)'
	@echo 'make fuzz        one parser under libFuzzer: make fuzz TARGET=common_pt SECONDS=600'
	@echo 'make test-peers  the same checkpoints through transformers, torch and Megatron-Core (installs them into $(PEERS))'

setup: tools $(READY)
	@echo 'ready: make demo, make test, or cargo run --release -p trainer -- --help'

.PHONY: tools
tools:
	@missing=''; \
	command -v cargo >/dev/null || missing+=' Rust (rustup.rs, 1.90 or newer)'; \
	command -v g++ >/dev/null || missing+=' g++'; \
	command -v python3 >/dev/null || missing+=' python3'; \
	if [ -n "$$missing" ]; then echo "missing:$$missing; install it and run make setup again" >&2; exit 1; fi

$(VENV)/bin/pip:
	@python3 -c 'import ensurepip, venv' 2>/dev/null || { echo 'missing: python3-venv; install it and run make again' >&2; exit 1; }
	python3 -m venv $(VENV)

# The wheel's symbolic link hides the Python version from the build. Made last: it marks a whole installation.
.libtorch: | $(VENV)/bin/pip
ifeq ($(CUDA),1)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH)
else
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps $(TORCH) $(CUDA_FOR_CPU)
endif
	ln -sfn "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch" .libtorch

# What the C++ examples and tests need beside it. Without clang++ and valgrind make test-ffi says what it skips.
setup-ffi: tools $(VENV)/bin/cmake
	@command -v clang++ >/dev/null || echo 'clang++ is not installed (Debian: apt-get install clang); make test-ffi then uses g++ only'
	@command -v valgrind >/dev/null || echo 'valgrind is not installed (Debian: apt-get install valgrind); make test-ffi then leaves it out'
	@echo 'ready: make test-ffi'

$(VENV)/bin/cmake: | $(VENV)/bin/pip
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(CMAKE_WHEEL)
	touch $@

demo: tools $(READY)
	cargo build --release -p trainer
	rm -rf demo
	cargo run --release --quiet -p trainer -- demo --model tests/goldens/checkpoints/moe_vl \
	  --data tests/goldens/data/shapes/train.jsonl --output demo

test: tools $(READY)
	cargo test --release --workspace

lint: tools $(READY)
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	cargo clippy --release -p trainer -p tests -p benches --no-default-features --all-targets -- -D warnings
	cargo clippy --release -p trainer -p tests --no-default-features --features hub --all-targets -- -D warnings
	cargo clippy --release -p fuzz --features libfuzzer --bins -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --release --workspace --no-deps

# The licences and sources are in make test, too; the advisories come from github.com.
audit: tools
	cargo deny --version >/dev/null 2>&1 || cargo install --locked $(CARGO_DENY)
	cargo deny check

bench: tools $(READY)
	cargo bench -p benches

# The library for C++ and C; it needs no libtorch.
ffi: tools
	bridge-ffi/link.sh target/ffi

# The operators are built against the torch of PYTHON, or without one against the libtorch of make setup.
kernels: tools $(READY)
	cargo build --release -p trainer
	CUDA_HOME="$${CUDA_HOME:-$$(realpath $(VENV)/nvcc)}" bridge-torch/kernels/operators target/kernels/operators \
	  "$(if $(PYTHON),$$($(PYTHON) -c 'import torch; print(torch.__path__[0])'),$(or $(LIBTORCH),.libtorch))"
	mv target/kernels/operators/libmegatron_bridge_kernels.so target/kernels/
	target/release/trainer info

kernels-check: $(NVCC_READY)
	CUDA_HOME="$${CUDA_HOME:-$$(realpath $(VENV)/nvcc)}" bridge-torch/kernels/check target/kernels

# WHEELS=0 leaves out the packages of others that the suite times beside ours.
gpu-check: kernels $(VENV)/bin/pip
	benches/gpu/pack target/gpu-check target/release/trainer target/kernels/libmegatron_bridge_kernels.so \
	  $(if $(filter 0,$(WHEELS)),,$(VENV)/bin/pip)

# The symbolic link hides the Python version and is made last: it marks a whole installation. A build that found no nvcc looks
# again once its build script has changed.
$(VENV)/nvcc: | $(VENV)/bin/pip
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps $(NVCC)
	ln -sfn "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13" $@
	touch bridge-torch/build.rs

# A build of its own: the flags of the instrumentation would rebuild everything else.
TARGET ?= common_pt
SECONDS ?= 600
fuzz: tools
	mkdir -p target/fuzz/$(TARGET)
	cargo fuzz run --fuzz-dir tests/fuzz --features libfuzzer --sanitizer none --target-dir target/fuzz/build $(TARGET) \
	  target/fuzz/$(TARGET) tests/fuzz/corpus/$(TARGET) -- -max_total_time=$(SECONDS) -timeout=10 -rss_limit_mb=2048

# Peers are test partners: nothing that users run depends on them.
test-peers: tools $(READY) $(PEERS)/ready
	cargo build --release -p trainer
	$(PEERS)/bin/python tests/peers/megatron_loads_output.py --trainer target/release/trainer
	$(PEERS)/bin/python tests/peers/transformers_loads_output.py --trainer target/release/trainer
	$(MAKE) torch-ops PYTHON=$(PEERS)/bin/python
	$(PEERS)/bin/python tests/peers/megatron_job_loads.py --trainer target/release/trainer \
	  --library target/torch-ops/libmegatron_bridge_torch.so
	EMULATION=1 bridge-torch/kernels/operators target/kernels/emulated "$$($(PEERS)/bin/python -c 'import torch; print(torch.__path__[0])')"
	PYTHON=$(PEERS)/bin/python benches/gpu/run correctness --device cpu --small \
	  --library target/kernels/emulated/libmegatron_bridge_kernels.so --output target/kernels/emulated/results

$(PEERS)/ready:
	[ -x $(PEERS)/bin/pip ] || python3 -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check -r tests/peers/requirements.txt
	touch $@

# The C and C++ library where it is used.
install: ffi
	bridge-ffi/install.sh $(PREFIX) target/ffi $(VERSION)

test-ffi: setup-ffi $(READY) ffi
	cargo build --release -p trainer
	tests/ffi/installed/run.sh target/release/trainer target/ffi $(VERSION)

# Against the torch of PYTHON, or without one against the libtorch of make setup.
torch-ops: setup-ffi ffi $(if $(PYTHON),,$(LIBTORCH_READY))
	bridge-ffi/install.sh $(CURDIR)/target/ffi/installed target/ffi $(VERSION)
	$(VENV)/bin/cmake -S target/ffi/installed/share/megatron_bridge/torch_ops -B target/torch-ops \
	  -DCMAKE_PREFIX_PATH=$(CURDIR)/target/ffi/installed \
	  -DLIBTORCH="$(if $(PYTHON),$$($(PYTHON) -c 'import torch; print(torch.__path__[0])'),$(abspath $(or $(LIBTORCH),.libtorch)))"
	$(VENV)/bin/cmake --build target/torch-ops
