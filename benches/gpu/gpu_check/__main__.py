"""Checks and times the kernels on a GPU.

    run                            everything, in this order: correctness, sanitizer, model, suite
    run correctness suite          some of it
    run suite --rows 1,4-7 --peers fla,flash_qla --budget 500
    run --list                     what there is, and whether the tables agree; needs no torch

Results go to OUTPUT/gpu.md and OUTPUT/gpu.json, which are written after every stage and every benchmark. Exit code 1: a check failed.
"""
import argparse
import importlib.util
import os
import pathlib
import shlex
import sys
import tempfile
import time

HOME = pathlib.Path(__file__).resolve().parents[1]
ROOT = HOME.parents[1] if HOME.name == "gpu" else HOME
STAGES = ("correctness", "sanitizer", "model", "suite")


def first_that_is_there(*paths):
    return next((path for path in paths if path.exists()), paths[0])


def numbers(text):
    """1,4-7 as a set."""
    parts = (part.split("-") for part in text.split(","))
    return {number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)}


def words(text):
    return tuple(text.split(","))


def arguments():
    parser = argparse.ArgumentParser(prog="run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)} (all)")
    add("--device", default="cuda", help="cuda, cuda:N, or cpu with the emulated library")
    add("--small", action="store_true", help="cases and shapes that the emulation bears; times then mean nothing")
    add("--smallest", action="store_true", help="of the cases only the cheapest of every axis")
    add("--operators", type=words, default=(), metavar="NAMES", help="correctness of these only")
    add("--rows", type=numbers, default=numbers("1-21"), metavar="NUMBERS", help="rows of the suite: 1,4-7")
    add("--shapes", type=words, default=(), metavar="WORDS", dest="only_shapes", help="shapes of the suite that contain one of these")
    add("--peers", type=words, default=(), metavar="NAMES", help="these peers only")
    add("--rounds", type=int, default=30)
    add("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin nothing behind so many seconds")
    add("--jobs", type=int, default=min(6, os.cpu_count() or 1), help="model checks at a time")
    add("--output", type=pathlib.Path, default=pathlib.Path("gpu-results"))
    add("--library", type=pathlib.Path, default=first_that_is_there(HOME / "lib/libmegatron_bridge_kernels.so",
                                                                  ROOT / "target/kernels/libmegatron_bridge_kernels.so"))
    add("--trainer", type=pathlib.Path, default=first_that_is_there(HOME / "bin/trainer", ROOT / "target/release/trainer"))
    add("--goldens", type=pathlib.Path, default=first_that_is_there(HOME / "goldens", ROOT / "tests/goldens"))
    add("--list", action="store_true", help="print cases and rows, and whether the tables agree")
    options = parser.parse_args()
    if unknown := [stage for stage in options.stages if stage not in STAGES]:
        parser.error(f"unknown stage {unknown[0]}; the stages are {', '.join(STAGES)}")
    options.stages = options.stages or STAGES
    options.until = time.monotonic() + options.budget
    return options


def tell(text):
    print(text, flush=True)


def list_everything():
    from . import listing
    for line in listing.lines():
        tell(line)
    wrong = listing.disagreements()
    for complaint in wrong:
        tell(f"WRONG {complaint}")
    return 1 if wrong else 0


def main():
    options = arguments()
    if options.list:
        return list_everything()
    if importlib.util.find_spec("torch") is None:
        sys.exit("this Python has no torch; name one that has: PYTHON=/path/to/python run")
    # What is packed along comes last: a machine's own packages win.
    sys.path += [str(HOME / "peers")] if (HOME / "peers").is_dir() else []
    import torch

    from . import benchmark, cases, correctness, machine, models, report, sanitizer, suite
    from .trainer import Trainer

    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; on a CPU: --device cpu --small with an emulated library (docs/kernels.md)")
    if not options.library.exists():
        sys.exit(f"{options.library} is not there; make kernels builds it, --library names another")
    torch.ops.load_library(str(options.library.resolve()))
    key = torch.device(options.device).type.upper()
    if not torch._C._dispatch_has_kernel_for_dispatch_key("megatron_bridge::swiglu", key):
        sys.exit(f"{options.library} has no operators for {options.device}: `make kernels` builds those for CUDA, "
                 "`EMULATION=1 bridge-torch/kernels/operators` those for the CPU")
    options.ceiling, measured = machine.ceiling(options.device)
    about = {**machine.describe(options.device), "measured": measured, "ceiling": options.ceiling, "command": shlex.join(["run", *sys.argv[1:]])}
    results, found, benches = {}, None, []

    def keep():
        report.write(options.output, about, results, found, benches, options.small)

    tell(f"{about['card']}, driver {about['driver']}, torch {torch.__version__}; results in {options.output}/gpu.md")
    if "correctness" in options.stages:
        choose = cases.smallest_cases if options.smallest else cases.small_cases if options.small else cases.all_cases
        group, missing = correctness.run_all(choose(options.operators), options, tell, laws=not options.operators and not options.smallest)
        results["Operators against float64"] = group
        tell(f"correctness: {sum(not r.complaints for r in group)} of {len(group)} hold")
        about["missing_operators"] = missing
        keep()
    if "sanitizer" in options.stages:
        found = sanitizer.run(options, tell)
        if isinstance(found, str):
            tell(f"sanitizer: not run: {found}")
        keep()
    if "model" in options.stages:
        with tempfile.TemporaryDirectory() as folder:
            group = models.run(Trainer(options.trainer.resolve(), options.device, folder), models.Goldens(options.goldens), options, tell)
        results["Whole models"] = group
        tell(f"model: {sum(not r.complaints for r in group)} of {len(group)} hold")
        keep()
    if "suite" in options.stages:
        def keep_benches(done):
            benches[:] = done
            keep()
        benchmark.run([row for row in suite.ROWS if row.number in options.rows], options, tell, keep_benches)
    failed = any(r.complaints for group in results.values() for r in group)
    failed = failed or (isinstance(found, dict) and any(one["passed"] is False for one in found.values()))
    return 1 if failed else 0


sys.exit(main())
