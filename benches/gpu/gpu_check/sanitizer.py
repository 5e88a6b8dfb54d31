"""The cheapest case of every axis under compute-sanitizer, tool by tool. Only what it says of our kernels counts."""
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

OURS = "bridge"  # in the names of our kernels
# Whether a tool may leave other kernels alone: initcheck must see who writes what ours read.
TOOLS = {"memcheck": True, "racecheck": True, "synccheck": True, "initcheck": False}


def find():
    on_path = shutil.which("compute-sanitizer")
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return on_path or (str(usual) if usual.exists() else None)


def run(options, tell):
    """By tool: {"passed", "seconds", "tail"}, or a reason why there is nothing."""
    program = find()
    if not program:
        return "compute-sanitizer is not on this machine (CUDA's toolkit brings it; put it into PATH)"
    results = {}
    for tool, only_ours in TOOLS.items():
        begun = time.monotonic()
        if begun > options.until:
            results[tool] = {"passed": None, "seconds": 0, "tail": "the time was up"}
            continue
        # Every allocation its own, so that an access between two tensors shows; memory that torch pools would hide it.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
        command = [program, "--tool", tool, *(["--kernel-name", f"kns={OURS}"] if only_ours else []), "--print-limit", "1000",
                   sys.executable, "-m", "gpu_check", "correctness", "--smallest", "--device", options.device,
                   "--library", str(options.library), "--output", str(options.output / f"sanitizer-{tool}")]
        limit = options.until - begun if math.isfinite(options.until) else None
        try:
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit)
            text, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as error:
            text, code = (error.stdout or b"").decode(errors="replace"), None
        passed, found = verdict(text, code)
        results[tool] = {"passed": passed, "seconds": time.monotonic() - begun, "tail": "\n".join(found)}
        tell(f"{tool}: {'passed' if passed else 'FAILED' if passed is False else 'out of time'} in {results[tool]['seconds']:.0f} s")
        if not passed:
            tell(results[tool]["tail"])
    return results


def verdict(text, code):
    """Whether a tool had nothing to say of our kernels and the cases held (None: it did not end), and the lines that say so."""
    said = [row for row in text.splitlines() if row.startswith("=========")]
    ours = [row for row in said if OURS in row and "--library" not in row]
    passed = None if code is None else not ours and code == 0
    return passed, (ours[:20] or text.splitlines()[-12:])
