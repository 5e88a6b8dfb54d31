#!/usr/bin/env python3
"""examples/megatron_load.py: the operator library in a job of Megatron-Core's own model.

    megatron_job_loads.py --trainer target/release/trainer --library target/torch-ops/libmegatron_bridge_torch.so

1. Two tensor-parallel ranks of Megatron-Core's GPTModel hold, after the load, what `trainer convert shard` says.
2. What is refused arrives in Python as an error with the library's text.
Run by `make test-peers`; prints one line a check and exits 1 if any fails.
"""
import json, os, pathlib, shutil, subprocess, sys, tempfile

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checks import GOLDENS, Checks

EXAMPLE = GOLDENS.parents[1] / "examples/megatron_load.py"


def text_only(directory):
    """dense_text, as tests/goldens/README.md derives it of dense_vl."""
    source = GOLDENS / "checkpoints/dense_vl"
    tensors = {}
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                if not name.startswith("model.visual."):
                    tensors[name.replace("model.language_model.", "model.")] = opened.get_tensor(name)
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(GOLDENS / "megatron/checkpoints/dense_text/config.json", directory)
    return tensors


def run_job(model, library, saved):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, EXAMPLE, "--tp", "2", "--model", model, "--library", library, "--save", saved]
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def refused(path, layout, rank, tensors):
    try:
        torch.ops.megatron_bridge.load_state_dict(str(path), layout, rank, tensors)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def main():
    checks = Checks("library")
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        model = work / "dense_text"
        text_only(model)
        job = run_job(model, checks.library, work / "saved")
        checks.check("a job of two ranks loads", job.returncode == 0, job.stderr[-3000:])
        if job.returncode == 0:
            for rank in range(2):
                shard = work / f"shard_{rank}.safetensors"
                checks.run("convert", "shard", "--hf-model", model, "--tp", 2, "--rank", rank, "--output", shard)
                ours = {name: tensor for name, tensor in load_file(shard).items() if not name.startswith("mtp.")}
                theirs = torch.load(work / "saved" / f"rank_{rank}.pt", weights_only=True)
                wrong = sorted(set(ours) ^ set(theirs))
                wrong += [name for name in ours if name in theirs and not torch.equal(ours[name], theirs[name])]
                checks.check(f"rank {rank} holds what convert shard says ({len(ours)} tensors)", not wrong, wrong[:5])

        torch.ops.load_library(str(checks.library))
        for what, said, wanted in [
            ("a checkpoint that is not there", refused(work / "none", "", 0, {}), "none"),
            ("a layout key that is not there", refused(model, "tq=2", 0, {}), "`tq`"),
            ("tensors that are missing", refused(model, "tp=2", 1, {}), "embedding.word_embeddings.weight"),
            ("another shape", refused(model, "", 0, {"decoder.final_layernorm.weight": torch.empty(3)}), "[3]"),
        ]:
            checks.check(f"refused: {what}", wanted in said, said)
    checks.finish()


if __name__ == "__main__":
    main()
