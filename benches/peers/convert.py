#!/usr/bin/env python3
"""Conversions beside `cp`, safetensors and torch.distributed.checkpoint, in interleaved rounds.

    convert.py --trainer target/release/trainer --model MODEL_DIR --scratch DIR [--rounds 5] [--cold] [--tp 4]

Every way of writing ends with its files synced. `--cold` drops the model's and the outputs' pages before each step. Peers need
torch and safetensors (`make test-peers` installs them). Prints a table in markdown: median seconds, ratio to cp, peak memory.
"""
import argparse, os, pathlib, platform, shutil, statistics, subprocess, sys

SAFETENSORS = """
import sys, glob, os
from safetensors.torch import load_file, save_file
for file in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    out = os.path.join(sys.argv[2], os.path.basename(file))
    save_file(load_file(file), out)
    os.fsync(os.open(out, os.O_RDONLY))
"""
DCP_SAVE = """
import sys, glob
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
state = {}
for file in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    state.update(load_file(file))
dcp.save(state, storage_writer=dcp.FileSystemWriter(sys.argv[2], thread_count=2), no_dist=True)
"""
DCP_LOAD = """
import sys, torch
import torch.distributed.checkpoint as dcp
reader = dcp.FileSystemReader(sys.argv[1])
state = {k: torch.empty(e.size, dtype=e.properties.dtype) for k, e in reader.read_metadata().state_dict_metadata.items() if hasattr(e, "size")}
dcp.load(state, storage_reader=reader, no_dist=True)
"""


def files_of(path):
    return [p for p in path.rglob("*") if p.is_file()] if path.exists() else []


def drop_pages(*paths):
    for path in paths:
        for file in files_of(path):
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def sync(path):
    for file in [*files_of(path), path]:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def timed(command):
    """Seconds and peak megabytes of a process."""
    start = os.times().elapsed
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    return os.times().elapsed - start, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--trainer", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--scratch", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    trainer, model, scratch = args.trainer.resolve(), args.model, args.scratch
    megatron, out = scratch / "megatron", scratch / "out"
    subprocess.run([trainer, "-q", "convert", "import", "--overwrite", "--hf-model", model, "--megatron-path", megatron], check=True)
    convert = [trainer, "-q", "convert"]
    python = [sys.executable, "-c"]

    def copy():
        start = os.times().elapsed
        _, peak = timed(["cp", "-r", model, out])
        sync(out)
        return os.times().elapsed - start, peak

    steps = {
        "cp -r and fsync": copy,
        "trainer convert import": lambda: timed([*convert, "import", "--hf-model", model, "--megatron-path", out]),
        "... --no-verify": lambda: timed([*convert, "import", "--no-verify", "--hf-model", model, "--megatron-path", out]),
        "trainer convert export": lambda: timed([*convert, "export", "--hf-model", model, "--megatron-path", megatron, "--hf-path", out]),
        "... --no-verify ": lambda: timed([*convert, "export", "--no-verify", "--hf-model", model, "--megatron-path", megatron, "--hf-path", out]),
        "trainer convert shard (whole)": lambda: timed([*convert, "shard", "--hf-model", model, "--output", out / "rank.safetensors"]),
        f"trainer convert shard (one rank of TP {args.tp})": lambda: timed([*convert, "shard", "--hf-model", model, "--tp", args.tp, "--output", out / "rank.safetensors"]),
        "trainer verify (model, torch_dist)": lambda: timed([trainer, "-q", "verify", model, megatron]),
    }
    if not args.no_peers:
        steps |= {
            "safetensors, load and save": lambda: timed([*python, SAFETENSORS, model, out]),
            "torch.distributed.checkpoint, load safetensors and save": lambda: timed([*python, DCP_SAVE, model, out]),
            "torch.distributed.checkpoint, load": lambda: timed([*python, DCP_LOAD, megatron / "iter_0000000"]),
        }
    needs_folder = ("safetensors", "torch.distributed", "trainer convert shard")
    times = {name: [] for name in steps}
    peaks = dict.fromkeys(steps, 0)
    for _ in range(args.rounds):
        for name, step in steps.items():
            shutil.rmtree(out, ignore_errors=True)
            if name.startswith(needs_folder):
                out.mkdir(parents=True)
            os.sync()
            if args.cold:
                drop_pages(model, megatron)
            seconds, peak = step()
            times[name].append(seconds)
            peaks[name] = max(peaks[name], peak)
    shutil.rmtree(out, ignore_errors=True)
    size = sum(f.stat().st_size for f in files_of(model))
    base = statistics.median(times["cp -r and fsync"])
    print(f"{size / 1e9:.2f} GB, page cache {'cold' if args.cold else 'warm'}, {args.rounds} rounds, {os.cpu_count()} cores, {platform.machine()}\n")
    print("| | seconds (median) | fastest, slowest | speed of cp | peak memory |\n|---|---|---|---|---|")
    for name, all_times in times.items():
        median = statistics.median(all_times)
        print(f"| {name.strip()} | {median:.2f} | {min(all_times):.2f}, {max(all_times):.2f} | {base / median:.2f} | {peaks[name]:.0f} MB |")


if __name__ == "__main__":
    main()
