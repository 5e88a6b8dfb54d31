"""Results as JSON and as markdown in the form of benches/results/."""
import datetime
import json

from . import suite
from .benchmark import OURS


def to_json(machine, results, sanitizer, benches, meaningless):
    return {
        "schema_version": 1, "date": datetime.date.today().isoformat(), "meaningless_times": meaningless, "machine": machine,
        "checks": {name: [{"name": r.name, "seconds": r.seconds, "errors": r.errors, "complaints": r.complaints} for r in group]
                   for name, group in results.items()},
        "sanitizer": sanitizer, "benchmarks": [bench.to_json() for bench in benches],
    }


def table(head, body):
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join('---' for _ in head)}|"]
    return lines + [f"| {' | '.join(' '.join(str(cell).replace('|', '/').split()) for cell in row)} |" for row in body]


def machine_lines(machine):
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in machine["packages"].items())
    rates = machine.get("measured")
    measured = f" Measured here: copies {rates[0] / 1e12:.2f} TB/s, bfloat16 products {rates[1] / 1e12:.0f} TFLOP/s." if rates else ""
    ceiling = machine["ceiling"]
    return [f"`{machine['command']}` on {datetime.date.today().isoformat()}: {machine['card']}, driver {machine['driver']}, CUDA {machine['cuda']}, "
            f"Python {machine['python']}; commit {machine['commit']}; {packages}.",
            f"Limits are of {ceiling[0] / 1e12:.2f} TB/s and {ceiling[1] / 1e12:.0f} TFLOP/s.{measured}"]


def check_lines(title, results):
    failed = [r for r in results if r.complaints]
    lines = [f"## {title}", "", f"{len(results) - len(failed)} of {len(results)} hold, in {sum(r.seconds for r in results):.0f} s of checks.", ""]
    if failed:
        lines += table(("failed", "why"), [(r.name, "; ".join(r.complaints[:3])) for r in failed]) + [""]
    worst = {}
    for r in results:
        share, name = r.worst
        if share > worst.get(r.operator, (-1,))[0]:
            worst[r.operator] = (share, name, r.name)
    shown = [(operator, f"{share:.2f}", name, case) for operator, (share, name, case) in worst.items() if name]
    return lines + (table(("operator", "worst share of its bound", "tensor", "case"), shown) + [""] if shown else [])


def sanitizer_lines(found):
    if isinstance(found, str):
        return ["## Sanitizers", "", f"Not run: {found}.", ""]
    words = {True: "passed", False: "failed", None: "not finished"}
    return ["## Sanitizers", "", "The cheapest case of every axis; our kernels only.", "",
            *table(("tool", "", "seconds"), [(tool, words[one["passed"]], f"{one['seconds']:.0f}") for tool, one in found.items()]), ""]


def time_of(bench, side):
    if bench.direction == suite.MEMORY:
        return f"{side['median'] / 1e9:.2f} GB"
    return f"{side['median'] * 1e6:.1f} ({side['p10'] * 1e6:.1f} to {side['p90'] * 1e6:.1f})"


def rate_of(bench, side):
    num_bytes, operations = bench.amount
    if not bench.limit:
        return "", ""
    by_bytes = num_bytes and not (operations and operations / 700e12 > num_bytes / 3.5e12)
    rate = f"{num_bytes / side['median'] / 1e9:.0f} GB/s" if by_bytes else f"{operations / side['median'] / 1e12:.0f} TFLOP/s"
    return rate, f"{100 * bench.limit / side['median']:.0f} %"


def goal_of(row, name):
    first, final = row.peers.get(name, (None, None))
    return f"{first or '-'}; {final or '-'}" if name != OURS else ""


def bench_lines(benches):
    rows = {(row.number, row.title): row for row in suite.ROWS}
    body = []
    for bench in benches:
        row, shape = rows[bench.row, bench.title], bench.shape + ("" if bench.cold else ", warm")
        what = (bench.row, bench.title, shape, bench.direction)
        if bench.failed:
            body.append((*what, "", bench.failed, "", "", "", "", ""))
            continue
        for name, side in bench.sides.items():
            ratio = side.get("ratio")
            between = f"{ratio['median']:.2f}" + (f" ({ratio['p10']:.2f} to {ratio['p90']:.2f})" if "p10" in (ratio or {}) else "") if ratio and name != OURS else ""
            error = side.get("error")
            shown = f"{error:.1e}" if isinstance(error, float) else error or ""
            body.append((*what, name, time_of(bench, side), *rate_of(bench, side), between, goal_of(row, name), shown))
        body += [(*what, name, f"missing: {why}", "", "", "", goal_of(row, name), "") for name, why in bench.missing.items()]
    head = ("row", "op", "shape", "direction", "side", "us: median (10 to 90 %)", "rate", "of the limit", "ours : peer", "goals", "error")
    notes = {f"row {bench.row}: {bench.note}." for bench in benches if bench.note}
    clocks = [clock for bench in benches for clock in bench.clocks if clock]
    text = ["## Benchmarks", "", "Interleaved rounds, medians of times by CUDA events behind a sleeping kernel, so that the host's work is not "
            "in them; ratios are medians of the rounds' ratios, below 1 is better. Inputs are read cold, since sets of buffers rotate beyond the "
            "L2 cache, but for shapes that are called warm. Error: the worst relative L2 error of outputs and gradients against float64, at few tokens of the same shape.", ""]
    if clocks:
        text += [f"SM clock between benches: {min(clocks)} to {max(clocks)} MHz.", ""]
    return text + [*sorted(notes), "", *table(head, body), ""]


def to_markdown(machine, results, sanitizer, benches, meaningless):
    lines = ["# Kernels on a GPU", "", *machine_lines(machine), ""]
    if meaningless:
        lines += ["**A dry run on a CPU with small shapes: no time here means anything.**", ""]
    for name, group in results.items():
        lines += check_lines(name, group)
    if sanitizer is not None:
        lines += sanitizer_lines(sanitizer)
    if benches:
        lines += bench_lines(benches)
    return "\n".join(lines).rstrip() + "\n"


def write(folder, *what):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(to_json(*what), indent=1, default=str) + "\n")
    (folder / "gpu.md").write_text(to_markdown(*what))
