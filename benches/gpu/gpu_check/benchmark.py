"""Times the rows of the suite: ours and the peers in interleaved rounds, after each has been held to the float64 reference.

The check runs the same shape with few tokens, which a float64 reference can hold; a peer that is wrong there is timed all the same
and printed with its error.
"""
import time
from dataclasses import asdict, dataclass, field

import torch

from . import correctness, limits, machine, peers, suite, timing
from .families.adamw import Training
from .families.problem import FastRandom, Random

CHECK_TOKENS = 1024
OURS = "ours"


@dataclass
class Bench:
    """One shape of a row in one direction."""
    row: int
    title: str
    shape: str
    direction: str
    operator: str
    sides: dict = field(default_factory=dict)   # by name: median, p10, p90 in seconds (or bytes), error, ratio of ours to it
    missing: dict = field(default_factory=dict)  # by name: why it was not timed
    limit: float = 0.0      # seconds
    amount: tuple = (0, 0)  # bytes, operations
    cold: bool = True
    clocks: tuple = ()      # MHz before and behind
    note: str = ""
    failed: str = ""

    def to_json(self):
        return asdict(self)


@dataclass
class Side:
    """How one side is called: `prepare` is not timed."""
    prepare: object
    call: object


def first_line(error):
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def sides_of(row, fields, problem, only):
    """Ours and the row's peers, and why others are missing."""
    sides, missing = {OURS: Side(peers.as_given, problem.ours)}, {}
    for name in row.peers:
        if only and name not in only:
            continue
        try:
            sides[name] = Side(*peers.PEERS[name, row.operator](fields, problem))
        except Exception as error:  # a peer breaks in its own way
            missing[name] = first_line(error)
    return sides, missing


def errors_of(row, fields, device, only):
    """By side the worst relative error of outputs and gradients, or what it raised."""
    problem = correctness.PROBLEMS[row.operator](fields, random := Random(1, device))
    upstream = correctness.upstream_of(problem, random)
    wide = {name: x.double() for name, x in problem.leaves.items()}
    truth, gradients = correctness.run(problem.reference, wide, upstream)
    sides, _ = sides_of(row, fields, problem, only)
    errors = {}
    for name, side in sides.items():
        try:
            found = correctness.run(lambda x, side=side: side.call(side.prepare(x)), problem.leaves, upstream)
            everything, true = correctness.named(*found), correctness.named(truth, gradients)
            sizes = problem.sizes()
            errors[name] = max(correctness.distance(x, true[key], sizes.get(key.removeprefix("d ")) if key.startswith("d ") else None)
                               for key, x in everything.items() if x.is_floating_point())
        except Exception as error:  # as above
            errors[name] = first_line(error)
    return errors


def detached(tensors, frozen=()):
    return {name: x.detach().clone().requires_grad_(x.is_floating_point() and name not in frozen) for name, x in tensors.items()}


def gradients_of(outputs, inputs, upstream, keep):
    wanted = [x for x in inputs.values() if x.requires_grad]
    reached = correctness.differentiable(outputs)
    return torch.autograd.grad(reached, wanted, upstream, retain_graph=keep, allow_unused=True)


def calls_of(row, side, leaves, direction, sets):
    """One call a set of buffers."""
    calls = []
    for _ in range(sets):
        inputs = detached(side.prepare(detached(leaves, row.frozen)), row.frozen)
        if direction == suite.FORWARD:
            calls.append(lambda inputs=inputs: side.call(inputs))
            continue
        outputs = side.call(inputs)
        upstream = [torch.randn_like(out) for out in correctness.differentiable(outputs)]
        if direction == suite.BACKWARD:
            calls.append(lambda outputs=outputs, inputs=inputs, upstream=upstream: gradients_of(outputs, inputs, upstream, True))
        else:
            del outputs
            calls.append(lambda inputs=inputs, upstream=upstream: gradients_of(side.call(inputs), inputs, upstream, False))
    return calls


def in_place_turn(problem):
    """mrope_ without the copy that a test makes for it."""
    operator, given = torch.ops.megatron_bridge.mrope_, problem.given

    def call(x):
        with torch.no_grad():
            return operator(x["q"].detach(), x["k"].detach(), given["cos"], given["sin"])

    return call


def steps(fields, problem):
    training = Training(fields, problem.given["parameters"])
    return lambda _: training.step(problem.given["gradients"])


# Where a timed call is not the tested one.
TIMED = {"mrope_": lambda fields, problem: in_place_turn(problem), "adamw": steps}


