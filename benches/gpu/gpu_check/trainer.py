"""Runs the release binary on the torch of this Python: it finds libtorch beside it."""
import itertools
import json
import os
import pathlib
import subprocess

import torch
from safetensors.torch import load_file, save_file

LIBTORCH = pathlib.Path(torch.__file__).parent / "lib"


class Trainer:
    def __init__(self, binary, device, folder):
        self.binary, self.device, self.folder = binary, device, pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.numbers = itertools.count()
        # The binary's own path of libtorch is that of the machine that built it; its kernels' library has none.
        paths = [str(LIBTORCH), os.environ.get("LD_LIBRARY_PATH", "")]
        self.environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(path for path in paths if path), "NO_COLOR": "1"}

    def run(self, *words):
        """stdout and stderr; raises with the program's own words."""
        command = [str(self.binary), *map(str, words)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"trainer {words[0]} exited with {done.returncode}: {done.stderr.strip()[-600:]}")
        return done.stdout, done.stderr

    def place(self, kind):
        return self.folder / f"{kind}-{next(self.numbers)}"

    def save(self, batch):
        file = self.place("batch").with_suffix(".safetensors")
        save_file({name: x.contiguous().cpu() for name, x in batch.items()}, file)
        return file

    def forward(self, model, batch, dtype, kernels, grads=False):
        """Every output of a batch, and what computed each op."""
        out = self.place("out").with_suffix(".safetensors")
        flags = ["--grads"] if grads else []
        _, log = self.run("forward", "--model", model, "--inputs", self.save(batch), "--output", out, "--dtype", dtype,
                          "--kernels", kernels, "--device", self.device, *flags)
        tensors = load_file(out)
        out.unlink()
        return tensors, log

    def generate(self, model, ids, count, dtype, kernels):
        text, _ = self.run("generate", "--model", model, "--prompt-ids", ",".join(map(str, ids)), "--max-new-tokens", count, "--ignore-eos",
                           "--dtype", dtype, "--kernels", kernels, "--device", self.device, "--json")
        return json.loads(text)["output_ids"]

    def finetune(self, model, data, steps, dtype, kernels, device, *settings):
        """The metrics of every step."""
        out = self.place("run")
        self.run("finetune", "--model", model, "--data", data, "--output", out, "--max-steps", steps, "--dtype", dtype, "--kernels", kernels,
                 "--device", device, *settings)
        return [json.loads(row) for row in (out / "run/metrics.jsonl").read_text().splitlines()]

    def init(self, config, seed, dtype):
        """A random model of `config`."""
        file, out = self.place("config").with_suffix(".json"), self.place("model")
        file.write_text(json.dumps(config))
        self.run("init", "--config", file, "--output", out, "--seed", seed, "--dtype", dtype)
        return out
