"""What a report says of the machine and of the code that ran on it."""
import json
import pathlib
import platform
import shutil
import subprocess

import torch

from . import limits, peers

HOME = pathlib.Path(__file__).resolve().parents[1]


def ask(*words):
    """What a program prints, or nothing where it is not there or fails."""
    if not shutil.which(words[0]):
        return ""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def query(field):
    return ask("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits").splitlines()


def sm_clock():
    """MHz now; None without a GPU."""
    found = query("clocks.sm")
    return int(found[0]) if found and found[0].isdigit() else None


def packed():
    """What `pack` wrote beside the package, or the checkout's own commit."""
    file = HOME / "packed.json"
    if file.exists():
        return json.loads(file.read_text())
    changed = ask("git", "-C", str(HOME), "status", "--porcelain", "--untracked-files=no")
    return {"commit": ask("git", "-C", str(HOME), "rev-parse", "--short", "HEAD") + ("+" if changed else "")}


def describe(device):
    card = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.processor() or "a CPU"
    driver = query("driver_version")
    return {"card": card, "driver": driver[0] if driver else None, "cuda": torch.version.cuda, "python": platform.python_version(),
            "packages": peers.versions(), **packed()}


def ceiling(device):
    """Copy speed in bytes a second and bfloat16 operations a second: of a known card, else measured here. And the measurement."""
    if torch.device(device).type != "cuda":
        return (1e10, 1e11), None
    from .timing import Clock, spread
    clock, x = Clock(device), torch.randn(2**28, device=device)
    y, a = torch.empty_like(x), torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    copies = spread([clock.seconds([lambda: y.copy_(x)], 1e-3) for _ in range(8)])["median"]
    products = spread([clock.seconds([lambda: a @ a], 1e-3) for _ in range(8)])["median"]
    measured = (2 * x.numel() * 4 / copies, 2 * 8192**3 / products)
    return limits.CEILINGS.get(torch.cuda.get_device_name(device), measured), measured
