# make setup | demo | test | lint | bench | ffi | kernels-check | test-peers      (see README.md)
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench ffi kernels-check fuzz test-peers clean-demo

VENV := .venv
PEERS := .venv-peers
TORCH := torch==2.11.0
CUDA_FOR_CPU := nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85
CUDA ?= 0
# nvcc names its parts without versions, so that all are named here; cuobjdump 13.0 is not on PyPI.
NVCC := nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 \
  nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37

# A libtorch of your own: make LIBTORCH=/path/to/libtorch ...
ifdef LIBTORCH
export LIBTORCH
LIBTORCH_READY :=
else
LIBTORCH_READY := .libtorch
endif

# A CUDA toolkit of your own: make CUDA_HOME=/usr/local/cuda kernels-check
ifdef CUDA_HOME
NVCC_READY :=
else
NVCC_READY := $(VENV)/nvcc
endif

help:
	@echo 'make setup       what a build needs: libtorch into .venv (CUDA=1 for a GPU; LIBTORCH=DIR to use your own)'
	@echo 'make demo        fine-tune the tiny MoE model on pictures of shapes and ask it about them'
	@echo 'make test        every test'
	@echo 'make lint        format, clippy and docs, warnings as errors'
	@echo 'make bench       the criterion suites'
	@echo 'make ffi         libmegatron_bridge, shared and static, into target/ffi, for C++ and C'
	@echo 'make kernels-check  every CUDA kernel compiled for every architecture, spills and machine code checked (no GPU needed)'
	@echo 'make fuzz        one parser under libFuzzer: make fuzz TARGET=common_pt SECONDS=600'
	@echo 'make test-peers  the same checkpoints through transformers, torch and Megatron-Core (installs them into $(PEERS))'

setup: tools $(LIBTORCH_READY)
	@echo 'ready: make demo, make test, or cargo run --release -p trainer -- --help'

.PHONY: tools
tools:
	@missing=''; \
	command -v cargo >/dev/null || missing+=' Rust (rustup.rs, 1.90 or newer)'; \
	command -v g++ >/dev/null || missing+=' g++'; \
	command -v python3 >/dev/null || missing+=' python3'; \
	if [ -n "$$missing" ]; then echo "missing:$$missing; install it and run make setup again" >&2; exit 1; fi

# The wheel's symbolic link hides the Python version from the build. Made last: it marks a whole installation.
.libtorch:
	@python3 -c 'import ensurepip, venv' 2>/dev/null || { echo 'missing: python3-venv; install it and run make setup again' >&2; exit 1; }
	[ -x $(VENV)/bin/pip ] || python3 -m venv $(VENV)
ifeq ($(CUDA),1)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH)
else
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps $(TORCH) $(CUDA_FOR_CPU)
endif
	ln -sfn "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch" .libtorch

demo: tools $(LIBTORCH_READY)
	cargo build --release -p trainer
	rm -rf demo
	cargo run --release --quiet -p trainer -- demo --model tests/goldens/checkpoints/moe_vl \
	  --data tests/goldens/data/shapes/train.jsonl --output demo

test: tools $(LIBTORCH_READY)
	cargo test --release --workspace

lint: tools $(LIBTORCH_READY)
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	cargo clippy --release -p trainer -p tests -p benches --no-default-features --all-targets -- -D warnings
	cargo clippy --release -p trainer -p tests --no-default-features --features hub --all-targets -- -D warnings
	cargo clippy --release -p fuzz --features libfuzzer --bins -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --release --workspace --no-deps

bench: tools $(LIBTORCH_READY)
	cargo bench -p benches

# The library for C++ and C; it needs no libtorch.
ffi: tools
	bridge-ffi/link.sh target/ffi

kernels-check: $(NVCC_READY)
	CUDA_HOME="$${CUDA_HOME:-$$(realpath $(VENV)/nvcc)}" bridge-torch/kernels/check target/kernels

# The symbolic link hides the Python version and is made last: it marks a whole installation.
$(VENV)/nvcc:
	@python3 -c 'import ensurepip, venv' 2>/dev/null || { echo 'missing: python3-venv; install it and run make again' >&2; exit 1; }
	[ -x $(VENV)/bin/pip ] || python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps $(NVCC)
	ln -sfn "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13" $@

# A build of its own: the flags of the instrumentation would rebuild everything else.
TARGET ?= common_pt
SECONDS ?= 600
fuzz: tools
	mkdir -p target/fuzz/$(TARGET)
	cargo fuzz run --fuzz-dir tests/fuzz --features libfuzzer --sanitizer none --target-dir target/fuzz/build $(TARGET) \
	  target/fuzz/$(TARGET) tests/fuzz/corpus/$(TARGET) -- -max_total_time=$(SECONDS) -timeout=10 -rss_limit_mb=2048

# Peers are test partners: nothing that users run depends on them.
test-peers: tools $(LIBTORCH_READY) $(PEERS)/ready
	cargo build --release -p trainer
	$(PEERS)/bin/python tests/peers/megatron_loads_output.py --trainer target/release/trainer
	$(PEERS)/bin/python tests/peers/transformers_loads_output.py --trainer target/release/trainer

$(PEERS)/ready:
	[ -x $(PEERS)/bin/pip ] || python3 -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check -r tests/peers/requirements.txt
	touch $@