def fill(bench, row, fields, options):
    """Measures one bench into `bench`."""
    device = options.device
    small = suite.shrink(row.operator, fields, 64 if options.small else CHECK_TOKENS if row.operator != "linear_cross_entropy" else 128,
                         heads=(4 if row.operator == "gdn_core" else 1) if options.small else None)
    errors = errors_of(row, small, device, options.peers)
    if options.small:
        fields = small
    problem = correctness.PROBLEMS[row.operator](fields, FastRandom(1, device))
    sides, bench.missing = sides_of(row, fields, problem, options.peers)
    if row.operator in TIMED:
        sides[OURS] = Side(peers.as_given, TIMED[row.operator](fields, problem))
    num_bytes = sum(x.numel() * x.element_size() for x in (*problem.leaves.values(), *problem.given.get("parameters", ())))
    sets = 1 if options.small else timing.buffer_sets(num_bytes)
    bench.cold = sets * num_bytes >= timing.COLD_BYTES
    calls = {}
    for name, side in sides.items():
        try:
            calls[name] = calls_of(row, side, problem.leaves, bench.direction, sets)
            calls[name][0]()
        except Exception as error:  # as above
            calls.pop(name, None)
            bench.missing[name] = first_line(error)
    if bench.direction == suite.MEMORY:
        for name, made in calls.items():
            bench.sides[name] = {"median": timing.peak_bytes(made[0]), "error": errors.get(name)}
    else:
        taken = timing.interleave(calls, timing.Clock(device), options.rounds)
        bench.sides = {name: {**timing.spread(seconds), "error": errors.get(name)} for name, seconds in taken.items()}
        if OURS in taken:
            for name, seconds in taken.items():
                bench.sides[name]["ratio"] = timing.spread([a / b for a, b in zip(taken[OURS], seconds)])
        bench.amount = limits.work(row.operator, fields, bench.direction, row.frozen)
        bench.limit = limits.limit_seconds(options.ceiling, bench.amount)
    if bench.direction == suite.MEMORY and OURS in bench.sides:
        for side in bench.sides.values():
            side["ratio"] = {"median": bench.sides[OURS]["median"] / max(1, side["median"])}


def fill_alone(bench, fields, options):
    """A product of libtorch's, where no kernel of ours is."""
    fields = suite.shrink("routed_experts", fields, 64, heads=1) if options.small else fields
    call = peers.grouped_products(fields, options.device, bench.direction)
    taken = timing.interleave({"torch": [call]}, timing.Clock(options.device), options.rounds)
    bench.sides = {"torch": timing.spread(taken["torch"])}
    bench.missing[OURS] = "not there yet"
    rows = fields["tokens"] * fields["top_k"]
    weights = fields["experts"] * 2 * fields["inner"] * fields["hidden"]
    bench.amount = (2 * (weights + rows * (fields["hidden"] + 2 * fields["inner"])), 2 * rows * fields["hidden"] * 2 * fields["inner"])
    bench.limit = limits.limit_seconds(options.ceiling, bench.amount)


def run(rows, options, tell, keep):
    """All benches of `rows`; `keep(benches)` after each, so that a run that is cut off leaves what it has."""
    benches = []
    for row in rows:
        for label, fields in (row.shapes or row.fields).items():
            for direction in row.directions:
                bench = Bench(row.number, row.title, label, direction, row.operator, note=row.note)
                benches.append(bench)
                if options.only_shapes and not any(word in label for word in options.only_shapes):
                    bench.failed = "not chosen"
                elif time.monotonic() > options.until:
                    bench.failed = "the time was up"
                elif row.operator and not correctness.has(row.operator):
                    bench.failed = f"{row.operator} is not in this library"
                elif direction == suite.MEMORY and torch.device(options.device).type != "cuda":
                    bench.failed = "memory is measured on a GPU only"
                else:
                    measure(bench, row, fields, options)
                tell(line(bench))
                keep(benches)
    return benches


def measure(bench, row, fields, options):
    before = machine.sm_clock()
    try:
        if row.operator:
            fill(bench, row, fields, options)
        else:
            fill_alone(bench, fields, options)
    except Exception as error:  # out of memory, for one: the next bench may fit
        bench.failed = first_line(error)
    bench.clocks = (before, machine.sm_clock())
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def line(bench):
    """A bench in a line of the terminal."""
    what = f"row {bench.row} {bench.title}, {bench.shape}, {bench.direction}"
    if bench.failed:
        return f"{what}: {bench.failed}"
    unit = (lambda x: f"{x / 1e9:.2f} GB") if bench.direction == suite.MEMORY else (lambda x: f"{x * 1e6:.1f} us")
    parts = []
    for name, side in bench.sides.items():
        ratio = f" ({side['ratio']['median']:.2f})" if name != OURS and "ratio" in side else ""
        error = f" [{side['error']}]" if isinstance(side.get("error"), str) else ""
        parts.append(f"{name} {unit(side['median'])}{ratio}{error}")
    parts += [f"{name} missing: {why}" for name, why in bench.missing.items()]
    return f"{what}: {'; '.join(parts)}"
