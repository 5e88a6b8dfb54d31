#!/usr/bin/env python3
"""Training speed beside transformers, on the CPU, in one run.

    benches/peers/train.py [--json] [--rounds 3] [--steps 8] [--threads 2] [--cases dense_float32,moe_bfloat16]

For each case (dense and MoE, float32 and bfloat16) transformers writes the very model and batch (hf_train.py --save), then
whole runs alternate: transformers, ours (`train_step`, the binary of this crate), the bare matrix products. Medians of the
rounds count. Both sides run AdamW alike: states in the weights' dtype, no float32 masters, decay on every parameter.
Each side runs as its user starts it: ours keeps freed memory in the process and takes denormal numbers as zero (its defaults),
transformers has the defaults of glibc and torch;
--peer-malloc gives transformers the same malloc settings by environment.

Needs cargo and python3. The peers' packages go into .venv-peers, as `make test-peers` puts them there.
With --json the last line of stdout is one JSON object: each case's ratio (ours / transformers, tokens a second) and, as
CASE_limit, our step over the bare matrix products. A table goes to benches/results/training_step.md.
"""
import argparse, datetime, json, os, pathlib, platform, statistics, subprocess, sys, tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).resolve().parent
PYTHON = ROOT / ".venv-peers/bin/python"
BARS = {"dense_float32": 1.25, "dense_bfloat16": 1.5, "moe_float32": 1.3, "moe_bfloat16": 1.45}
# How far our losses may lie from transformers': (first step, every step). Later MoE steps are printed only: routing flips
# between any two back ends.
LOSS = {"dense_float32": (1e-3, 1e-3), "dense_bfloat16": (5e-3, 5e-3), "moe_float32": (1e-3, None), "moe_bfloat16": (1e-2, None)}
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "99999999999", "MALLOC_TOP_PAD_": "67108864"}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--json", action="store_true", help="end with one JSON line")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--cases", default=",".join(BARS))
parser.add_argument("--peer-malloc", action="store_true")
args = parser.parse_args()
cases = args.cases.split(",")
if unknown := [case for case in cases if case not in BARS]:
    parser.error(f"unknown case {unknown[0]}; the cases are {', '.join(BARS)}")


def note(text):
    print(text, file=sys.stderr, flush=True)


def run(command, **env):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, env={**os.environ, **env})
    if done.returncode:
        sys.exit(f"{command[0]} failed with exit code {done.returncode}: {' '.join(map(str, command))}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def prepare():
    subprocess.run(["make", "--no-print-directory", "-C", ROOT, ".venv-peers/ready"], check=True, stdout=sys.stderr)
    subprocess.run(["make", "--no-print-directory", "-C", ROOT, "setup"], check=True, stdout=sys.stderr)
    subprocess.run(["cargo", "build", "--release", "-p", "benches", "--bin", "train_step"], check=True, cwd=ROOT, stdout=sys.stderr)


def measure(case, folder):
    variant, dtype = case.split("_")
    common = ["--variant", variant, "--dtype", dtype, "--threads", args.threads]
    peer_env = MALLOC if args.peer_malloc else {}
    model = pathlib.Path(folder) / case
    run([PYTHON, HERE / "hf_train.py", *common, "--save", model])
    rounds = []
    for number in range(args.rounds):
        peer = run([PYTHON, HERE / "hf_train.py", *common, "--steps", args.steps], **peer_env)
        ours = run([ROOT / "target/release/train_step", "--model", model, "--batch", model / "batch.safetensors", "--dtype", dtype,
                    "--steps", args.steps, "--threads", args.threads])
        limit = run([PYTHON, HERE / "matmul_limit.py", *common])
        rounds.append((peer, ours, limit))
        note(f"{case} round {number + 1}: transformers {peer['step_s']:.3f} s, ours {ours['step_s']:.3f} s, products {limit['matmul_s']:.3f} s, load {os.getloadavg()[0]:.1f}")
    median = lambda side, key: statistics.median(r[side][key] for r in rounds)
    peer, ours = rounds[0][0], rounds[0][1]
    gaps = [abs(a - b) for a, b in zip(peer["losses"], ours["losses"])]
    first, every = LOSS[case]
    note(f"{case} losses: transformers {peer['losses']}\n{case} losses: ours         {ours['losses']}")
    return {
        "ratio": median(1, "tokens_per_s") / median(0, "tokens_per_s"),
        "limit": median(1, "step_s") / median(2, "matmul_s"),
        "peer_s": median(0, "step_s"), "ours_s": median(1, "step_s"), "products_s": median(2, "matmul_s"),
        "spread": [[round(r[side][key], 4) for r in rounds] for side, key in ((0, "step_s"), (1, "step_s"), (2, "matmul_s"))],
        "peer_mb": max(r[0]["peak_rss_mb"] for r in rounds), "ours_mb": max(r[1]["peak_rss_mb"] for r in rounds),
        "first_gap": gaps[0], "worst_gap": max(gaps),
        "losses_agree": gaps[0] <= first and (every is None or max(gaps) <= every),
    }


def table(results):
    def processor():
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
        return platform.processor()

    versions = run([PYTHON, "-c", "import json, torch, transformers; print(json.dumps([torch.__version__, transformers.__version__]))"])
    lines = [
        "# A training step beside transformers", "",
        f"`benches/peers/train.py --rounds {args.rounds} --steps {args.steps} --threads {args.threads}{' --peer-malloc' if args.peer_malloc else ''}`"
        f" on {datetime.date.today()}, {args.threads} threads of {processor()}; torch {versions[0]}, transformers {versions[1]}.",
        f"Whole runs in alternation, medians of {args.rounds} rounds. Ours keeps freed memory in the process and takes denormal numbers as zero (its defaults); transformers ran with {'the same malloc settings' if args.peer_malloc else 'the defaults of glibc and torch'}.", "",
        "| case | transformers, s a step | ours | bare products | ours : transformers, tokens/s | bar | ours : products | peak MB, transformers / ours | loss gap, first / worst step | losses agree |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, r in results.items():
        lines.append(f"| {case} | {r['peer_s']:.3f} | {r['ours_s']:.3f} | {r['products_s']:.3f} | {r['ratio']:.2f} | {BARS[case]} | {r['limit']:.2f} | {r['peer_mb']} / {r['ours_mb']} | {r['first_gap']:.1e} / {r['worst_gap']:.1e} | {'yes' if r['losses_agree'] else 'NO'} |")
    lines += ["", "Every round, s a step (transformers; ours; products):", ""]
    lines += [f"- {case}: {'; '.join(', '.join(map(str, side)) for side in r['spread'])}" for case, r in results.items()]
    return "\n".join(lines) + "\n"


prepare()
with tempfile.TemporaryDirectory() as folder:
    results = {case: measure(case, folder) for case in cases}
text = table(results)
if set(cases) == set(BARS):
    name = "training_step_same_malloc" if args.peer_malloc else "training_step"
    (ROOT / "benches/results").mkdir(exist_ok=True)
    (ROOT / f"benches/results/{name}.md").write_text(text)
print(text, file=sys.stderr if args.json else sys.stdout)
if args.json:
    print(json.dumps({key: value for case, r in results.items() for key, value in ((case, round(r["ratio"], 3)), (f"{case}_limit", round(r["limit"], 3)))}))
sys.exit(0 if all(r["losses_agree"] for r in results.values()) else 1)
